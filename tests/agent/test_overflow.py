"""What is left out when a prompt outgrows its room, and that nothing is lost for the update by it."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from chat_templates import style_tokenizer
from epo.agent.chat import ChatFormat
from epo.agent.context import Context, TranscriptContext, WindowContext
from epo.agent.prompts import Prompt
from epo.config import AlgorithmConfig
from epo.objectives import trajectory_weights
from epo.packing import pack
from epo.training.batch import flatten
from epo.training.credit import critic_free_advantages, ppo_advantages
from epo.types import Observation, Task, Trajectory, Turn

CHAT = ChatFormat(style_tokenizer("chatml"))
TASK = Task(suite="s", id="t", split="train")
ACTIONS = ["open door", "take the cup", "look", "go to the kitchen", "close door", "look", "look", "open the door"]


def seen(number: int) -> Observation:
    return Observation(text=f"Room {number}: a cup, a door.", goal="Find it." if number == 0 else None)


def transcript(room: int | None) -> TranscriptContext:
    return TranscriptContext(CHAT, Prompt("brief", think=False, transcript=True), list_actions=False, room=room)


def window(room: int | None, *, size: int) -> WindowContext:
    prompt = Prompt("brief", think=False, transcript=False)
    return WindowContext(CHAT, prompt, list_actions=False, window=size, room=room)


def play(context: Context) -> list[tuple[list[int], int]]:
    """The prompts of an episode, each with how many turns it leaves out."""
    found = [(context.open(seen(0)), context.dropped_turns)]
    for number, action in enumerate(ACTIONS):
        prompt = context.advance(CHAT.response_ids(action), action=action, observation=seen(number + 1))
        found.append((prompt, context.dropped_turns))
    return found


def text(prompt: Sequence[int]) -> str:
    return CHAT.tokenizer.decode(list(prompt))


def test_without_a_room_nothing_is_left_out() -> None:
    assert play(transcript(None)) == play(transcript(10_000))
    assert play(window(None, size=3)) == play(window(10_000, size=3))
    assert {dropped for _, dropped in play(transcript(None))} == {0}


def test_the_first_message_stays_and_whole_exchanges_go() -> None:
    whole = [len(prompt) for prompt, _ in play(transcript(None))]
    room = whole[3]
    context = transcript(room)
    found = play(context)
    assert [prompt for prompt, _ in found[:4]] == [prompt for prompt, _ in play(transcript(None))[:4]]
    prompt, dropped = found[4]
    assert dropped == 3 and text(prompt) == (
        "<|im_start|>user\nFind it.\nRoom 0: a cup, a door.<|im_end|>\n<|im_start|>assistant\n"
        "go to the kitchen<|im_end|>\n<|im_start|>user\nRoom 4: a cup, a door.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert all(len(prompt) <= room for prompt, _ in found)
    assert play(context) == found  # the second episode must not remember the first


def test_several_turns_fit_before_the_next_drop() -> None:
    """In a room for n exchanges of one length, the drops are about n/2 turns apart, not one."""
    context = transcript(None)
    first, action = context.open(seen(0)), CHAT.response_ids("look")
    size = len(context.advance(action, action="look", observation=seen(1))) - len(first)
    context = transcript(len(first) + 8 * size)
    context.open(seen(0))
    drops, before = [], 0
    for number in range(1, 10):
        context.advance(action, action="look", observation=seen(number))
        if context.dropped_turns > before:
            drops.append((number, context.dropped_turns))
        before = context.dropped_turns
    assert drops == [(9, 5)]


def test_what_does_not_fit_at_all_is_returned_too_long() -> None:
    context = transcript(10)
    assert len(context.open(seen(0))) > 10
    prompt = context.advance(CHAT.response_ids("look"), action="look", observation=seen(1))
    assert len(prompt) > 10 and context.dropped_turns == 0
    context = window(10, size=2)
    assert len(context.open(seen(0))) > 10
    prompt = context.advance(CHAT.response_ids("look"), action="look", observation=seen(1))
    assert len(prompt) > 10 and "Room 0" not in text(prompt)


@pytest.mark.parametrize("size", [0, 1, 3])
def test_the_window_shrinks_for_the_turn_that_needs_it(size: int) -> None:
    full = play(window(None, size=size))
    room = sorted(len(prompt) for prompt, _ in full)[len(full) // 2]
    for number, ((prompt, dropped), (wanted, _)) in enumerate(zip(play(window(room, size=size)), full, strict=True)):
        most = min(size, number)
        if len(wanted) <= room:
            assert (prompt, dropped) == (wanted, 0)
            continue
        shown = [play(window(None, size=most - less))[number][0] for less in range(most + 1)]
        fits = [less for less, ids in enumerate(shown) if len(ids) <= room]
        assert dropped == (fits[0] if fits else most)
        assert prompt == shown[dropped]


# ---------------------------------------------------------------- credit


def trajectories(rng: np.random.Generator, *, room: int | None, count: int) -> list[Trajectory]:
    """Same draws and rewards whatever the room: only the prompts differ."""
    made = []
    for _ in range(count):
        context = transcript(room)
        prompt = context.open(seen(0))
        episode = Trajectory(task=TASK)
        for number in range(int(rng.integers(4, 9))):
            action = ACTIONS[int(rng.integers(len(ACTIONS)))]
            ids = CHAT.response_ids(action)
            episode.turns.append(
                Turn(
                    prompt_ids=np.array(prompt, dtype=np.int64),
                    response_ids=np.array(ids, dtype=np.int64),
                    logprobs=rng.uniform(-5, -1, size=len(ids)).astype(np.float32),
                    entropy=rng.uniform(0, 3, size=len(ids)).astype(np.float32),
                    observation=f"Room {int(rng.integers(3))}",
                    response=action,
                    action=action,
                    is_valid=True,
                    environment_reward=float(rng.normal()),
                )
            )
            prompt = context.advance(ids, action=action, observation=seen(number + 1))
        made.append(episode)
    return made


ALGORITHMS = [
    AlgorithmConfig.model_validate({"name": name, **options})
    for name, options in [
        ("ppo", {"advantage": "turn"}), ("ppo", {"advantage": "token", "gamma": 0.9}),
        ("ppo", {"advantage": "bilevel"}), ("ppo", {"advantage": "within_turn"}),
        ("grpo", {}), ("grpo", {"group_statistics": "row"}), ("dr_grpo", {}),
        ("rloo", {}), ("reinforce_pp", {"gamma": 0.9}), ("gigpo", {}), ("gigpo", {"group_statistics": "row"}),
    ]
]  # fmt: skip


@pytest.mark.parametrize("config", ALGORITHMS, ids=lambda c: f"{c.name}-{c.advantage}-{c.group_statistics}")
def test_an_episode_in_several_rows_gets_the_credit_of_one_in_one_row(config: AlgorithmConfig) -> None:
    rng = np.random.default_rng(5)
    whole = trajectories(copy.deepcopy(rng), room=None, count=6)
    split = trajectories(copy.deepcopy(rng), room=140, count=6)
    cpu = torch.device("cpu")
    batches = [pack(whole), pack(split)]
    assert len(batches[0].rows) == 6 and len(batches[1].rows) >= 10
    (a, b) = (flatten(batch, made, device=cpu) for batch, made in zip(batches, (whole, split), strict=True))
    for name in ("trajectory_ids_N", "turn_ids_N", "old_logprobs_N", "old_entropy_N"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert torch.equal(
        trajectory_weights(a.trajectory_ids_N, a.turn_ids_N), trajectory_weights(b.trajectory_ids_N, b.turn_ids_N)
    )
    # Tokens in the order of the rows are the tokens in the order of the turns.
    drawn = [int(i) for episode in split for turn in episode.turns for i in turn.response_ids]
    for batch in batches:
        assert [int(i) for row in batch.rows for i in row.token_ids_T[row.trained_T]] == drawn
    if config.name == "ppo":
        values_N = torch.randn(len(drawn), generator=torch.Generator().manual_seed(0))
        assert all(
            map(torch.equal, ppo_advantages(whole, a, values_N, config), ppo_advantages(split, b, values_N, config))
        )
    else:
        found = critic_free_advantages([split[:3], split[3:]], b, config)
        assert torch.equal(critic_free_advantages([whole[:3], whole[3:]], a, config), found)
        assert found.abs().max() > 0.1
