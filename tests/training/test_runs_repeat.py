"""One seed, one run: repeated, and stopped and resumed, it is the same to the last bit."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from quiet import QuietObserver

from epo.config import Config
from epo.training.session import train_run

PPO_EPO = ("algorithm.name=ppo", "entropy.method=epo")
PPO_SEPARATE = ("algorithm.name=ppo", "algorithm.critic.trunk=separate")
GRPO_EPO_KL = (
    "algorithm.name=grpo",
    "rollout.tasks_per_step=2",
    "rollout.group_size=2",
    "algorithm.kl_coefficient=0.1",
    "entropy={method: epo, reference: per_turn, kappa_low: 0.9, kappa_high: 1.1, coefficient: 0.05}",
)
GROUPS_OF_TWO = ("rollout.tasks_per_step=2", "rollout.group_size=2")
GIGPO_SIREN = ("algorithm.name=gigpo", *GROUPS_OF_TWO, "entropy={method: siren, coefficient: 1, quantile: 0.5}")
RLOO_CLIP_COV = ("algorithm.name=rloo", *GROUPS_OF_TWO, "entropy={method: clip_cov, ratio: 0.2, lower: 0.0}")
REINFORCE_ENTROPIC = ("algorithm.name=reinforce_pp", "entropy={method: entropic, threshold: 0.1}")
VARIANTS = [
    pytest.param(PPO_EPO, id="ppo-epo-shared-critic"),
    pytest.param(PPO_SEPARATE, id="ppo-separate-critic"),
    pytest.param(GRPO_EPO_KL, id="grpo-epo-kl"),
    pytest.param(GIGPO_SIREN, id="gigpo-siren"),
    pytest.param(RLOO_CLIP_COV, id="rloo-clip-cov"),
    pytest.param(REINFORCE_ENTROPIC, id="reinforce-entropic"),
]


def is_of_the_machine(name: str) -> bool:
    return name.startswith(("time/", "memory/", "workers/")) or name == "tokens/per_second"


def metrics_of(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not is_of_the_machine(k)} for line in lines]


def files_of(folder: Path, pattern: str) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob(pattern)) if p.is_file()}


def assert_same_run(one: Path, other: Path, *, critic: bool) -> None:
    assert metrics_of(one) == metrics_of(other)
    assert [line["step"] for line in metrics_of(one)] == [1, 2, 3, 4]
    assert (one / "eval.jsonl").read_bytes() == (other / "eval.jsonl").read_bytes()
    assert [json.loads(line)["step"] for line in (one / "eval.jsonl").read_text().splitlines()] == [0, 2, 4]
    trajectories = files_of(one / "trajectories", "*.jsonl")
    assert len(trajectories) == 5 and trajectories == files_of(other / "trajectories", "*.jsonl")
    last = [folder / "checkpoints" / "step_000004" for folder in (one, other)]
    tensors = files_of(last[0], "*.safetensors")
    expected = {"optimizer.safetensors", "policy/model.safetensors"} | ({"critic.safetensors"} if critic else set())
    assert set(tensors) == expected
    assert tensors == files_of(last[1], "*.safetensors")
    states = [json.loads((folder / "state.json").read_text()) for folder in last]
    for state in states:
        state["state"].pop("wall_seconds")
    assert states[0] == states[1]


@pytest.mark.parametrize("options", VARIANTS)
def test_repeated_and_resumed_runs_equal_the_first(
    options: tuple[str, ...], minute_config: Callable[..., Config], tmp_path: Path
):
    config = minute_config(*options)
    whole, again, parts = tmp_path / "whole", tmp_path / "again", tmp_path / "parts"
    train_run(config, whole, QuietObserver(), resume=False)
    train_run(config, again, QuietObserver(), resume=False)
    critic = config.algorithm.name == "ppo"
    assert_same_run(whole, again, critic=critic)

    def stop(step: int) -> None:
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    observer = QuietObserver(stop)
    stopped = train_run(config, parts, observer, resume=False)
    assert not stopped["finished"] and stopped["steps"] == 2
    assert any("stopping" in note for note in observer.notes)
    assert [line["step"] for line in metrics_of(parts)] == [1, 2]
    resumed = train_run(config, parts, QuietObserver(), resume=True)
    assert resumed["finished"] and resumed["steps"] == 4
    assert_same_run(whole, parts, critic=critic)
    if config.entropy.method == "epo":
        state = json.loads((parts / "checkpoints" / "step_000004" / "state.json").read_text())
        assert len(state["control"]["history"]["steps"]) == 4


def test_another_seed_is_another_run(minute_config: Callable[..., Config], tmp_path: Path):
    runs = [tmp_path / "0", tmp_path / "1"]
    for seed, run in enumerate(runs):
        train_run(minute_config("steps=1", f"seed={seed}"), run, QuietObserver(), resume=False)
    assert metrics_of(runs[0]) != metrics_of(runs[1])


def test_the_number_of_workers_does_not_change_what_is_learnt(minute_config: Callable[..., Config], tmp_path: Path):
    """Which episodes share a forward pass does, but only by rounding."""
    found = []
    for workers in (1, 3):
        run = tmp_path / str(workers)
        train_run(minute_config("steps=1", f"environment.workers={workers}"), run, QuietObserver(), resume=False)
        (trajectories,) = files_of(run / "trajectories", "step_*.jsonl").values()
        found.append([json.loads(line) for line in trajectories.decode().splitlines()])
    for one, other in zip(*found, strict=True):
        assert [turn["response_ids"] for turn in one["turns"]] == [turn["response_ids"] for turn in other["turns"]]


def test_a_run_goes_on_with_another_number_of_workers(minute_config: Callable[..., Config], tmp_path: Path):
    """Promised: the same tasks, every step once. The bits are those of the machine's batches."""
    runs = {workers: tmp_path / str(workers) for workers in (2, 3)}

    def stop(step: int) -> None:
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    for workers, run in runs.items():
        train_run(minute_config("logging.to=[]"), run, QuietObserver(stop), resume=False)
        config = minute_config("logging.to=[]", f"environment.workers={workers}")
        resumed = train_run(config, run, QuietObserver(), resume=True)
        assert resumed["finished"]
        assert [line["step"] for line in metrics_of(run)] == [1, 2, 3, 4]
        assert [json.loads(line)["step"] for line in (run / "eval.jsonl").read_text().splitlines()] == [0, 2, 4]
        index = [json.loads(line) for line in (run / "trajectories" / "index.jsonl").read_text().splitlines()]
        assert [line["step"] for line in index] == [1, 2, 3, 4]
        found = [line["columns"]["task"] for line in index]
        assert found == [line["columns"]["task"] for line in json_lines(runs[2] / "trajectories" / "index.jsonl")]
        # To rounding, what they learn from is the same too.
        for name in ("entropy/mean", "policy/grad_norm", "advantage/std"):
            values, same = ([line[name] for line in metrics_of(path)] for path in (run, runs[2]))
            assert values == pytest.approx(same, rel=1e-3, abs=1e-6)


def test_the_best_checkpoint_outlives_the_newest(
    minute_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Panels of made-up success: 0.25 before RL, 0.75 after step 1, no more after that."""
    from epo.training import trainer

    rates = iter([0.25, 0.75, 0.5, 0.75])
    play = trainer.evaluate

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        return dataclasses.replace(play(*args, **kwargs), success=next(rates), low=0.0, high=1.0)

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    config = minute_config("steps=3", "evaluation.every=1", "checkpoint.every=4", "checkpoint.keep=1", "logging.to=[]")
    run = tmp_path / "run"
    summary = train_run(config, run, QuietObserver(), resume=False)
    assert sorted(int(p.name[5:]) for p in (run / "checkpoints").iterdir()) == [1, 3]
    kept = str(run / "checkpoints" / "step_000001")
    assert summary["best"] == {"step": 1, "success": 0.75, "checkpoint": kept}
    assert json.loads((run / "summary.json").read_text())["best"] == summary["best"]


def json_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_run_that_has_no_checkpoint_yet_is_resumed_from_its_start(
    minute_config: Callable[..., Config], tmp_path: Path
):
    """As after a kill during the first steps: nothing is lost, nothing is there twice."""
    config = minute_config("steps=2", "checkpoint.best=false")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_run(config, whole, QuietObserver(), resume=False)

    class Killed(BaseException): ...

    def die(step: int) -> None:
        raise Killed

    with pytest.raises(Killed):
        train_run(config, killed, QuietObserver(die), resume=False)
    assert [line["step"] for line in metrics_of(killed)] == [1]
    assert not (killed / "checkpoints").exists()
    # What a process leaves that is killed while it writes: a line cut short, a checkpoint without its name.
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rew')
    (killed / "checkpoints" / ".step_000001.0123456789abcdef" / "policy").mkdir(parents=True)
    train_run(config, killed, QuietObserver(), resume=True)
    assert metrics_of(killed) == metrics_of(whole)
    assert (killed / "eval.jsonl").read_bytes() == (whole / "eval.jsonl").read_bytes()
    assert [p.name for p in (killed / "checkpoints").iterdir()] == ["step_000002"]


def test_a_stop_during_the_first_evaluation_leaves_a_checkpoint(minute_config: Callable[..., Config], tmp_path: Path):
    config = minute_config("steps=1")

    class Impatient(QuietObserver):
        def begin(self, what: str, total: int) -> None:
            if what.startswith("evaluate"):
                signal.raise_signal(signal.SIGINT)

    stopped = train_run(config, tmp_path / "run", Impatient(), resume=False)
    assert not stopped["finished"] and stopped["steps"] == 0
    assert (tmp_path / "run" / "checkpoints" / "step_000000" / "state.json").is_file()
    resumed = train_run(config, tmp_path / "run", QuietObserver(), resume=True)
    assert resumed["finished"]
    assert [json.loads(x)["step"] for x in (tmp_path / "run" / "eval.jsonl").read_text().splitlines()] == [0, 1]


def test_the_second_signal_ends_at_once(minute_config: Callable[..., Config], tmp_path: Path):
    def stop_twice(step: int) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train_run(minute_config(), tmp_path / "run", QuietObserver(stop_twice), resume=False)
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1]
    assert signal.getsignal(signal.SIGINT) is before


def test_only_the_newest_checkpoints_are_kept(minute_config: Callable[..., Config], tmp_path: Path):
    config = minute_config("checkpoint.every=1", "checkpoint.keep=2", "checkpoint.best=false", "evaluation.every=0")
    train_run(config, tmp_path / "run", QuietObserver(), resume=False)
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step_000003", "step_000004"]
    assert [json.loads(x)["step"] for x in (tmp_path / "run" / "eval.jsonl").read_text().splitlines()] == [0, 4]
