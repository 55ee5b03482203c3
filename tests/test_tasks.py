"""Orders of tasks: functions of the seed, fair to goals and tasks."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epo.errors import UserError
from epo.tasks import Curriculum, balanced_order, panel
from epo.types import Task

SIZES = {"boil": 7, "find": 3, "grow": 1}


def tasks_of(sizes: dict[str, int]) -> list[Task]:
    return [
        Task(suite="s", id=f"{goal}/{i}", split="train", goal=goal) for goal, size in sizes.items() for i in range(size)
    ]


TASKS = tasks_of(SIZES)
goal_sizes = st.dictionaries(st.sampled_from("abcde"), st.integers(1, 6), min_size=1)


@given(sizes=goal_sizes, seed=st.integers(0, 1000), positions=st.permutations(range(12)))
def test_a_curriculum_is_a_function_of_seed_and_position(
    sizes: dict[str, int], seed: int, positions: list[int]
) -> None:
    tasks = tasks_of(sizes)
    in_order = [Curriculum(tasks, seed=seed, balance="goal")[k] for k in range(12)]
    curriculum = Curriculum(tasks, seed=seed, balance="goal")
    assert {k: curriculum[k] for k in positions} == dict(enumerate(in_order))


@given(sizes=goal_sizes, seed=st.integers(0, 1000), cycles=st.integers(1, 3))
def test_goals_take_turns_and_each_goal_s_tasks_come_once_a_cycle(
    sizes: dict[str, int], seed: int, cycles: int
) -> None:
    curriculum = Curriculum(tasks_of(sizes), seed=seed, balance="goal")
    length = len(sizes) * max(sizes.values()) * cycles
    drawn = [curriculum[k] for k in range(length)]
    for start in range(0, length, len(sizes)):
        assert sorted(t.goal for t in drawn[start : start + len(sizes)]) == sorted(sizes)
    for goal, size in sizes.items():
        own = [t.id for t in drawn if t.goal == goal]
        for start in range(0, len(own) - size + 1, size):
            assert len(set(own[start : start + size])) == size


def test_balanced_by_task_every_task_comes_once_a_cycle() -> None:
    curriculum = Curriculum(TASKS, seed=3, balance="task")
    cycles = [[curriculum[c * len(TASKS) + k].id for k in range(len(TASKS))] for c in range(3)]
    assert all(sorted(cycle) == sorted(t.id for t in TASKS) for cycle in cycles)
    assert len({tuple(cycle) for cycle in cycles}) == 3  # each cycle in another order


def test_steps_are_consecutive_stretches() -> None:
    curriculum = Curriculum(TASKS, seed=0, balance="goal")
    steps = [task for step in range(4) for task in curriculum.step_tasks(step, count=5)]
    assert steps == [curriculum[k] for k in range(20)]


def test_seeds_give_different_orders() -> None:
    orders = {tuple(Curriculum(TASKS, seed=s, balance="task")[k].id for k in range(11)) for s in range(20)}
    assert len(orders) == 20


def test_every_place_of_a_cycle_is_equally_likely() -> None:
    # 600 cycles of 3 tasks: each task is first in 200 of them, give or take 4 standard deviations.
    curriculum = Curriculum(tasks_of({"a": 3}), seed=1, balance="goal")
    first = Counter(curriculum[3 * cycle].id for cycle in range(600))
    assert all(abs(count - 200) < 4 * (600 * 1 / 3 * 2 / 3) ** 0.5 for count in first.values())


def test_the_curriculum_does_not_change_between_versions() -> None:
    # Runs resumed, and results compared, across versions of this package or of Python rely on it.
    drawn = [Curriculum(TASKS, seed=0, balance="goal")[k].id for k in range(6)]
    assert drawn == ["boil/3", "find/1", "grow/0", "boil/0", "find/0", "grow/0"]


@pytest.mark.parametrize("balance", ["goal", "task"])
def test_balanced_order_is_a_seeded_permutation(balance) -> None:
    order = balanced_order(TASKS, seed=5, balance=balance)
    assert sorted(order, key=lambda t: t.id) == sorted(TASKS, key=lambda t: t.id)
    assert order == balanced_order(TASKS, seed=5, balance=balance)
    assert order != balanced_order(TASKS, seed=6, balance=balance)


@given(sizes=goal_sizes, length=st.integers(1, 30))
def test_any_beginning_of_a_balanced_order_is_as_even_as_the_tasks_allow(sizes: dict[str, int], length: int) -> None:
    counts = Counter(t.goal for t in balanced_order(tasks_of(sizes), seed=0, balance="goal")[:length])
    for goal, size in sizes.items():
        if counts[goal] < size:  # tasks of this goal are left, so no goal is more than one ahead
            assert max(counts.values()) - counts[goal] <= 1


@given(sizes=goal_sizes, episodes=st.integers(1, 40))
def test_panels_are_fixed_nested_and_never_repeat_a_task(sizes: dict[str, int], episodes: int) -> None:
    tasks = tasks_of(sizes)
    drawn = panel(tasks, episodes=episodes, split="iid")
    assert len(drawn) == min(episodes, len(tasks))
    assert drawn == panel(tasks, episodes=episodes + 5, split="iid")[:episodes]
    assert len({t.id for t in drawn}) == len(drawn)


def test_empty_splits_are_user_errors() -> None:
    with pytest.raises(UserError, match="'train' has no tasks"):
        Curriculum([], seed=0, balance="goal")
    with pytest.raises(UserError, match="'ood' has no tasks"):
        panel([], episodes=3, split="ood")
