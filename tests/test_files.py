"""Files and folders are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from epo.files import new_folder, write_atomically


class Interrupted(BaseException):
    """Like KeyboardInterrupt: not an Exception."""


def failing(*args: object, **kwargs: object) -> None:
    raise Interrupted


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_writes_and_replaces(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "er" / "a.txt"
    write_atomically(file, "old 打\n")
    write_atomically(file, "new")
    assert file.read_text(encoding="utf-8") == "new"
    assert names(file.parent) == ["a.txt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("existing", [True, False])
def test_an_interrupted_write_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, existing: bool
) -> None:
    file = tmp_path / "a.txt"
    if existing:
        file.write_text("old")
    monkeypatch.setattr(*((os, "fsync", failing) if call == "fsync" else (Path, "replace", failing)))
    with pytest.raises(Interrupted):
        write_atomically(file, "new" * 1000)
    assert names(tmp_path) == (["a.txt"] if existing else [])
    assert not existing or file.read_text() == "old"


def test_text_that_cannot_be_encoded_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(file, "half is fine, then \ud800")
    assert (names(tmp_path), file.read_text()) == (["a.txt"], "old")


def test_others_may_read_as_the_umask_says(tmp_path: Path) -> None:
    plain_file, plain_folder = tmp_path / "plain", tmp_path / "plain_folder"
    plain_file.write_text("")
    plain_folder.mkdir()
    write_atomically(tmp_path / "file", "")
    with new_folder(tmp_path / "folder"):
        pass
    assert (tmp_path / "file").stat().st_mode == plain_file.stat().st_mode
    assert (tmp_path / "folder").stat().st_mode == plain_folder.stat().st_mode


def fill(draft: Path, text: str) -> None:
    (draft / "sub").mkdir()
    (draft / "sub" / "a.txt").write_text(text)


def test_a_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with new_folder(tmp_path / "deep" / "checkpoint") as draft:
            fill(draft, text)
        assert (tmp_path / "deep" / "checkpoint" / "sub" / "a.txt").read_text() == text
        assert names(tmp_path / "deep") == ["checkpoint"]


@pytest.mark.parametrize("existing", [True, False])
def test_an_interrupted_block_leaves_what_was_there(tmp_path: Path, existing: bool) -> None:
    path = tmp_path / "checkpoint"
    if existing:
        path.mkdir()
        fill(path, "old")
    with pytest.raises(Interrupted), new_folder(path) as draft:
        fill(draft, "new")
        assert path.exists() == existing
        raise Interrupted
    assert names(tmp_path) == (["checkpoint"] if existing else [])
    assert not existing or (path / "sub" / "a.txt").read_text() == "old"


def test_a_failed_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint"
    path.mkdir()
    fill(path, "old")
    rename = Path.rename
    calls = iter([rename, failing, rename])  # the old folder away, the new one in, the old one back
    monkeypatch.setattr(Path, "rename", lambda *args: next(calls)(*args))
    with pytest.raises(Interrupted), new_folder(path) as draft:
        fill(draft, "new")
    assert (names(tmp_path), (path / "sub" / "a.txt").read_text()) == (["checkpoint"], "old")


def test_a_crash_while_the_old_folder_is_deleted_leaves_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint"
    path.mkdir()
    fill(path, "old")
    monkeypatch.setattr(shutil, "rmtree", failing)
    with pytest.raises(Interrupted), new_folder(path) as draft:
        fill(draft, "new")
    assert (path / "sub" / "a.txt").read_text() == "new"
