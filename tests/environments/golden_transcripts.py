"""What ScienceWorld and household games say to the expert, word for word, kept as text under `golden/`.

    python tests/environments/golden_transcripts.py     # writes the files anew: read the difference before keeping it

An upgrade that changes a sentence, a score or what may be done changes these files; results from before and after it
are then not results of the same environment.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from epo.environments import TextEnv
from epo.environments.alfworld import HouseholdSuite
from epo.environments.scienceworld import ScienceWorldSuite
from epo.types import Observation, Task

FOLDER = Path(__file__).parent / "golden"
SCIENCEWORLD = ("find-animal/0", "lifespan-longest-lived/0", "identify-life-stages-1/0")
HOUSEHOLD = {"counts": {"train": 2, "iid": 0, "ood": 0}, "max_receptacles": 4, "max_copies": 1, "density": 0.2}


def scienceworld() -> dict[str, Any]:
    suite = ScienceWorldSuite()
    tasks = [Task(suite="scienceworld", id=i, split="train", goal=i.partition("/")[0]) for i in SCIENCEWORLD]
    facts = {key: value for key, value in suite.provenance().items() if key != "java"}
    with suite.make_env() as env:
        return {"suite": facts, "episodes": episodes(env, tasks)}


def household() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as cache:
        suite = HouseholdSuite(**HOUSEHOLD, cache=cache)
        suite.prepare()
        with suite.make_env() as env:
            found = episodes(env, suite.tasks("train"))
        return {"suite": {"versions": suite.provenance()["versions"]}, "episodes": found}


def episodes(env: TextEnv, tasks: Iterable[Task]) -> list[dict[str, Any]]:
    """Each task from its first observation to the end, by the environment's own demonstration."""
    found: list[dict[str, Any]] = []
    for task in tasks:
        actions = env.demonstration(task)
        assert actions, f"no expert for {task.id}"
        turns: list[dict[str, Any]] = [{"observation": said(env.reset(task))}]
        for action in actions:
            step = env.step(action)
            turns.append(
                {
                    "action": action,
                    "observation": said(step.observation),
                    "reward": step.reward,
                    "score": step.score,
                    "terminated": step.terminated,
                    "success": step.success,
                    "understood": step.understood,
                }
            )
        found.append({"task": task.id, "turns": turns})
    return found


def said(observation: Observation) -> dict[str, Any]:
    said: dict[str, Any] = {"text": observation.text}
    if observation.goal is not None:
        said["goal"] = observation.goal
    if observation.admissible_actions is not None:
        said["admissible_actions"] = sorted(observation.admissible_actions)
    return said


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for play in (scienceworld, household):
        (FOLDER / f"{play.__name__}.json").write_text(json.dumps(play(), indent=1, ensure_ascii=False) + "\n", "utf-8")
