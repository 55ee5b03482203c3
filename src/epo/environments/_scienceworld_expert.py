"""Shortens ScienceWorld's gold paths to what an agent needs to see and do.

The simulator's own expert walks door by door, opens doors that are open, looks around in rooms it only crosses, and
calls objects by names that no observation shows ("egg giant tortoise"). The functions here only propose; the caller
replays a proposal and keeps it when it still reaches full success.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

_LOOK = "look around"
_NAVIGATION = re.compile(r"look around|(?:open door to|go to) (?P<room>.+)")
_NAMED_REPLIES = (
    (re.compile(r"focus on .+"), re.compile(r"You focus on the (.+)\."), "focus on {0}"),
    (re.compile(r"pick up .+"), re.compile(r"You move the (.+) to the inventory\."), "pick up {0}"),
    (re.compile(r"move .+ to .+"), re.compile(r"You move the (.+) to the (.+)\."), "move {0} to {1}"),
)


def with_shown_names(actions: Sequence[str], replies: Sequence[str]) -> list[str]:
    """The same actions, calling objects what the simulator called them when it answered."""
    return [_with_shown_name(action, reply) for action, reply in zip(actions, replies, strict=True)]


def _with_shown_name(action: str, reply: str) -> str:
    for action_pattern, reply_pattern, form in _NAMED_REPLIES:
        if action_pattern.fullmatch(action) and (named := reply_pattern.fullmatch(reply)):
            return form.format(*named.groups())
    return action


def shortened(actions: Sequence[str]) -> list[str]:
    """The same work with one `teleport to` per journey and without looks that show nothing new.

    A look stays where the expert looked after a journey, and comes in before a `focus on` in a room just entered: a
    wrong focus ends the episode, so the agent should have seen what it names.
    """
    short: list[str] = []
    for is_journey, run in _runs(actions):
        if not is_journey:
            short.extend(run)
            continue
        rooms = [action.removeprefix("go to ") for action in run if action.startswith("go to ")]
        if rooms:
            short.append(f"teleport to {rooms[-1]}")
        has_waited = bool(short) and short[-1].startswith("wait")
        if run[-1] == _LOOK and (rooms or has_waited):
            short.append(_LOOK)
    return list(_looking_before_focus(short))


def _runs(actions: Sequence[str]) -> Iterator[tuple[bool, list[str]]]:
    """Splits into maximal runs that are navigation only (True) or contain none (False)."""
    run: list[str] = []
    is_journey = False
    for action in actions:
        navigates = _NAVIGATION.fullmatch(action) is not None
        if run and navigates != is_journey:
            yield is_journey, run
            run = []
        is_journey = navigates
        run.append(action)
    if run:
        yield is_journey, run


def _looking_before_focus(actions: Sequence[str]) -> Iterator[str]:
    previous = ""
    for action in actions:
        if action.startswith("focus on ") and previous.startswith("teleport to "):
            yield _LOOK
        yield action
        previous = action
