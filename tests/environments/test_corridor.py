"""The corridor against brute force: its optimum, the luck of a random agent, and what it says."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epo.environments.corridor import RULE, CorridorEnv, CorridorSuite
from epo.errors import UserError
from epo.types import Step, Task

SPLITS = ("train", "iid", "ood")


def play(env: CorridorEnv, task: Task, actions: list[str]) -> list[Step]:
    """Steps until the actions are used up or the episode ends."""
    env.reset(task)
    steps: list[Step] = []
    for action in actions:
        steps.append(env.step(action))
        if steps[-1].terminated:
            break
    return steps


@given(length=st.integers(1, 7), choices=st.integers(2, 8), strict=st.booleans())
@settings(max_examples=30, deadline=None)
def test_demonstrations_succeed_in_the_optimal_number_of_turns(length: int, choices: int, strict: bool):
    suite = CorridorSuite(length=length, choices=choices, tasks=1, strict=strict)
    with suite.make_env() as env:
        for task in itertools.chain(*map(suite.tasks, SPLITS)):
            demonstration = env.demonstration(task)
            *before, last = play(env, task, demonstration)
            assert last.success and last.terminated and last.reward == 1.0 and last.score == 1.0
            assert not any(step.success or step.terminated or step.reward for step in before)
            assert len(before) + 1 == suite.optimal_turns(task) == (2 * length if task.split == "ood" else length)


@pytest.mark.parametrize("strict", [False, True])
def test_no_shorter_way_and_random_success_by_enumeration(strict: bool):
    """All 3^5 action sequences of five turns in a corridor of three doors."""
    suite = CorridorSuite(length=3, choices=3, tasks=2, strict=strict)
    task, words = suite.tasks("train")[0], list(RULE.values())[:3]
    with suite.make_env() as env:
        for turns in range(6):
            plays = [play(env, task, list(actions)) for actions in itertools.product(words, repeat=turns)]
            wins = sum(any(step.success for step in steps) for steps in plays)
            assert suite.random_success(task, max_turns=turns) == pytest.approx(wins / 3**turns, abs=1e-12)
            assert (wins > 0) == (turns >= 3)


@given(length=st.integers(1, 12), choices=st.integers(2, 8), max_turns=st.integers(0, 60), strict=st.booleans())
@settings(max_examples=100, deadline=None)
def test_random_success_is_the_absorption_probability_of_the_markov_chain(
    length: int, choices: int, max_turns: int, strict: bool
):
    suite = CorridorSuite(length=length, choices=choices, tasks=1, strict=strict)
    stay = 0.0 if strict else 1 - 1 / choices
    chain_SS = np.diag([stay] * length + [1.0]) + np.diag([1 / choices] * length, k=1)
    reached_S = np.linalg.matrix_power(chain_SS, max_turns)[0]
    assert suite.random_success(suite.tasks("train")[0], max_turns=max_turns) == pytest.approx(reached_S[-1], abs=1e-12)


def test_random_agents_succeed_as_often_as_computed():
    suite, episodes, turns = CorridorSuite(length=4, choices=3, tasks=2), 4000, 12
    rng, task = random.Random(1), suite.tasks("iid")[0]
    with suite.make_env() as env:
        words = env.reset(task).admissible_actions
        assert words is not None
        wins = sum(play(env, task, rng.choices(words, k=turns))[-1].success for _ in range(episodes))
    p = suite.random_success(task, max_turns=turns)
    assert 0.3 < p < 0.9
    assert abs(wins / episodes - p) < 5 * (p * (1 - p) / episodes) ** 0.5


def test_a_corridor_in_words():
    suite = CorridorSuite(length=3, choices=3, tasks=4)
    task = Task(suite="corridor", id="train/blue-red-green", split="train")
    with suite.make_env() as env:
        first = env.reset(task)
        assert first.goal == "Walk to the end of the corridor: push red doors, pull blue doors and slide green doors."
        assert first.text == "You stand before a blue door. 3 doors are left."
        assert first.admissible_actions == ("push", "pull", "slide")
        steps = [env.step(action) for action in ["push", "sesame", " Pull\n", "push", "slide"]]
    assert [step.observation.text for step in steps] == [
        "The blue door stays shut. You stand before a blue door. 3 doors are left.",
        "Nothing happens. You stand before a blue door. 3 doors are left.",
        "The blue door opens. You stand before a red door. 2 doors are left.",
        "The red door opens. You stand before a green door. 1 door is left.",
        "The green door opens. You are at the end of the corridor.",
    ]
    assert [step.understood for step in steps] == [True, False, True, True, True]
    assert [step.score for step in steps] == pytest.approx([0, 0, 1 / 3, 2 / 3, 1])
    assert [step.reward for step in steps] == [0, 0, 0, 0, 1]
    assert all(step.observation.goal is None for step in steps)
    assert steps[-1].observation.admissible_actions == ()


def test_a_strict_corridor_punishes_wrong_words_but_not_senseless_ones():
    suite = CorridorSuite(length=2, choices=2, tasks=1, strict=True)
    with suite.make_env() as env:
        env.reset(Task(suite="corridor", id="train/red-red", split="train"))
        assert not env.step("sesame").terminated
        step = env.step("pull")
        assert step.terminated and not step.success and step.reward == 0
        assert step.observation.text == "The red door locks for good. You have failed."
        with pytest.raises(RuntimeError, match="call reset first"):
            env.step("push")


def test_splits_are_fixed_disjoint_and_ood_is_longer():
    suite = CorridorSuite(seed=3)
    by_split = {split: list(suite.tasks(split)) for split in suite.splits}
    assert by_split == {split: list(CorridorSuite(seed=3).tasks(split)) for split in SPLITS}
    assert by_split["train"] != list(CorridorSuite(seed=4).tasks("train"))
    corridors = [task.id.split("/")[1] for tasks in by_split.values() for task in tasks]
    assert len(set(corridors)) == len(corridors) == 3 * 64
    assert {task.goal for task in by_split["train"] + by_split["iid"]} == {"5-doors"}
    assert {task.goal for task in by_split["ood"]} == {"10-doors"}
    assert {(task.suite, task.split) for task in by_split["iid"]} == {("corridor", "iid")}
    assert set("-".join(corridors).split("-")) == {"red", "blue", "green"}


def test_every_corridor_can_be_drawn():
    suite = CorridorSuite(length=3, choices=2, tasks=4, ood_length=2)
    drawn = {task.id.split("/")[1] for split in ("train", "iid") for task in suite.tasks(split)}
    assert drawn == {"-".join(doors) for doors in itertools.product(["red", "blue"], repeat=3)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "'length' must be at least 1, not 0"),
        ({"ood_length": 0}, "'ood_length' must be at least 1, not 0"),
        ({"tasks": 0}, "'tasks' must be at least 1, not 0"),
        ({"choices": 1}, "'choices' must be from 2 to 8, not 1"),
        ({"choices": 9}, "'choices' must be from 2 to 8, not 9"),
        ({"ood_length": 5}, "'ood_length' must differ from 'length'"),
        ({"tasks": 122}, "243 different corridors, fewer than the 244 asked for"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        CorridorSuite(**options)


def test_unknown_splits_and_tasks_are_refused():
    suite = CorridorSuite()
    with pytest.raises(UserError, match=r"no split 'test'; its splits: train, iid, ood"):
        suite.tasks("test")
    with suite.make_env() as env:
        for task in [
            Task(suite="corridor", id="train/red-grey", split="train"),
            Task(suite="corridor", id="train/17", split="train"),
            Task(suite="scienceworld", id="train/red-red", split="train"),
        ]:
            with pytest.raises(UserError, match="not a corridor of red, blue, green doors"):
                env.reset(task)
