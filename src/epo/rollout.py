"""Episodes: environments and a sampler, round by round, into trajectories.

A round steps every live episode once and then draws one response for every live episode. Episodes join as slots become
free and leave when they end, so nothing is generated for the dead, and which episodes share a round depends on their
lengths only, never on timing: the same seed gives the same trajectories.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from epo.agent.chat import ChatFormat
from epo.agent.context import Context, TranscriptContext, WindowContext
from epo.agent.parsing import find_parts, parse_response
from epo.agent.prompts import Prompt
from epo.config import AgentConfig
from epo.environments.pool import EnvPool, Pending
from epo.errors import EnvironmentFailure
from epo.sampling.base import Completion, Request, Sampler
from epo.types import Observation, ResponseParts, Step, StopReason, Task, Trajectory, Turn

LARGEST = 1e12
"""Of a reward or a score, without its sign: sums over the episodes of a step stay finite, and so do squares of rewards
in single precision, in which advantages are computed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EpisodeSpec:
    """One episode to play."""

    task: Task
    seed: tuple[int, ...]
    """Entropy of the episode's own random numbers; the same seed and policy draw the same responses."""


@dataclass(kw_only=True, slots=True)
class RolloutTiming:
    """Seconds of the last `collect`, by what was waited for."""

    environment: float = 0.0
    sampling: float = 0.0
    prefill: float = 0.0
    """Part of `sampling`; 0 for a sampler that does not tell."""
    decode: float = 0.0
    """Part of `sampling`; 0 for a sampler that does not tell."""
    workers: float = 0.0
    """Waiting for rollout workers elsewhere, which do the above without being asked for it."""


class Collector(Protocol):
    """Plays episodes with the current policy (`RolloutCollector` has the meanings)."""

    timing: RolloutTiming
    max_context: int
    max_response: int

    def collect(
        self,
        specs: Sequence[EpisodeSpec],
        *,
        temperature: float,
        alternatives: int = 0,
        on_done: Callable[[Trajectory], None] | None = None,
    ) -> list[Trajectory]: ...


class TrainingCollector(Collector, Protocol):
    """One that may be told of episodes ahead of time."""

    def expect(self, specs: Sequence[EpisodeSpec], *, temperature: float, alternatives: int = 0) -> None:
        """`specs` will be collected later; they may be begun with the weights of the moment."""
        ...


@dataclass(kw_only=True, slots=True)
class Episode:
    """One that is being played."""

    number: int
    context: Context
    trajectory: Trajectory
    random: np.random.Generator
    pending: Pending[Observation] | Pending[Step]
    observation: Observation | None = None
    prompt_ids: list[int] = field(default_factory=list[int])


class ContextFactory:
    """Makes the context of each episode from the agent's configuration.

    Args:
        max_context: tokens of prompt and response together, at most.
    """

    def __init__(self, chat: ChatFormat, config: AgentConfig, *, max_context: int) -> None:
        self._chat = chat
        self._config = config
        self.room = max_context - config.max_response_tokens
        """Tokens a prompt may have, so that the longest response still fits."""
        self._prompt = Prompt(
            config.prompt, think=config.format == "think_action", transcript=config.context == "transcript"
        )

    def __call__(self) -> Context:
        shown = self._config.list_actions
        room = self.room if self._config.overflow == "drop_oldest" else None
        if self._config.context == "transcript":
            return TranscriptContext(self._chat, self._prompt, list_actions=shown, room=room)
        return WindowContext(self._chat, self._prompt, list_actions=shown, window=self._config.window, room=room)


def take_in(
    trajectory: Trajectory, answer: Observation | Step | EnvironmentFailure, *, max_turns: int
) -> Observation | None:
    """Add what the environment answered to the last turn of `trajectory`.

    Returns:
        What the agent reads next; None when the episode is over, and `trajectory` says why.
    """
    if isinstance(answer, EnvironmentFailure):
        trajectory.stop_reason, trajectory.error = StopReason.ENVIRONMENT_ERROR, str(answer)
        return None
    if isinstance(answer, Observation):
        trajectory.instruction = answer.goal
        return answer
    if not (abs(answer.reward) <= LARGEST and abs(answer.score) <= LARGEST):  # NaN is not, either
        trajectory.stop_reason = StopReason.ENVIRONMENT_ERROR
        trajectory.error = (
            f"the environment answered with reward {answer.reward} and score {answer.score}; finite numbers of at most "
            f"{LARGEST:g} are taken"
        )
        return None
    turn = trajectory.turns[-1]
    turn.environment_reward = answer.reward
    turn.understood, turn.score = answer.understood, answer.score
    trajectory.success, trajectory.score = answer.success, answer.score
    if answer.terminated:
        trajectory.stop_reason = StopReason.SUCCESS if answer.success else StopReason.FAILURE
        return None
    if answer.truncated or len(trajectory.turns) >= max_turns:
        trajectory.stop_reason = StopReason.MAX_TURNS
        return None
    return answer.observation


class RolloutCollector:
    """Plays episodes with the current policy."""

    def __init__(
        self,
        pool: EnvPool,
        sampler: Sampler,
        chat: ChatFormat,
        config: AgentConfig,
        *,
        max_turns: int,
        max_context: int,
        train_temperature: float = 1.0,
    ) -> None:
        self._pool = pool
        self._sampler = sampler
        self._chat = chat
        self._config = config
        self._make_context = ContextFactory(chat, config, max_context=max_context)
        self._max_turns = max_turns
        self.max_context = max_context
        self.max_response = config.max_response_tokens
        self._train_temperature = train_temperature
        self.timing = RolloutTiming()

    def expect(self, specs: Sequence[EpisodeSpec], *, temperature: float, alternatives: int = 0) -> None:
        """Nothing is begun early where learner and sampler are one."""

    def collect(
        self,
        specs: Sequence[EpisodeSpec],
        *,
        temperature: float,
        alternatives: int = 0,
        on_done: Callable[[Trajectory], None] | None = None,
    ) -> list[Trajectory]:
        """Play every spec to its end; trajectories in the order of `specs`. `alternatives` of the most probable tokens
        are kept at every place.

        An episode whose environment fails for good ends with `StopReason.ENVIRONMENT_ERROR`; one whose prompt outgrows
        the context, also after what `agent.overflow` leaves out, ends with `StopReason.CONTEXT_OVERFLOW`, possibly
        before its first turn. Neither disturbs the others.
        """
        self.timing = RolloutTiming()
        finished: dict[int, Trajectory] = {}
        waiting = deque(enumerate(specs))
        live: dict[int, Episode] = {}

        def finish(slot: int) -> None:
            episode = live.pop(slot)
            finished[episode.number] = self._leave(slot, episode)
            if on_done is not None:
                on_done(episode.trajectory)

        while waiting or live:
            for slot in range(self._pool.size):
                if slot not in live and waiting:
                    live[slot] = self._begin(slot, *waiting.popleft())
            for slot in self._receive(live):
                finish(slot)
            if live:
                for slot, completion in self._respond(live, temperature=temperature, alternatives=alternatives):
                    self._act(slot, live[slot], completion)
        return [finished[number] for number in range(len(specs))]

    def _begin(self, slot: int, number: int, spec: EpisodeSpec) -> Episode:
        return Episode(
            number=number,
            context=self._make_context(),
            trajectory=Trajectory(task=spec.task),
            random=np.random.default_rng(spec.seed),
            pending=self._pool.submit_reset(slot, spec.task),
        )

    def _leave(self, slot: int, episode: Episode) -> Trajectory:
        """The episode is over; its slot is free."""
        self._sampler.release(episode.number)
        episode.trajectory.restarts = self._pool.restarts(slot)
        return episode.trajectory

    def _receive(self, live: dict[int, Episode]) -> list[int]:
        """Take in what the environments answered; returns the slots whose episode is over."""
        start = time.perf_counter()
        slots = sorted(live)
        answers = self._pool.gather([live[slot].pending for slot in slots])
        self.timing.environment += time.perf_counter() - start
        return [slot for slot, answer in zip(slots, answers, strict=True) if self._ends(live[slot], answer)]

    def _ends(self, episode: Episode, answer: Observation | Step | EnvironmentFailure) -> bool:
        trajectory = episode.trajectory
        observation = take_in(trajectory, answer, max_turns=self._max_turns)
        if observation is None:
            return True
        episode.observation = observation
        if trajectory.turns:
            turn = trajectory.turns[-1]
            episode.prompt_ids = episode.context.advance(
                turn.response_ids.tolist(), action=turn.action, observation=observation
            )
        else:
            episode.prompt_ids = episode.context.open(observation)
        if len(episode.prompt_ids) > self._make_context.room:
            trajectory.stop_reason = StopReason.CONTEXT_OVERFLOW
            trajectory.error = (
                f"the prompt of turn {len(trajectory.turns)} has {len(episode.prompt_ids)} tokens; model.max_context="
                f"{self.max_context} less agent.max_response_tokens={self.max_response} leaves "
                f"{self._make_context.room}"
            )
            return True
        return False

    def _respond(
        self, live: dict[int, Episode], *, temperature: float, alternatives: int
    ) -> list[tuple[int, Completion]]:
        start, prefill, decode = time.perf_counter(), self._sampler.prefill_seconds, self._sampler.decode_seconds
        slots = sorted(live)
        completions = self._sampler.generate(
            [Request(episode=live[s].number, prompt_ids=live[s].prompt_ids, random=live[s].random) for s in slots],
            temperature=temperature,
            train_temperature=self._train_temperature,
            max_tokens=self._config.max_response_tokens,
            alternatives=alternatives,
        )
        self.timing.sampling += time.perf_counter() - start
        self.timing.prefill += self._sampler.prefill_seconds - prefill
        self.timing.decode += self._sampler.decode_seconds - decode
        return list(zip(slots, completions, strict=True))

    def _act(self, slot: int, episode: Episode, completion: Completion) -> None:
        assert episode.observation is not None
        response_ids = completion.response_ids.tolist()
        text = self._chat.decode(response_ids)
        parsed = parse_response(
            text,
            response_format=self._config.format,
            finished=completion.finished,
            longest=self._config.max_action_characters,
        )
        episode.trajectory.turns.append(
            Turn(
                prompt_ids=np.array(episode.prompt_ids, dtype=np.int64),
                response_ids=completion.response_ids,
                logprobs=completion.logprobs,
                entropy=completion.entropy,
                alternatives=completion.alternatives,
                observation=episode.observation.text,
                response=text,
                action=parsed.action,
                parts=self._parts(response_ids, text),
                is_valid=parsed.is_valid,
                penalty=0.0 if parsed.is_valid else self._config.invalid_action_penalty,
                dropped_turns=episode.context.dropped_turns,
                drifted=self._chat.drifts(response_ids),
                policy_version=completion.policy_version,
            )
        )
        episode.pending = self._pool.submit_step(slot, parsed.action)

    def _parts(self, response_ids: list[int], text: str) -> ResponseParts | None:
        if self._config.format != "think_action":
            return None
        spans = (span and self._chat.tokens_inside(response_ids, text, span) for span in find_parts(text))
        return ResponseParts(*spans)
