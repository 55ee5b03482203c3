"""Whole runs on a Ray cluster of two nodes: the run of one process, whatever dies on the way."""

from __future__ import annotations

import json
import os
import re
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from watching import Watcher, processes

from epo.cluster import place
from epo.config import Config
from epo.errors import UserError
from epo.seeds import TRAINING_STREAM
from epo.training.session import train_run

MakeConfig = Callable[..., Config]
ROUNDING = 5e-5
"""fp32 sums in other orders, three steps of Adam on weights of the order of 1. A wrong weight of a gradient moves
parameters by the learning rate, 1e-3."""


def weights_of(run: Path, step: int = 3) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for file in (run / "checkpoints" / f"step_{step:06d}" / "policy").glob("*.safetensors"):
        found |= load_file(file)
    return found


def difference(one: Path, other: Path) -> float:
    a, b = weights_of(one), weights_of(other)
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def draws_of(run: Path) -> list[list[Any]]:
    """Every trajectory's tokens, in the order in which they were trained on."""
    return [
        [turn["response_ids"] for turn in line["turns"]]
        for step in (1, 2, 3)
        for line in lines_of(run / "trajectories" / f"step_{step:06d}.jsonl")
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, minute_config: MakeConfig, cache: Path) -> Path:
    """The run of a single process."""
    before, os.environ["EPO_CACHE"] = os.environ.get("EPO_CACHE"), str(cache)
    path = tmp_path_factory.mktemp("alone") / "run"
    train_run(minute_config(), path, Watcher(), resume=False)
    if before is None:
        del os.environ["EPO_CACHE"]
    else:
        os.environ["EPO_CACHE"] = before
    return path


def test_a_killed_rollout_worker_changes_nothing(
    two_nodes: str, alone: Path, minute_config: MakeConfig, tmp_path: Path
):
    """kill -9 in the second step, when one episode is back: the run is that of a single process."""
    killed: list[int] = []

    def kill(stage: str, done: int) -> None:
        if stage == "step 2/3" and done == 1 and not killed:
            killed.append(processes("RolloutWorker")[0])
            os.kill(killed[0], signal.SIGKILL)

    watcher = Watcher(kill)
    run = tmp_path / "run"
    assert train_run(minute_config(), run, watcher, resume=False, cluster=two_nodes)["finished"]
    assert draws_of(run) == draws_of(alone)
    assert difference(run, alone) < ROUNDING
    events = lines_of(run / "cluster.jsonl")
    assert Counter(event["event"] for event in events)["worker_lost"] == 1
    lost = next(event for event in events if event["event"] == "worker_lost")
    assert f"pid {killed[0]}" in lost["where"] and len(lost["episodes"]) <= 2
    assert any(f"pid {killed[0]}" in note and "played again" in note for note in watcher.notes)
    assert [m["episodes"] for m in watcher.steps] == [6, 6, 6]
    # Whether it had an episode of that step left is a matter of who was quick; each is counted where it belongs.
    steps = [seed[2] for seed in lost["episodes"] if seed[1] == TRAINING_STREAM]
    assert [m["episodes/restarts"] for m in watcher.steps] == [steps.count(step) for step in range(3)]
    assert 0 not in steps
    cluster = json.loads((run / "provenance.json").read_text())["cluster"]
    assert cluster["address"] == two_nodes and len(cluster["nodes"]) == 2


def test_a_killed_learner_rank_costs_the_steps_since_the_checkpoint(
    two_nodes: str, alone: Path, minute_config: MakeConfig, tmp_path: Path
):
    """Two ranks, one of them killed in the second step; the run goes on from the checkpoint of the first, of which each
    wrote a share."""
    killed: list[int] = []

    def kill(stage: str, done: int) -> None:
        if stage == "step 2/3" and done == 1 and not killed:
            killed.append(processes("RayTrainWorker")[-1])
            os.kill(killed[0], signal.SIGKILL)

    watcher = Watcher(kill)
    run = tmp_path / "run"
    config = minute_config(
        "cluster.workers=1", "cluster.episodes_per_worker=4", "cluster.learners=2", "cluster.sharded_checkpoints=true"
    )
    assert train_run(config, run, watcher, resume=False, cluster=two_nodes)["finished"]
    assert killed
    assert len(list((run / "checkpoints" / "step_000003").glob("optimizer-*-of-00002.safetensors"))) == 2
    assert [line["step"] for line in lines_of(run / "metrics.jsonl")] == [1, 2, 3]
    assert draws_of(run) == draws_of(alone)
    assert difference(run, alone) < ROUNDING
    assert any("learner group is lost" in note and "step_000001" in note for note in watcher.notes)
    assert [event["event"] for event in lines_of(run / "cluster.jsonl")] == ["learner_lost"]
    mine, single = (lines_of(folder / "metrics.jsonl") for folder in (run, alone))
    for name in ("policy/loss", "policy/grad_norm", "value/loss", "entropy/mean", "policy/kl", "rows"):
        assert [m[name] for m in mine] == pytest.approx([m[name] for m in single], rel=1e-3, abs=1e-5), name


def test_a_run_with_stale_weights(two_nodes: str, minute_config: MakeConfig, tmp_path: Path):
    """Every step has its own tasks once; no token is older than allowed; the correction is logged."""
    watcher, run = Watcher(), tmp_path / "run"
    config = minute_config("steps=4", "cluster.max_staleness=2", "cluster.workers=1", "evaluation.every=2")
    assert train_run(config, run, watcher, resume=False, cluster=two_nodes)["finished"]
    ages = [m["sampler/staleness_max"] for m in watcher.steps]
    assert ages[0] == 0 and max(ages) <= 2 and max(ages) > 0
    assert [m["episodes"] for m in watcher.steps] == [6] * 4
    for metrics in watcher.steps:
        assert 0 <= metrics["sampler/staleness"] <= metrics["sampler/staleness_max"]
        assert metrics["sampler/mismatch_kl"] >= 0 and 0.2 < metrics["sampler/importance_mean"] < 2
    # Weights that are older draw from another distribution than the learner's, by more than rounding.
    assert max(m["sampler/mismatch_kl"] for m, age in zip(watcher.steps, ages, strict=True) if age) > 1e-6
    assert watcher.steps[0]["sampler/mismatch_kl"] < 1e-9
    seen = [
        [json.loads(line)["task"] for line in file.read_text().splitlines()]
        for file in sorted((run / "trajectories").glob("step_*.jsonl"))
    ]
    assert [len(tasks) for tasks in seen] == [6] * 4


def test_a_cluster_without_room_says_what_it_has(two_nodes: str, minute_config: MakeConfig, tmp_path: Path):
    config = minute_config("cluster.worker_cpus=64", "cluster.start_seconds=1")
    with pytest.raises(UserError, match=r"cluster\.worker_cpus=64.*of which the cluster has 8 CPUs and 0 GPUs"):
        train_run(config, tmp_path / "run", Watcher(), resume=False, cluster=two_nodes)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("absent", "learners", "said"),
    [
        ("ray", 0, "--cluster needs Ray: pip install"),
        ("pyarrow", 2, "cluster.learners=2 needs Ray Train, which lacks pyarrow: pip install"),
    ],
)
def test_packages_that_are_missing(
    absent: str, learners: int, said: str, minute_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(place, "find_spec", lambda name: None if name == absent else object())
    config = minute_config(f"cluster.learners={learners}")
    with pytest.raises(UserError, match=re.escape(said)):
        train_run(config, tmp_path / "run", Watcher(), resume=False, cluster="local")
    assert not (tmp_path / "run").exists()


def test_no_cluster_at_the_address(minute_config: MakeConfig, tmp_path: Path):
    for address in ("127.0.0.1:1", "nonsense"):
        with pytest.raises(UserError, match=f"--cluster {address}: no Ray cluster answers"):
            train_run(minute_config(), tmp_path / "run", Watcher(), resume=False, cluster=address)
    assert not (tmp_path / "run").exists()
