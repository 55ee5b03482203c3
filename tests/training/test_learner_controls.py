"""Every entropy option reaches the weights of every algorithm; lost episodes reach nothing; groups stay whole."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from epo.config import Config
from epo.objectives import make_control
from epo.training.learner import Learner, _minibatches
from epo.training.policy import Policy
from epo.types import StopReason, TrajectoryGroup
from made_up import groups, trajectory

ALGORITHMS = {
    "ppo": ("algorithm.name=ppo",),
    "ppo-separate": ("algorithm.name=ppo", "algorithm.critic.trunk=separate"),
    "grpo": ("algorithm.name=grpo", "rollout.group_size=2"),
}
EPO = (
    "entropy.method=epo",
    "entropy.coefficient=0.5",
    "entropy.alpha=0.4",
    "entropy.kappa_low=0.8",
    "entropy.kappa_high=1.2",
)

BONUS = ("entropy.method=bonus", "entropy.coefficient=0.5")

MakePolicy = Callable[..., Policy]
MakeConfig = Callable[..., Config]


@pytest.fixture
def train(
    make_sharp_policy: MakePolicy, minute_config: MakeConfig
) -> Callable[[Sequence[str]], tuple[list[Tensor], Learner]]:
    """The policy's weights after two steps on the same made-up data: the second one has a history."""

    def run(options: Sequence[str], *, steps: int = 2) -> tuple[list[Tensor], Learner]:
        config = minute_config("steps=6", *options)
        policy = make_sharp_policy()
        learner = Learner(policy, config, make_control(config.entropy.method, **config.entropy.options()))
        rng = np.random.default_rng(0)
        for step in range(steps):
            learner.update(groups(rng, count=4), step=step)
        return [p.detach().clone() for p in policy.parameters()], learner

    return run


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    "change",
    [
        "entropy.coefficient=0.6",
        "entropy.alpha=0.8",
        "entropy.kappa_low=0.5",
        "entropy.kappa_high=3.0",
        "entropy.gamma=1.0",
        "entropy.penalty=squared",
        "entropy.penalty=indicator",
        "entropy.reference=per_turn",
        "entropy.aggregate=token",
        "entropy.schedule=constant",
    ],
)
def test_every_option_changes_the_weights(
    algorithm: str, change: str, train: Callable[..., tuple[list[Tensor], Learner]]
):
    base, _ = train([*ALGORITHMS[algorithm], *EPO])
    changed, _ = train([*ALGORITHMS[algorithm], *EPO, change])
    assert not same(base, changed)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_changes_no_weight(algorithm: str, train: Callable[..., tuple[list[Tensor], Learner]]):
    options = ALGORITHMS[algorithm]
    bonus, _ = train([*options, *BONUS])
    # The indicator has no gradient: EPO-Base with a logged number.
    assert same(bonus, train([*options, *EPO, "entropy.penalty=indicator"])[0])
    assert same(bonus, train([*options, *EPO, "entropy.alpha=0"])[0])
    none, _ = train([*options, "entropy.method=none"])
    assert same(none, train([*options, *EPO, "entropy.coefficient=0"])[0])
    # Without history there is no corridor: at the first step EPO is its bonus.
    first, _ = train([*options, *EPO], steps=1)
    assert same(first, train([*options, *BONUS], steps=1)[0])
    assert same(first, train([*options, *EPO, "entropy.kappa_low=0.99", "entropy.penalty=squared"], steps=1)[0])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_history_is_the_token_mean_of_what_was_sampled(
    algorithm: str, train: Callable[..., tuple[list[Tensor], Learner]]
):
    _, learner = train([*ALGORITHMS[algorithm], *EPO])
    rng = np.random.default_rng(0)
    for _, mean in [entry for step in learner.control.state_dict()["history"]["steps"] for entry in step]:
        sampled = [
            float(h) for g in groups(rng, count=4) for t in g.trajectories for turn in t.turns for h in turn.entropy
        ]
        assert mean == pytest.approx(sum(sampled) / len(sampled), rel=1e-6)


def lost(rng: np.random.Generator, *, turns: int, task: str) -> TrajectoryGroup:
    broken = trajectory(rng, turns=turns, task=task, rewards=[50.0] * turns)
    broken.stop_reason = StopReason.ENVIRONMENT_ERROR
    return TrajectoryGroup(task=broken.task, trajectories=[broken])


def full_state(learner: Learner) -> list[Tensor]:
    critic = [] if learner.critic is None else list(learner.critic.parameters())
    moments = [v for s in learner.optimizer.state.values() for v in s.values()]
    return [t.detach().clone() for t in (*learner.policy.parameters(), *critic, *moments)]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_lost_episodes_leave_no_trace(algorithm: str, make_sharp_policy: MakePolicy, minute_config: MakeConfig):
    """With them, whatever they earned and however they were sampled, the update is the one without them."""
    states, histories, metrics = [], [], []
    for with_lost in (False, True):
        rng = np.random.default_rng(1)
        made = groups(rng, count=3, size=2)
        if with_lost:
            # A member of a group, another before its first turn, and a group of which nothing is left.
            made[0].trajectories.insert(1, lost(rng, turns=3, task="task0").trajectories[0])
            made[2].trajectories.append(lost(rng, turns=0, task="task2").trajectories[0])
            made.append(lost(rng, turns=2, task="task3"))
        config = minute_config(*ALGORITHMS[algorithm], *EPO, "optimizer.minibatches=2")
        learner = Learner(make_sharp_policy(), config, make_control("epo", **config.entropy.options()))
        metrics.append(learner.update(made, step=0))
        states.append(full_state(learner))
        histories.append(learner.control.state_dict())
    assert same(states[0], states[1])
    assert histories[0] == histories[1]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_step_without_survivors_changes_nothing(
    algorithm: str, make_sharp_policy: MakePolicy, minute_config: MakeConfig
):
    rng = np.random.default_rng(2)
    config = minute_config(*ALGORITHMS[algorithm], *EPO)
    learner = Learner(make_sharp_policy(), config, make_control("epo", **config.entropy.options()))
    learner.update(groups(rng), step=0)
    before, history, version = full_state(learner), copy.deepcopy(learner.control.state_dict()), learner.policy.version
    found = learner.update([lost(rng, turns=2, task="a"), lost(rng, turns=0, task="b")], step=1)
    assert found == {"update/optimizer_steps": 0.0}
    assert same(before, full_state(learner))
    assert learner.control.state_dict() == history
    assert learner.policy.version == version


def test_a_gradient_that_is_not_finite_is_skipped(make_sharp_policy: MakePolicy, minute_config: MakeConfig):
    rng = np.random.default_rng(3)
    config = minute_config("optimizer.minibatches=2")
    learner = Learner(make_sharp_policy(), config, make_control("none"))
    made = groups(rng, count=2)
    made[0].trajectories[0].turns[0].logprobs[0] = np.nan
    before = [p.detach().clone() for p in learner.policy.parameters()]
    found = learner.update(made, step=0)
    assert found["update/skipped"] == 1.0 and found["update/optimizer_steps"] == 2.0
    assert all(bool(torch.isfinite(p).all()) for p in learner.policy.parameters())
    assert not same(before, list(learner.policy.parameters()))  # the healthy mini-batch was trained on


@pytest.mark.parametrize(("sizes", "count"), [([1] * 7, 3), ([2, 1, 4, 3], 4), ([3, 3], 4), ([5], 1)])
def test_minibatches_deal_whole_groups_once(sizes: list[int], count: int):
    rng = np.random.default_rng(4)
    survivors = [[trajectory(rng, turns=1) for _ in range(size)] for size in sizes]
    parts = _minibatches(survivors, count, np.random.default_rng(0))
    assert len(parts) == min(count, len(sizes))
    assert sorted(i for part in parts for i in part) == list(range(sum(sizes)))
    start = 0
    for size in sizes:
        group = set(range(start, start + size))
        assert sum(group <= part for part in parts) == 1
        start += size
    assert all(parts)  # none is empty


def test_the_number_of_optimiser_steps_does_not_depend_on_the_rows(
    make_sharp_policy: MakePolicy, minute_config: MakeConfig
):
    for turns in (1, 6):
        rng = np.random.default_rng(5)
        made = [
            TrajectoryGroup(task=t.task, trajectories=[t])
            for t in (trajectory(rng, turns=turns, splits_at=turns // 2, task=str(i)) for i in range(4))
        ]
        config = minute_config("optimizer.minibatches=2", "optimizer.epochs=3")
        learner = Learner(make_sharp_policy(), config, make_control("none"))
        assert learner.update(made, step=0)["update/optimizer_steps"] == 6.0
        steps = {int(s["step"]) for s in learner.optimizer.state.values()}
        assert steps == {6}


def test_tokens_of_transcripts_are_processed_once(make_sharp_policy: MakePolicy, minute_config: MakeConfig):
    """Cost is linear in the turns with a transcript: one row per episode, no token twice; a window pays per turn."""
    rng = np.random.default_rng(6)
    for turns in (1, 4, 8):
        whole = trajectory(rng, turns=turns)
        learner = Learner(make_sharp_policy(), minute_config(), make_control("none"))
        found = learner.update([TrajectoryGroup(task=whole.task, trajectories=[whole])], step=0)
        last = whole.turns[-1]
        assert found["rows"] == 1
        assert found["tokens/processed"] == len(last.prompt_ids) + len(last.response_ids)
        assert found["tokens/trained"] == whole.num_tokens
        split = trajectory(rng, turns=turns)
        for turn in split.turns:
            turn.prompt_ids = rng.integers(3, 300, size=7)
        found = learner.update([TrajectoryGroup(task=split.task, trajectories=[split])], step=0)
        assert found["rows"] == turns
        assert found["tokens/processed"] == 7 * turns + split.num_tokens
