"""What `epo env new` writes works as written: its tests, epo's check, and a training run, from an installed copy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from epo.authoring.scaffold import write_package
from epo.errors import UserError

SOURCE = Path(__file__).parents[2] / "src"


def test_the_package_passes_its_tests_and_the_check_and_is_trained_on(tmp_path: Path) -> None:
    package = write_package("dig_here", tmp_path / "digging")
    installed = tmp_path / "installed"
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(installed), str(SOURCE)]),
        "OMP_NUM_THREADS": "1",
        "EPO_CACHE": str(tmp_path / "cache"),
    }

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *arguments], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    # As the package's README says, but into a folder of the test's own.
    options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--target", str(installed)]
    run("pip", "install", *options, str(package))
    run("pytest", "-q", "-p", "no:cacheprovider", str(package))
    checked = json.loads(run("epo", "env", "check", "dig_here", "--resets", "20", "--json"))
    assert {entry["verdict"] for entry in checked} == {"ok"}
    overrides = ["steps=2", "imitation.batches=4", "rollout.tasks_per_step=4", "evaluation.episodes=4"]
    small = ["model.threads=1", "environment.options.places=4", "evaluation.every=0"]
    summary = json.loads(run("epo", "train", str(package / "recipe.yaml"), *overrides, *small, "--json"))
    assert (summary["finished"], summary["steps"], set(summary["eval"])) == (True, 2, {"iid", "ood"})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Maze", "lower-case"),
        ("my-maze", "lower-case"),
        ("../maze", "lower-case"),
        ("1maze", "lower-case"),
        ("", "lower-case"),
        ("class", "keyword"),
        ("maze\n", "lower-case"),
        ("m" * 41, "up to 40"),
        ("corridor", "a suite is called so"),
        ("random", "a Python package is called so"),
        ("torch", "a Python package is called so"),
    ],
)
def test_a_bad_name_is_refused_and_nothing_is_written(
    name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words) as refusal:
        write_package(name)
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_what_exists_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "empty", "dangling"):
        with pytest.raises(UserError, match="exists already"):
            write_package("maze", tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "empty", "file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_cannot_hold_it_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write"):
        write_package("maze", tmp_path / "missing" / "maze")
    assert not list(tmp_path.iterdir())


def test_a_failure_midway_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    write_text = Path.write_text

    def full(self: Path, *arguments: str, **options: str) -> int:
        written.append(self)
        if len(written) == 4:
            raise OSError(28, "No space left on device")
        return write_text(self, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_package("maze", tmp_path / "maze")
    assert len(written) == 4
    assert not list(tmp_path.iterdir())
