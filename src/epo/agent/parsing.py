"""From a response to an action. Never raises: whatever the model wrote, there is an action to send and a verdict."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

ResponseFormat = Literal["action", "think_action"]
Span = tuple[int, int]
"""First and end, as for slices."""

MAX_ACTION_CHARACTERS = 500
"""No game has longer actions; runaway text is cut, and marked invalid."""

# Text without any tag: a second pair of tags must not hide inside the first, and no match takes more than linear time.
_PLAIN = r"(?:(?!</?(?:think|action)>).)*+"
_THINK_ACTION = re.compile(rf"\s*<think>{_PLAIN}</think>\s*<action>(?P<action>{_PLAIN})</action>\s*", re.DOTALL)
_THOUGHT = re.compile(rf"<think>(?P<thought>{_PLAIN})</think>", re.DOTALL)
_ACTION = re.compile(rf"<action>(?P<action>{_PLAIN})</action>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ParsedAction:
    action: str
    """What to send to the environment; empty when the response names no action."""
    is_valid: bool
    """The response has the required format."""


def parse_response(
    text: str, *, response_format: ResponseFormat, finished: bool = True, longest: int = MAX_ACTION_CHARACTERS
) -> ParsedAction:
    """Read the action out of a response.

    Args:
        text: the decoded response, without the end-of-turn token.
        response_format: `action` (the response is one line, the action) or `think_action`
            (`<think>..</think><action>..</action>`, nothing else, no tags inside). A response without that format still
            acts: its first `<action>..</action>` is sent.
        longest: characters of an action (`agent.max_action_characters`).
        finished: the model ended its turn; a response cut at the token limit is never valid.

    Example::

        >>> parse_response("<think>door?</think><action>open door</action>", response_format="think_action")
        ParsedAction(action='open door', is_valid=True)
    """
    if response_format == "action":
        action, is_valid = text.strip(), True
    else:
        is_valid = _THINK_ACTION.fullmatch(text) is not None
        found = _ACTION.search(text)
        action = found["action"].strip() if found else ""
    clean = action.splitlines() == [action] and len(action) <= longest
    return ParsedAction(action[:longest], is_valid and clean and finished)


def find_parts(text: str) -> tuple[Span | None, Span | None]:
    """The characters inside the first `<think>..</think>` and inside the first `<action>..</action>` of a response;
    None for a pair of tags that is not there."""
    thought, action = _THOUGHT.search(text), _ACTION.search(text)
    return thought and thought.span("thought"), action and action.span("action")


def render_response(action: str, *, response_format: ResponseFormat, thought: str = "") -> str:
    """The response an expert would write for `action`; `parse_response` gives the action back."""
    return action if response_format == "action" else f"<think>{thought}</think><action>{action}</action>"
