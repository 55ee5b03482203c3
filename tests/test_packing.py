"""Packing: every sampled token is trained exactly once, no other ever, and a transcript costs what it holds."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from epo.packing import extends, pack
from epo.types import PackedRow, Task, Trajectory, Turn

TASK = Task(suite="s", id="t", split="train")


def turn(prompt_ids: list[int], response_ids: list[int], logprobs: list[float] | None = None) -> Turn:
    return Turn(
        prompt_ids=np.array(prompt_ids, dtype=np.int64),
        response_ids=np.array(response_ids, dtype=np.int64),
        logprobs=np.array(logprobs or [-1.0] * len(response_ids), dtype=np.float32),
        entropy=np.ones(len(response_ids), dtype=np.float32),
        observation="",
        response="",
        action="",
        is_valid=True,
    )


def trajectory(*turns: Turn) -> Trajectory:
    return Trajectory(task=TASK, turns=list(turns))


def as_lists(row: PackedRow) -> tuple[list[int], list[int], list[int], list[float], int]:
    return (
        row.token_ids_T.tolist(),
        row.trained_T.astype(int).tolist(),
        row.turn_ids_T.tolist(),
        row.logprobs_T.tolist(),
        row.trajectory_id,
    )


def test_turns_that_extend_each_other_become_one_row() -> None:
    batch = pack(
        [trajectory(turn([1, 2, 3], [4, 5], [-0.5, -0.25]), turn([1, 2, 3, 4, 5, 6, 7], [8, 9], [-2.0, -4.0]))]
    )
    assert [as_lists(row) for row in batch.rows] == [
        (
            [1, 2, 3, 4, 5, 6, 7, 8, 9],
            [0, 0, 0, 1, 1, 0, 0, 1, 1],
            [-1, -1, -1, 0, 0, -1, -1, 1, 1],
            [0.0, 0.0, 0.0, -0.5, -0.25, 0.0, 0.0, -2.0, -4.0],
            0,
        )
    ]
    assert (batch.num_tokens, batch.num_trained, batch.num_trajectories) == (9, 4, 1)


def test_a_changed_prompt_starts_a_new_row_and_turn_numbers_go_on() -> None:
    batch = pack(
        [
            trajectory(turn([1], [2]), turn([1, 2, 3], [4]), turn([7], [8]), turn([7, 8], [9, 9])),
            trajectory(),
            trajectory(turn([5], [])),
        ]
    )
    assert [as_lists(row) for row in batch.rows] == [
        ([1, 2, 3, 4], [0, 1, 0, 1], [-1, 0, -1, 1], [0, -1, 0, -1], 0),
        ([7, 8, 9, 9], [0, 1, 1, 1], [-1, 2, 3, 3], [0, -1, -1, -1], 0),
        ([5], [0], [-1], [0], 2),
    ]
    assert batch.num_trajectories == 3


def test_nothing_packs_to_nothing() -> None:
    assert (pack([]).rows, pack([]).num_tokens, pack([trajectory()]).rows) == ([], 0, [])


def test_one_different_token_anywhere_breaks_the_prefix() -> None:
    before, whole = turn([1, 2], [3, 4]), [1, 2, 3, 4, 5]
    assert extends(turn(whole, [6]), before)
    assert extends(turn(whole[:4], [6]), before)
    assert not extends(turn(whole[:3], [6]), before)
    for position in range(4):
        changed = list(whole)
        changed[position] = 99
        assert not extends(turn(changed, [6]), before)


def test_a_transcript_costs_what_it_holds_and_a_window_what_it_repeats() -> None:
    num_turns, prompt, message, response = 30, 40, 25, 12
    transcript: list[Turn] = []
    ids = [0] * prompt
    for _ in range(num_turns):
        transcript.append(turn(ids, [1] * response))
        ids = ids + [1] * response + [2] * message
    merged = pack([trajectory(*transcript)])
    assert merged.num_tokens == prompt + num_turns * response + (num_turns - 1) * message
    # The same turns rendered anew, here with a counter in front: nothing is a prefix of anything.
    anew = [turn([100 + i, *t.prompt_ids.tolist()], t.response_ids.tolist()) for i, t in enumerate(transcript)]
    split = pack([trajectory(*anew)])
    pairs = num_turns * (num_turns - 1) // 2
    assert split.num_tokens == num_turns * (1 + prompt + response) + pairs * (response + message)
    assert (len(merged.rows), len(split.rows)) == (1, num_turns)
    assert merged.num_trained == split.num_trained == num_turns * response


ids = st.lists(st.integers(0, 3), max_size=4)  # few values, so that prefixes also agree by accident


@st.composite
def episodes(draw: st.DrawFn) -> list[Trajectory]:
    made: list[Trajectory] = []
    for _ in range(draw(st.integers(0, 3))):
        turns: list[Turn] = []
        for number in range(draw(st.integers(0, 5))):
            goes_on = bool(turns) and draw(st.booleans())
            start = [*turns[-1].prompt_ids.tolist(), *turns[-1].response_ids.tolist()] if goes_on else []
            drawn = draw(ids)
            logprobs = [-float(100 * len(made) + 10 * number + i + 1) for i in range(len(drawn))]
            turns.append(turn([*start, *draw(ids)], drawn, logprobs))
        made.append(trajectory(*turns))
    return made


@given(trajectories=episodes())
def test_every_sampled_token_is_trained_once_where_it_was_drawn(trajectories: list[Trajectory]) -> None:
    batch = pack(trajectories)
    found: list[tuple[int, int, int, float, list[int]]] = []
    for row in batch.rows:
        for position in range(len(row)):
            token, logprob = int(row.token_ids_T[position]), float(row.logprobs_T[position])
            turn_id = int(row.turn_ids_T[position])
            if not row.trained_T[position]:
                assert (turn_id, logprob) == (-1, 0.0)
                continue
            found.append((row.trajectory_id, turn_id, token, logprob, row.token_ids_T[:position].tolist()))
    sampled = [
        (i, k, int(token), float(logprob), [*t.prompt_ids.tolist(), *t.response_ids.tolist()[:j]])
        for i, episode in enumerate(trajectories)
        for k, t in enumerate(episode.turns)
        for j, (token, logprob) in enumerate(zip(t.response_ids, t.logprobs, strict=True))
    ]
    assert found == sampled  # in order, each with exactly the tokens before it that the policy had read
