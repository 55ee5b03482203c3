"""From a configuration to a finished run: what `epo train` does."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Protocol

import torch

from epo.config import Config, ModelConfig
from epo.environments.base import TaskSuite
from epo.environments.identity import changed_facts, describe_suite_record
from epo.environments.pool import EnvPool
from epo.errors import EnvironmentFailure, LearnerLost, StorageError, UserError
from epo.files import write_atomically
from epo.reporting.loggers import open_loggers, require_loggers
from epo.reporting.pages.builder import has_plotly
from epo.reporting.pages.report import write_report
from epo.reporting.plot import plot_run
from epo.reporting.reading.run_reader import read_run
from epo.rollout import TrainingCollector
from epo.sampling._vllm_engine import require_vllm
from epo.training.checkpoint import (
    best_evaluation,
    checkpoints,
    newest_checkpoint,
    refuse_damaged_source,
    step_of,
)
from epo.training.demonstrations import collect_demonstrations
from epo.training.hardware import memory_note
from epo.training.imitation import warm_started_policy
from epo.training.learner import Learner
from epo.training.machine import MachineWatch
from epo.training.model_directory import quiet_libraries
from epo.training.policy import Policy, load_policy, resumed_policy
from epo.training.preparation import prepare_suite
from epo.training.provenance import provenance
from epo.training.run_folder import RunFolder
from epo.training.trainer import Observer, StepLearner, Trainer, control_of, make_collector, make_sampler

_OF_THE_MACHINE = (
    ("environment", "workers"),
    ("environment", "worker_memory_mb"),
    ("sampler", "kv_gib"),
    ("sampler", "block_size"),
    ("sampler", "max_weight_error"),
)
"""How many workers play and what an engine is granted: the machine's business, not the experiment's."""
_TO_LOOK_AT = ("checkpoint", "record", "health", "logging")
"""Sections that say what is kept and shown. Like the above, they may change when a run goes on."""


def open_pool(config: Config) -> EnvPool:
    environment = config.environment
    return EnvPool(
        environment.suite,
        environment.options,
        size=environment.workers,
        timeout_seconds=environment.timeout_seconds,
        worker_memory_mb=environment.worker_memory_mb,
    )


def starting_policy(config: Config, suite: TaskSuite, pool: EnvPool, observer: Observer) -> Policy:
    """The policy before RL: loaded, and warm-started on demonstrations where the configuration asks for it."""
    refuse_damaged_source(config.model.path)
    if config.imitation.demonstrations == 0:
        return load_policy(config.model.path, config.model, seed=config.seed)
    if config.model.path != "tiny":
        load_policy(config.model.path, config.model)  # a bad directory is found out before minutes of demonstrations
    observer.begin("demonstrations", config.imitation.demonstrations)
    demonstrations = collect_demonstrations(
        config, suite, pool, on_done=lambda done, _: observer.advance(done, "expert episodes")
    )
    observer.begin("imitation", config.imitation.batches)
    policy = warm_started_policy(
        config, demonstrations, on_batch=lambda done, loss: observer.advance(done, f"loss {loss:.3f}")
    )
    observer.note(
        f"imitation: {len(demonstrations)} demonstrations, {config.imitation.batches} batches of "
        f"{config.imitation.batch_size}"
    )
    return policy


class Parts(NamedTuple):
    """What a trainer works with."""

    learner: StepLearner
    collector: TrainingCollector
    sampler: str
    """One line for people: what draws."""
    watch: MachineWatch | None = None
    """What looks at the machine, where environments are played beside the learner."""


class Place(Protocol):
    """Where a run computes."""

    def provenance(self) -> dict[str, Any]:
        """What machines these are."""
        ...

    def parts(self, policy: Policy, start: Policy | None, run: RunFolder) -> AbstractContextManager[Parts]:
        """Learner and collector for a run that goes on with `policy` and began with `start` (None: with it, too)."""
        ...


class ThisProcess:
    """The learner and the sampler here, the environments in processes beside them."""

    def __init__(self, config: Config, pool: EnvPool) -> None:
        self._config, self._pool, self._watch = config, pool, MachineWatch(pool)

    def provenance(self) -> dict[str, Any]:
        return {}

    @contextmanager
    def parts(self, policy: Policy, start: Policy | None, run: RunFolder) -> Iterator[Parts]:
        del run
        learner = Learner(policy, self._config, control_of(self._config), start_policy=start)
        with closing(make_sampler(self._config, policy, max_episodes=self._pool.size)) as sampler:
            collector = make_collector(self._config, self._pool, policy, sampler)
            yield Parts(learner, collector, sampler.describe(), watch=self._watch)


@contextmanager
def open_place(config: Config, pool: EnvPool, cluster: str | None, observer: Observer) -> Iterator[Place]:
    """Where to compute.

    Args:
        cluster: address of a Ray cluster, or `local` for one that is started on this machine; None for neither.
    """
    if cluster is None:
        yield ThisProcess(config, pool)
        return
    from epo.cluster.place import RayCluster, require_ray

    require_ray(learners=config.cluster.learners)
    with RayCluster.connected(cluster, config, observer) as place:
        yield place


def train_run(
    config: Config, path: Path, observer: Observer, *, resume: bool, cluster: str | None = None
) -> dict[str, Any]:
    """Train, evaluate, and leave the run folder `path` complete; returns the summary.

    With `resume`, goes on from the newest checkpoint of `path`, or from its start if there is none; so does a run that
    lost its learner. The first Ctrl-C (or SIGTERM) ends the run after the current step with a checkpoint, the second
    one at once. A run that fails before it has anything to show leaves no folder.

    Args:
        cluster: as for `open_place`.

    Raises:
        UserError: something the user can mend.
        StorageError: the disk is full. What was written is whole, and the message says how to go on.
        LearnerLost: more often than `cluster.max_losses`. As above.
        EnvironmentFailure: of the suite itself, not of an episode. As above.
    """
    start_time = time.perf_counter()
    quiet_libraries()
    use_threads(config.model)
    if config.sampler.name == "vllm":  # a missing package is found out before the warm start
        require_vllm()
    require_loggers(config.logging)
    suite = prepare_suite(config, observer, plays_here=cluster is None)
    facts = provenance(suite)
    if resume:
        run, checkpoint = _reopen(path, config, facts["suite"])
    else:
        run, checkpoint = RunFolder.create(path, config, facts), None
    observer.note(f"environment: {describe_suite_record(facts['suite'])}")
    with (
        _saying_how_to_go_on(run),
        run.locked(),
        run.kept_only_with_content(),
        open_pool(config) as pool,
        open_place(config, pool, cluster, observer) as place,
    ):
        if not resume:
            run.add_provenance(place.provenance())
        losses = 0
        while True:
            policy, start = _policies(config, checkpoint, suite, pool, observer)
            observer.note(f"model: {policy.describe()}")
            if cluster is None:  # a plan is of one process that does it all
                observer.note(memory_note(config, policy.device))
            run.add_vocabulary(policy.chat.pieces())
            try:
                with place.parts(policy, start, run) as parts:
                    observer.note(f"sampler: {parts.sampler}")
                    trainer = Trainer(
                        config, suite, run, observer, learner=parts.learner, collector=parts.collector,
                        resume_from=checkpoint, watch=parts.watch,
                    )  # fmt: skip
                    if resume or losses:
                        run.rewind(trainer.state.step, evaluations=trainer.state.evaluations)
                        observer.note(f"resuming {str(path)!r} after step {trainer.state.step}")
                    if trainer.state.step < config.steps:  # looking at a finished run is not part of it
                        trainer.state.wall_seconds += time.perf_counter() - start_time
                    with _stop_after_step(trainer, observer), _logged(run, trainer, observer):
                        finished = trainer.train()
                break
            except LearnerLost as loss:
                losses += 1
                if losses > config.cluster.max_losses:
                    limit = f"more than cluster.max_losses={config.cluster.max_losses}"
                    raise LearnerLost(f"{loss}; losses in this session: {losses}, {limit}") from loss
                checkpoint, start_time = newest_checkpoint(run.checkpoints, run=run.id), time.perf_counter()
                observer.note(f"{loss}; going on from {'the start' if checkpoint is None else checkpoint.name}")
        for line in () if trainer.halt is None else trainer.halt.message(run.path):
            observer.note(line)
        return _finish(run, config, trainer, observer, finished=finished)


def _policies(
    config: Config, checkpoint: Path | None, suite: TaskSuite, pool: EnvPool, observer: Observer
) -> tuple[Policy, Policy | None]:
    """The policy to go on with, and, where it is asked for, the one that training started from."""
    start = None
    if checkpoint is None or config.algorithm.kl_coefficient > 0:
        start = starting_policy(config, suite, pool, observer)
    if checkpoint is None:
        assert start is not None
        return start, start
    if start is None:
        return load_policy(checkpoint / "policy", config.model), None
    return resumed_policy(checkpoint / "policy", config.model, start=start)


def use_threads(config: ModelConfig) -> None:
    """Set the CPU threads of this process's tensor computations, for good."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)


def _reopen(path: Path, config: Config, suite: Mapping[str, Any]) -> tuple[RunFolder, Path | None]:
    run = RunFolder.open(path)
    before, now = run.config().model_dump(mode="json"), config.model_dump(mode="json")
    for section, key in _OF_THE_MACHINE:
        before[section].pop(key)
        now[section].pop(key)
    for section in _TO_LOOK_AT:
        before.pop(section)
        now.pop(section)
    for values in (before, now):  # on what it runs may change; how old weights may be is part of the experiment
        values["cluster"] = {"max_staleness": values["cluster"]["max_staleness"]}
    if different := _differences(before, now):
        raise UserError(
            f"--resume goes on with the configuration the run was started with, but {', '.join(different)} differ: "
            f"leave out these overrides, or give {str(path / 'config.yaml')!r} as the recipe, or start a new run with "
            "another --name"
        )
    if changed := changed_facts(run.provenance().get("suite"), suite):
        raise UserError(
            f"--resume goes on in the environment the run was started in, but of suite {suite['name']!r} differ "
            f"{', '.join(changed)}: install that version (or put that data) in place again, or start a new run with "
            "another --name"
        )
    newest = newest_checkpoint(run.checkpoints, run=run.id)
    if newest is not None:
        run.require_steps(step_of(newest))
    return run, newest


def _differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key in {**a, **b}:
        left, right = a.get(key), b.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            found += _differences(left, right, f"{prefix}{key}.")
        elif left != right:
            found.append(f"{prefix}{key} ({left!r} then, {right!r} now)")
    return found


@contextmanager
def _saying_how_to_go_on(run: RunFolder) -> Iterator[None]:
    """Adds to the message of a failure what is safe and how to go on; of a full disk, once there is room."""
    try:
        yield
    except StorageError as error:
        less = " (a lower checkpoint.keep needs less)" if checkpoints(run.checkpoints) else ""
        raise StorageError(error.errno, f"{error}, and {_how_to_go_on(run)}{less}") from error
    except LearnerLost as error:
        raise LearnerLost(f"{error}; {_how_to_go_on(run)}") from error
    except EnvironmentFailure as error:
        raise EnvironmentFailure(f"{error}; {_how_to_go_on(run)}") from error


def _how_to_go_on(run: RunFolder) -> str:
    if not run.path.exists():
        return "run the same command again; nothing was left behind"
    if saved := checkpoints(run.checkpoints):
        return f"go on after step {step_of(saved[-1])} with --resume"
    return "start over with --resume; there is no checkpoint yet"


@contextmanager
def _logged(run: RunFolder, trainer: Trainer, observer: Observer) -> Iterator[None]:
    """Inside, the trainer's metrics go to the loggers of the configuration too."""
    with open_loggers(
        trainer.config,
        run.path,
        step=trainer.state.step,
        metrics=run.metrics(),
        evaluations=run.evaluations(),
        note=observer.note,
    ) as trainer.log:
        yield


@contextmanager
def _stop_after_step(trainer: Trainer, observer: Observer) -> Iterator[None]:
    def handle(number: int, frame: FrameType | None) -> None:
        if trainer.stop_requested:
            raise KeyboardInterrupt
        trainer.stop_requested = True
        observer.note("stopping after this step with a checkpoint (once more to stop at once)")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _finish(run: RunFolder, config: Config, trainer: Trainer, observer: Observer, *, finished: bool) -> dict[str, Any]:
    evaluations, metrics, recorded = run.evaluations(), run.metrics(), run.provenance()
    summary: dict[str, Any] = {
        "recipe": config.name,
        "seed": config.seed,
        "commit": recorded.get("commit"),
        "suite": recorded.get("suite"),
        "finished": finished,
        "halted": None if trainer.halt is None else trainer.halt.as_dict(),
        "steps": trainer.state.step,
        "wall_seconds": round(trainer.state.wall_seconds, 1),
        "eval": _panel_summary(evaluations),
        "best": _best_summary(run, evaluations),
        "run": str(run.path),
        "plot": str(run.path / "plot.svg"),
        "report": str(run.path / "report.html") if has_plotly() else None,
    }
    plot_run(
        run.path / "plot.svg", title=f"{config.name}, seed {config.seed}", metrics=metrics, evaluations=evaluations
    )
    write_atomically(run.path / "summary.json", json.dumps(summary, indent=1))
    if has_plotly():
        write_report(run.path / "report.html", [read_run(run.path)])
    else:
        observer.note("no report: pip install -e '.[report]' to have one, then epo report " + str(run.path))
    return summary


def _panel_summary(evaluations: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    summary: dict[str, dict[str, Any]] = {}
    for name, entry in (("initial", evaluations[0]), ("final", evaluations[-1])) if evaluations else ():
        for panel in entry["panels"]:
            keys = ("success", "low", "high", "episodes", "errors")  # runs of older versions have no errors
            summary.setdefault(panel["split"], {})[name] = {key: panel[key] for key in keys if key in panel}
    return summary


def _best_summary(run: RunFolder, evaluations: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The best evaluation, and its checkpoint if it is kept."""
    best = best_evaluation(evaluations)
    if best is None:
        return None
    step, success = best
    path = next((path for path in checkpoints(run.checkpoints) if step_of(path) == step), None)
    return {"step": step, "success": success, "checkpoint": None if path is None else str(path)}
