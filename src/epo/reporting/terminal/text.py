"""Text of models and environments for a terminal: nothing in it moves the cursor, changes colours or hides."""

from __future__ import annotations

import re
import unicodedata

_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
"""Letters and signs that show nothing."""
_SHOWN_AS_CODE = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"))
"""Control, format, surrogate, private, unassigned; separators of lines and paragraphs; spaces other than the usual."""
_MARKS = 4
"""Combining marks left on one letter; no writing stacks more."""


def visible(text: str, *, keep: str = "") -> str:
    """`text` with everything that a terminal obeys or a reader does not see shown as a symbol.

    C0 controls become their pictures (␛), other characters their number (⟨U+202E⟩): C1 controls, bidi marks, zero-width
    characters, unusual spaces, lone surrogates, what Unicode assigns to nothing. Every result can be encoded.

    Args:
        keep: what the caller lays out itself, such as a line feed or a tab.

    Example:
        >>> visible("a\\x1b[2J\\u202eb\\n", keep="\\n")
        'a␛[2J⟨U+202E⟩b\\n'
    """
    if text.isascii() and text.isprintable():
        return text
    shown = text.translate(_TABLE if not keep else _Table({ord(character): character for character in keep}))
    return _STACK.sub(lambda found: found[1] + "".join(map(_code, found[2])), shown)


def visible_lines(text: str) -> str:
    """`visible`, with line feeds and tabs left for the layout."""
    return visible(text, keep="\n\t")


class _Table(dict[int, str]):
    """Finds out on first use what a character is shown as."""

    def __missing__(self, code: int) -> str:
        self[code] = shown = _symbol(chr(code))
        return shown


def _symbol(character: str) -> str:
    code = ord(character)
    if character == " ":
        return character
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    is_variation = 0xFE00 <= code <= 0xFE0F or 0xE0100 <= code <= 0xE01EF or 0x180B <= code <= 0x180F
    if character in _BLANK or is_variation or unicodedata.category(character) in _SHOWN_AS_CODE:
        return _code(character)
    return character


def _code(character: str) -> str:
    return f"⟨U+{ord(character):04X}⟩"


_TABLE = _Table()
# Python's `re` knows no categories; these are the blocks of combining marks, which is what piles up.
_MARK = "[\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]"
_STACK = re.compile(f"({_MARK}{{{_MARKS}}})({_MARK}+)")
