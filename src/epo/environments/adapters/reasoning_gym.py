"""The data sets of reasoning-gym: questions made by rules, answers judged by rules, one turn each.

Stojanovski et al., "Reasoning Gym: Reasoning Environments for Reinforcement Learning with Verifiable Rewards",
arXiv 2505.24760.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from epo.environments.adapters._shared import SeededSuite, require
from epo.environments.base import TextEnv
from epo.errors import EnvironmentFailure, UserError
from epo.types import Observation, Step, Task


class ReasoningGymSuite(SeededSuite):
    """One of reasoning-gym's data sets. The answer is the only turn; success is a score of 1.

    `train` and `iid` are different items of one data set; where it has few different questions, they share some.

    Args:
        dataset: its name, such as `chain_sum`.
        options: its configuration, `seed` and `size` aside.
        train: questions in `train`.
        iid: questions in `iid`.
        ood: questions in `ood`, where `ood_options` are given.
        ood_options: configuration in place of `options` in `ood`; without them there is no such split.
        seed: seed of the data set.

    Raises:
        UserError: an option out of its range.
    """

    name = "reasoning_gym"
    library = ("reasoning_gym", "reasoning-gym")

    def __init__(
        self,
        *,
        dataset: str = "chain_sum",
        options: dict[str, Any] | None = None,
        train: int = 256,
        iid: int = 64,
        ood: int = 64,
        ood_options: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        for name in ("seed", "size"):
            if name in {**(options or {}), **(ood_options or {})}:
                raise UserError(f"suite {self.name!r}: {name!r} is the suite's own; leave it out of the options")
        # The library draws item i from seed + i, so different seeds would give shifted copies of the same questions.
        super().__init__(goal=dataset, seed=0, train=train, iid=iid, ood=ood, options=options, ood_options=ood_options)
        self._size = train + iid + (0 if ood_options is None else ood)
        self._dataset, self._seed = dataset, seed

    def make_env(self) -> ReasoningGymEnv:
        return ReasoningGymEnv(self._dataset, options=self._options, seed=self._seed, size=self._size)

    def prepare(self) -> None:
        env = self.make_env()
        for split in self.splits:
            env.dataset(split)

    def provenance(self) -> dict[str, Any]:
        return {
            "reasoning_gym": version("reasoning-gym"),
            "dataset": self._dataset,
            "options": self._options,
            "seed": self._seed,
        }


class ReasoningGymEnv(TextEnv):
    """Asks one question at a time. Options: `ReasoningGymSuite`."""

    def __init__(self, name: str, *, options: dict[str, dict[str, Any]], seed: int, size: int) -> None:
        self._name, self._options, self._seed, self._size = name, options, seed, size
        self._made: dict[str, Any] = {}
        self._task: Task | None = None
        self._entry: dict[str, Any] = {}

    def dataset(self, split: str) -> Any:
        """The data set behind a split.

        Raises:
            UserError: reasoning-gym or the data set is missing, or refuses its options.
        """
        if split not in self._made:
            library = require("reasoning_gym", extra="reasoning-gym")
            try:
                self._made[split] = library.create_dataset(
                    self._name, **self._options[split], seed=self._seed, size=self._size
                )
            except (ValueError, TypeError, AssertionError) as error:
                options = self._options[split]
                raise UserError(f"suite 'reasoning_gym': {self._name!r} with options {options}: {error}") from None
        return self._made[split]

    def reset(self, task: Task) -> Observation:
        self._entry = self._read(task)
        self._task = task
        return Observation(text="What is your answer?", goal=str(self._entry["question"]))

    def step(self, action: str) -> Step:
        if self._task is None:
            raise RuntimeError("the episode is over: call reset first")
        answer = action.encode("utf-8", errors="replace").decode().strip()
        try:
            score = min(1.0, max(0.0, float(self.dataset(self._task.split).score_answer(answer, self._entry))))
        except Exception:  # some judges parse the answer and stumble over what is none
            score = 0.0
        self._task = None
        success = score == 1
        return Step(
            observation=Observation(text="Right." if success else "Wrong."),
            reward=float(success),
            terminated=True,
            success=success,
            score=score,
            understood=bool(answer),
        )

    def demonstration(self, task: Task) -> list[str] | None:
        answer = self._read(task).get("answer")
        return None if answer is None else [str(answer)]

    def _read(self, task: Task) -> dict[str, Any]:
        try:
            return self.dataset(task.split)[task.seed]
        except UserError:
            raise
        except Exception as error:
            raise EnvironmentFailure(f"reasoning-gym failed to make {self._name} {task.seed}: {error!r}") from error
