"""Targets: what models say to environments, and environments to models."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fuzz_cases
from fuzz_models import tiny_policy
from fuzz_target import Throw, Verdict, target

from epo.agent.parsing import MAX_ACTION_CHARACTERS, parse_response
from epo.environments.pool import EnvPool
from epo.environments.registry import make_suite, register_suite
from epo.packing import pack
from epo.recipe import parse_config
from epo.rollout import EpisodeSpec, RolloutCollector
from epo.sampling.local import LocalSampler
from epo.training.run_folder import RunFolder
from epo.types import Observation, Step, StopReason, Task, TrajectoryGroup

register_suite("babbling", "babbling_suite:BabblingSuite")


@target("responses through the action parser", bounded=10_000, full=100_000)
def responses(folder: Path) -> Iterator[Throw]:
    def throw(rng: random.Random) -> Verdict:
        text = fuzz_cases.text(rng)
        if rng.random() < 0.3:
            text = f"<think>{text}</think><action>{fuzz_cases.text(rng)}</action>"
        for response_format in ("action", "think_action"):
            parsed = parse_response(text, response_format=response_format, finished=rng.random() < 0.9)
            assert type(parsed.action) is str and len(parsed.action) <= MAX_ACTION_CHARACTERS
            assert not parsed.is_valid or parsed.action in text
        return "accepted" if parsed.is_valid else "refused"

    yield throw


def _steps(suite_name: str, options: dict[str, Any]) -> Iterator[Throw]:
    """Random strings as actions; an episode goes on over cases and begins anew when it is over."""
    suite = make_suite(suite_name, options)
    tasks = suite.tasks("train")
    with suite.make_env() as env:
        playing = False

        def throw(rng: random.Random) -> Verdict:
            nonlocal playing
            if not playing or rng.random() < 0.02:
                assert isinstance(env.reset(rng.choice(tasks)), Observation)
            step = env.step(fuzz_cases.text(rng))
            assert isinstance(step, Step) and isinstance(step.observation.text, str)
            assert 0 <= step.score <= 1 and not (step.success and not step.terminated)
            playing = not step.terminated and not step.truncated
            return "accepted" if step.understood else "refused"

        yield throw


@target("actions in the corridor", bounded=5000, full=100_000)
def corridor_actions(folder: Path) -> Iterator[Throw]:
    yield from _steps("corridor", {})


@target("actions in ScienceWorld", bounded=100, full=3000, seconds=90, has_workers=True)
def scienceworld_actions(folder: Path) -> Iterator[Throw]:
    yield from _steps("scienceworld", {"tasks": ["find-animal", "boil", "power-component"]})


@target(
    "replies of environments, through pool, rollout, packing and run folder", bounded=25, full=300, has_workers=True
)
def replies(folder: Path) -> Iterator[Throw]:
    policy, model = tiny_policy()
    config = parse_config(
        {"agent": {"format": "action", "max_response_tokens": 4}, "model": model.model_dump(mode="json")}
    )
    variants = [
        config.agent.model_copy(update={"context": context, "overflow": overflow, "list_actions": listed})
        for context in ("transcript", "window")
        for overflow in ("end", "drop_oldest")
        for listed in (True, False)
    ]
    run = RunFolder.create(Path(tempfile.mkdtemp(dir=folder)) / "run", config, {})
    sampler = LocalSampler(policy, max_episodes=1)
    step = 0
    with EnvPool("babbling", size=1, max_restarts=1) as pool:

        def throw(rng: random.Random) -> Verdict:
            nonlocal step
            step += 1
            task = Task(
                suite="babbling", id=fuzz_cases.text(rng, longest=8) + str(rng.random()), split="train", goal="any"
            )
            collector = RolloutCollector(pool, sampler, policy.chat, rng.choice(variants), max_turns=6, max_context=512)
            (trajectory,) = collector.collect([EpisodeSpec(task=task, seed=(step,))], temperature=1.0)
            group = TrajectoryGroup(task=task, trajectories=[trajectory])
            if trajectory.turns:
                pack(group.trajectories)
            run.add_step(step, {}, [group])
            (record,) = (run.trajectories / f"step_{step:06d}.jsonl").read_bytes().splitlines()
            json.loads(record, parse_constant=lambda name: 1 / 0)
            return "refused" if trajectory.stop_reason is StopReason.ENVIRONMENT_ERROR else "accepted"

        yield throw
