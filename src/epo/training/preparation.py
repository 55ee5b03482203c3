"""What a run, an evaluation or a warm start needs before anything is played: its suite, ready."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from epo.agent.prompts import Prompt
from epo.config import Config
from epo.environments.base import TaskSuite
from epo.environments.registry import make_suite
from epo.environments.worker_memory import memory_problem
from epo.errors import EnvironmentFailure, UserError
from epo.training.trainer import Observer


def prepare_suite(config: Config, observer: Observer, *, plays_here: bool = True) -> TaskSuite:
    """The suite of a configuration, with everything it needs in place. The observer sees it as a stage.

    Args:
        plays_here: `environment.workers` of them will be at work on this machine, and have to fit into its memory.

    Raises:
        UserError: unknown suite or option, missing package, Java or data, too many workers.
        EnvironmentFailure: preparing it failed.
    """
    suite = make_suite(config.environment.suite, config.environment.options)
    for split in ("train", *config.evaluation.splits):
        if split not in suite.splits:
            raise UserError(
                f"evaluation.splits names {split!r}, which suite {suite.name!r} does not have: choose from "
                + ", ".join(suite.splits)
            )
    workers = config.environment.workers
    if plays_here and (problem := memory_problem(suite.name, suite.worker_mb, workers=workers)):
        raise UserError(problem)
    # A template that cannot be read is found out before minutes of demonstrations.
    Prompt(config.agent.prompt, think=config.agent.format == "think_action", transcript=True)
    try:
        _prepare(suite, observer)
    except EnvironmentFailure as failure:
        raise EnvironmentFailure(
            f"preparing suite {suite.name!r} failed: {failure}; nothing was begun: run the same command again"
        ) from failure
    return suite


def _prepare(suite: TaskSuite, observer: Observer) -> None:
    stage, is_counted = f"prepare {suite.name}", False

    def progress(done: int, total: int) -> None:
        nonlocal is_counted
        if not is_counted:
            observer.begin(stage, total)
        is_counted = True
        observer.advance(done)

    observer.begin(stage, 0)
    prepare: Callable[..., None] = suite.prepare
    if "progress" in inspect.signature(prepare).parameters:
        prepare(progress=progress)
    else:
        prepare()
