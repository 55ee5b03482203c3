"""Episodes of a model behind a server are those of the same answers drawn here: prompts, parsing, limits, success."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from chat_stub import Answer, ChatStub, Cut, refuses, says
from epo.config import AgentConfig
from epo.environments import make_suite
from epo.environments.pool import EnvPool
from epo.errors import UserError
from epo.hosted.chat_server import RETRIES, ChatServer
from epo.hosted.collector import HostedCollector
from epo.rollout import EpisodeSpec, RolloutCollector
from epo.sampling.base import Completion, Request, Sampler
from epo.training.policy import Policy
from epo.types import StopReason, Task, Trajectory

OPTIONS = {"length": 3, "choices": 2, "tasks": 4}
TASKS = list(make_suite("corridor", OPTIONS).tasks("train"))
SPECS = [EpisodeSpec(task=task, seed=(7, place)) for place, task in enumerate(TASKS)]
AGENT = AgentConfig(format="think_action", max_response_tokens=40, invalid_action_penalty=0.25)
WORDS = {"red": "push", "blue": "pull"}
Speak = Callable[[str], str]


def expert(seen: str) -> str:
    """Opens the door that was seen last."""
    colour = seen.rpartition("before a ")[2].split()[0]
    return f"<think>{colour}</think><action>{WORDS[colour]}</action>"


def clumsy(seen: str) -> str:
    """Right, wrong, or without the format, as what was seen has it: the same for the same text."""
    say = [expert(seen), "<think>?</think><action>dance</action>", "push", "<action>pull</action> or so"]
    return say[sum(seen.encode()) % 4]


@pytest.fixture(scope="module")
def pool() -> Iterator[EnvPool]:
    with EnvPool("corridor", OPTIONS, size=3) as pool:
        yield pool


def play(pool: EnvPool, url: str, *, agent: AgentConfig = AGENT, timeout_seconds: float = 20.0) -> list[Trajectory]:
    with ChatServer(url, "m", timeout_seconds=timeout_seconds, first_wait_seconds=0.001) as server:
        collector = HostedCollector(pool, server, agent, max_turns=6, max_context=2048)
        return collector.collect(SPECS, temperature=0.5)


class Spoken(Sampler):
    """Says what `speak` says to the last message of the prompt."""

    def __init__(self, policy: Policy, speak: Speak) -> None:
        self.policy, self.speak = policy, speak

    def generate(self, requests: Sequence[Request], **_: Any) -> list[Completion]:
        found = []
        for request in requests:
            last = self.policy.tokenizer.decode(list(request.prompt_ids)).rpartition("<|user|>")[2]
            ids = np.array(self.policy.chat.response_ids(self.speak(last.removesuffix("<|end|><|assistant|>"))))
            found.append(
                Completion(
                    episode=request.episode, response_ids=ids, logprobs=np.zeros(len(ids), np.float32),
                    entropy=np.zeros(len(ids), np.float32), finished=True, policy_version=0,
                )
            )  # fmt: skip
        return found

    def release(self, episode: int) -> None: ...


@pytest.mark.parametrize("speak", [expert, clumsy])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"list_actions": True},
        {"context": "window", "window": 2},
        {"context": "window", "window": 0},
        {"prompt": "remind"},
        {"max_action_characters": 4},
    ],
)
def test_the_same_answers_make_the_same_episodes(
    pool: EnvPool, policy: Policy, speak: Speak, change: dict[str, Any]
) -> None:
    agent = AGENT.model_copy(update=change)
    here = RolloutCollector(pool, Spoken(policy, speak), policy.chat, agent, max_turns=6, max_context=8192)
    expected = here.collect(SPECS, temperature=1.0)
    read: dict[str, list[int]] = {}

    def answer(body: dict[str, Any], number: int) -> Answer:
        messages = body["messages"]
        text = policy.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        read[f"{number}"] = policy.tokenizer(text, add_special_tokens=False)["input_ids"]
        return says(speak(messages[-1]["content"]))

    with ChatStub(answer) as stub:
        found = play(pool, stub.url, agent=agent)
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("task", "instruction", "stop_reason", "success", "score", "error", "total_reward"):
            assert getattr(ours, name) == getattr(theirs, name), name
        assert len(ours.turns) == len(theirs.turns) >= 3
        for a, b in zip(ours.turns, theirs.turns, strict=True):
            for name in ("observation", "response", "action", "is_valid", "understood", "reward", "score"):
                assert getattr(a, name) == getattr(b, name), name
            assert not len(a.prompt_ids) and not len(a.response_ids) and not len(a.entropy) and a.counts is None
    prompts = sorted(turn.prompt_ids.tolist() for t in expected for turn in t.turns)
    assert sorted(read.values()) == prompts, "token by token what a policy here reads"
    if speak is expert:
        assert all(t.success for t in found)


def test_sampling_is_asked_for_and_every_turn_has_a_seed_of_its_own(pool: EnvPool) -> None:
    def run() -> list[tuple[str, int]]:
        with ChatStub(lambda body, _: says(expert(body["messages"][-1]["content"]))) as stub:
            play(pool, stub.url)
        assert {(b["temperature"], b["max_tokens"]) for b in stub.bodies} == {(0.5, 40)}
        return sorted((json.dumps(b["messages"]), b["seed"]) for b in stub.bodies)

    first = run()
    assert len({seed for _, seed in first}) == len(first) == 12 and run() == first


def test_as_many_requests_at_once_as_there_are_slots(pool: EnvPool) -> None:
    together = threading.Barrier(pool.size)

    def answer(body: dict[str, Any], number: int) -> Answer:
        if number < pool.size:  # none is answered before all are there
            together.wait(timeout=60)
        return says(expert(body["messages"][-1]["content"]))

    with ChatStub(answer) as stub:
        found = play(pool, stub.url, timeout_seconds=90.0)
    assert stub.most == pool.size and all(t.success for t in found)


def test_a_slow_episode_holds_up_no_other(pool: EnvPool) -> None:
    order: list[Task] = []

    def answer(body: dict[str, Any], number: int) -> Answer:
        text = body["messages"][0]["content"] + body["messages"][-1]["content"]
        if number == 0:  # answered when the three others are over
            deadline = time.monotonic() + 60
            while len(order) < 3 and time.monotonic() < deadline:
                time.sleep(0.01)
        return says(expert(text))

    with (
        ChatStub(answer) as stub,
        ChatServer(stub.url, "m", timeout_seconds=90.0) as server,
    ):
        collector = HostedCollector(pool, server, AGENT, max_turns=6, max_context=2048)
        found = collector.collect(SPECS, temperature=0.0, on_done=lambda t: order.append(t.task))
    assert [t.task for t in found] == TASKS and all(t.success for t in found)
    assert len(order) == 4 and order != TASKS


@pytest.mark.parametrize(
    ("fault", "reason", "turns"),
    [
        (refuses(400, "we do not talk about doors"), StopReason.SERVER_ERROR, 1),
        (refuses(500, "it broke"), StopReason.SERVER_ERROR, 1),
        (Cut(), StopReason.SERVER_ERROR, 1),
        (refuses(400, code="context_length_exceeded"), StopReason.CONTEXT_OVERFLOW, 1),
    ],
)
def test_one_episode_that_the_server_leaves_is_data(
    pool: EnvPool, fault: Answer, reason: StopReason, turns: int
) -> None:
    doomed = TASKS[1].id.rpartition("/")[2].split("-")

    def answer(body: dict[str, Any], number: int) -> Answer:
        messages = body["messages"]
        seen = [m["content"].rpartition("before a ")[2].split()[0] for m in messages if m["role"] == "user"]
        if len(seen) == 2 and seen == doomed[:2]:
            return fault
        return says(expert(messages[-1]["content"]))

    alike = [t.id.rpartition("/")[2].split("-")[:2] == doomed[:2] for t in TASKS]
    assert not all(alike)
    with ChatStub(answer) as stub:
        found = play(pool, stub.url)
    for trajectory, is_doomed in zip(found, alike, strict=True):
        if is_doomed:
            assert trajectory.stop_reason is reason and len(trajectory.turns) == turns and trajectory.error
            assert not trajectory.success and trajectory.stop_reason.is_error == (reason is StopReason.SERVER_ERROR)
        else:
            assert trajectory.success and trajectory.error is None


def test_a_response_that_was_cut_is_invalid(pool: EnvPool) -> None:
    with ChatStub(lambda body, _: says(expert(body["messages"][-1]["content"]), finish="length")) as stub:
        found = play(pool, stub.url)
    assert all(t.success and not any(turn.is_valid for turn in t.turns) for t in found)
    assert found[0].total_reward == pytest.approx(1 - 3 * 0.25)


def test_a_panel_without_an_answer_measures_nothing(pool: EnvPool) -> None:
    with (
        ChatStub(lambda *_: refuses(400, code="context_length_exceeded")) as stub,
        pytest.raises(UserError, match="answered the first request of no episode"),
    ):
        play(pool, stub.url)
    with (
        ChatStub(lambda *_: refuses(503, "loading")) as stub,
        pytest.raises(UserError, match=f"loading.*{RETRIES + 1} times"),
    ):
        play(pool, stub.url)
    # The pool is as good as before.
    with ChatStub(lambda body, _: says(expert(body["messages"][-1]["content"]))) as stub:
        assert all(t.success for t in play(pool, stub.url))
