"""Nothing that a terminal obeys or a reader does not see survives, and everything readable does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from payloads import LONG, PAYLOADS, is_active, printable

from epo.reporting.terminal.text import visible, visible_lines


@pytest.mark.parametrize("name", PAYLOADS)
def test_payloads_become_text(name: str):
    shown = visible(PAYLOADS[name])
    assert not any(map(is_active, shown))
    shown.encode()  # lone surrogates are gone
    rest = iter(shown)
    assert all(character in rest for character in printable(PAYLOADS[name]))  # all of it, in order


@given(st.text(st.characters()) | st.text(st.characters(categories=["Cc", "Cf", "Cs", "Zl", "Zp", "Mn"])))
def test_any_text_becomes_harmless_and_stays_so(text: str):
    shown = visible(text)
    assert not any(map(is_active, shown))
    assert visible(shown) == shown
    assert not any(map(is_active, visible_lines(text).replace("\n", "").replace("\t", "")))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain text, [with] <signs>", "plain text, [with] <signs>"),
        ("Grüße, 你好, שלום", "Grüße, 你好, שלום"),
        ("a\x1b[2Jb", "a␛[2Jb"),
        ("a\x00\x7f\r\n", "a␀␡␍␊"),
        ("a\x9b31m", "a⟨U+009B⟩31m"),
        ("a\u202eb", "a⟨U+202E⟩b"),
        ("pass\u200bword", "pass⟨U+200B⟩word"),
        ("a\ud800b", "a⟨U+D800⟩b"),
        ("a\u00a0b\u3164c", "a⟨U+00A0⟩b⟨U+3164⟩c"),
        ("e\u0301", "e\u0301"),
        ("z" + "\u0336" * 5, "z" + "\u0336" * 4 + "⟨U+0336⟩"),
        ("\U000e0068", "⟨U+E0068⟩"),
    ],
)
def test_what_is_shown(text: str, expected: str):
    assert visible(text) == expected


def test_what_the_caller_lays_out_stays():
    assert visible("a\n\tb\r", keep="\n") == "a\n␉b␍"
    assert visible_lines("a\n\tb\r") == "a\n\tb␍"


@pytest.mark.parametrize("name", LONG)
def test_long_text_is_quick(name: str):
    shown = visible(LONG[name])
    assert len(shown) >= len(LONG[name]) and "\x1b" not in shown
