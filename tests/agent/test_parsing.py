"""Parsing never raises, and calls valid exactly what has the format."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epo.agent.parsing import MAX_ACTION_CHARACTERS, ParsedAction, ResponseFormat, parse_response, render_response

TAGS = ["<think>", "</think>", "<action>", "</action>"]
# Text made of tags and of what commonly stands around them: hits the format far more often than free text.
pieces = st.lists(st.sampled_from([*TAGS, "go", " ", "\n", "打开门", "<", "/action>"]), max_size=12).map("".join)
texts = st.one_of(st.text(), pieces)
plain = st.text().filter(lambda text: not any(tag in text for tag in TAGS))
actions = plain.map(str.strip).filter(lambda a: a.splitlines() == [a] and len(a) <= MAX_ACTION_CHARACTERS)
formats = st.sampled_from(["action", "think_action"])


def specified_action(text: str) -> str | None:
    """The action of a text in think_action format, None for any other text: the rule, tag by tag, without patterns."""
    positions = [text.find(tag) for tag in TAGS]
    if any(text.count(tag) != 1 for tag in TAGS) or positions != sorted(positions):
        return None
    opening, closing, action_opening, action_closing = positions
    before = text[:opening]
    between = text[closing + len("</think>") : action_opening]
    action = text[action_opening + len("<action>") : action_closing].strip()
    after = text[action_closing + len("</action>") :]
    if before.strip() or between.strip() or after.strip() or not action:
        return None
    return action if len(action.splitlines()) == 1 and len(action) <= MAX_ACTION_CHARACTERS else None


@given(text=texts, response_format=formats, finished=st.booleans())
def test_any_text_gives_an_action_of_bounded_length(text: str, response_format: ResponseFormat, finished: bool) -> None:
    parsed = parse_response(text, response_format=response_format, finished=finished)
    assert len(parsed.action) <= MAX_ACTION_CHARACTERS
    assert not (parsed.is_valid and (not parsed.action or not finished))


@given(text=st.one_of(texts, st.builds("<think>{}</think>{}<action>{}</action>".format, texts, texts, texts)))
def test_valid_exactly_when_the_text_has_the_format(text: str) -> None:
    parsed = parse_response(text, response_format="think_action")
    expected = specified_action(text)
    assert parsed.is_valid == (expected is not None)
    if expected is not None:
        assert parsed.action == expected


@given(action=actions, thought=plain, response_format=formats)
def test_rendered_responses_give_the_action_back(action: str, thought: str, response_format: ResponseFormat) -> None:
    text = render_response(action, response_format=response_format, thought=thought)
    assert parse_response(text, response_format=response_format) == ParsedAction(action, True)
    assert parse_response(text, response_format=response_format, finished=False) == ParsedAction(action, False)


@pytest.mark.parametrize(
    ("text", "action", "is_valid"),
    [
        ("<think>door?</think><action>open door</action>", "open door", True),
        ("  <think></think>\n<action> open door </action>\n", "open door", True),
        ("<think>门关着</think><action>打开门</action>", "打开门", True),
        ("<action>open door</action>", "open door", False),
        ("<think>a</think><action>x</action><action>y</action>", "x", False),
        ("<think>a</think><think>b</think><action>x</action>", "x", False),
        ("<think>a<action>y</action></think><action>x</action>", "y", False),
        ("<think>a</think><action><action>x</action></action>", "x", False),
        ("</action><action>x", "", False),
        ("</action> then <action>x</action>", "x", False),
        ("<action>x</action><think>a</think>", "x", False),
        ("<think>a</think><action>x</action> done", "x", False),
        ("<think>a</think>so <action>x</action>", "x", False),
        ("<think>a</think><action>x\ny</action>", "x\ny", False),
        ("<think>a</think><action></action>", "", False),
        ("<think>a</think><action>  </action>", "", False),
        ("<Think>a</Think><Action>x</Action>", "", False),
        ("open door", "", False),
        ("", "", False),
    ],
)
def test_think_action_examples(text: str, action: str, is_valid: bool) -> None:
    assert parse_response(text, response_format="think_action") == ParsedAction(action, is_valid)


@pytest.mark.parametrize(
    ("text", "action", "is_valid"),
    [
        ("open door", "open door", True),
        (" open door\n", "open door", True),
        ("打开门", "打开门", True),
        ("open door\ngo north", "open door\ngo north", False),
        ("open door\r\x0bgo", "open door\r\x0bgo", False),
        ("", "", False),
        (" \n", "", False),
    ],
)
def test_action_examples(text: str, action: str, is_valid: bool) -> None:
    assert parse_response(text, response_format="action") == ParsedAction(action, is_valid)


@pytest.mark.parametrize("length", [MAX_ACTION_CHARACTERS, MAX_ACTION_CHARACTERS + 1, 10_000])
@pytest.mark.parametrize("response_format", ["action", "think_action"])
def test_runaway_actions_are_cut_and_invalid(length: int, response_format: ResponseFormat) -> None:
    text = render_response("x" * length, response_format=response_format)
    parsed = parse_response(text, response_format=response_format)
    assert parsed == ParsedAction("x" * min(length, MAX_ACTION_CHARACTERS), length <= MAX_ACTION_CHARACTERS)
    assert parse_response(text, response_format=response_format, longest=length) == ParsedAction("x" * length, True)
