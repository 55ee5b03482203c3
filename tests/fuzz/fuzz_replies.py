"""Targets where an environment answers: what it may reply with, without a model, and household games well under way."""

from __future__ import annotations

import io
import json
import math
import pickle
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import fuzz_cases
import numpy as np
from babbling_suite import BabblingEnv
from fuzz_models import tiny_policy
from fuzz_target import Throw, Verdict, target

from epo.environments._replies import checked
from epo.environments._worker import MAX_ANSWER_BYTES, _RecordsOnly
from epo.environments._worker import Request as Call
from epo.environments.registry import make_suite
from epo.errors import EnvironmentFailure
from epo.evaluation.panels import summarise
from epo.packing import pack
from epo.recipe import parse_config
from epo.reporting.metrics import rollout_metrics
from epo.rollout import EpisodeSpec, RolloutCollector
from epo.sampling.base import Completion, Request, Sampler
from epo.training.batch import flatten
from epo.training.credit import critic_free_advantages
from epo.training.run_folder import RunFolder
from epo.types import Observation, Step, StopReason, Task, TrajectoryGroup


class Desk:
    """`EnvPool` without processes: what an environment returns is checked, pickled and read as a worker's answer is."""

    def __init__(self, size: int) -> None:
        self.size = size
        # The tokenizer takes most of the time, and seconds for what is huge.
        self._envs = [BabblingEnv(huge=0.0002, longest=200) for _ in range(size)]
        self._answers: dict[int, Any] = {}
        self.oddity = 0.0

    def submit_reset(self, slot: int, task: Task) -> int:
        self._envs[slot].oddity = self.oddity
        return self._submit(slot, Call("reset", task))

    def submit_step(self, slot: int, action: str) -> int:
        return self._submit(slot, Call("step", action))

    def _submit(self, slot: int, call: Call) -> int:
        value = getattr(self._envs[slot], call.method)(call.argument)
        try:
            data = pickle.dumps(checked(call, value))
        except TypeError as error:
            self._answers[slot] = EnvironmentFailure(f"the environment broke its contract: {error}")
        else:
            assert len(data) <= MAX_ANSWER_BYTES
            self._answers[slot] = _RecordsOnly(io.BytesIO(data)).load()
        return slot

    def gather(self, pending: Sequence[int]) -> list[Any]:
        return [self._answers.pop(slot) for slot in pending]

    def restarts(self, slot: int) -> int:
        return 0


class Dice(Sampler):
    """A model that says anything."""

    def __init__(self, vocabulary: int, stop_id: int) -> None:
        self._vocabulary, self._stop_id = vocabulary, stop_id

    def generate(self, requests: Sequence[Request], *, max_tokens: int, **_: Any) -> list[Completion]:
        return [self._answer(request, max_tokens) for request in requests]

    def _answer(self, request: Request, max_tokens: int) -> Completion:
        ids = request.random.integers(self._vocabulary, size=request.random.integers(1, max_tokens + 1))
        numbers = request.random.random(len(ids), dtype=np.float32)
        return Completion(
            episode=request.episode, response_ids=ids, logprobs=-numbers, entropy=numbers,
            finished=bool(ids[-1] == self._stop_id), policy_version=0,
        )  # fmt: skip

    def release(self, episode: int) -> None: ...


@target(
    "replies of environments without a model, through checks, prompts, packing, credit, metrics and records",
    bounded=400,
    full=100_000,
    seconds=120,
)
def unmodelled_replies(folder: Path) -> Iterator[Throw]:
    """A case is one short episode, or a group of two."""
    policy, _ = tiny_policy()
    agent = {"format": "action", "max_response_tokens": 4}
    config = parse_config({"agent": agent, "algorithm": {"name": "grpo"}, "rollout": {"group_size": 2}})
    variants = [
        config.agent.model_copy(
            update={"context": context, "overflow": overflow, "list_actions": listed, "format": form, "prompt": prompt}
        )
        for context in ("transcript", "window")
        for overflow in ("end", "drop_oldest")
        for listed in (True, False)
        for form in ("action", "think_action")
        for prompt in ("brief", "react", "remind")
    ]
    run = RunFolder.create(folder / "run", config, {})
    desk: Any = Desk(2)
    sampler = Dice(len(policy.tokenizer), policy.chat.stop_id)
    collectors = [
        RolloutCollector(desk, sampler, policy.chat, agent, max_turns=3, max_context=room)
        for agent in variants
        for room in (256, 4096)
    ]

    def throw(rng: random.Random) -> Verdict:
        task = Task(suite="babbling", id=str(rng.random()), split="train", goal="any")
        desk.oddity = rng.choice([0.0, 0.1, 0.4])
        members = 2 if rng.random() < 0.2 else 1
        specs = [EpisodeSpec(task=task, seed=(rng.getrandbits(32), member)) for member in range(members)]
        trajectories = rng.choice(collectors).collect(specs, temperature=1.0)
        group = TrajectoryGroup(task=task, trajectories=trajectories)
        survivors = group.survivors
        batch = pack(survivors)
        if len(survivors) > 1:
            data = flatten(batch, survivors, device=policy.device)
            advantages_N = critic_free_advantages([survivors], data, config.algorithm)
            assert len(advantages_N) == batch.num_trained and bool(advantages_N.isfinite().all())
        metrics = rollout_metrics([group])
        panel = summarise("train", trajectories).as_dict()
        assert all(math.isfinite(number) for number in (*metrics.values(), panel["score"]) if number is not None)
        run.add_step(1, metrics, [group])
        for file in (run.trajectories / "step_000001.jsonl", run.index_file, run.metrics_file):
            for line in file.read_bytes().splitlines():
                json.loads(line, parse_constant=lambda name: 1 / 0)
            file.unlink()
        refused = any(t.stop_reason is StopReason.ENVIRONMENT_ERROR for t in trajectories)
        return "refused" if refused else "accepted"

    with mock.patch("os.fsync"):  # three a case; nothing here is about power cuts
        yield throw


def altered(rng: random.Random, action: str) -> str:
    """Nearly `action`: another place, another case, more spaces, a letter less, or something hostile in it."""
    words = action.split()
    match rng.randrange(6):
        case 0:
            return " ".join([*words[:-1], rng.choice(["0", "99", "-1", "1" * 500, words[-1]])])
        case 1:
            return rng.choice([action.upper(), action.title(), f"  {action}\n", action.replace(" ", "   ")])
        case 2:
            rng.shuffle(words)
            return " ".join(words)
        case 3:
            place = rng.randrange(len(action))
            return action[:place] + action[place + 1 :]
        case 4:
            return action + rng.choice(["\x00", ".", "; look", "\n> look", " and look", "\ud800", "\u0300"])
        case _:
            place = rng.randrange(len(action) + 1)
            return action[:place] + fuzz_cases.text(rng) + action[place:]


@target("actions in household games under way", bounded=40, full=20_000, seconds=120, has_workers=True)
def household_actions(folder: Path) -> Iterator[Throw]:
    """Every episode begins with a part of its walkthrough; then random strings, actions that may be done and such that
    are nearly one take turns."""
    options = {
        "counts": {"train": 2, "iid": 0, "ood": 0},
        "max_receptacles": 6,
        "max_copies": 1,
        "density": 0.2,
        "task_types": ["pick_and_place_simple", "pick_heat_then_place_in_recep"],
        "cache": str(folder / "games"),
    }
    suite = make_suite("household", options)
    tasks = suite.tasks("train")
    with suite.make_env() as env:
        here: Observation | None = None

        def begin(rng: random.Random) -> Observation:
            task = rng.choice(tasks)
            walkthrough = env.demonstration(task)
            assert walkthrough is not None
            first = now = env.reset(task)
            for action in walkthrough[: rng.randrange(1, len(walkthrough))]:
                step = env.step(action)
                assert step.understood and not step.terminated
                now = step.observation
            assert now.admissible_actions != first.admissible_actions, "the first state was not left"
            return now

        def throw(rng: random.Random) -> Verdict:
            nonlocal here
            if here is None or rng.random() < 0.02:
                here = begin(rng)
            known = rng.choice(here.admissible_actions or ())
            draw = rng.random()
            step = env.step(known if draw < 0.3 else altered(rng, known) if draw < 0.6 else fuzz_cases.text(rng))
            assert isinstance(step, Step) and isinstance(step.observation.text, str)
            assert 0 <= step.score <= 1 and not (step.success and not step.terminated)
            assert step.understood or draw >= 0.3, f"{known!r} may be done, and was not understood"
            here = None if step.terminated or step.truncated else step.observation
            return "accepted" if step.understood else "refused"

        yield throw
