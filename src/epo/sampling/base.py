"""The sampler contract: any subset of the live episodes, in any order, at any time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from epo.types import Alternatives, FloatArray, IntArray


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """Ask for one response of one episode."""

    episode: int
    """Names the episode for as long as it lives; a sampler may keep its keys and values under it."""
    prompt_ids: Sequence[int]
    random: np.random.Generator
    """The episode's own stream of random numbers: what is drawn does not depend on who else is in the batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    episode: int
    response_ids: IntArray
    """[R] sampled tokens, the end token included when it was drawn."""
    logprobs: FloatArray
    """[R] at training temperature."""
    entropy: FloatArray
    """[R] of the full distribution at training temperature, in nats; NaN where the sampler does not know it."""
    finished: bool
    """The model ended its turn; False when the response was cut at the token limit."""
    policy_version: int
    alternatives: Alternatives | None = None
    """As many as were asked for; None for 0."""


class Sampler(ABC):
    """Draws responses. Log-probabilities and entropies are those of the distribution the policy is trained with
    (`train_temperature`), also when a panel is sampled at another temperature."""

    prefill_seconds: float = 0.0
    """Spent so far on reading prompts, for samplers that can tell."""
    decode_seconds: float = 0.0
    """Spent so far on drawing tokens one after the other, for samplers that can tell."""

    @abstractmethod
    def generate(
        self,
        requests: Sequence[Request],
        *,
        temperature: float,
        train_temperature: float,
        max_tokens: int,
        alternatives: int = 0,
    ) -> list[Completion]:
        """One completion per request, in the order of the requests.

        Args:
            requests: of episodes that live, each at most once.
            temperature: of the draw; 0 is greedy.
            train_temperature: of the log-probabilities and entropies returned.
            max_tokens: after which a response is cut.
            alternatives: how many of the most probable tokens to tell at every place.
        """

    @abstractmethod
    def release(self, episode: int) -> None:
        """The episode is over; forget what is kept for it. Unknown episodes are no error."""

    def incidents(self) -> list[str]:
        """What died under the sampler and was mended since the last call, in words; from any thread."""
        return []

    def describe(self) -> str:
        """One line for people: what draws."""
        return type(self).__name__

    def close(self) -> None:  # noqa: B027 - most samplers hold nothing that has to be given back
        """End what the sampler started outside this process. More than once is no error; nothing is drawn after it."""
