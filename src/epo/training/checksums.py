"""The checksums of a folder, in the format of `sha256sum`: `sha256sum --check SHA256SUMS` verifies it by hand."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from epo.files import sha256_of, write_atomically
from epo.reporting.terminal.text import visible

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
    if (odd := find_irregular(folder)) is not None:
        return odd
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
        return f"{_shown(missing[0])}: missing"
    if unknown := sorted(found - expected.keys()):
        return f"{_shown(unknown[0])}: not in {SUMS_FILE}"
    return first_difference(folder, expected.items())


def find_irregular(folder: Path) -> str | None:
    """The first entry below `folder` that is neither a regular file nor a folder, as `file: how`.

    To read a pipe or a device may never end, and a link may lead to one.
    """
    for name in _entries(folder):
        if not _is_folder(folder / name) and (why := _why_not_read(folder, name)) is not None:
            return f"{_shown(name)}: {why}"
    return None


def first_difference(folder: Path, expected: Iterable[tuple[str, str]]) -> str | None:
    """The first of `expected` (names, SHA-256) that is not so in `folder`. Nothing but its regular files is opened."""
    for name, digest in expected:
        try:
            why = _why_not_read(folder, name)
            if why is None and sha256_of(folder / name) != digest:
                why = "its content is not what was written"
        except OSError as error:
            why = error.strerror
        if why is not None:
            return f"{_shown(name)}: {why}"
    return None


def _why_not_read(folder: Path, name: str) -> str | None:
    path = PurePosixPath(name)
    if path.is_absolute() or any(part.startswith(".") for part in path.parts):
        return "no name of a file of this folder"
    try:
        mode = os.lstat(folder / name).st_mode
    except OSError as error:
        return error.strerror
    except ValueError:  # a NUL, or half of a surrogate pair
        return "no name of a file"
    return None if stat.S_ISREG(mode) else "no regular file"


def _files(folder: Path) -> list[str]:
    """Paths below `folder` that are no folders, without the checksums themselves."""
    return [name for name in _entries(folder) if name != SUMS_FILE and not _is_folder(folder / name)]


def _entries(folder: Path) -> list[str]:
    """Paths below `folder`, without hidden ones."""
    names = (path.relative_to(folder) for path in folder.rglob("*"))
    return sorted(name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts))


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path) and not os.path.islink(path)  # unlike Path's, never raises


def _shown(name: str) -> str:
    return visible(name)[:200]
