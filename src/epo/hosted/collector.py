"""Episodes of a model behind a server: environments and conversations, each at its own pace."""

from __future__ import annotations

import queue
import socket
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from epo.agent.messages import Conversation, Message
from epo.agent.parsing import parse_response
from epo.agent.prompts import Prompt
from epo.config import AgentConfig
from epo.environments.pool import EnvPool, Pending
from epo.errors import EnvironmentFailure, UserError
from epo.hosted.chat_server import ChatServer, PromptTooLong, Refused, Reply
from epo.rollout import EpisodeSpec, RolloutTiming, take_in
from epo.types import Observation, Step, StopReason, Trajectory, Turn

_NO_IDS = np.empty(0, dtype=np.int64)
_NO_NUMBERS = np.empty(0, dtype=np.float32)


@dataclass(kw_only=True, slots=True)
class _Episode:
    number: int
    conversation: Conversation
    trajectory: Trajectory
    random: np.random.Generator
    pending: Pending[Observation] | Pending[Step] | None
    """None while the server is asked."""
    observation: Observation | None = None
    asked: Future[Reply] | None = None


class HostedCollector:
    """Plays episodes with the model of a server; a slot of the pool each, so as many at once as it has.

    Prompts, parsing, limits of turns and success are those of `epo.rollout.RolloutCollector`. How much the model can
    read is for the server to say: where it refuses a conversation as too long, the episode ends with
    `StopReason.CONTEXT_OVERFLOW`. Turns hold no token ids, log-probabilities and entropies.
    """

    def __init__(
        self, pool: EnvPool, server: ChatServer, config: AgentConfig, *, max_turns: int, max_context: int
    ) -> None:
        self._pool = pool
        self._server = server
        self._config = config
        self._max_turns = max_turns
        self.max_context, self.max_response = max_context, config.max_response_tokens
        self._prompt = Prompt(
            config.prompt, think=config.format == "think_action", transcript=config.context == "transcript"
        )
        self.timing = RolloutTiming()

    def collect(
        self,
        specs: Sequence[EpisodeSpec],
        *,
        temperature: float,
        alternatives: int = 0,
        on_done: Callable[[Trajectory], None] | None = None,
    ) -> list[Trajectory]:
        """Play every spec to its end; trajectories in the order of `specs`.

        An episode ends with `StopReason.SERVER_ERROR` when the server leaves one of its requests without an answer.

        Raises:
            UserError: what would go wrong in every episode, such as a wrong key; or not one was answered at all.
        """
        del alternatives
        finished: dict[int, Trajectory] = {}
        waiting = deque(enumerate(specs))
        live: dict[int, _Episode] = {}
        answered: queue.SimpleQueue[int] = queue.SimpleQueue()
        wake, signal = socket.socketpair()

        def ask(slot: int, messages: list[Message]) -> None:
            episode = live[slot]
            episode.asked = self._server.ask(
                messages,
                temperature=temperature,
                max_tokens=self.max_response,
                seed=int(episode.random.integers(2**31)),
            )
            episode.pending = None
            episode.asked.add_done_callback(lambda _: tell(slot))

        def tell(slot: int) -> None:
            answered.put(slot)
            with suppress(OSError):  # nobody listens any more
                signal.send(b"\0")

        def end(slot: int) -> None:
            episode = live.pop(slot)
            episode.trajectory.restarts = self._pool.restarts(slot)
            finished[episode.number] = episode.trajectory
            if on_done is not None:
                on_done(episode.trajectory)

        try:
            while waiting or live:
                for slot in range(self._pool.size):
                    if slot not in live and waiting:
                        live[slot] = self._begin(slot, *waiting.popleft())
                stepping = [episode.pending for episode in live.values() if episode.pending is not None]
                # Whoever is first ends the wait: an environment or the server.
                calls = self._pool.ready(stepping, block=True, wake=wake)
                for call, answer in zip(calls, self._pool.gather(calls), strict=True):
                    messages = self._read(live[call.slot], answer)
                    if messages is None:
                        end(call.slot)
                    else:
                        ask(call.slot, messages)
                is_waited_for = not stepping
                while is_waited_for or not answered.empty():
                    is_waited_for = False
                    wake.recv(1)  # one byte an answer
                    slot = answered.get()
                    if not self._act(slot, live[slot]):
                        end(slot)
        finally:
            for episode in live.values():
                if episode.asked is not None:
                    episode.asked.cancel()
            wake.close()
            signal.close()
        trajectories = [finished[number] for number in range(len(specs))]
        _refuse_unanswered(trajectories, model=self._server.model)
        return trajectories

    def _begin(self, slot: int, number: int, spec: EpisodeSpec) -> _Episode:
        window = None if self._config.context == "transcript" else self._config.window
        return _Episode(
            number=number,
            conversation=Conversation(self._prompt, list_actions=self._config.list_actions, window=window),
            trajectory=Trajectory(task=spec.task),
            random=np.random.default_rng(spec.seed),
            pending=self._pool.submit_reset(slot, spec.task),
        )

    def _read(self, episode: _Episode, answer: Observation | Step | EnvironmentFailure) -> list[Message] | None:
        """Take in what the environment answered; the conversation to go on with, or None: the episode is over."""
        trajectory = episode.trajectory
        observation = take_in(trajectory, answer, max_turns=self._max_turns)
        if observation is None:
            return None
        episode.observation = observation
        if not trajectory.turns:
            return episode.conversation.open(observation)
        turn = trajectory.turns[-1]
        return episode.conversation.advance(turn.response, action=turn.action, observation=observation)

    def _act(self, slot: int, episode: _Episode) -> bool:
        """Do what the server answered; False when there is no answer, and the episode is over."""
        assert episode.asked is not None and episode.observation is not None
        trajectory = episode.trajectory
        try:
            reply = episode.asked.result()
        except Refused as refusal:
            is_long = isinstance(refusal, PromptTooLong)
            trajectory.stop_reason = StopReason.CONTEXT_OVERFLOW if is_long else StopReason.SERVER_ERROR
            trajectory.error = str(refusal)
            return False
        parsed = parse_response(
            reply.text,
            response_format=self._config.format,
            finished=reply.finished,
            longest=self._config.max_action_characters,
        )
        trajectory.turns.append(
            Turn(
                prompt_ids=_NO_IDS,
                response_ids=_NO_IDS,
                logprobs=_NO_NUMBERS,
                entropy=_NO_NUMBERS,
                observation=episode.observation.text,
                response=reply.text,
                action=parsed.action,
                is_valid=parsed.is_valid,
                penalty=0.0 if parsed.is_valid else self._config.invalid_action_penalty,
                counts=reply.counts,
            )
        )
        episode.pending = self._pool.submit_step(slot, parsed.action)
        return True


def _refuse_unanswered(trajectories: Sequence[Trajectory], *, model: str) -> None:
    """A panel on which the model did not say a word measures nothing."""
    unanswered = [t for t in trajectories if not t.turns and t.stop_reason is not StopReason.ENVIRONMENT_ERROR]
    if trajectories and len(unanswered) == len(trajectories):
        raise UserError(f"{model!r} answered the first request of no episode: {unanswered[0].error}")
