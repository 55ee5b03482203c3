"""The checksums of a folder, in the format of `sha256sum`: `sha256sum --check SHA256SUMS` verifies it by hand."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from epo.files import sha256_of, write_atomically

SUMS_FILE = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def write_checksums(folder: Path) -> None:
    """Leave the checksum of every file of `folder` in its `SHA256SUMS`."""
    lines = [f"{sha256_of(folder / name)}  {name}\n" for name in _files(folder)]
    write_atomically(folder / SUMS_FILE, "".join(lines))


def find_damage(folder: Path) -> str | None:
    """What is wrong with a folder that `write_checksums` left, as `file: how`; None if it is whole.

    Hidden files, which file managers and network file systems leave, do not count.
    """
    try:
        text = (folder / SUMS_FILE).read_bytes().decode()
    except (OSError, ValueError) as error:
        return f"{SUMS_FILE}: {getattr(error, 'strerror', None) or 'not text'}"
    *lines, rest = text.split("\n")
    if rest:
        return f"{SUMS_FILE}: cut short"
    expected: dict[str, str] = {}
    for line in lines:
        if (parts := _LINE.fullmatch(line)) is None:
            return f"{SUMS_FILE}: a line is damaged"
        expected[parts[2]] = parts[1]
    found = set(_files(folder))
    if missing := sorted(expected.keys() - found):
        return f"{missing[0]}: missing"
    if unknown := sorted(found - expected.keys()):
        return f"{unknown[0]}: not in {SUMS_FILE}"
    return first_difference(folder, expected.items())


def first_difference(folder: Path, expected: Iterable[tuple[str, str]]) -> str | None:
    """The first of `expected` (names, SHA-256) that is not so in `folder`."""
    for name, digest in expected:
        try:
            same = sha256_of(folder / name) == digest
        except OSError as error:
            return f"{name}: {error.strerror}"
        if not same:
            return f"{name}: its content is not what was written"
    return None


def _files(folder: Path) -> list[str]:
    """Paths below `folder`, without hidden ones and the checksums themselves."""
    names = (p.relative_to(folder) for p in folder.rglob("*") if not p.is_dir())
    return sorted(
        name.as_posix()
        for name in names
        if name.as_posix() != SUMS_FILE and not any(part.startswith(".") for part in name.parts)
    )
