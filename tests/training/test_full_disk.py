"""A full disk ends a run with one line and exit code 1; nothing is half-written, and --resume goes on once there is
room."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from quiet import QuietObserver
from test_runs_repeat import files_of, metrics_of

from epo import cli
from epo.config import Config
from epo.errors import StorageError
from epo.files import append_whole, new_folder, write_atomically
from epo.training.checkpoint import checkpoints, read_state
from epo.training.run_folder import read_lines
from epo.training.session import train_run

STEPS = ("steps=3", "checkpoint.every=1", "evaluation.every=1", "logging.to=[]", "model.threads=1")
Fill = Callable[[str, int, int], None]


@pytest.fixture
def fill(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fill]:
    """`fill("metrics.jsonl", 2, errno.ENOSPC)`: from the second time on, a file of that name cannot be brought to disk.

    It fails after the bytes were written, so that half-written files would be seen.
    """
    sync = os.fsync

    def choose(name: str, time: int, number: int) -> None:
        seen = 0

        def fsync(handle: int) -> None:
            nonlocal seen
            if name in os.readlink(f"/proc/self/fd/{handle}"):
                seen += 1
                if seen >= time:
                    raise OSError(number, os.strerror(number))
            sync(handle)

        monkeypatch.setattr(os, "fsync", fsync)

    yield choose


@pytest.fixture(scope="module")
def whole(
    minute_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory, cache: Path
) -> Iterator[Path]:
    """The run that always had room."""
    path = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EPO_CACHE", str(cache))
        train_run(minute_config(*STEPS), path, QuietObserver(), resume=False)
    yield path


def assert_equal(one: Path, other: Path) -> None:
    assert metrics_of(one) == metrics_of(other)
    assert files_of(one, "*.safetensors") == files_of(other, "*.safetensors")
    assert files_of(one / "trajectories", "*") == files_of(other / "trajectories", "*")
    assert (one / "eval.jsonl").read_bytes() == (other / "eval.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("name", "time", "number", "goes_on_after"),
    [
        ("model.safetensors", 3, errno.ENOSPC, 1),
        ("metrics.jsonl", 2, errno.EDQUOT, 1),
        ("eval.jsonl", 3, errno.ENOSPC, 1),
        ("step_000003.jsonl", 1, errno.EDQUOT, 2),
        ("summary.json", 1, errno.ENOSPC, 3),
    ],
)
def test_wherever_the_disk_is_full_the_run_goes_on_as_if_it_never_had_been(
    name: str,
    time: int,
    number: int,
    goes_on_after: int,
    fill: Fill,
    whole: Path,
    minute_config: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    run = tmp_path / "run"
    fill(name, time, number)
    with pytest.raises(StorageError) as full:
        train_run(minute_config(*STEPS), run, QuietObserver(), resume=False)
    message = str(full.value)
    assert "\n" not in message and str(run) in message and os.strerror(number) in message and "make room" in message
    assert f"go on after step {goes_on_after} with --resume" in message
    saved = checkpoints(run / "checkpoints")
    assert read_state(saved[-1])["step"] == goes_on_after
    left = [p for p in run.rglob("*") if p.name.startswith(".") and p.name != ".lock"]
    assert left == []
    for file in run.rglob("*.jsonl"):
        assert file.read_text() == "" or file.read_text().endswith("\n")
    monkeypatch.undo()
    monkeypatch.setenv("EPO_CACHE", str(whole.parent / "unused"))  # the warm start is behind it
    assert train_run(minute_config(*STEPS), run, QuietObserver(), resume=True)["finished"]
    assert_equal(whole, run)


@pytest.mark.parametrize("name", ["config.yaml", "vocabulary.json"])
def test_a_run_that_found_no_room_at_all_leaves_nothing(
    name: str, fill: Fill, minute_config: Callable[..., Config], tmp_path: Path
):
    fill(name, 1, errno.ENOSPC)
    with pytest.raises(StorageError, match="no space is left in"):
        train_run(minute_config(*STEPS), tmp_path / "runs" / "run", QuietObserver(), resume=False)
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_warm_start_without_room_names_the_cache_and_is_made_again(
    fill: Fill, minute_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("EPO_CACHE", str(tmp_path / "cache"))
    fill("model.safetensors", 1, errno.ENOSPC)
    config = minute_config("steps=0", "logging.to=[]")
    with pytest.raises(StorageError) as full:
        train_run(config, tmp_path / "run", QuietObserver(), resume=False)
    assert str(tmp_path / "cache") in str(full.value) and "run the same command again" in str(full.value)
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    monkeypatch.setenv("EPO_CACHE", str(tmp_path / "cache"))
    assert train_run(config, tmp_path / "run", QuietObserver(), resume=False)["finished"]


def mounted(folder: Path, *, kib: int) -> bool:
    """A disk of its own for a folder; False where this user may not mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


def test_a_small_disk_for_real(
    whole: Path,
    minute_config: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """The command on a file system that is full within the third checkpoint. Who may not mount one gets a limit on the
    size of files instead, which the libraries that write checkpoints meet in the same way."""
    disk, recipe = tmp_path / "disk", tmp_path / "recipe.yaml"
    recipe.write_text(minute_config(*STEPS).to_yaml())
    is_mounted = mounted(disk, kib=1000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def command(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(
            sys, "argv", ["epo", "train", str(recipe), "--runs", str(disk), "--name", "run", *arguments]
        )
        with pytest.raises(SystemExit) as ended:
            cli.main()
            sys.exit(0)
        return int(ended.value.code or 0), capsys.readouterr().err

    try:
        if not is_mounted:
            # Room for the checkpoint of step 0, whose optimiser is empty, and not for one with moments.
            resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, hard))
        code, err = command()
        assert code == 1, err
        assert "Traceback" not in err
        last = err.strip().splitlines()[-1]
        assert last.startswith("error: ") and str(disk) in last and "make room" in last and "--resume" in last
        saved = checkpoints(disk / "run" / "checkpoints")
        assert saved and all(read_state(path) for path in saved)
        assert not [p for p in disk.rglob(".*") if p.name != ".lock"]
        # Still full: the same answer, and nothing is lost by it.
        code, err = command("--resume")
        assert code == 1 and checkpoints(disk / "run" / "checkpoints") == saved
        if is_mounted:
            subprocess.run(["mount", "-o", "remount,size=60m", str(disk)], check=True)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        code, err = command("--resume")
        assert code == 0, err
        assert_equal(whole, disk / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        if is_mounted:
            # Lazily: tensors mapped from its files live until the next garbage collection.
            subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_what_could_be_written_of_a_line_is_taken_back(tmp_path: Path):
    """With a real limit, at which the system writes a part of the line first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    file = tmp_path / "lines.jsonl"
    append_whole(file, '{"step": 1}\n')
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        for act in (
            lambda: append_whole(file, '{"step": 2, "x": "' + "y" * 200 + '"}\n'),
            lambda: write_atomically(tmp_path / "other", "z" * 200),
            lambda: write_atomically(file, "z" * 200),
        ):
            with pytest.raises(StorageError, match="a file grew too large in") as full:
                act()
            assert full.value.errno == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_text() == '{"step": 1}\n' and [p.name for p in tmp_path.iterdir()] == ["lines.jsonl"]


def test_lines_cut_short_by_a_full_disk_are_left_out(tmp_path: Path):
    file = tmp_path / "lines.jsonl"
    file.write_bytes(b'{"step": 1}\n{"step": 2, "x": \xff}\n[3]\n{"step": 4}\n{"ste')
    assert read_lines(file) == [{"step": 1}, {"step": 4}]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        Exception("No space left on device (os error 28)"),  # as tokenizers has it
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),  # and safetensors
    ],
)
def test_what_libraries_make_of_a_full_disk_is_one_error(error: Exception, tmp_path: Path):
    with pytest.raises(StorageError, match="no space is left in"), new_folder(tmp_path / "new"):
        raise error
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="something else"), new_folder(tmp_path / "new"):
        raise ValueError("something else")
