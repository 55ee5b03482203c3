"""Files and folders that are either whole or not there, and where prepared ones are kept."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from epo.errors import StorageError

_FULL = {errno.ENOSPC: "no space is left", errno.EDQUOT: "the quota is used up", errno.EFBIG: "a file grew too large"}
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_DRAFT = re.compile(r"\..+\.[0-9a-f]{16}")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content`; a reader, or a crash in between, sees the old file or the new one, never a part.

    Raises:
        StorageError: the disk is full.
    """
    with explaining_full_disk(path.parent):
        draft = _draft(path)
        try:
            with draft.open("xb") as file:
                file.write(content if isinstance(content, bytes) else content.encode())
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def append_whole(path: Path, text: str) -> None:
    """Append `text`; when that fails the file is as it was. A crash in between may leave a part of the last line.

    Raises:
        StorageError: the disk is full.
    """
    data = memoryview(text.encode())
    with explaining_full_disk(path.parent), path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        except BaseException:
            with suppress(OSError):
                file.truncate(size)
            raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name only when the block ends without an error. Replaces an older one.

    Raises:
        StorageError: the disk is full.
    """
    with explaining_full_disk(path.parent):
        draft = _draft(path)
        draft.mkdir()
        try:
            yield draft
            for item in (*draft.rglob("*"), draft):
                if item.is_dir():
                    _sync_folder(item)
                else:
                    with item.open("rb") as handle:
                        os.fsync(handle.fileno())
            # The older folder is moved away first: deleted in place, a crash would leave a part of it under its name.
            old = _draft(path)
            if path.exists():
                path.rename(old)
            try:
                draft.rename(path)
            except BaseException:
                if old.exists():
                    old.rename(path)
                raise
            _sync_folder(path.parent)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise


def remove_folder(path: Path) -> None:
    """Delete a folder; a crash in between leaves no part of it under its name."""
    doomed = _draft(path)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_drafts(folder: Path) -> None:
    """Delete what processes that were killed while they wrote left in `folder`; nobody may be writing there."""
    for draft in folder.iterdir() if folder.is_dir() else ():
        if _DRAFT.fullmatch(draft.name):
            if draft.is_dir() and not draft.is_symlink():
                shutil.rmtree(draft, ignore_errors=True)
            else:
                draft.unlink(missing_ok=True)


@contextmanager
def explaining_full_disk(folder: Path) -> Iterator[None]:
    """Turns what libraries make of a full disk into one `StorageError` that names `folder`."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:  # tokenizers raises bare Exception, safetensors its own
        if (number := _os_error(error)) not in _FULL:
            raise
        raise StorageError(
            number, f"{_FULL[number]} in {str(folder)!r} ({os.strerror(number)}): make room on its disk"
        ) from error


def _os_error(error: Exception) -> int | None:
    """The operating system's error number behind an exception; in the text where a Rust library raised it."""
    if isinstance(error, OSError):
        return error.errno
    found = _OS_ERROR.search(str(error))
    return int(found[1]) if found else None


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """One process at a time makes `path`; another waits until it is there. The system frees the lock of a dead one."""
    with explaining_full_disk(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.with_name(f".{path.name}.lock").open("a")
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)  # a process forked in the block has the handle too


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    """Names, too, are on the disk only when their folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # of file systems that cannot
            raise
    finally:
        os.close(handle)


def _draft(path: Path) -> Path:
    """A free hidden name beside `path`. Not from `tempfile`, whose files nobody else may read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


def cache_dir() -> Path:
    """Where prepared things live between runs: `$EPO_CACHE`, else `~/.cache/epo`."""
    root = os.environ.get("EPO_CACHE")
    return Path(root) if root else Path.home() / ".cache" / "epo"
