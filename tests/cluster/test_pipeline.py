"""Rollouts of later steps during an update: how old weights may be, and that nothing is counted twice."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from epo.cluster.batches import Batches
from epo.cluster.events import EventLog
from epo.cluster.rollouts import ClusterCollector
from epo.cluster.weights import policy_files, publisher
from epo.config import ModelConfig
from epo.environments import make_suite, register_suite
from epo.recipe import load_config
from epo.rollout import EpisodeSpec
from epo.training.policy import Policy, embedded_policy
from epo.types import Task, Trajectory, Turn

register_suite("gated", "gated_suite:GatedSuite")


def spec(step: int, place: int) -> EpisodeSpec:
    task = make_suite("gated", {"gates": "/"}).tasks("train")[place]
    return EpisodeSpec(task=task, seed=(7, step, place))


class Gates:
    """Two episodes a step in a corridor whose every step waits for a file; one worker with three slots; a policy whose
    version the test counts up."""

    def __init__(self, folder: Path, policy: Policy, collector: ClusterCollector) -> None:
        self._folder, self.policy, self.collector = folder, policy, collector
        self._first = 0

    def begin(self) -> None:
        """Versions count from here; all gates are shut."""
        self._first = self.policy.version
        for gate in self._folder.iterdir():
            gate.unlink()

    def open(self, place: int) -> None:
        (self._folder / str(place)).touch()

    def wait_for_knock(self, place: int) -> None:
        """Until an episode of that place has drawn a turn."""
        due = time.monotonic() + 120
        while not (self._folder / f"{place}.knock").exists():
            assert time.monotonic() < due
            time.sleep(0.02)

    def update(self) -> None:
        """As a learner's: other weights, one version on."""
        with torch.no_grad():
            for parameter in self.policy.parameters():
                parameter.mul_(1.01)
        self.policy.version += 1

    def expect(self, step: int, *places: int) -> None:
        self.collector.expect([spec(step, place) for place in places], temperature=1.0)

    def collect(self, step: int, *places: int, on_done: Any = None) -> list[list[int]]:
        """The versions that drew each episode's turns."""
        specs = [spec(step, place) for place in places]
        found = self.collector.collect(specs, temperature=1.0, on_done=on_done)
        return [[turn.policy_version - self._first for turn in trajectory.turns] for trajectory in found]


@pytest.fixture(scope="module")
def service(
    two_nodes: str, tiny_config: ModelConfig, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gates]:
    folder = tmp_path_factory.mktemp("gates")
    config = load_config(
        "base",
        [
            "environment.suite=gated", f"environment.options={{gates: {folder}}}", "environment.max_turns=3",
            "agent.format=action", "agent.max_response_tokens=6", "model.max_context=256", "model.device=cpu",
            "model.threads=1", "cluster={workers: 1, episodes_per_worker: 3, max_staleness: 1, start_seconds: 240}",
        ],
    )  # fmt: skip
    policy = embedded_policy(tokenizer, tiny_config, seed=0)
    with connected(two_nodes):
        events = EventLog(tmp_path_factory.mktemp("log") / "cluster.jsonl", lambda text: None)
        collector = ClusterCollector(config, model=policy_files(policy), weights=publisher(policy), events=events)
        with closing(collector):
            yield Gates(folder, policy, collector)


@pytest.fixture
def gates(service: Gates) -> Gates:
    service.begin()
    return service


@contextmanager
def connected(address: str) -> Iterator[None]:
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    ray.init(address=address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": path}})
    try:
        yield
    finally:
        ray.shutdown()


def test_episodes_that_straddle_an_update_say_which_weights_drew_each_turn(gates: Gates):
    """The first turn of the next step's episode is drawn before the update, the others after it."""
    gates.open(0)
    gates.expect(0, 0)
    gates.expect(1, 0, 1)  # place 1 waits behind its gate after its first turn
    assert versions(gates.collect(0, 0)) == [{0}]
    gates.wait_for_knock(1)
    gates.update()
    gates.collect(9, 0, on_done=None)  # brings the new weights to the worker, and is drawn with nothing else
    gates.open(1)
    fresh, straddling = gates.collect(1, 0, 1)
    assert straddling[0] == 0 and set(straddling[1:]) == {1}
    assert set(fresh) <= {0, 1}


def test_older_weights_than_allowed_are_never_handed_out(gates: Gates):
    """What no trainer does: two updates between what is expected and its collection."""
    gates.expect(1, 1)
    gates.wait_for_knock(1)
    gates.update()
    gates.update()
    gates.open(1)
    with pytest.raises(RuntimeError, match=r"not \d+ or at most 1 before it"):
        gates.collect(1, 1)


def test_a_panel_is_played_with_the_weights_of_the_moment(gates: Gates):
    """Although episodes that were begun with older ones are still in the worker."""
    gates.open(0)
    gates.expect(1, 1)
    assert versions(gates.collect(0, 0)) == [{0}]
    gates.wait_for_knock(1)
    gates.update()
    assert versions(gates.collect(8, 0)) == [{1}]
    gates.open(1)
    assert versions(gates.collect(1, 1)) == [{0, 1}]


def versions(found: list[list[int]]) -> list[set[int]]:
    return [set(turns) for turns in found]


def trajectory(*versions: int) -> Trajectory:
    nothing: Any = []
    turn: dict[str, Any] = dict.fromkeys(("prompt_ids", "response_ids", "logprobs", "entropy"), nothing)
    turn |= {"observation": "", "response": "", "action": "", "is_valid": True}
    task = Task(suite="s", id="t", split="train")
    return Trajectory(task=task, turns=[Turn(policy_version=version, **turn) for version in versions])


def test_an_episode_is_given_out_once_and_counted_once():
    """Interleaved batches, an episode that comes back, and one that comes twice."""
    books = Batches()
    batches = [
        books.enter([spec(step, n) for n in range(3)], temperature=1.0, alternatives=0, max_staleness=1)
        for step in range(2)
    ]
    assert books.enter(batches[1].specs, temperature=1.0, alternatives=0, max_staleness=0) is batches[1]
    batches[1].is_awaited = True
    given = [books.next() for _ in range(6)]
    assert given == [
        (batches[1], 0),
        (batches[1], 1),
        (batches[1], 2),
        (batches[0], 0),
        (batches[0], 1),
        (batches[0], 2),
    ]
    assert books.next() is None and not books.are_done
    batches[0].waiting.appendleft(1)  # its worker was lost
    batches[0].losses[1] += 1
    assert books.next() == (batches[0], 1)
    for batch in batches:
        for place in range(3):
            batch.finish(place, trajectory(3, 4))
    with pytest.raises(AssertionError, match="twice"):
        batches[0].finish(1, trajectory(4))
    assert books.are_done
    assert [t.restarts for t in books.hand_out(batches[0], version=4)] == [0, 1, 0]


@pytest.mark.parametrize(("newest", "is_allowed"), [(3, False), (4, True), (5, True), (6, False)])
def test_the_oldest_token_of_an_episode_decides(newest: int, is_allowed: bool):
    """Drawn with 4 and 5, and allowed to be one update old. That a token is newer than the weights of the moment is a
    mistake, too."""
    books = Batches()
    batch = books.enter([spec(0, 0)], temperature=1.0, alternatives=0, max_staleness=1)
    batch.finish(0, trajectory(4, 4) if newest == 4 else trajectory(4, 5))
    if is_allowed:
        assert len(books.hand_out(batch, version=newest)) == 1
    else:
        with pytest.raises(RuntimeError, match="was drawn with weights"):
            books.hand_out(batch, version=newest)
