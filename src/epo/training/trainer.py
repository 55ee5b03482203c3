"""The training loop. Reads like Algorithm 1 of EPO (arXiv 2509.22576 v2).

for k = 0 .. K-1:
    collect D_k with pi_old
    advantages and L^MT
    L^H, H_ref, L^smooth (none at k = 0), beta_k
    minimise L^EPO
    append the mean entropy of D_k to the history
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from epo.config import Config
from epo.environments.base import TaskSuite
from epo.environments.pool import EnvPool
from epo.errors import UserError
from epo.evaluation.panels import PanelResult, evaluate
from epo.objectives import make_control
from epo.objectives.control import EntropyControl
from epo.reporting.health import Health
from epo.reporting.metrics import entropy_oscillation, rollout_metrics
from epo.reporting.timetable import time_metrics
from epo.rollout import EpisodeSpec, RolloutCollector, TrainingCollector
from epo.sampling.base import Sampler
from epo.sampling.local import LocalSampler
from epo.seeds import TRAINING_STREAM
from epo.tasks import Curriculum, panel
from epo.training.checkpoint import best_evaluation, checkpoints, load_checkpoint, save_checkpoint, step_of
from epo.training.halting import Halt
from epo.training.machine import MachineWatch
from epo.training.policy import Policy
from epo.training.run_folder import RunFolder
from epo.training.skipped import SkippedBatch, save_skipped
from epo.training.trainer_state import TrainerState
from epo.types import Trajectory, TrajectoryGroup

AnyCollector = TypeVar("AnyCollector", bound=RolloutCollector)


class MetricsLog(Protocol):
    """Where numbers go besides the run folder's files."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def evaluated(self, step: int, results: Sequence[PanelResult]) -> None: ...


class Observer(Protocol):
    """Who watches a run. Calls come from the training process, in order."""

    def begin(self, what: str, total: int) -> None:
        """A stage of `total` units starts, such as the episodes of a step; 0 where their number is not known."""

    def advance(self, done: int, note: str = "") -> None:
        """`done` units of the stage are finished."""

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """RL step `step` (from 1) is finished."""

    def evaluated(self, step: int, results: Sequence[PanelResult]) -> None:
        """The panels were played after `step` RL steps."""

    def note(self, text: str) -> None:
        """Something a person should read."""


class StepLearner(Protocol):
    """What one RL step needs of a learner, wherever it computes (`epo.training.learner.Learner` has the meanings)."""

    skipped: list[SkippedBatch]

    def rescore(self, groups: Sequence[TrajectoryGroup]) -> Sequence[TrajectoryGroup]: ...

    def input_dependence(self, groups: Sequence[TrajectoryGroup], *, step: int) -> dict[str, float]: ...

    def update(self, groups: Sequence[TrajectoryGroup], *, step: int) -> dict[str, float]: ...

    def seconds(self) -> dict[str, float]: ...

    def reference_digest(self) -> str | None: ...

    def write(self, folder: Path) -> dict[str, Any]: ...

    def read(self, folder: Path, control: dict[str, Any]) -> None: ...


class Trainer:
    """Trains a learner on the episodes that a collector plays, and leaves everything worth knowing in the run folder.

    Args:
        collector: plays with the learner's weights of the moment.
        resume_from: a checkpoint of the same configuration, from which the learner's policy was loaded.
        watch: adds what it sees of the machine to every step's metrics; nothing by default.
    """

    def __init__(
        self,
        config: Config,
        suite: TaskSuite,
        run: RunFolder,
        observer: Observer,
        *,
        learner: StepLearner,
        collector: TrainingCollector,
        resume_from: Path | None = None,
        watch: MachineWatch | None = None,
    ) -> None:
        self.config = config
        self.run = run
        self.observer = observer
        self.learner = learner
        self.collector = collector
        self.watch = watch
        self.curriculum = Curriculum(suite.tasks("train"), seed=config.seed, balance=config.rollout.balance)
        self.panels = {
            split: panel(suite.tasks(split), episodes=config.evaluation.episodes, split=split)
            for split in config.evaluation.splits
        }
        digest = learner.reference_digest()
        self.state = TrainerState(reference=digest)
        self.stop_requested = False
        self.halt: Halt | None = None
        """Set when an alarm of `health.halt` ended the run."""
        self.health = Health(config.health)
        self.log: MetricsLog | None = None
        if resume_from is not None:
            kept = load_checkpoint(resume_from, learner, run=run.id)
            self.state = TrainerState.kept_in(resume_from, kept)
            if self.state.reference != digest:
                raise UserError(
                    "the model that the KL loss refers to is no longer the one this run started from: put the model "
                    "directory and the packages back as they were, or start a new run with another --name"
                )
            for metrics in run.metrics()[: self.state.step]:
                self.health.observe(metrics)
        for warning in control_of(config).warnings():
            observer.note(f"{config.entropy.method}: {warning}")

    def train(self) -> bool:
        """Run to the last step; False when it ended early: on `stop_requested` after a checkpoint, or when an alarm
        of `health.halt` was on, without one."""
        config, total = self.config, self.config.steps
        if not self.state.evaluations:
            self.evaluate()
            if self.is_best() or self.stop_requested or total == 0:
                self.save()
        while self.state.step < total and not self.stop_requested:
            start = time.perf_counter()
            groups = self.collect(self.state.step)
            rollout_seconds = time.perf_counter() - start
            groups = self.learner.rescore(groups)
            metrics = self.learner.input_dependence(groups, step=self.state.step)
            metrics |= self.learner.update(groups, step=self.state.step)
            step_seconds = time.perf_counter() - start
            self.state.step += 1
            self.state.wall_seconds += step_seconds
            self.record(groups, metrics, rollout_seconds=rollout_seconds, step_seconds=step_seconds)
            if self.halt is not None:
                return False
            last = self.state.step == total
            if last or (config.evaluation.every and self.state.step % config.evaluation.every == 0):
                self.evaluate()
            due = self.state.step % config.checkpoint.every == 0
            if last or due or self.is_best() or self.stop_requested:
                self.save()
        return self.state.step >= total

    def collect(self, step: int) -> list[TrajectoryGroup]:
        """Play the step's episodes: `tasks_per_step` tasks, `group_size` times each. Those of the steps after it may
        begin, too, as `cluster.max_staleness` allows."""
        rollout, total = self.config.rollout, self.config.steps
        how: dict[str, Any] = {"temperature": rollout.temperature, "alternatives": self.config.record.alternatives}
        for next_step in range(step, min(step + self.config.cluster.max_staleness, total - 1) + 1):
            self.collector.expect(self.episodes(next_step), **how)
        specs, size = self.episodes(step), rollout.group_size
        self.observer.begin(f"step {step + 1}/{total}", len(specs))
        trajectories = self.collector.collect(specs, on_done=count_episodes(self.observer), **how)
        return [
            TrajectoryGroup(task=specs[start].task, trajectories=trajectories[start : start + size])
            for start in range(0, len(specs), size)
        ]

    def episodes(self, step: int) -> list[EpisodeSpec]:
        """The episodes of a step, group by group: a function of the seed and the step."""
        rollout = self.config.rollout
        return [
            EpisodeSpec(task=task, seed=(self.config.seed, TRAINING_STREAM, step, place, member))
            for place, task in enumerate(self.curriculum.step_tasks(step, count=rollout.tasks_per_step))
            for member in range(rollout.group_size)
        ]

    def record(
        self,
        groups: Sequence[TrajectoryGroup],
        update_metrics: dict[str, float],
        *,
        rollout_seconds: float,
        step_seconds: float,
    ) -> None:
        """Write the step's metrics and trajectories."""
        metrics = rollout_metrics(groups) | update_metrics
        if "entropy/mean" in metrics:  # absent when every environment failed
            self.state.entropy_by_step.append(metrics["entropy/mean"])
        metrics["entropy/oscillation"] = entropy_oscillation(self.state.entropy_by_step)
        tokens = sum(t.num_tokens for group in groups for t in group.trajectories)
        timing = self.collector.timing
        rollout = {phase: getattr(timing, phase) for phase in ("environment", "prefill", "decode", "workers")}
        metrics |= time_metrics(
            rollout | self.learner.seconds(),
            step_seconds=step_seconds,
            rollout_seconds=rollout_seconds,
            sampling_seconds=timing.sampling,
        )
        metrics |= {"tokens/sampled": float(tokens), "tokens/per_second": tokens / step_seconds}
        if self.watch is not None:
            metrics |= self.watch.metrics()
        verdict = self.health.observe(metrics)
        metrics |= verdict.metrics()
        kept = save_skipped(
            self.run.skipped, self.learner.skipped, step=self.state.step, keep=self.config.record.skipped
        )
        self.run.add_step(self.state.step, metrics, groups)
        if self.log is not None:
            self.log.step(self.state.step, metrics)
        self.observer.step(self.state.step, metrics)
        for path in kept:
            self.observer.note(f"an optimiser step was skipped: a loss or gradient is not finite; its batch is {path}")
        for note in verdict.notes():
            self.observer.note(note)
        if alarms := tuple(name for name in verdict.active if name in self.config.health.halt):
            saved = {step_of(path): path for path in checkpoints(self.run.checkpoints)}
            good = self.health.last_good(saved, alarms=self.config.health.halt)
            self.halt = Halt(verdict=verdict, alarms=alarms, last_good=None if good is None else saved[good])

    def evaluate(self) -> list[PanelResult]:
        """Play the fixed panels; the whole ones before and after training, their first episodes in between."""
        start = time.perf_counter()
        evaluation = self.config.evaluation
        is_interim = 0 < self.state.step < self.config.steps
        count = (evaluation.interim_episodes if is_interim else None) or evaluation.episodes
        results: list[PanelResult] = []
        for split, tasks in self.panels.items():
            self.observer.begin(f"evaluate {split}", min(count, len(tasks)))
            results.append(
                evaluate(
                    self.collector,
                    tasks[:count],
                    split=split,
                    temperature=evaluation.temperature,
                    on_done=count_episodes(self.observer),
                )
            )
        self.state.wall_seconds += time.perf_counter() - start
        entry = {"step": self.state.step, "panels": [result.as_dict() for result in results]}
        self.state.evaluations.append(entry)
        self.run.add_evaluation(entry)
        if self.log is not None:
            self.log.evaluated(self.state.step, results)
        self.observer.evaluated(self.state.step, results)
        return results

    def is_best(self) -> bool:
        """Whether this step was evaluated and is the best so far, where `checkpoint.best` asks for it to be kept."""
        best = best_evaluation(self.state.evaluations)
        return self.config.checkpoint.best and best is not None and best[0] == self.state.step

    def save(self) -> None:
        """Write a checkpoint from which the run goes on exactly. Two are never dropped: the best by evaluation, and the
        last good one: the newest earlier one that no alarm speaks against (of `health.halt`, where it names any), nor
        may at the next step."""
        # Not the one that is about to be written: an alarm at the next step speaks against it.
        steps = map(step_of, checkpoints(self.run.checkpoints))
        good = self.health.last_good(steps, alarms=self.config.health.halt, suspecting=True)
        best = best_evaluation(self.state.evaluations) if self.config.checkpoint.best else None
        save_checkpoint(
            self.run.checkpoints,
            self.learner,
            step=self.state.step,
            state=self.state.model_dump(),
            keep=self.config.checkpoint.keep,
            protect=[step for step in (good, None if best is None else best[0]) if step is not None],
            run=self.run.id,
        )


def count_episodes(observer: Observer) -> Callable[[Trajectory], None]:
    """What tells `observer` of every finished episode of a stage."""
    finished: list[Trajectory] = []

    def on_done(trajectory: Trajectory) -> None:
        finished.append(trajectory)
        observer.advance(len(finished), f"success {sum(t.success for t in finished)}/{len(finished)}")

    return on_done


def control_of(config: Config) -> EntropyControl:
    """The entropy control that the configuration names."""
    return make_control(config.entropy.method, **config.entropy.options())


def make_sampler(config: Config, policy: Policy, *, max_episodes: int) -> Sampler:
    """The sampler that the configuration names; the caller closes it."""
    if config.sampler.name == "vllm":
        from epo.sampling.vllm import VllmSampler

        return VllmSampler(policy, config.sampler, max_episodes=max_episodes)
    return LocalSampler(policy, max_episodes=max_episodes)


def make_collector(
    config: Config, pool: EnvPool, policy: Policy, sampler: Sampler, *, kind: type[AnyCollector] = RolloutCollector
) -> AnyCollector:
    """What plays the pool's episodes as the configuration says."""
    return kind(
        pool,
        sampler,
        policy.chat,
        config.agent,
        max_turns=config.environment.max_turns,
        max_context=config.model.max_context,
        train_temperature=config.rollout.temperature,
    )
