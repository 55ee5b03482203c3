"""From a response to an action. Never raises: whatever the model wrote, there is an action to send and a verdict."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

ResponseFormat = Literal["action", "think_action"]

MAX_ACTION_CHARACTERS = 500
"""No environment has longer actions; runaway text is cut, and marked invalid."""

_THINK_ACTION = re.compile(r"\s*<think>(?P<think>.*?)</think>\s*<action>(?P<action>.*?)</action>\s*", re.DOTALL)
_ACTION = re.compile(r"<action>(.*?)</action>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ParsedAction:
    action: str
    """What to send to the environment; empty when the response names no action."""
    is_valid: bool
    """The response has the required format."""


def parse_response(text: str, *, response_format: ResponseFormat, finished: bool = True) -> ParsedAction:
    """Read the action out of a response.

    Args:
        text: the decoded response, without the end-of-turn token.
        response_format: `action` (the response is one line, the action) or `think_action`
            (`<think>..</think><action>..</action>`, nothing else).
        finished: the model ended its turn; a response cut at the token limit is never valid.

    Example::

        >>> parse_response("<think>door?</think><action>open door</action>", response_format="think_action")
        ParsedAction(action='open door', is_valid=True)
    """
    if response_format == "action":
        action, is_valid = text.strip(), True
    else:
        whole = _THINK_ACTION.fullmatch(text)
        found = whole["action"] if whole else next(iter(_ACTION.findall(text)), "")
        action, is_valid = found.strip(), whole is not None
    clean = bool(action) and "\n" not in action and len(action) <= MAX_ACTION_CHARACTERS
    return ParsedAction(action[:MAX_ACTION_CHARACTERS], is_valid and clean and finished)


def render_response(action: str, *, response_format: ResponseFormat, thought: str = "") -> str:
    """The response an expert would write for `action`; `parse_response` gives the action back."""
    return action if response_format == "action" else f"<think>{thought}</think><action>{action}</action>"
