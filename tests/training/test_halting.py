"""A run that its alarms stop: what it leaves, what it says, how it goes on; and that looking changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from quiet import QuietObserver
from test_runs_repeat import files_of, metrics_of
from typer.testing import CliRunner

from epo.config import Config
from epo.reporting.health import rules as alarm_rules
from epo.reporting.health.rules import Reading, Series, above
from epo.training.session import train_run

EVERY_STEP = ("steps=5", "checkpoint.every=1", "evaluation.every=0", "evaluation.episodes=1", "checkpoint.best=false")


def long_from(first: int) -> Callable[[Series, object], Reading]:
    """A rule that fires from step `first` on."""
    return lambda series, config: above("response/tokens", float(len(series.all("reward/mean"))), first - 0.5)


def checkpoints_of(run: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in (run / "checkpoints").iterdir())


def test_a_halted_run_keeps_its_last_good_checkpoint_and_goes_on_when_told(
    minute_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(alarm_rules, "length", long_from(4))
    run, whole = tmp_path / "run", tmp_path / "whole"
    observer = QuietObserver()
    summary = train_run(minute_config(*EVERY_STEP, "health.halt=[length]"), run, observer, resume=False)
    # Step 4 was played with the weights of checkpoint 3, so checkpoint 2 is the newest that nothing speaks against.
    assert summary["halted"] == {
        "step": 4,
        "alarms": ["length"],
        "last_good": str(run / "checkpoints" / "step_000002"),
    }
    assert not summary["finished"] and json.loads((run / "summary.json").read_text())["halted"] == summary["halted"]
    assert checkpoints_of(run) == [2, 3]
    assert [line["health/length"] for line in metrics_of(run)] == [0.0, 0.0, 0.0, 1.0]
    assert (run / "trajectories" / "step_000004.jsonl").is_file()
    said = "\n".join(observer.notes)
    for words in (
        "alarm at step 4: Surge of response length: response/tokens 4 is above 3.5. Try: ",
        "halted at step 4",
        f"model.path={run}/checkpoints/step_000002/policy imitation.demonstrations=0",
        "--resume health.halt=[]",
    ):
        assert words in said
    # The weights before the bad step are a model to start from.
    start = minute_config("steps=1", f"model.path={run}/checkpoints/step_000002/policy", "imitation.demonstrations=0")
    assert train_run(start, tmp_path / "branch", QuietObserver(), resume=False)["finished"]
    # Resumed without the halt, it is the run that nothing ever stopped.
    observer = QuietObserver()
    summary = train_run(minute_config(*EVERY_STEP), run, observer, resume=True)
    assert summary["finished"] and summary["halted"] is None
    assert sum("alarm at step" in note for note in observer.notes) == 1
    train_run(minute_config(*EVERY_STEP), whole, QuietObserver(), resume=False)
    assert metrics_of(run) == metrics_of(whole)
    assert checkpoints_of(run) == checkpoints_of(whole) == [2, 4, 5]  # kept: the newest two, and the last good one
    assert files_of(run / "checkpoints" / "step_000005", "*.safetensors") == files_of(
        whole / "checkpoints" / "step_000005", "*.safetensors"
    )


def test_an_alarm_that_is_on_halts_a_resumed_run_again(
    minute_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(alarm_rules, "length", long_from(2))
    config = minute_config(*EVERY_STEP, "health.halt=[length]")
    for resume in (False, True):
        summary = train_run(config, tmp_path / "run", QuietObserver(), resume=resume)
        assert summary["halted"] == {"step": 2, "alarms": ["length"], "last_good": None}
        assert checkpoints_of(tmp_path / "run") == [1]


def test_the_command_fails_and_says_why(
    minute_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from epo.cli import app

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(minute_config(*EVERY_STEP, "health.halt=[sampler_mismatch]").to_yaml())
    command = ["train", str(recipe), "--runs", str(tmp_path), "--name", "run", "health.sampler_mismatch=1e-30"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1, result.output
    assert "halted" in result.output
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["halted"]["alarms"] == ["sampler_mismatch"]


def test_looking_changes_nothing(minute_config: Callable[..., Config], tmp_path: Path):
    """With and without the mutual information, and whatever the thresholds: same tokens, same weights."""
    overrides = (("health.prompts=4",), ("health.prompts=0", "health.warmup=3", "health.length=1.01"))
    runs = [tmp_path / "on", tmp_path / "off"]
    for run, override in zip(runs, overrides, strict=True):
        assert train_run(minute_config("steps=2", *override), run, QuietObserver(), resume=False)["finished"]
    on, off = (
        [{k: v for k, v in line.items() if not k.startswith(("input/", "health/"))} for line in metrics_of(run)]
        for run in runs
    )
    assert on == off
    assert {k for k in metrics_of(runs[0])[0] if k.startswith("input/")} == {
        *("input/mutual_information", "input/mutual_information_per_token"),
        *("input/retrieval_accuracy", "input/retrieval_chance"),
    }
    assert files_of(runs[0] / "trajectories", "*.jsonl") == files_of(runs[1] / "trajectories", "*.jsonl")
    last = [files_of(run / "checkpoints" / "step_000002", "*.safetensors") for run in runs]
    assert last[0] == last[1] and last[0]
    # Both may change when a run goes on.
    assert train_run(minute_config("steps=2", *overrides[1]), runs[0], QuietObserver(), resume=True)["finished"]
