"""What an environment returns, checked and made plain before it leaves the worker process."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from typing import TYPE_CHECKING, Any, SupportsFloat, cast

from epo.types import Observation, Step

if TYPE_CHECKING:
    from epo.environments._worker import Request

MAX_CHARACTERS = 100_000
"""Of an observation's text, of its goal, and of all its admissible actions: some 25,000 tokens of English. A megabyte
keeps the tokenizer busy for many seconds, only for the episode to end for lack of room."""
_SHORTEST_ACTION = 10
"""Characters for which an action counts at the least: with what a prompt puts between them, half a million empty ones
are a megabyte, too."""


def checked(request: Request, value: Any) -> Observation | Step | list[str] | None:
    """`value`, returned by the method that `request` names, with strings, floats and booleans of the built-in kinds,
    and no text longer than `MAX_CHARACTERS`: what is cut is said.

    Raises:
        TypeError: it is not what the contract says; tells the field and its kind.
    """
    if request.method == "reset":
        return _observation(value, "reset")
    if request.method == "step":
        return _step(value)
    return None if value is None else list(_texts(value, "demonstration"))


def _step(value: Any) -> Step:
    if not isinstance(value, Step):
        raise TypeError(f"step returned {_kind(value)}, not a Step")
    return Step(
        observation=_observation(value.observation, "step's observation"),
        reward=_number(value.reward, "reward"),
        terminated=_truth(value.terminated, "terminated"),
        truncated=_truth(value.truncated, "truncated"),
        success=_truth(value.success, "success"),
        score=_number(value.score, "score"),
        understood=_truth(value.understood, "understood"),
    )


def _observation(value: Any, what: str) -> Observation:
    if not isinstance(value, Observation):
        raise TypeError(f"{what} returned {_kind(value)}, not an Observation")
    text, actions = _cut(_text(value.text, "text")), value.admissible_actions
    if actions is not None:
        listed = _texts(actions, "admissible_actions")
        actions = _fitting(listed)
        if len(actions) < len(listed):
            text += f"\n[{len(listed) - len(actions)} more actions are not listed]"
    return Observation(
        text=text,
        admissible_actions=actions,
        goal=None if value.goal is None else _cut(_text(value.goal, "goal")),
    )


def _cut(text: str) -> str:
    left = len(text) - MAX_CHARACTERS
    return text if left <= 0 else f"{text[:MAX_CHARACTERS]}\n[{left} more characters are not shown]"


def _fitting(actions: list[str]) -> tuple[str, ...]:
    """The first actions that have no more than `MAX_CHARACTERS` together."""
    lengths = list(accumulate(max(len(action), _SHORTEST_ACTION) for action in actions))
    return tuple(actions[: bisect_right(lengths, MAX_CHARACTERS)])


def _texts(value: Any, field: str) -> list[str]:
    if not isinstance(value, list | tuple):
        raise TypeError(f"{field} is {_kind(value)}, not a sequence of texts")
    return [_text(entry, field) for entry in cast("list[Any]", value)]


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{field} is {_kind(value)}, not text")
    return str.__str__(value)  # of a subclass, which the parent may not know, the plain text


def _number(value: Any, field: str) -> float:
    """NumPy's numbers pass; what is not finite does too, and ends the episode where rewards are added up."""
    if isinstance(value, str | bytes) or not isinstance(value, SupportsFloat):
        raise TypeError(f"{field} is {_kind(value)}, not a number")
    try:
        return float(value)
    except Exception as error:  # an integer of hundreds of digits, and whatever a stranger's own method does
        raise TypeError(f"{field} is {_kind(value)} without a floating-point value ({type(error).__name__})") from None


def _truth(value: Any, field: str) -> bool:
    if type(value).__name__ not in ("bool", "bool_"):  # NumPy's is no subclass
        raise TypeError(f"{field} is {_kind(value)}, not a truth value")
    return bool(value)


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"
