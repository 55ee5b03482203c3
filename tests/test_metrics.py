"""Metrics of literal trajectories, worked out by hand."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np
import pytest

from epo.reporting.metrics import entropy_oscillation, repetition, reward_std, rollout_metrics
from epo.training.learner import learning_rate_factor
from epo.types import ResponseParts, StopReason, Task, Trajectory, TrajectoryGroup, Turn

TASK = Task(suite="made-up", id="a", split="train")


def turn(entropy: Sequence[float], *, reward: float = 0.0, penalty: float = 0.0, understood: bool = True) -> Turn:
    return Turn(
        prompt_ids=np.array([1]),
        response_ids=np.arange(len(entropy)),
        logprobs=np.zeros(len(entropy), dtype=np.float32),
        entropy=np.array(entropy, dtype=np.float32),
        observation="",
        response="",
        action="",
        is_valid=penalty == 0,
        understood=understood,
        environment_reward=reward,
        penalty=penalty,
    )


def group(*trajectories: Trajectory) -> TrajectoryGroup:
    return TrajectoryGroup(task=TASK, trajectories=list(trajectories))


def test_entropy_by_part_of_the_response():
    """Tokens of thoughts and of actions, each counting alike; tags and what has no part count in the mean alone."""
    first, second, third, plain = turn([9, 1, 2, 9, 4, 9]), turn([9, 6, 9]), turn([7, 5]), turn([3])
    first.parts = ResponseParts(thought=(1, 3), action=(4, 5))
    second.parts = ResponseParts(thought=(1, 2), action=None)
    third.parts = ResponseParts(thought=None, action=(2, 2))  # an action without tokens
    found = rollout_metrics([group(Trajectory(task=TASK, turns=[first, second, third, plain]))])
    assert found["entropy/think"] == (1 + 2 + 6) / 3 and found["entropy/action"] == 4
    assert found["entropy/mean"] == pytest.approx((9 + 1 + 2 + 9 + 4 + 9 + 9 + 6 + 9 + 7 + 5 + 3) / 12)
    lost = Trajectory(task=TASK, turns=[first], stop_reason=StopReason.ENVIRONMENT_ERROR)
    for turns in ([lost], [Trajectory(task=TASK, turns=[third, plain])]):
        assert not {"entropy/think", "entropy/action"} & rollout_metrics([group(*turns)]).keys()


def test_rollout_metrics_by_hand():
    won = Trajectory(
        task=TASK,
        turns=[turn([1.0, 3.0]), turn([2.0]), turn([4.0, 4.0, 4.0]), turn([0.5, 1.5], reward=1.0)],
        stop_reason=StopReason.SUCCESS,
        success=True,
        score=1.0,
        restarts=2,
    )
    stuck = Trajectory(task=TASK, turns=[turn([6.0], penalty=0.25, understood=False), turn([2.0, 4.0])], score=0.5)
    short = Trajectory(task=TASK, turns=[turn([8.0])], stop_reason=StopReason.FAILURE)
    lost = Trajectory(task=TASK, turns=[turn([100.0])], stop_reason=StopReason.ENVIRONMENT_ERROR)
    found = rollout_metrics([group(won, stuck), group(short, lost)])
    expected = {
        "reward/mean": (1.0 - 0.25) / 4,
        # Of the one group with two to compare: 1 and -0.25.
        "reward/std": 0.625,
        "success/train": 1 / 4,
        "score/train": 1.5 / 4,
        "turns/mean": 8 / 4,
        "turns/invalid": 1 / 8,
        "turns/not_understood": 1 / 8,
        "turns/repeated": 4 / 4,
        "response/tokens": (8 + 3 + 1 + 1) / 8,
        "response/tokens_max": 3.0,
        "response/repetition": 0.0,
        "groups/all_equal": 0.0,
        "episodes": 4.0,
        "episodes/restarts": 2.0,
        # No prompt of `turn` continues the one before.
        "context/segments": 8 / 4,
        "context/dropped_turns": 0.0,
        "context/drift": 0.0,
        "stop/success": 1 / 4,
        "stop/failure": 1 / 4,
        "stop/max_turns": 1 / 4,
        "stop/context_overflow": 0.0,
        "stop/environment_error": 1 / 4,
        # All tokens of the three episodes that are trained on.
        "entropy/mean": (1 + 3 + 2 + 12 + 0.5 + 1.5 + 6 + 2 + 4 + 8) / 12,
        # Turn means are 2, 2, 4, 1 and 6, 3; a third of four turns, and of two, is one. One turn alone says nothing.
        "entropy/turn_early": (2 + 6) / 2,
        "entropy/turn_late": (1 + 3) / 2,
    }
    assert found == pytest.approx(expected)


def test_thirds_of_a_long_episode():
    seven = Trajectory(task=TASK, turns=[turn([float(k)]) for k in (1, 2, 10, 10, 10, 5, 7)])
    found = rollout_metrics([group(seven)])
    assert found["entropy/turn_early"] == pytest.approx(1.5) and found["entropy/turn_late"] == pytest.approx(6.0)


def test_groups_without_a_signal():
    def earning(reward: float, *, lost: bool = False) -> Trajectory:
        reason = StopReason.ENVIRONMENT_ERROR if lost else StopReason.FAILURE
        return Trajectory(task=TASK, turns=[turn([1.0], reward=reward)], stop_reason=reason)

    made = [
        group(earning(1), earning(1)),
        group(earning(1), earning(0)),
        group(earning(0), earning(0), earning(1, lost=True)),
        group(earning(1)),  # a group of one is never compared
    ]
    assert rollout_metrics(made)["groups/all_equal"] == pytest.approx(2 / 3)
    assert rollout_metrics([group(earning(1))])["groups/all_equal"] == 0.0


def test_rewards_deviate_within_groups_or_where_there_are_none_over_the_step():
    def earning(*rewards: float) -> TrajectoryGroup:
        return group(*(Trajectory(task=TASK, turns=[turn([1.0], reward=reward)]) for reward in rewards))

    assert reward_std([earning(1, 1), earning(0, 0)]) == 0.0
    assert reward_std([earning(1, 0), earning(0, 0), earning(7)]) == pytest.approx((0.5 + 0.0) / 2)
    assert reward_std([earning(1), earning(0)]) == pytest.approx(0.5)
    assert reward_std([]) == reward_std([group()]) == 0.0


@pytest.mark.parametrize(
    ("ids", "share"),
    [
        ([], 0.0),
        ([1, 1, 1], 0.0),
        ([1, 2, 3, 4, 5, 6], 0.0),
        ([1, 1, 1, 1, 1, 1], 2 / 3),  # one 4-gram three times
        ([1, 2, 1, 2, 1, 2, 1], 2 / 4),  # 1212 2121 1212 2121
        ([1, 2, 3, 4, 9, 1, 2, 3, 4], 1 / 6),
    ],
)
def test_repetition_is_the_share_of_4_grams_that_were_there_before(ids: list[int], share: float):
    assert repetition(ids) == pytest.approx(share)


def test_repetition_is_over_responses_that_can_repeat():
    turns = [turn([0.0] * 6), turn([0.0] * 6), turn([0.0] * 4)]
    turns[0].response_ids = np.ones(6, dtype=np.int64)
    assert rollout_metrics([group(Trajectory(task=TASK, turns=turns))])["response/repetition"] == pytest.approx(1 / 3)


def test_a_repeated_turn_tries_again_what_changed_nothing():
    episode = Trajectory(task=TASK, turns=[turn([1.0]) for _ in range(5)])
    for made, seen, done in zip(episode.turns, "aaabb", "xxxxy", strict=True):
        made.observation, made.action = seen, done
    # The second and the third; the fourth sees something else, the fifth does something else.
    assert rollout_metrics([group(episode)])["turns/repeated"] == pytest.approx(2 / 4)


def test_nothing_sampled_has_no_entropy():
    lost = Trajectory(task=TASK, turns=[], stop_reason=StopReason.ENVIRONMENT_ERROR)
    found = rollout_metrics([group(lost)])
    assert not any(name.startswith("entropy/") for name in found)
    assert found["stop/environment_error"] == 1.0 and found["turns/mean"] == 0.0
    # Nor has it a length, a share of invalid turns or a spread of rewards: 0 would say something of the policy.
    absent = {"reward/std", "turns/invalid", "turns/repeated", "response/tokens", "response/repetition"}
    assert not absent & found.keys()


def test_oscillation_is_the_spread_of_the_last_ten_changes():
    steady = [3.0 - 0.1 * k for k in range(30)]
    assert entropy_oscillation(steady) == pytest.approx(0.0, abs=1e-12)
    wild = [*[100.0, -100.0] * 5, *(k % 2 * 1.0 for k in range(11))]
    assert entropy_oscillation(wild) == pytest.approx(1.0)
    values = [1.0, 1.5, 1.2, 2.0]
    assert entropy_oscillation(values) == pytest.approx(statistics.pstdev([0.5, -0.3, 0.8]))
    assert entropy_oscillation([1.0, 2.0]) == entropy_oscillation([]) == 0.0


@pytest.mark.parametrize(("total", "warmup", "ratio"), [(100, 0.1, 0.2), (7, 0.5, 0.0), (10, 0.0, 0.5), (1, 0.1, 0.2)])
def test_learning_rate_schedule(total: int, warmup: float, ratio: float):
    first = int(warmup * total)
    for step in range(total + 1):
        if step < first:
            expected = ratio + (1 - ratio) * step / first
        else:
            expected = ratio + (1 - ratio) * (1 + math.cos(math.pi * (step - first) / (total - first))) / 2
        assert learning_rate_factor(step, total, warmup_fraction=warmup, min_ratio=ratio) == pytest.approx(expected)
    assert learning_rate_factor(first, total, warmup_fraction=warmup, min_ratio=ratio) == pytest.approx(1.0)
    assert learning_rate_factor(total, total, warmup_fraction=warmup, min_ratio=ratio) == pytest.approx(ratio)


def test_a_warm_up_that_never_ends():
    factors = [learning_rate_factor(k, 10, warmup_fraction=1.0, min_ratio=0.2) for k in range(11)]
    assert factors == pytest.approx([0.2 + 0.08 * k for k in range(11)])
