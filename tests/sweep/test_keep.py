"""What of a finished sweep is kept beside the documentation, and what is refused."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
KEEP, HELD_OUT = (ROOT / "benchmarks" / f"{name}.py" for name in ("keep", "held_out"))
PROVENANCE = {
    "run": "0123456789abcdef",
    "packages": {"torch": "2.13.0"},
    "python": "3.11.7",
    "commit": "c0ffee",
    "suite": {"name": "corridor"},
    "machine": {"system": "Linux-6", "cores": 2, "torch_threads": 1},
    "command": ["epo", "train", "/home/somebody/arms/a.yaml"],
}


def made_up_run(folder: Path, *, finished: bool = True, provenance: dict[str, Any] = PROVENANCE) -> Path:
    (folder / "checkpoints" / "step_000001").mkdir(parents=True)
    (folder / "config.yaml").write_text("name: made-up\n")
    (folder / "provenance.json").write_text(json.dumps(provenance))
    for name in ("eval.jsonl", "metrics.jsonl"):
        (folder / name).write_text('{"step": 1}\n')
    if finished:
        (folder / "summary.json").write_text('{"finished": true}')
    return folder


def keep(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> object:
    """The exit code, or the message in its place."""
    monkeypatch.setattr(sys, "argv", ["keep.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(KEEP), run_name="__main__")
    return ended.value.code


def test_finished_runs_are_kept_with_where_they_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, kept = tmp_path / "sweeps" / "made-up", tmp_path / "kept"
    for name in ("a--seed0", "b--seed0"):
        made_up_run(sweep / name)
    assert keep(monkeypatch, sweep, "--to", kept) == 0
    for name in ("a--seed0", "b--seed0"):
        files = {path.name for path in (kept / "made-up" / name).iterdir()}
        assert files == {"config.yaml", "eval.jsonl", "metrics.jsonl", "summary.json", "provenance.json"}
        text = (kept / "made-up" / name / "provenance.json").read_text()
        wanted = ("commit", "packages", "python", "suite", "machine")
        assert json.loads(text) == {key: PROVENANCE[key] for key in wanted}
        assert "somebody" not in text
    made_up_run(sweep / "a--seed1")
    assert keep(monkeypatch, sweep, "--to", kept) == 0  # those that are there are no error
    assert (kept / "made-up" / "a--seed1").is_dir()


def test_unfinished_runs_are_refused_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep, kept = tmp_path / "made-up", tmp_path / "kept"
    made_up_run(sweep / "whole")
    made_up_run(sweep / "at-work", finished=False)
    (made_up_run(sweep / "halted") / "summary.json").write_text('{"finished": false, "halted": {"step": 3}}')
    (made_up_run(sweep / "of-unknown-code") / "provenance.json").unlink()
    assert keep(monkeypatch, sweep, "--to", kept) == 1
    assert [path.name for path in (kept / "made-up").iterdir()] == ["whole"]
    said = capsys.readouterr().err
    assert "at-work: refused, not finished" in said and "halted: refused, not finished" in said
    assert "of-unknown-code: refused, without provenance.json" in said


def test_another_run_is_not_overwritten_and_a_path_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, kept = tmp_path / "made-up", tmp_path / "kept"
    run = made_up_run(sweep / "a")
    assert keep(monkeypatch, sweep, "--to", kept) == 0
    (run / "metrics.jsonl").write_text('{"step": 2}\n')
    assert "another run (metrics.jsonl differs)" in str(keep(monkeypatch, sweep, "--to", kept))
    assert (kept / "made-up" / "a" / "metrics.jsonl").read_text() == '{"step": 1}\n'
    data = PROVENANCE | {"suite": {"name": "mine", "data": ["/home/somebody/games"]}}
    made_up_run(tmp_path / "other" / "a", provenance=data)
    assert "/home/somebody/games" in str(keep(monkeypatch, tmp_path / "other", "--to", kept))
    assert not (kept / "other").exists()
    assert "there is no run" in str(keep(monkeypatch, tmp_path / "nothing", "--to", kept))


def test_an_entry_of_held_out_types_is_as_the_kept_ones() -> None:
    program = runpy.run_path(str(HELD_OUT))
    kept = json.loads((ROOT / "benchmarks" / "results" / "held_out_types.json").read_text())[0]
    panel = {"split": "held_out"} | {key: value for key, value in kept.items() if key not in ("sweep", "run")}
    run = Path("sweeps") / kept["sweep"] / kept["run"]
    assert program["entry"](run, json.dumps({"held_out": panel})) == kept
    assert set(kept["by_goal"]) == set(program["TYPES"])


def test_the_command_of_held_out_types_is_the_one_of_the_page() -> None:
    program = runpy.run_path(str(HELD_OUT))
    page = (ROOT / "docs" / "findings.md").read_text().replace("\\\n", " ")
    command = program["command"](Path("RUN"), episodes=48, workers=4)
    assert " ".join(["epo", *command[:-1]]) in " ".join(page.split())
