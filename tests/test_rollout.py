"""Episodes against a scripted sampler: every way to end, exact tokens, and no influence of who else is live."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from epo.config import AgentConfig
from epo.environments import make_suite
from epo.environments.pool import EnvPool
from epo.packing import pack
from epo.recipe import parse_config
from epo.reporting.metrics import rollout_metrics
from epo.rollout import EpisodeSpec, RolloutCollector
from epo.sampling.base import Completion, Request, Sampler
from epo.sampling.local import LocalSampler
from epo.training.policy import Policy
from epo.training.run_folder import RunFolder
from epo.types import Step, StopReason, Task, Trajectory, TrajectoryGroup

OPTIONS = {"length": 3, "choices": 2, "tasks": 4}
SUITE = make_suite("corridor", OPTIONS)
TASKS = list(SUITE.tasks("train"))
WORDS = {"red": "push", "blue": "pull"}
AGENT = AgentConfig(format="action", max_response_tokens=8, invalid_action_penalty=0.25)


class Script(Sampler):
    """Says what it is told to, and notes what it was asked."""

    def __init__(self, policy: Policy, say: Callable[[str], str | None]) -> None:
        self.policy, self.say = policy, say
        self.asked: list[list[int]] = []
        self.prompts: dict[int, list[list[int]]] = {}
        self.released: list[int] = []

    def generate(
        self,
        requests: Sequence[Request],
        *,
        temperature: float,
        train_temperature: float,
        max_tokens: int,
        alternatives: int = 0,
    ) -> list[Completion]:
        assert not {r.episode for r in requests} & set(self.released), "nothing is generated for the dead"
        self.asked.append([r.episode for r in requests])
        found = []
        for request in requests:
            self.prompts.setdefault(request.episode, []).append(list(request.prompt_ids))
            said = self.say(self.policy.tokenizer.decode(list(request.prompt_ids)))
            finished = said is not None
            ids = self.policy.chat.response_ids(said if said is not None else "push")
            ids = ids if finished else ids[:-1]
            unknown = np.zeros(len(ids), dtype=np.float32)
            found.append(
                Completion(
                    episode=request.episode, response_ids=np.array(ids), logprobs=unknown, entropy=unknown,
                    finished=finished, policy_version=0,
                )
            )  # fmt: skip
        return found

    def release(self, episode: int) -> None:
        self.released.append(episode)


def right_word(prompt: str) -> str:
    return WORDS[prompt.rpartition("before a ")[2].split()[0]]


@pytest.fixture(scope="module")
def pool() -> Iterator[EnvPool]:
    with EnvPool("corridor", OPTIONS, size=2) as pool:
        yield pool


def specs(tasks: Sequence[Task]) -> list[EpisodeSpec]:
    return [EpisodeSpec(task=task, seed=(7, place)) for place, task in enumerate(tasks)]


@pytest.fixture
def collect(pool: EnvPool, policy: Policy) -> Callable[..., tuple[list[Trajectory], Script]]:
    def run(
        say: Callable[[str], str | None], *, tasks: Sequence[Task] = TASKS, max_turns: int = 6, max_context: int = 4096,
        agent: AgentConfig = AGENT,
    ) -> tuple[list[Trajectory], Script]:  # fmt: skip
        script = Script(policy, say)
        collector = RolloutCollector(pool, script, policy.chat, agent, max_turns=max_turns, max_context=max_context)
        return collector.collect(specs(tasks), temperature=1.0), script

    return run


def test_experts_succeed_in_the_order_of_the_specs(collect: Callable[..., tuple[list[Trajectory], Script]]):
    found, script = collect(right_word)
    assert [t.task for t in found] == TASKS
    for number, t in enumerate(found):
        assert t.success and t.score == 1.0 and t.stop_reason is StopReason.SUCCESS and len(t.turns) == 3
        assert [turn.environment_reward for turn in t.turns] == [0.0, 0.0, 1.0]
        assert t.total_reward == 1.0
        assert t.instruction == "Walk to the end of the corridor: push red doors and pull blue doors."
        assert [turn.prompt_ids.tolist() for turn in t.turns] == script.prompts[number]
        assert [turn.action for turn in t.turns] == [WORDS[c] for c in t.task.id.rpartition("/")[2].split("-")]
    assert sorted(script.released) == [0, 1, 2, 3]
    assert max(map(len, script.asked)) == 2  # never more than there are slots


def test_a_turn_knows_its_thought_and_its_action(
    collect: Callable[..., tuple[list[Trajectory], Script]], policy: Policy
):
    thinking = AGENT.model_copy(update={"format": "think_action"})
    said = iter(["<think>the door</think><action>push</action>", "<think>the door", "push"])
    (found,), _ = collect(lambda prompt: next(said), tasks=TASKS[:1], max_turns=3, agent=thinking)
    whole, cut, neither = found.turns
    assert whole.parts is not None and whole.parts.thought is not None and whole.parts.action is not None
    ids = whole.response_ids.tolist()
    assert policy.chat.decode(ids[slice(*whole.parts.thought)]) == "the door"
    assert policy.chat.decode(ids[slice(*whole.parts.action)]) == "push"
    assert cut.parts == neither.parts == (None, None)
    assert all(turn.parts is None for t in collect(right_word)[0] for turn in t.turns)


def test_a_transcript_grows_and_is_never_rendered_anew(
    collect: Callable[..., tuple[list[Trajectory], Script]], policy: Policy
):
    found, _ = collect(right_word, tasks=TASKS[:1])
    for before, after in zip(found[0].turns, found[0].turns[1:], strict=False):
        whole = [*before.prompt_ids.tolist(), *before.response_ids.tolist()]
        assert after.prompt_ids.tolist()[: len(whole)] == whole
        added = policy.tokenizer.decode(after.prompt_ids.tolist()[len(whole) :])
        assert "door opens" in added and "Walk to the end" not in added


def test_ends_without_success(collect: Callable[..., tuple[list[Trajectory], Script]]):
    (limited,), _ = collect(right_word, tasks=TASKS[:1], max_turns=2)
    assert limited.stop_reason is StopReason.MAX_TURNS and len(limited.turns) == 2
    assert not limited.success and limited.score == pytest.approx(2 / 3)
    (senseless,), _ = collect(lambda prompt: "dance", tasks=TASKS[:1], max_turns=3)
    assert [turn.understood for turn in senseless.turns] == [False] * 3
    assert senseless.stop_reason is StopReason.MAX_TURNS and senseless.total_reward == 0


def test_a_response_that_was_cut_is_invalid_and_costs(collect: Callable[..., tuple[list[Trajectory], Script]]):
    (cut,), _ = collect(lambda prompt: None, tasks=TASKS[:1], max_turns=2)
    assert [turn.is_valid for turn in cut.turns] == [False, False]
    assert cut.total_reward == pytest.approx(-0.5)


def test_prompts_that_outgrow_the_context(collect: Callable[..., tuple[list[Trajectory], Script]]):
    (whole,), _ = collect(right_word, tasks=TASKS[:1])
    lengths = [len(turn.prompt_ids) for turn in whole.turns]
    (second,), _ = collect(right_word, tasks=TASKS[:1], max_context=lengths[1] + AGENT.max_response_tokens)
    assert second.stop_reason is StopReason.CONTEXT_OVERFLOW and len(second.turns) == 2
    (never,), script = collect(right_word, tasks=TASKS[:1], max_context=lengths[0] + AGENT.max_response_tokens - 1)
    assert never.stop_reason is StopReason.CONTEXT_OVERFLOW and never.turns == [] and script.asked == []
    assert never.error == (
        f"the prompt of turn 0 has {lengths[0]} tokens; model.max_context={lengths[0] + 7} less "
        f"agent.max_response_tokens=8 leaves {lengths[0] - 1}"
    )


DROPPING = AGENT.model_copy(update={"overflow": "drop_oldest"})


def test_an_episode_goes_on_without_its_oldest_turns(collect: Callable[..., tuple[list[Trajectory], Script]]):
    ended, _ = collect(lambda prompt: "dance", tasks=TASKS[:1], max_turns=12)
    lengths = [len(turn.prompt_ids) for turn in ended[0].turns]
    found, script = collect(
        lambda prompt: "dance", tasks=TASKS[:2], max_turns=12, max_context=lengths[4] + 8, agent=DROPPING
    )
    for number, t in enumerate(found):
        assert t.stop_reason is StopReason.MAX_TURNS and len(t.turns) == 12 and t.error is None
        assert [turn.prompt_ids.tolist() for turn in t.turns] == script.prompts[number]
        assert max(len(turn.prompt_ids) for turn in t.turns) <= lengths[4]
        dropped = [turn.dropped_turns for turn in t.turns]
        assert dropped[:4] == [0] * 4 and dropped == sorted(dropped) and len(set(dropped)) <= 5
    batch = pack(found)
    metrics = rollout_metrics([TrajectoryGroup(task=TASKS[0], trajectories=found)])
    assert metrics["context/segments"] == len(batch.rows) / 2 >= 3
    assert metrics["context/dropped_turns"] == sum(t.turns[-1].dropped_turns for t in found) / 2 >= 6
    assert metrics["context/drift"] == 0 and metrics["stop/context_overflow"] == 0


def test_not_even_the_last_exchange_fits(collect: Callable[..., tuple[list[Trajectory], Script]]):
    (whole,), _ = collect(right_word, tasks=TASKS[:1])
    size = len(whole.turns[1].prompt_ids) + AGENT.max_response_tokens - 1
    (found,), _ = collect(right_word, tasks=TASKS[:1], max_context=size, agent=DROPPING)
    assert found.stop_reason is StopReason.CONTEXT_OVERFLOW and len(found.turns) == 1
    assert found.error is not None and "the prompt of turn 1 has" in found.error


def test_what_was_drawn_after_a_drop_has_the_probability_that_the_learner_finds(policy: Policy):
    """Rows, positions and kept ids are right, or these would be log-probabilities of something else."""
    agent = DROPPING.model_copy(update={"max_response_tokens": 6, "prompt": "brief"})
    with EnvPool("corridor", OPTIONS, size=2) as pool:
        sampler = LocalSampler(policy, max_episodes=2)
        collector = RolloutCollector(pool, sampler, policy.chat, agent, max_turns=10, max_context=220)
        found = collector.collect(specs(TASKS[:2]), temperature=1.0)
    assert all(len(t.turns) == 10 and t.turns[-1].dropped_turns > 2 for t in found)
    rows = pack(found).rows
    assert len(rows) >= 4
    for row in rows:
        with torch.no_grad():
            logits_T_V = policy.model(torch.from_numpy(row.token_ids_T)[None]).logits[0].double()
        positions = np.flatnonzero(row.trained_T)
        logprobs_T_V = torch.log_softmax(logits_T_V[positions - 1], dim=-1)
        found_n = logprobs_T_V[torch.arange(len(positions)), torch.from_numpy(row.token_ids_T[positions])]
        np.testing.assert_allclose(found_n.numpy(), row.logprobs_T[positions], atol=1e-4)


def test_drift_is_counted_and_nothing_is_encoded_again(
    collect: Callable[..., tuple[list[Trajectory], Script]], policy: Policy, monkeypatch: pytest.MonkeyPatch
):
    letters = [i for letter in "door" for i in policy.chat.response_ids(letter)[:-1]] + [policy.chat.stop_id]
    assert letters != policy.chat.response_ids("door")
    monkeypatch.setattr(policy.chat, "response_ids", lambda text: letters)
    (found,), _ = collect(lambda prompt: "door", tasks=TASKS[:1], max_turns=2)
    assert [turn.action for turn in found.turns] == ["door", "door"]
    assert [turn.response_ids.tolist() for turn in found.turns] == [letters, letters]
    assert rollout_metrics([TrajectoryGroup(task=TASKS[0], trajectories=[found])])["context/drift"] == 1.0
    (row,) = pack([found]).rows
    assert row.token_ids_T[row.trained_T].tolist() == letters * 2


@pytest.mark.parametrize("field", ["reward", "score"])
def test_an_environment_that_pays_no_number_is_at_fault(
    collect: Callable[..., tuple[list[Trajectory], Script]], pool: EnvPool, monkeypatch: pytest.MonkeyPatch, field: str
):
    gather = pool.gather

    def spoilt(pending: Any) -> Any:
        answers = gather(pending)
        return [replace(a, **{field: math.nan}) if isinstance(a, Step) and a.terminated else a for a in answers]

    monkeypatch.setattr(pool, "gather", spoilt)
    (found,), _ = collect(right_word, tasks=TASKS[:1])
    assert found.stop_reason is StopReason.ENVIRONMENT_ERROR and f"{field} nan" in (found.error or "")
    assert math.isfinite(found.total_reward) and math.isfinite(found.score) and not found.success


@pytest.mark.parametrize("field", ["reward", "score"])
@pytest.mark.parametrize("number", [1e308, -1e308, 1e20])
def test_what_would_overflow_when_it_is_added_up_or_squared_is_the_environments_fault(
    collect: Callable[..., tuple[list[Trajectory], Script]],
    pool: EnvPool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    field: str,
    number: float,
):
    gather = pool.gather

    def overpaid(pending: Any) -> Any:
        return [replace(a, **{field: number}) if isinstance(a, Step) else a for a in gather(pending)]

    monkeypatch.setattr(pool, "gather", overpaid)
    found, _ = collect(right_word, tasks=TASKS[:2])
    assert all(t.stop_reason is StopReason.ENVIRONMENT_ERROR and f"{field} {number}" in (t.error or "") for t in found)
    groups = [TrajectoryGroup(task=t.task, trajectories=[t]) for t in found]
    metrics = rollout_metrics(groups)
    assert all(map(math.isfinite, metrics.values()))
    RunFolder.create(tmp_path / "run", parse_config({}), {}).add_step(1, metrics, groups)  # strict JSON


def test_window_contexts_are_rendered_anew(collect: Callable[..., tuple[list[Trajectory], Script]], policy: Policy):
    agent = AGENT.model_copy(update={"context": "window", "window": 1})
    (found,), _ = collect(right_word, tasks=TASKS[:1], agent=agent)
    texts = [policy.tokenizer.decode(turn.prompt_ids.tolist()) for turn in found.turns]
    assert found.success and all("Walk to the end" in text for text in texts)
    assert "Observation 1" in texts[1] and "Observation 2" in texts[2] and "[Observation 1:" not in texts[2]


@pytest.mark.parametrize("size", [1, 3])
def test_what_is_drawn_does_not_depend_on_who_else_is_live(size: int, policy: Policy):
    def play(tasks: list[Any], slots: int) -> list[Trajectory]:
        with EnvPool("corridor", OPTIONS, size=slots) as pool:
            sampler = LocalSampler(policy, max_episodes=slots)
            collector = RolloutCollector(pool, sampler, policy.chat, AGENT, max_turns=3, max_context=256)
            return collector.collect(tasks, temperature=1.0)

    together, alone = play(specs(TASKS), 2), play(specs(TASKS), size)
    for one, other in zip(together, alone, strict=True):
        for a, b in zip(one.turns, other.turns, strict=True):
            assert a.response_ids.tolist() == b.response_ids.tolist() and a.action == b.action
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
            np.testing.assert_allclose(a.entropy, b.entropy, atol=1e-4)
