"""Contexts: the transcript is what was read and drawn, token by token; the window shows the last pairs and no more."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_templates import STYLES, style_tokenizer
from epo.agent.chat import ChatFormat
from epo.agent.context import TranscriptContext, WindowContext
from epo.agent.prompts import Prompt
from epo.errors import UserError
from epo.packing import pack
from epo.types import Observation, Task, Trajectory, Turn

VOCABULARY = 283
"""Entries that every style's tokenizer has; the special tokens of a style come after them."""
TASK = Task(suite="s", id="t", split="train")
FIRST = Observation(text="You are in the hall.", goal="Find the cup.", admissible_actions=("look", "go north"))
SECOND = Observation(text="A kitchen.", admissible_actions=("take cup",))


@cache
def chat_of(name: str) -> ChatFormat:
    return ChatFormat(style_tokenizer(name))


def transcript(chat: ChatFormat) -> TranscriptContext:
    return TranscriptContext(chat, Prompt("brief", think=True, transcript=True), list_actions=False)


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
def test_the_template_says_what_ends_a_response(name: str) -> None:
    chat = chat_of(name)
    assert chat.stop_id == chat.tokenizer.convert_tokens_to_ids(STYLES[name].stop)


@st.composite
def responses(draw: st.DrawFn) -> list[tuple[list[int], bool]]:
    """Turns of random ids, most of which no text would encode to, each with and without the end token."""
    ids = st.lists(st.integers(3, VOCABULARY - 1), min_size=0, max_size=6)
    return draw(st.lists(st.tuples(ids, st.booleans()), min_size=1, max_size=5))


@pytest.mark.parametrize("name", STYLES)
@settings(max_examples=20, deadline=None)
@given(turns=responses(), observation=st.text(alphabet="abc xyz.,\n打", max_size=20))
def test_a_prompt_is_the_one_before_plus_what_was_drawn_plus_a_message(
    name: str, turns: list[tuple[list[int], bool]], observation: str
) -> None:
    chat = chat_of(name)
    context = transcript(chat)
    prompt = context.open(FIRST)
    played: list[Turn] = []
    for ids, ended in turns:
        drawn = [*ids, chat.stop_id] if ended or not ids else ids
        played.append(turn(prompt, drawn))
        following = context.advance(drawn, action="x", observation=Observation(text=observation))
        assert following[: len(prompt)] == prompt
        assert following[len(prompt) : len(prompt) + len(drawn)] == drawn
        message = following[len(prompt) + len(drawn) :]
        # The turn is ended exactly once, by the model or, where it was cut, by the message. A style may also end the
        # user's turn with that token.
        ends = [*drawn, *message].index(chat.stop_id)
        assert (ends == len(drawn) - 1) == (drawn[-1] == chat.stop_id)
        again = chat.next_message(observation, after=[5])
        assert message == (again if drawn[-1] != chat.stop_id else again[again.index(chat.stop_id) + 1 :])
        prompt = following
    batch = pack([Trajectory(task=TASK, turns=played)])
    (row,) = batch.rows
    trained = row.token_ids_T[row.trained_T].tolist()
    assert trained == [i for t in played for i in t.response_ids.tolist()]


def test_a_forced_end_token_is_read_but_never_trained() -> None:
    chat = chat_of("chatml")
    context = transcript(chat)
    first = context.open(FIRST)
    cut, ended = [70, 71], [72, chat.stop_id]
    second = context.advance(cut, action="x", observation=SECOND)
    assert second[len(first) + len(cut)] == chat.stop_id
    (row,) = pack([Trajectory(task=TASK, turns=[turn(first, cut), turn(second, ended)])]).rows
    assert not row.trained_T[len(first) + len(cut)]
    assert row.token_ids_T[row.trained_T].tolist() == [70, 71, 72, chat.stop_id]


def test_thoughts_stay_where_the_template_would_take_them_out() -> None:
    chat = chat_of("qwen3")
    context = transcript(chat)
    context.open(FIRST)
    prompt = context.advance(
        chat.response_ids("<think>north?</think><action>go</action>"), action="go", observation=SECOND
    )
    assert chat.tokenizer.decode(prompt) == (
        "<|im_start|>user\nFind the cup.\nYou are in the hall.<|im_end|>\n"
        "<|im_start|>assistant\n<think>north?</think><action>go</action><|im_end|>\n"
        "<|im_start|>user\nA kitchen.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_decode_leaves_out_the_end_token_and_survives_ids_outside_the_vocabulary() -> None:
    chat = chat_of("gemma")
    assert chat.decode(chat.response_ids("go 打")) == "go 打"
    assert chat.decode([*chat.response_ids("go"), 10_000_000]) == "go"
    assert chat.decode([]) == ""


BRIEF_WINDOW = [
    "G\no1",
    "G\no1\n> a1\no2",
    "G\no1\n> a1\no2\n> a2\no3",
    "G\no2\n> a2\no3\n> a3\no4",
]
RULES = (
    "You are an expert agent acting in a text environment.\nYour task: G\n"
    "Each turn, first reason step by step about the situation inside <think> </think>, then give one action inside "
    "<action> </action>.\n\n"
)
REACT_WINDOW = [
    RULES + "Current observation: o1",
    RULES + "You have taken 1 action so far.\nThe last 1 observations and actions:\n"
    "[Observation 1: o1, Action 1: a1]\nCurrent observation: o2",
    RULES + "You have taken 2 actions so far.\nThe last 2 observations and actions:\n"
    "[Observation 1: o1, Action 1: a1]\n[Observation 2: o2, Action 2: a2]\nCurrent observation: o3",
    RULES + "You have taken 3 actions so far.\nEarlier actions: a1\nThe last 2 observations and actions:\n"
    "[Observation 2: o2, Action 2: a2]\n[Observation 3: o3, Action 3: a3]\nCurrent observation: o4",
]
LISTED = {"brief": "\n[look; go north]", "react": "\nAdmissible actions:\n'look'\n'go north'"}


@pytest.mark.parametrize("list_actions", [False, True])
@pytest.mark.parametrize(("name", "expected"), [("brief", BRIEF_WINDOW), ("react", REACT_WINDOW)])
def test_the_window_shows_the_last_two_pairs(name: str, expected: list[str], list_actions: bool) -> None:
    chat = chat_of("tiny")
    context = WindowContext(chat, Prompt(name, think=True, transcript=False), list_actions=list_actions, window=2)

    def seen(number: int) -> Observation:
        goal = "G" if number == 1 else None
        return Observation(text=f"o{number}", goal=goal, admissible_actions=("look", "go north"))

    for _ in range(2):  # the second episode must not remember the first
        prompts = [context.open(seen(1))]
        prompts += [context.advance([9], action=f"a{n}", observation=seen(n + 1)) for n in (1, 2, 3)]
        ending = LISTED[name] if list_actions else ""
        texts = [chat.tokenizer.decode(ids) for ids in prompts]
        assert texts == [f"<|user|>{text}{ending}<|end|><|assistant|>" for text in expected]


@pytest.mark.parametrize("list_actions", [False, True])
@pytest.mark.parametrize("think", [False, True])
@pytest.mark.parametrize("name", ["brief", "react"])
def test_the_transcript_says_the_goal_once(name: str, think: bool, list_actions: bool) -> None:
    rules = (
        RULES
        if think
        else (
            "You are an expert agent acting in a text environment.\nYour task: G\n"
            "Each turn, answer with one action and nothing else.\n\n"
        )
    )
    chat = chat_of("tiny")
    prompt = Prompt(name, think=think, transcript=True)
    context = TranscriptContext(chat, prompt, list_actions=list_actions)
    listed = LISTED[name] if list_actions else ""
    for _ in range(2):
        context.open(Observation(text="o1", goal="G", admissible_actions=("look", "go north")))
        ids = context.advance(chat.response_ids("a1"), action="a1", observation=Observation(text="o2"))
        first = f"{'G' + chr(10) if name == 'brief' else rules}o1{listed}"
        assert (
            chat.tokenizer.decode(ids) == f"<|user|>{first}<|end|><|assistant|>a1<|end|><|user|>o2<|end|><|assistant|>"
        )


def test_the_reminding_transcript_says_the_goal_in_every_message() -> None:
    chat = chat_of("tiny")
    context = TranscriptContext(chat, Prompt("remind", think=False, transcript=True), list_actions=True)
    context.open(Observation(text="o1", goal="G", admissible_actions=("look", "go north")))
    ids = context.advance(chat.response_ids("a1"), action="a1", observation=Observation(text="o2"))
    assert chat.tokenizer.decode(ids) == (
        "<|user|>o1\n[look; go north]\nG<|end|><|assistant|>a1<|end|><|user|>o2\nG<|end|><|assistant|>"
    )


def test_a_window_of_none_shows_no_pairs() -> None:
    chat = chat_of("tiny")
    context = WindowContext(chat, Prompt("react", think=True, transcript=False), list_actions=False, window=0)
    context.open(Observation(text="o1", goal="G"))
    ids = context.advance([9], action="a1", observation=Observation(text="o2"))
    text = "You have taken 1 action so far.\nEarlier actions: a1\nCurrent observation: o2"
    assert chat.tokenizer.decode(ids) == f"<|user|>{RULES}{text}<|end|><|assistant|>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{{ messages[0].content }}", "leaves out earlier responses"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "user's message exactly once"),
        ("{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}", "user's message exactly once"),
        ("{% for", "does not render"),
        ("{{ raise_exception('one role only') }}", "one role only"),
    ],
)
def test_unusable_chat_templates_are_refused(template: str | None, message: str) -> None:
    tokenizer = style_tokenizer("tiny")
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=message):
        ChatFormat(tokenizer)


def test_a_response_that_nothing_ends_is_refused() -> None:
    tokenizer = style_tokenizer("tiny")
    tokenizer.eos_token = None
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(UserError, match="no end-of-sequence token"):
        ChatFormat(tokenizer)


@pytest.mark.parametrize(
    ("source", "message"),
    [("{{ weather }}", "'weather' is undefined"), ("{% if %}", "not a valid Jinja"), ("\xff", "not a valid Jinja")],
)
def test_a_bad_prompt_file_is_a_user_error(tmp_path: Path, source: str, message: str) -> None:
    file = tmp_path / "own.j2"
    file.write_text(source, encoding="latin-1")
    with pytest.raises(UserError, match=message) as caught:
        Prompt(str(file), think=True, transcript=True).render("o", goal="g", admissible_actions=None)
    assert str(file) in str(caught.value)


def test_an_unknown_prompt_names_the_shipped_ones() -> None:
    with pytest.raises(UserError, match=r"agent\.prompt='reakt'.*brief, react"):
        Prompt("reakt", think=True, transcript=True)
