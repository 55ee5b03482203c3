"""What a model reads that is reached by messages instead of token ids: the texts of the contexts, as a conversation."""

from __future__ import annotations

from collections.abc import Sequence

from epo.agent.prompts import Pair, Prompt
from epo.types import Observation

Message = dict[str, str]
"""`role` (user or assistant) and `content`."""


class Conversation:
    """The memory of one episode. `open`, then `advance` after every turn; both return all messages to answer.

    The messages have the same text as in `epo.agent.context`; whoever answers puts its own template around them.

    Args:
        window: None for a transcript, whose messages pile up; else the observation-action pairs of the one message
            that is rendered anew at every turn.
    """

    def __init__(self, prompt: Prompt, *, list_actions: bool, window: int | None = None) -> None:
        self._prompt = prompt
        self._list_actions = list_actions
        self._window = window
        self._messages: list[Message] = []
        self._pairs: list[Pair] = []
        self._observation = ""
        self._goal = ""

    def open(self, observation: Observation) -> list[Message]:
        self._goal = observation.goal or ""
        self._pairs = []
        self._messages = []
        return self._say(observation)

    def advance(self, response: str, *, action: str, observation: Observation) -> list[Message]:
        self._pairs.append(Pair(len(self._pairs) + 1, self._observation, action))
        self._messages = [] if self._window is not None else [*self._messages, _message("assistant", response)]
        return self._say(observation)

    def _say(self, observation: Observation) -> list[Message]:
        self._observation = observation.text
        text = self._prompt.render(
            observation.text,
            goal=self._goal,
            admissible_actions=observation.admissible_actions if self._list_actions else None,
            history=self._history(),
            actions=[pair.action for pair in self._pairs],
        )
        self._messages = [*self._messages, _message("user", text)]
        return self._messages

    def _history(self) -> Sequence[Pair]:
        return self._pairs[len(self._pairs) - min(self._window, len(self._pairs)) :] if self._window else ()


def _message(role: str, content: str) -> Message:
    """Halves of surrogate pairs, which no tokenizer takes, are read as question marks."""
    return {"role": role, "content": content.encode("utf-8", "replace").decode()}
