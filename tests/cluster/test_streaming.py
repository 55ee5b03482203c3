"""Episodes without rounds, in one process: the same trajectories, in whatever order environments answer."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from epo.cluster.streaming import Inbox, Job, StreamingCollector
from epo.config import AgentConfig
from epo.environments import make_suite, register_suite
from epo.environments.pool import EnvPool
from epo.errors import UserError
from epo.rollout import EpisodeSpec, RolloutCollector
from epo.sampling.local import LocalSampler
from epo.training.policy import Policy
from epo.types import StopReason, Trajectory

register_suite("gated", "gated_suite:GatedSuite")
CORRIDOR = {"length": 3, "choices": 2, "tasks": 4}
TASKS = list(make_suite("corridor", CORRIDOR).tasks("train"))
AGENT = AgentConfig(format="action", max_response_tokens=8)
SPECS = [EpisodeSpec(task=task, seed=(7, place)) for place, task in enumerate([*TASKS, *TASKS])]


class Service:
    """A streaming collector in a thread, and what it answered, in that order."""

    def __init__(self, collector: StreamingCollector, *, episode_seconds: float = 600.0) -> None:
        self.inbox, self.order = Inbox(), list[int]()
        self.found: dict[int, Trajectory | BaseException] = {}
        self._news = threading.Condition()

        def serve() -> None:
            with contextlib.suppress(UserError):  # every job has been told
                collector.serve(self.inbox, episode_seconds=episode_seconds, prepare=lambda job: None)

        threading.Thread(target=serve, daemon=True).start()

    def put(self, number: int, spec: EpisodeSpec) -> None:
        def answer(found: Trajectory | BaseException) -> None:
            with self._news:
                assert number not in self.found
                self.found[number] = found
                self.order.append(number)
                self._news.notify_all()

        self.inbox.put(Job(spec=spec, temperature=1.0, alternatives=0, answer=answer))

    def wait(self, count: int) -> list[Any]:
        with self._news:
            assert self._news.wait_for(lambda: len(self.found) >= count, timeout=120)
        return [self.found[number] for number in sorted(self.found)]


def collector(kind: type[RolloutCollector], pool: EnvPool, policy: Policy) -> Any:
    sampler = LocalSampler(policy, max_episodes=pool.size)
    return kind(pool, sampler, policy.chat, AGENT, max_turns=6, max_context=4096)


@pytest.fixture
def roomy(make_policy: Callable[..., Policy]) -> Policy:
    policy = make_policy()
    policy.max_context = 4096
    return policy


@pytest.fixture
def gates(tmp_path: Path) -> Iterator[tuple[Path, EnvPool]]:
    """A pool of two environments, each of which answers a step of task k only while the file k is there."""
    with EnvPool("gated", {"gates": str(tmp_path)}, size=2) as pool:
        yield tmp_path, pool


def test_episodes_are_those_of_rounds(roomy: Policy):
    with EnvPool("corridor", CORRIDOR, size=3) as pool:
        in_rounds = collector(RolloutCollector, pool, roomy).collect(SPECS, temperature=1.0)
    with EnvPool("corridor", CORRIDOR, size=3) as pool:
        service = Service(collector(StreamingCollector, pool, roomy))
        for number, spec in enumerate(SPECS):
            service.put(number, spec)
        for one, other in zip(in_rounds, service.wait(len(SPECS)), strict=True):
            assert [t.response_ids.tolist() for t in one.turns] == [t.response_ids.tolist() for t in other.turns]
            assert (one.stop_reason, one.success, one.score) == (other.stop_reason, other.success, other.score)
            for a, b in zip(one.turns, other.turns, strict=True):
                assert np.abs(a.logprobs - b.logprobs).max() < 1e-4


def test_an_environment_that_waits_holds_up_no_other(gates: tuple[Path, EnvPool], roomy: Policy):
    """Two slots, one held by an episode that gets no answer: the other plays everything else meanwhile."""
    folder, pool = gates
    service = Service(collector(StreamingCollector, pool, roomy))
    for number in range(1, 5):
        (folder / str(number)).touch()
    for number in range(5):
        service.put(number, EpisodeSpec(task=gated_task(number), seed=(7, number)))
    service.wait(4)
    assert service.order == [1, 2, 3, 4]
    (folder / "0").touch()
    assert [t.turns != [] for t in service.wait(5)] == [True] * 5
    assert service.order[-1] == 0


def test_an_episode_past_its_deadline_is_lost_at_its_next_turn(gates: tuple[Path, EnvPool], roomy: Policy):
    folder, pool = gates
    (folder / "0").touch()
    service = Service(collector(StreamingCollector, pool, roomy), episode_seconds=1e-9)
    service.put(0, EpisodeSpec(task=gated_task(0), seed=(7, 0)))
    (late,) = service.wait(1)
    assert late.stop_reason is StopReason.ENVIRONMENT_ERROR and "cluster.episode_seconds" in late.error


def test_an_error_reaches_everybody_who_waits(roomy: Policy):
    with EnvPool("corridor", {"length": 0}, size=1) as pool:
        service = Service(collector(StreamingCollector, pool, roomy))
        for number, spec in enumerate(SPECS[:3]):
            service.put(number, spec)
        assert all(isinstance(answer, UserError) for answer in service.wait(3))


def gated_task(number: int) -> Any:
    return make_suite("gated", {"gates": "/"}).tasks("train")[number]
