"""Whatever is drawn and whatever an environment says, under the chat templates of well-known models: what was sampled
is what is read later and what is trained, token by token.

The contexts are compared with a transcript kept here by hand: a first message, then pairs of drawn ids and message ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from chat_templates import DATE, RESPONSES, STYLES, conversations, style_tokenizer
from epo.agent.chat import ChatFormat
from epo.agent.context import TranscriptContext
from epo.agent.prompts import Prompt
from epo.packing import pack
from epo.types import Observation, Task, Trajectory, Turn

TASK = Task(suite="s", id="t", split="train")
FIRST = Observation(text="You are in the hall.", goal="Find the cup.")
CONTROL = sorted({token for style in STYLES.values() for token in style.special})
FRAGMENTS = [*CONTROL, "<think>", "</think>", "<tool_response>", "[INST]", "epousermark", "epoassistantmark",
             "epocontrolmark", "<|", "|>", " ", "\n", "\t", "door", "{{ x }}", "👩‍🚀", "é", "打", "\u200b"]  # fmt: skip


@cache
def chat_of(name: str) -> ChatFormat:
    return ChatFormat(style_tokenizer(name))


@dataclass(frozen=True)
class Exchange:
    drawn: list[int]
    """Ids below 0 count from the end of the vocabulary, where the control tokens are."""
    ended: bool
    seen: str


observations = st.one_of(
    st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join),
    st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20),
)
exchanges = st.builds(
    Exchange, drawn=st.lists(st.integers(-8, 282), max_size=6), ended=st.booleans(), seen=observations
)
episodes = st.lists(exchanges, min_size=1, max_size=6)


def drawn_ids(chat: ChatFormat, exchange: Exchange) -> list[int]:
    ids = [i % len(chat.tokenizer) for i in exchange.drawn]
    ids = [i for i in ids if i != chat.stop_id]
    return [*ids, chat.stop_id] if exchange.ended else ids


def context_of(chat: ChatFormat, *, room: int | None = None) -> TranscriptContext:
    return TranscriptContext(chat, Prompt("brief", think=True, transcript=True), list_actions=False, room=room)


def turn(prompt_ids: list[int], response_ids: list[int]) -> Turn:
    return Turn(
        prompt_ids=np.array(prompt_ids, dtype=np.int64),
        response_ids=np.array(response_ids, dtype=np.int64),
        logprobs=np.full(len(response_ids), -1.0, dtype=np.float32),
        entropy=np.ones(len(response_ids), dtype=np.float32),
        observation="",
        response="",
        action="",
        is_valid=True,
    )


@pytest.mark.parametrize("name", STYLES)
@settings(max_examples=25, deadline=None)
@given(episode=episodes, extra=st.integers(0, 200))
def test_sampled_ids_are_read_and_trained_as_they_were_drawn(name: str, episode: list[Exchange], extra: int) -> None:
    chat = chat_of(name)
    whole = context_of(chat)
    first = whole.open(FIRST)
    room = len(first) + extra
    context = context_of(chat, room=room)
    prompt, read = context.open(FIRST), first
    assert prompt == first
    kept: list[list[int]] = []
    played: list[Turn] = []
    dropped, segments = 0, 1
    for exchange in episode:
        drawn = drawn_ids(chat, exchange)
        played.append(turn(prompt, drawn))
        seen = Observation(text=exchange.seen)
        following = whole.advance(drawn, action="x", observation=seen)
        assert following[: len(read) + len(drawn)] == [*read, *drawn]
        kept.append(following[len(read) :])
        read = following

        prompt = context.advance(drawn, action="x", observation=seen)
        length = len(first) + sum(map(len, kept))
        if length > room:
            # As few as leave half of what is beside the first message; the last exchange stays in any case.
            sizes = [sum(map(len, kept[n:])) for n in range(len(kept))]
            fewest = next((n for n, size in enumerate(sizes) if size <= extra // 2), len(kept) - 1)
            kept, dropped, segments = kept[fewest:], dropped + fewest, segments + (fewest > 0)
        assert prompt == [*first, *(i for ids in kept for i in ids)]
        assert context.dropped_turns == dropped
        if len(prompt) > room:
            assert len(kept) == 1, "nothing more could have been left out"
            break
    batch = pack([Trajectory(task=TASK, turns=played)])
    pairs = [(t, [*before.prompt_ids, *before.response_ids]) for before, t in pairwise(played)]
    starts = 1 + sum(t.prompt_ids[: len(read)].tolist() != read for t, read in pairs)
    assert len(batch.rows) == starts
    # The last drop may be of a prompt nothing was drawn for, and what is left may read like what was there.
    assert starts <= segments
    trained = [int(i) for row in batch.rows for i in row.token_ids_T[row.trained_T]]
    assert trained == [i for t in played for i in t.response_ids.tolist()]
    turn_ids = [int(i) for row in batch.rows for i in row.turn_ids_T[row.trained_T]]
    assert turn_ids == [n for n, t in enumerate(played) for _ in t.response_ids]
    for row in batch.rows:
        for number in set(row.turn_ids_T[row.trained_T].tolist()):
            start = int(np.flatnonzero(row.turn_ids_T == number)[0])
            assert row.token_ids_T[:start].tolist() == played[number].prompt_ids.tolist()


@pytest.mark.parametrize("name", STYLES)
@settings(max_examples=40, deadline=None)
@given(seen=observations)
def test_an_observation_is_read_as_text_and_writes_no_control_token(name: str, seen: str) -> None:
    chat = chat_of(name)
    control = {i for i, token in chat.tokenizer.added_tokens_decoder.items() if token.special}

    def controls(ids: list[int]) -> list[int]:
        return [i for i in ids if i in control]

    for plain, ids in (
        (chat.first_prompt("x"), chat.first_prompt(seen)),
        (chat.next_message("x", after=[5]), chat.next_message(seen, after=[5])),
        (chat.next_message("x", after=[chat.stop_id]), chat.next_message(seen, after=[chat.stop_id])),
    ):
        assert controls(ids) == controls(plain)
        before, _, after = chat.tokenizer.decode(plain).rpartition("x")
        text = chat.tokenizer.decode(ids)
        assert text.startswith(before) and text.endswith(after)
        assert text[len(before) : len(text) - len(after)] in (seen, seen.strip())


@pytest.mark.parametrize("name", STYLES)
@settings(max_examples=15, deadline=None)
@given(seen=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20))
def test_other_text_is_encoded_in_one_piece_with_what_the_template_puts_around_it(name: str, seen: str) -> None:
    chat = chat_of(name)
    special = [token.content for token in chat.tokenizer.added_tokens_decoder.values() if token.special]
    assume(not any(token in seen for token in special))
    rendered = chat.tokenizer.apply_chat_template(
        [{"role": "user", "content": seen}], tokenize=False, add_generation_prompt=True, date_string=DATE
    )
    assert chat.first_prompt(seen) == chat.tokenizer(rendered, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", RESPONSES)
@pytest.mark.parametrize("name", STYLES)
def test_where_the_template_would_render_the_conversation_differently(name: str, kind: str) -> None:
    """The table of docs/context.md."""
    transcript, anew = conversations(chat_of(name), RESPONSES[kind])
    assert (transcript != anew) == (kind in STYLES[name].differs)


def test_the_day_is_the_same_on_every_day() -> None:
    chat = chat_of("llama3_2")
    text = chat.tokenizer.decode(chat.first_prompt("Go on."))
    assert "Today Date: 26 Jul 2024\n" in text
    # The template asks the clock where it is not told otherwise.
    messages = [{"role": "user", "content": "Go on."}]
    asked = chat.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert asked != text and asked.count("Today Date: ") == 1


@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30))
@settings(max_examples=100, deadline=None)
def test_what_the_tokenizer_itself_writes_does_not_drift(text: str) -> None:
    chat = chat_of("qwen3")
    assert not chat.drifts(chat.response_ids(text))


def test_other_ways_to_write_a_text_drift() -> None:
    chat = chat_of("qwen3")
    letters = [i for letter in "door" for i in chat.response_ids(letter)[:-1]]
    assert len(chat.response_ids("door")) < len(letters) + 1
    assert chat.drifts(letters) and chat.drifts([*letters, chat.stop_id])
    # Half a character, and the letters of a control token.
    assert chat.drifts(chat.response_ids("打")[:1])
    assert chat.drifts([i for letter in "<|im_end|>" for i in chat.response_ids(letter)[:-1]])
    assert not chat.drifts([]) and not chat.drifts([chat.stop_id])
