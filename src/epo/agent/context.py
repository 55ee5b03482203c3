"""What the policy reads at each turn, as exact token ids."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from epo.agent.chat import ChatFormat
from epo.agent.prompts import Pair, Prompt
from epo.types import Observation


class Context(ABC):
    """The memory of one episode. `open`, then `advance` after every turn; both return the whole prompt."""

    @abstractmethod
    def open(self, observation: Observation) -> list[int]:
        """The prompt of the first turn."""

    @abstractmethod
    def advance(self, response_ids: Sequence[int], *, action: str, observation: Observation) -> list[int]:
        """The prompt of the next turn, after `response_ids` was drawn and `observation` came back."""


class TranscriptContext(Context):
    """The conversation as it happened: each prompt is the one before, plus the response as drawn, plus one message.

    Cost per episode is linear in its turns: the sampler keeps the keys and values, and packing makes one training row.
    """

    def __init__(self, chat: ChatFormat, prompt: Prompt, *, list_actions: bool) -> None:
        self._chat = chat
        self._prompt = prompt
        self._list_actions = list_actions
        self._ids: list[int] = []
        self._actions: list[str] = []
        self._goal = ""

    def open(self, observation: Observation) -> list[int]:
        self._goal = observation.goal or ""
        self._actions = []
        self._ids = self._chat.first_prompt(self._render(observation))
        return list(self._ids)

    def advance(self, response_ids: Sequence[int], *, action: str, observation: Observation) -> list[int]:
        self._actions.append(action)
        message = self._chat.next_message(self._render(observation), after=response_ids)
        self._ids = [*self._ids, *response_ids, *message]
        return list(self._ids)

    def _render(self, observation: Observation) -> str:
        return self._prompt.render(
            observation.text,
            goal=self._goal,
            admissible_actions=observation.admissible_actions if self._list_actions else None,
            actions=self._actions,
        )


class WindowContext(Context):
    """The paper's context: one message per turn, rendered anew, with the last `window` observation-action pairs."""

    def __init__(self, chat: ChatFormat, prompt: Prompt, *, list_actions: bool, window: int) -> None:
        self._chat = chat
        self._prompt = prompt
        self._list_actions = list_actions
        self._window = window
        self._pairs: list[Pair] = []
        self._observation = ""
        self._goal = ""

    def open(self, observation: Observation) -> list[int]:
        self._goal = observation.goal or ""
        self._pairs = []
        return self._render(observation)

    def advance(self, response_ids: Sequence[int], *, action: str, observation: Observation) -> list[int]:
        self._pairs.append(Pair(len(self._pairs) + 1, self._observation, action))
        return self._render(observation)

    def _render(self, observation: Observation) -> list[int]:
        self._observation = observation.text
        text = self._prompt.render(
            observation.text,
            goal=self._goal,
            admissible_actions=observation.admissible_actions if self._list_actions else None,
            history=self._pairs[max(0, len(self._pairs) - self._window) :],
            actions=[pair.action for pair in self._pairs],
        )
        return self._chat.first_prompt(text)
