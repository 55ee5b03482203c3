"""What the policy reads at each turn, as exact token ids.

Both contexts can be given a `room`: how many tokens a prompt may have. When the next prompt would have more, they leave
out the oldest turns it would have shown (`agent.overflow: drop_oldest`). A prompt that is too long all the same is
returned as it is; whoever plays the episode ends it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import chain

from epo.agent.chat import ChatFormat
from epo.agent.prompts import Pair, Prompt
from epo.types import Observation


class Context(ABC):
    """The memory of one episode. `open`, then `advance` after every turn; both return the whole prompt."""

    dropped_turns: int = 0
    """Earlier turns that the last prompt leaves out for lack of room."""

    @abstractmethod
    def open(self, observation: Observation) -> list[int]:
        """The prompt of the first turn."""

    @abstractmethod
    def advance(self, response_ids: Sequence[int], *, action: str, observation: Observation) -> list[int]:
        """The prompt of the next turn, after `response_ids` was drawn and `observation` came back."""


class TranscriptContext(Context):
    """The conversation as it happened: each prompt is the one before, plus the response as drawn, plus one message.

    Cost per episode is linear in its turns: the sampler keeps the keys and values, and packing makes one training row.

    Without room for the next prompt a new segment begins: the first message, with the goal, then as many of the latest
    exchanges (a response and the message that answered it) as fill at most half of the room beside the first message,
    and always the last one. Half, so that several turns follow before it happens again: each segment is a training row
    of its own and is read by the sampler from where the first message ends. What is kept are the ids as they were.

    Example, first message P, responses A, messages O, when O3 does not fit::

        P A0 O1 A1 O2 A2 O3    ->    P A2 O3
    """

    def __init__(self, chat: ChatFormat, prompt: Prompt, *, list_actions: bool, room: int | None = None) -> None:
        self._chat = chat
        self._prompt = prompt
        self._list_actions = list_actions
        self._room = room
        self._first: list[int] = []
        self._exchanges: list[list[int]] = []
        self._actions: list[str] = []
        self._goal = ""

    def open(self, observation: Observation) -> list[int]:
        self._goal = observation.goal or ""
        self._actions = []
        self._exchanges = []
        self.dropped_turns = 0
        self._first = self._chat.first_prompt(self._render(observation))
        return list(self._first)

    def advance(self, response_ids: Sequence[int], *, action: str, observation: Observation) -> list[int]:
        self._actions.append(action)
        message = self._chat.next_message(self._render(observation), after=response_ids)
        self._exchanges.append([*response_ids, *message])
        if self._room is not None and self._length() > self._room:
            self._drop_oldest(at_most=len(self._first) + (self._room - len(self._first)) // 2)
        return list(chain(self._first, *self._exchanges))

    def _length(self) -> int:
        return len(self._first) + sum(map(len, self._exchanges))

    def _drop_oldest(self, *, at_most: int) -> None:
        length = self._length()
        while length > at_most and len(self._exchanges) > 1:
            length -= len(self._exchanges.pop(0))
            self.dropped_turns += 1

    def _render(self, observation: Observation) -> str:
        return self._prompt.render(
            observation.text,
            goal=self._goal,
            admissible_actions=observation.admissible_actions if self._list_actions else None,
            actions=self._actions,
        )


class WindowContext(Context):
    """The paper's context: one message per turn, rendered anew, with the last `window` observation-action pairs.

    Where they do not fit into `room`, this turn's prompt shows as many of the latest as do; the next turn starts from
    the full window again.
    """

    def __init__(
        self, chat: ChatFormat, prompt: Prompt, *, list_actions: bool, window: int, room: int | None = None
    ) -> None:
        self._chat = chat
        self._prompt = prompt
        self._list_actions = list_actions
        self._window = window
        self._room = room
        self._pairs: list[Pair] = []
        self._observation = ""
        self._goal = ""

    def open(self, observation: Observation) -> list[int]:
        self._goal = observation.goal or ""
        self._pairs = []
        self.dropped_turns = 0
        self._observation = observation.text
        return self._render(observation, shown=0)

    def advance(self, response_ids: Sequence[int], *, action: str, observation: Observation) -> list[int]:
        self._pairs.append(Pair(len(self._pairs) + 1, self._observation, action))
        self._observation = observation.text
        self.dropped_turns = 0
        most = min(self._window, len(self._pairs))
        ids = self._render(observation, shown=most)
        while self._room is not None and len(ids) > self._room and self.dropped_turns < most:
            self.dropped_turns += 1
            ids = self._render(observation, shown=most - self.dropped_turns)
        return ids

    def _render(self, observation: Observation, *, shown: int) -> list[int]:
        text = self._prompt.render(
            observation.text,
            goal=self._goal,
            admissible_actions=observation.admissible_actions if self._list_actions else None,
            history=self._pairs[len(self._pairs) - shown :],
            actions=[pair.action for pair in self._pairs],
        )
        return self._chat.first_prompt(text)
