"""Every way to assign credit, from a recipe's words to the weights: against loops over literal tokens, and filters."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from epo.config import AlgorithmConfig, Config
from epo.objectives import make_control
from epo.packing import pack
from epo.training.batch import flatten
from epo.training.credit import critic_free_advantages, kept_groups, ppo_advantages
from epo.training.learner import Learner
from epo.training.policy import Policy
from epo.types import StopReason, Trajectory, TrajectoryGroup
from made_up import groups, trajectory

MakePolicy = Callable[..., Policy]
MakeConfig = Callable[..., Config]

CRITIC_FREE = {
    "grpo": "name: grpo",
    "grpo-no-std": "name: grpo, normalise_std: false",
    "grpo-row": "name: grpo, group_statistics: row",
    "dr-grpo": "name: dr_grpo",
    "rloo": "name: rloo",
    "reinforce-pp": "name: reinforce_pp, gamma: 0.9",
    "reinforce-pp-baseline": "name: reinforce_pp, reinforce_baseline: true",
    "gigpo": "name: gigpo",
    "gigpo-row-std": (
        "name: gigpo, group_statistics: row, gigpo_normalise_std: true, gigpo_weight: 0.5, gigpo_gamma: 0.8"
    ),
}
ALGORITHMS = {
    "ppo": "name: ppo",
    "ppo-bilevel": "name: ppo, advantage: bilevel, gamma: 0.95",
    **CRITIC_FREE,
    "dr-grpo-constant": "name: dr_grpo, aggregate: constant",
    "starpo-s": "name: ppo, filter: starpo_s, filter_keep: 0.5",
    "snr": "name: grpo, filter: snr",
}
EPO = ("entropy.method=epo", "entropy.coefficient=0.5", "entropy.alpha=0.4", "entropy.kappa_low=0.8")


def algorithm(words: str) -> tuple[str, ...]:
    return ("rollout.group_size=3", f"algorithm={{{words}}}")


def make_learner(make_policy: MakePolicy, make_config: MakeConfig, *options: str) -> Learner:
    config = make_config("steps=6", *options)
    return Learner(make_policy(), config, make_control(config.entropy.method, **config.entropy.options()))


def made_groups(seed: int, *, count: int = 4, size: int = 3) -> list[TrajectoryGroup]:
    """With penalties, and observations that come back within and across trajectories and groups."""
    rng = np.random.default_rng(seed)
    found = groups(rng, count=count, size=size)
    for turn in [turn for group in found for t in group.trajectories for turn in t.turns]:
        turn.observation = f"room {rng.integers(3)}"
        turn.penalty = 0.1 * float(rng.integers(2))
    return found


def state(learner: Learner) -> list[Tensor]:
    critic = [] if learner.critic is None else list(learner.critic.parameters())
    moments = [v for s in learner.optimizer.state.values() for v in s.values()]
    return [t.detach().clone() for t in (*learner.policy.parameters(), *critic, *moments)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ---------------------------------------------------------------- one update of every algorithm


@pytest.mark.parametrize("words", ALGORITHMS.values(), ids=ALGORITHMS.keys())
def test_an_update_moves_the_weights(words: str, make_sharp_policy: MakePolicy, minute_config: MakeConfig) -> None:
    learner = make_learner(make_sharp_policy, minute_config, *algorithm(words), *EPO)
    assert (learner.critic is not None) == words.startswith("name: ppo")
    before = [p.detach().clone() for p in learner.policy.parameters()]
    for step in range(2):
        metrics = learner.update(made_groups(step), step=step)
        assert all(np.isfinite(value) for value in metrics.values()), metrics
        assert metrics["update/optimizer_steps"] > 0 and metrics["update/skipped"] == 0
        assert metrics["advantage/std"] > 0
    assert metrics["entropy/reference"] > 0
    after = [p.detach().clone() for p in learner.policy.parameters()]
    assert not same(before, after)
    assert all(bool(torch.isfinite(p).all()) for p in after)


@pytest.mark.parametrize("words", ALGORITHMS.values(), ids=ALGORITHMS.keys())
def test_lost_episodes_leave_no_trace(words: str, make_sharp_policy: MakePolicy, minute_config: MakeConfig) -> None:
    found = []
    for with_lost in (False, True):
        made = made_groups(1)
        if with_lost:
            rng = np.random.default_rng(7)
            for where, turns in ((0, 3), (2, 0), (3, 1)):
                lost = trajectory(rng, turns=turns, rewards=[50.0] * turns)
                lost.stop_reason = StopReason.ENVIRONMENT_ERROR
                made[where].trajectories.insert(where % 2, lost)
            made.insert(1, TrajectoryGroup(task=lost.task, trajectories=[lost, lost]))
        learner = make_learner(make_sharp_policy, minute_config, *algorithm(words), *EPO)
        metrics = learner.update(made, step=0)
        found.append((metrics, state(learner), learner.control.state_dict()))
    assert found[0][0] == found[1][0]
    assert same(found[0][1], found[1][1])
    assert found[0][2] == found[1][2]


# ---------------------------------------------------------------- advantages of literal tokens


def scores(values: list[float], value: float, *, by_std: bool) -> float:
    """(value - mean) / (std + 1e-6), or value - mean; 0 where nothing differs."""
    if len(values) < 2 or max(values) - min(values) < 1e-6:
        return 0.0
    return (value - statistics.fmean(values)) / (statistics.stdev(values) + 1e-6 if by_std else 1.0)


def total(t: Trajectory) -> float:
    return sum(turn.environment_reward - turn.penalty for turn in t.turns)


def paid(t: Trajectory) -> list[float]:
    return [sum(turn.environment_reward for turn in t.turns) - turn.penalty for turn in t.turns]


def to_go(t: Trajectory, gamma: float) -> list[float]:
    rewards = [turn.environment_reward - turn.penalty for turn in t.turns]
    return [sum(gamma ** (later - k) * rewards[later] for later in range(k, len(rewards))) for k in range(len(rewards))]


def brute_turn(name: str, group: list[Trajectory], t: Trajectory, k: int) -> float:
    """The advantage of turn k of trajectory t, where all tokens of a turn share one."""
    totals, all_paid = [total(other) for other in group], [reward for other in group for reward in paid(other)]
    match name:
        case "grpo":
            return scores(totals, total(t), by_std=True)
        case "grpo-row":
            return scores(all_paid, paid(t)[k], by_std=True)
        case "grpo-no-std" | "dr-grpo" | "reinforce-pp-baseline":
            return scores(totals, total(t), by_std=False)
        case "rloo":
            return total(t) - statistics.fmean(total(other) for other in group if other is not t)
    by_row = name == "gigpo-row-std"
    gamma, weight = (0.8, 0.5) if by_row else (0.95, 1.0)
    met = [
        to_go(other, gamma)[i]
        for other in group
        for i, turn in enumerate(other.turns)
        if turn.observation == t.turns[k].observation
    ]
    episode = scores(all_paid, paid(t)[k], by_std=True) if by_row else scores(totals, total(t), by_std=False)
    return episode + weight * scores(met, to_go(t, gamma)[k], by_std=by_row)


def brute_tokens(name: str, found: list[list[Trajectory]]) -> list[float]:
    if name != "reinforce-pp":
        per_token = [
            brute_turn(name, group, t, k)
            for group in found
            for t in group
            for k, turn in enumerate(t.turns)
            for _ in turn.response_ids
        ]
    else:
        per_token = []
        for t in [t for group in found for t in group]:
            rewards: list[float] = []
            for turn in t.turns:
                rewards += [0.0] * (len(turn.response_ids) - 1) + [turn.environment_reward - turn.penalty]
            per_token += [sum(0.9 ** (j - i) * rewards[j] for j in range(i, len(rewards))) for i in range(len(rewards))]
    if name.startswith("reinforce-pp"):
        mean, deviation = statistics.fmean(per_token), statistics.stdev(per_token)
        per_token = [(value - mean) / deviation for value in per_token]
    return per_token


def credit(found: list[list[Trajectory]], config: AlgorithmConfig) -> list[float]:
    flat = [t for group in found for t in group]
    return critic_free_advantages(found, flatten(pack(flat), flat, device=torch.device("cpu")), config).tolist()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", CRITIC_FREE)
def test_advantages_of_literal_tokens(name: str, seed: int, minute_config: MakeConfig) -> None:
    config = minute_config(*algorithm(CRITIC_FREE[name])).algorithm
    made = [group.trajectories for group in made_groups(seed)]
    if seed == 1:
        made[1] = made[1][:2]
        for t in made[2]:  # equal episodes teach nothing
            t.turns = copy.deepcopy(made[2][0].turns)
    expected = brute_tokens(name, made)
    assert credit(made, config) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert statistics.pstdev(expected) > 0.1


@pytest.mark.parametrize("name", [name for name in CRITIC_FREE if not name.startswith("reinforce-pp")])
def test_another_group_changes_nothing(name: str, minute_config: MakeConfig) -> None:
    config = minute_config(*algorithm(CRITIC_FREE[name])).algorithm
    made = [group.trajectories for group in made_groups(3)]
    alone = credit(made[:1], config)
    for turn in [turn for t in made[1] for turn in t.turns]:
        turn.environment_reward += 100
    assert credit(made, config)[: len(alone)] == alone


@pytest.mark.parametrize("name", CRITIC_FREE)
def test_the_order_of_groups_and_of_their_members_is_no_matter(name: str, minute_config: MakeConfig) -> None:
    config = minute_config(*algorithm(CRITIC_FREE[name])).algorithm
    made = [group.trajectories for group in made_groups(4)]

    def by_trajectory(some: list[list[Trajectory]]) -> dict[int, list[float]]:
        members = [t for group in some for t in group]
        parts = torch.tensor(credit(some, config)).split([t.num_tokens for t in members])
        return {id(t): part.tolist() for t, part in zip(members, parts, strict=True)}

    forward, backward = by_trajectory(made), by_trajectory([group[::-1] for group in made[::-1]])
    for key, values in forward.items():
        assert values == pytest.approx(backward[key], rel=1e-4, abs=1e-5)


def test_rows_weigh_long_episodes_more(minute_config: MakeConfig) -> None:
    """Rewards 1 and 0 of a single turn and of three: four rows of mean 1/4 and unbiased deviation 1/2."""
    rng = np.random.default_rng(0)
    short, long = trajectory(rng, turns=1, rewards=[1.0]), trajectory(rng, turns=3, rewards=[0.0] * 3)
    found = credit([[short, long]], minute_config(*algorithm(CRITIC_FREE["grpo-row"])).algorithm)
    expected = [1.5] * len(short.turns[0].response_ids) + [-0.5] * long.num_tokens
    assert found == pytest.approx(expected, abs=1e-5)


def test_the_critics_algorithm_is_refused_without_one() -> None:
    made = [[trajectory(np.random.default_rng(0), turns=1)]]
    with pytest.raises(ValueError, match="from the critic"):
        credit(made, AlgorithmConfig(name="ppo"))


# ---------------------------------------------------------------- from a critic


def delta_sum(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    following = [*values[1:], 0.0]
    return [
        sum((gamma * lam) ** (j - s) * (rewards[j] + gamma * following[j] - values[j]) for j in range(s, len(values)))
        for s in range(len(values))
    ]


def brute_critic(advantage: str, t: Trajectory, values: list[float], gamma: float, lam: float) -> list[float]:
    ends = np.cumsum([len(turn.response_ids) for turn in t.turns])
    turns = [values[end - len(turn.response_ids) : end] for end, turn in zip(ends, t.turns, strict=True)]
    earned = [turn.environment_reward - turn.penalty for turn in t.turns]
    match advantage:
        case "turn":
            of_turns = delta_sum(earned, [v[0] for v in turns], gamma, lam)
            return [a for a, v in zip(of_turns, turns, strict=True) for _ in v]
        case "token":
            at_ends = [r for reward, v in zip(earned, turns, strict=True) for r in [0.0] * (len(v) - 1) + [reward]]
            return delta_sum(at_ends, values, gamma, lam)
        case "within_turn":
            at_ends = [[0.0] * (len(v) - 1) + [reward] for reward, v in zip(paid(t), turns, strict=True)]
            return [a for r, v in zip(at_ends, turns, strict=True) for a in delta_sum(r, v, gamma, lam)]
    # Inside a turn nothing is discounted: every token is short of the turn's worth by its value.
    of_turns = delta_sum(earned, [v[-1] for v in turns], gamma, lam)
    return [a + v[-1] - value for a, v in zip(of_turns, turns, strict=True) for value in v]


@pytest.mark.parametrize("advantage", ["turn", "within_turn", "token", "bilevel"])
def test_a_critics_advantages_of_literal_tokens(advantage: str, minute_config: MakeConfig) -> None:
    words = f"name: ppo, advantage: {advantage}, whiten: false, gamma: 0.9, lam: 0.7"
    config = minute_config(*algorithm(words)).algorithm
    flat = [t for group in made_groups(5) for t in group.trajectories]
    data = flatten(pack(flat), flat, device=torch.device("cpu"))
    values_N = torch.randn(len(data.turn_ids_N), generator=torch.Generator().manual_seed(0))
    parts = values_N.split([t.num_tokens for t in flat])
    expected = [a for t, v in zip(flat, parts, strict=True) for a in brute_critic(advantage, t, v.tolist(), 0.9, 0.7)]
    found_N, returns_N = ppo_advantages(flat, data, values_N, config)
    assert found_N.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    if advantage != "turn":  # whose tokens share the return of the first
        torch.testing.assert_close(returns_N, found_N + values_N)


# ---------------------------------------------------------------- Dr. GRPO's constant


@pytest.mark.parametrize(("aggregate", "depends"), [("constant", False), ("token", True), ("trajectory", False)])
def test_how_long_other_episodes_are(
    aggregate: str, depends: bool, make_sharp_policy: MakePolicy, minute_config: MakeConfig
) -> None:
    """A second group teaches nothing. Do its lengths change what the first group's tokens do to the weights?"""
    rng = np.random.default_rng(2)
    members = [trajectory(rng, turns=2, rewards=[0.0, reward]) for reward in (0.0, 1.0)]
    teaching = TrajectoryGroup(task=members[0].task, trajectories=members)
    found = []
    for turns in (1, 7):
        idle = [trajectory(rng, turns=turns, task="idle", rewards=[0.0] * turns) for _ in range(2)]
        learner = make_learner(
            make_sharp_policy,
            minute_config,
            *algorithm(f"name: dr_grpo, aggregate: {aggregate}"),
            "optimizer.minibatches=1",
            "optimizer.grad_clip=1e9",
            "optimizer.microbatch_tokens=64",
        )
        learner.update([teaching, TrajectoryGroup(task=idle[0].task, trajectories=idle)], step=0)
        found.append(torch.cat([p.grad.flatten() for p in learner.policy.parameters() if p.grad is not None]))
    assert bool(found[0].any())
    difference = float((found[0] - found[1]).abs().max() / found[0].abs().max())
    assert difference > 0.1 if depends else difference < 1e-4


def test_a_constant_length_scales_the_gradient(make_sharp_policy: MakePolicy, minute_config: MakeConfig) -> None:
    """Sum over tokens / (12 trajectories x 4 turns x 6 tokens) instead of the mean over tokens; metrics stay means."""
    gradients, metrics = [], []
    made = made_groups(2)
    for aggregate in ("token", "constant"):
        words = f"name: dr_grpo, kl_coefficient: 0.3, aggregate: {aggregate}"
        learner = make_learner(
            make_sharp_policy, minute_config, *algorithm(words), "optimizer.minibatches=1", "optimizer.grad_clip=1e9",
        )  # fmt: skip
        metrics.append(learner.update(made, step=0))
        gradients.append(torch.cat([p.grad.flatten() for p in learner.policy.parameters() if p.grad is not None]))
    count = sum(t.num_tokens for group in made for t in group.trajectories)
    share = count / (12 * 4 * 6)
    assert 0.1 < share < 0.9
    torch.testing.assert_close(
        gradients[1], gradients[0] * share, rtol=1e-4, atol=1e-6 * float(gradients[0].abs().max())
    )
    assert metrics[1]["policy/loss"] == pytest.approx(share * metrics[0]["policy/loss"], rel=1e-4, abs=1e-6)
    for name in ("policy/kl", "policy/clip_fraction", "policy/reference_kl"):
        assert metrics[1][name] == pytest.approx(metrics[0][name], rel=1e-4, abs=1e-7)


# ---------------------------------------------------------------- filters


def spread(seed: int, deviations: list[float]) -> list[TrajectoryGroup]:
    """One group per entry, whose two trajectories earn plus and minus as much."""
    rng = np.random.default_rng(seed)
    made = []
    for number, deviation in enumerate(deviations):
        members = [trajectory(rng, turns=2, task=str(number), rewards=[0.3, sign * deviation]) for sign in (1, -1)]
        made.append(TrajectoryGroup(task=members[0].task, trajectories=members))
    return made


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        ("filter: starpo_s", [4]),
        ("filter: starpo_s, filter_keep: 0.5", [1, 4]),
        ("filter: starpo_s, filter_keep: 1.0", [0, 1, 2, 3, 4]),
        ("filter: snr", [0, 1, 4]),
        ("filter: snr, filter_keep: 0.5", [4]),
        ("filter: snr, filter_keep: 1.0", [0, 1, 3, 4]),
    ],
)
@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_a_step_is_trained_on_the_kept_groups_alone(
    name: str, words: str, kept: list[int], make_sharp_policy: MakePolicy, minute_config: MakeConfig
) -> None:
    """The update with the filter is the update without it on the groups it keeps: weights, metrics, history."""
    made = spread(0, [0.5, 1.0, 0.0, 0.1, 2.0])
    found = []
    for options, groups_ in (
        (f"name: {name}, {words}", made),
        (f"name: {name}", [made[i] for i in kept]),
    ):
        learner = make_learner(make_sharp_policy, minute_config, *algorithm(options), *EPO)
        metrics = learner.update(groups_, step=0)
        found.append((metrics, state(learner), learner.control.state_dict()))
    assert found[0][0].pop("filter/kept_groups") == len(kept)
    assert "filter/kept_groups" not in found[1][0]
    assert found[0][0] == found[1][0]
    assert same(found[0][1], found[1][1])
    assert found[0][2] == found[1][2]


def test_a_step_of_which_nothing_is_kept_changes_nothing(
    make_sharp_policy: MakePolicy, minute_config: MakeConfig
) -> None:
    learner = make_learner(make_sharp_policy, minute_config, *algorithm("name: grpo, filter: snr"), *EPO)
    learner.update(spread(0, [1.0, 2.0]), step=0)
    before, history, version = state(learner), copy.deepcopy(learner.control.state_dict()), learner.policy.version
    found = learner.update(spread(1, [0.0, 0.0]), step=1)
    assert found == {"update/optimizer_steps": 0.0, "filter/kept_groups": 0.0}
    assert same(before, state(learner))
    assert learner.control.state_dict() == history
    assert learner.policy.version == version


def test_a_lost_episode_does_not_make_a_group_worth_keeping(
    make_sharp_policy: MakePolicy, minute_config: MakeConfig
) -> None:
    made = spread(3, [0.0, 0.5])
    lost = trajectory(np.random.default_rng(1), turns=2, task="0", rewards=[0.0, 100.0])
    lost.stop_reason = StopReason.ENVIRONMENT_ERROR
    made[0].trajectories.append(lost)
    learner = make_learner(make_sharp_policy, minute_config, *algorithm("name: rloo, filter: starpo_s"))
    metrics = learner.update(made, step=0)
    assert metrics["filter/kept_groups"] == 1
    assert metrics["tokens/trained"] == sum(t.num_tokens for t in made[1].trajectories)


def test_no_filter_keeps_what_is_there() -> None:
    made = [group.trajectories for group in spread(0, [0.0, 1.0])]
    assert kept_groups(made, AlgorithmConfig()) == made
