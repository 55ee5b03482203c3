"""Whole runs in the corridor: what is learnt, what survives the death of a worker, what lies in the run folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from quiet import QuietObserver
from safetensors.torch import load_file, save_file

from epo.config import Config
from epo.environments import make_suite
from epo.environments.pool import EnvPool
from epo.errors import UserError
from epo.evaluation.session import imitate_and_evaluate
from epo.files import cache_dir
from epo.training.demonstrations import as_trajectory, collect_demonstrations
from epo.training.policy import load_policy
from epo.training.session import train_run

MakeConfig = Callable[..., Config]


def lines_of(file: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in file.read_text().splitlines()]


# ---------------------------------------------------------------- learning


def test_imitation_learns_the_corridor(minute_config: MakeConfig):
    config = minute_config(
        "environment.options={length: 6, choices: 2, tasks: 24}", "environment.max_turns=7",
        "imitation={demonstrations: 24, batches: 250, batch_size: 8, learning_rate: 0.004}",
        "model.max_context=512", "model.tiny.hidden_size=64", "evaluation.episodes=24", "evaluation.temperature=0",
    )  # fmt: skip
    folder, results = imitate_and_evaluate(config, QuietObserver())
    (iid,) = results
    assert iid.success >= 0.9
    assert iid.invalid == 0
    again = load_policy(folder, config.model)
    assert again.max_context == config.model.max_context


def test_demonstrations_are_what_the_agent_would_have_lived(minute_config: MakeConfig, make_policy: Callable[..., Any]):
    config = minute_config("imitation.demonstrations=3")
    suite = make_suite("corridor", config.environment.options)
    with EnvPool("corridor", config.environment.options, size=2) as pool:
        demonstrations = collect_demonstrations(config, suite, pool)
        cached = collect_demonstrations(config, suite, pool)
    assert demonstrations == cached and len(demonstrations) == 3
    policy = make_policy()
    for demonstration in demonstrations:
        lived = as_trajectory(demonstration, policy.chat, config.agent, max_context=config.model.max_context)
        with suite.make_env() as env:
            observation, step = env.reset(demonstration.task), None
            for turn, seen in zip(lived.turns, demonstration.observations, strict=True):
                assert seen.text == observation.text
                assert policy.chat.decode(turn.response_ids.tolist()) == turn.action
                assert turn.response_ids[-1] == policy.chat.stop_id
                assert observation.text in policy.tokenizer.decode(turn.prompt_ids.tolist())
                step = env.step(turn.action)
                observation = step.observation
        assert step is not None and step.success
        for before, after in zip(lived.turns, lived.turns[1:], strict=False):
            start = [*before.prompt_ids.tolist(), *before.response_ids.tolist()]
            assert after.prompt_ids.tolist()[: len(start)] == start


def test_reinforcement_learning_raises_success(minute_config: MakeConfig, tmp_path: Path):
    """From a policy made weak by its temperature, not by its warm start: little depends on how well that one went."""
    config = minute_config(
        "steps=14", "imitation.batches=120", "imitation.learning_rate=0.003", "model.tiny.hidden_size=64",
        "environment.workers=4", "rollout.tasks_per_step=48", "optimizer.minibatches=4", "entropy.method=epo",
        "rollout.temperature=1.6", "evaluation.temperature=1.6", "evaluation.every=0", "evaluation.episodes=32",
        "checkpoint.every=100",
    )  # fmt: skip
    summary = train_run(config, tmp_path / "run", QuietObserver(), resume=False)
    panel = summary["eval"]["iid"]
    assert panel["final"]["success"] >= panel["initial"]["success"] + 0.25
    rates = [line["success/train"] for line in lines_of(tmp_path / "run" / "metrics.jsonl")]
    assert sum(rates[-4:]) / 4 > sum(rates[:3]) / 3 + 0.2


# ---------------------------------------------------------------- faults


def test_a_killed_worker_costs_a_restart_and_nothing_else(minute_config: MakeConfig, tmp_path: Path):
    """kill -9 in the middle of an episode: the trajectories are those of an undisturbed run."""
    found = {}
    for kills in (0, 2):
        log, run = tmp_path / f"log{kills}", tmp_path / f"run{kills}"
        config = minute_config(
            "steps=2", "environment.suite=failing", "environment.workers=1", "evaluation.every=0",
            f"environment.options={{log: {log}, at: 2, kills: {kills}}}",
        )  # fmt: skip
        # The warm start and the first panel take deaths too, so the log starts full and is emptied for step 1.
        log.write_text("x" * kills)
        observer = QuietObserver()
        observer.evaluated = lambda step, results, log=log: log.write_text("")  # type: ignore[method-assign]
        assert train_run(config, run, observer, resume=False)["finished"]
        found[kills] = lines_of(run / "metrics.jsonl"), lines_of(run / "trajectories" / "step_000001.jsonl")
    restarts = [line["episodes/restarts"] for line in found[2][0]]
    assert sum(restarts) == 2 and restarts[0] >= 1
    assert [line["workers/died"] for line in found[2][0]] == restarts
    assert [line["workers/died"] for line in found[0][0]] == [0, 0]
    assert all(line["memory/learner_mb"] > 100 and line["memory/workers_mb"] > 10 for line in found[0][0])
    assert all(line["stop/environment_error"] == 0 for line in found[2][0])
    assert [line["episodes/restarts"] for line in found[0][0]] == [0, 0]
    for one, other in zip(found[0][1], found[2][1], strict=True):
        assert one["turns"] == other["turns"]


def test_a_group_trains_on_its_survivors(minute_config: MakeConfig, tmp_path: Path):
    log = tmp_path / "log"
    config = minute_config(
        "steps=1", "environment.suite=failing", "environment.workers=1", "evaluation.every=0", "algorithm.name=grpo",
        f"environment.options={{log: {log}, at: 1, kills: 3}}", "rollout.group_size=3", "rollout.tasks_per_step=2",
    )  # fmt: skip
    log.write_text("xxx")
    observer = QuietObserver()
    observer.evaluated = lambda step, results: log.write_text("") if step == 0 else None  # type: ignore[method-assign]
    train_run(config, tmp_path / "run", observer, resume=False)
    (metrics,) = observer.steps
    records = lines_of(tmp_path / "run" / "trajectories" / "step_000001.jsonl")
    lost = [r for r in records if r["stop_reason"] == "environment_error"]
    assert len(records) == 6 and len(lost) == 1 and lost[0]["error"]
    assert metrics["stop/environment_error"] == pytest.approx(1 / 6)
    survivors = [r for r in records if r not in lost]
    assert metrics["tokens/trained"] == sum(len(turn["response_ids"]) for r in survivors for turn in r["turns"])
    assert metrics["rows"] == 5
    for group in (0, 1):
        assert len({r["task"] for r in records if r["group"] == group}) == 1
    assert len({r["task"] for r in records}) == 2


def test_a_step_in_which_everything_failed_changes_nothing(minute_config: MakeConfig, tmp_path: Path):
    log, run = tmp_path / "log", tmp_path / "run"
    config = minute_config(
        "steps=2", "environment.suite=failing", "environment.workers=1", "evaluation.every=0", "entropy.method=epo",
        f"environment.options={{log: {log}, at: 1, kills: 6}}", "rollout.tasks_per_step=2", "checkpoint.every=1",
    )  # fmt: skip
    log.write_text("x" * 6)
    observer = QuietObserver()
    observer.evaluated = lambda step, results: log.write_text("") if step == 0 else None  # type: ignore[method-assign]
    assert train_run(config, run, observer, resume=False)["finished"]
    failed, healthy = lines_of(run / "metrics.jsonl")
    assert failed["stop/environment_error"] == 1 and failed["update/optimizer_steps"] == 0
    assert healthy["stop/environment_error"] == 0 and healthy["update/optimizer_steps"] == 2
    first, second = (json.loads((run / "checkpoints" / f"step_{n:06d}" / "state.json").read_text()) for n in (1, 2))
    assert first["control"]["history"]["steps"] == [] and len(second["control"]["history"]["steps"]) == 1
    assert second["state"]["entropy_by_step"] == [pytest.approx(healthy["entropy/mean"])]


# ---------------------------------------------------------------- the run folder


def test_the_run_folder_is_complete(minute_config: MakeConfig, tmp_path: Path):
    run = tmp_path / "run"
    config = minute_config("steps=2", "evaluation.splits=[iid, ood]", "evaluation.episodes=3")
    returned = train_run(config, run, QuietObserver(), resume=False)
    summary = json.loads((run / "summary.json").read_text())
    assert summary == returned
    assert (summary["recipe"], summary["seed"], summary["steps"], summary["finished"]) == ("minute", 0, 2, True)
    assert summary["wall_seconds"] > 0
    assert set(summary["eval"]) == {"iid", "ood"}
    for panel in summary["eval"].values():
        for when in ("initial", "final"):
            assert set(panel[when]) == {"success", "low", "high", "episodes", "errors"}
            assert 0 <= panel[when]["low"] <= panel[when]["success"] <= panel[when]["high"] <= 1
            assert (panel[when]["episodes"], panel[when]["errors"]) == (3, 0)
    assert Path(summary["plot"]).read_text().count("<svg") == 1
    assert "name: minute" in Path(summary["report"]).read_text()
    metrics, evaluations = lines_of(run / "metrics.jsonl"), lines_of(run / "eval.jsonl")
    assert [line["step"] for line in metrics] == [1, 2]
    assert [line["step"] for line in evaluations] == [0, 2]
    assert summary["eval"]["ood"]["final"]["success"] == evaluations[-1]["panels"][1]["success"]
    for step in (1, 2):
        records = lines_of(run / "trajectories" / f"step_{step:06d}.jsonl")
        assert len(records) == 4
        assert sum(r["success"] for r in records) / 4 == metrics[step - 1]["success/train"]
    provenance = json.loads((run / "provenance.json").read_text())
    assert provenance["packages"]["torch"] and provenance["suite"]["name"] == "corridor"
    assert (summary["commit"], summary["suite"]) == (provenance["commit"], provenance["suite"])
    load_policy(run / "checkpoints" / "step_000002" / "policy", config.model)


def test_a_run_of_no_steps_evaluates_the_warm_start(minute_config: MakeConfig, tmp_path: Path):
    run = tmp_path / "run"
    summary = train_run(minute_config("steps=0"), run, QuietObserver(), resume=False)
    assert summary["finished"] and summary["steps"] == 0
    assert summary["eval"]["iid"]["initial"] == summary["eval"]["iid"]["final"]
    assert (run / "checkpoints" / "step_000000" / "policy" / "model.safetensors").is_file()
    assert Path(summary["report"]).is_file()


def test_a_changed_kl_reference_is_refused_on_resume(
    minute_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("EPO_CACHE", str(tmp_path / "cache"))  # it will be damaged
    config, run = minute_config("steps=1", "algorithm.kl_coefficient=0.1"), tmp_path / "run"
    train_run(config, run, QuietObserver(), resume=False)
    train_run(config, run, QuietObserver(), resume=True)
    for file in (cache_dir() / "imitation").rglob("model.safetensors"):
        weights = load_file(file)
        next(iter(weights.values())).add_(1e-3)
        save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="no longer the one this run started from"):
        train_run(config, run, QuietObserver(), resume=True)


def test_resuming_a_finished_run_changes_nothing(minute_config: MakeConfig, tmp_path: Path):
    config, run = minute_config("steps=1"), tmp_path / "run"
    first = train_run(config, run, QuietObserver(), resume=False)

    def content() -> dict[Path, bytes]:
        # The page is made anew and says when.
        files = (p for p in run.rglob("*") if p.is_file() and p.name != "report.html" and "tensorboard" not in p.parts)
        return {p: p.read_bytes() for p in files}

    before = content()
    assert train_run(config, run, QuietObserver(), resume=True) == first
    assert content() == before
