"""Files that are either whole or not there, and where prepared ones are kept."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Write `text`; a reader, or a crash in between, sees the old file or the new one, never a part."""
    draft = _draft(path)
    try:
        with draft.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name only when the block ends without an error. Replaces an older one."""
    draft = _draft(path)
    draft.mkdir()
    try:
        yield draft
        for file in draft.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
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
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """One process at a time makes `path`; another waits until it is there. The system frees the lock of a dead one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)  # a process forked in the block has the handle too


def _draft(path: Path) -> Path:
    """A free hidden name beside `path`. Not from `tempfile`, whose files nobody else may read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


def cache_dir() -> Path:
    """Where prepared things live between runs: `$EPO_CACHE`, else `~/.cache/epo`."""
    root = os.environ.get("EPO_CACHE")
    return Path(root) if root else Path.home() / ".cache" / "epo"
