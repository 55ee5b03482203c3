"""Evaluation on its own: what `epo eval` and `epo imitate` do."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from epo.config import Config
from epo.environments.base import TaskSuite
from epo.environments.identity import describe_suite_record
from epo.environments.pool import EnvPool
from epo.errors import UserError
from epo.evaluation.panels import PanelResult, evaluate
from epo.recipe import apply_overrides, load_config
from epo.tasks import panel
from epo.training.checkpoint import choose_checkpoint, refuse_damaged_source, step_of
from epo.training.model_directory import quiet_libraries
from epo.training.policy import Policy, load_policy
from epo.training.preparation import prepare_suite
from epo.training.provenance import provenance
from epo.training.run_folder import RunFolder
from epo.training.session import open_pool, starting_policy, use_threads
from epo.training.trainer import Observer, count_episodes, make_collector, make_sampler


def evaluate_target(
    target: Path,
    *,
    recipe: str | None,
    overrides: Sequence[str],
    observer: Observer,
    checkpoint: str | None = None,
) -> tuple[list[PanelResult], dict[str, Any]]:
    """Play the panels with a checkpoint of a run, or with a model directory as `recipe` has it act.

    Returns:
        The results, and what decided them: the model (`model`, `checkpoint`), the resolved `config`, and `provenance`.

    Args:
        checkpoint: of a run: `last` (the default), `best`, or a number of finished steps.

    Raises:
        UserError: neither a run with such a checkpoint nor a model directory, or a model without a recipe.
    """
    quiet_libraries()
    source: dict[str, Any] | None = None
    if (target / "config.yaml").is_file():
        run = RunFolder.open(target)
        config = run.config()
        chosen = choose_checkpoint(run.checkpoints, checkpoint or "last", evaluations=run.evaluations(), run=run.id)
        if chosen is None:
            raise UserError(f"the run {str(target)!r} has no checkpoint yet: wait for one, or --resume the run")
        observer.note(f"checkpoint: {chosen.name}")
        folder, source = chosen / "policy", {"run": str(target), "step": step_of(chosen)}
    elif checkpoint is not None:
        raise UserError(f"--checkpoint {checkpoint} chooses among those of a run, and {str(target)!r} is none")
    elif recipe is None:
        raise UserError(
            f"{str(target)!r} is not a run folder; for a model directory add --recipe, which says how the model acts"
        )
    else:
        refuse_damaged_source(target)
        config, folder = load_config(recipe), target
    config = apply_overrides(config, overrides)
    use_threads(config.model)
    policy, suite = load_policy(folder, config.model), prepare_suite(config, observer)
    facts = {"model": str(folder), "checkpoint": source, "config": config.model_dump(mode="json"), **provenance(suite)}
    observer.note(f"environment: {describe_suite_record(facts['suite'])}")
    with open_pool(config) as pool:
        return _play_panels(config, suite, pool, policy, observer), facts


def imitate_and_evaluate(config: Config, observer: Observer) -> tuple[Path, list[PanelResult]]:
    """Make (or find) the warm start of `config` and play its panels; returns the model directory and the results."""
    quiet_libraries()
    use_threads(config.model)
    suite = prepare_suite(config, observer)
    with open_pool(config) as pool:
        policy = starting_policy(config, suite, pool, observer)
        assert policy.folder is not None
        return policy.folder, _play_panels(config, suite, pool, policy, observer)


def _play_panels(
    config: Config, suite: TaskSuite, pool: EnvPool, policy: Policy, observer: Observer
) -> list[PanelResult]:
    temperature = config.evaluation.temperature
    observer.note(f"model: {policy.describe()}")
    results: list[PanelResult] = []
    with closing(make_sampler(config, policy, max_episodes=pool.size)) as sampler:
        observer.note(f"sampler: {sampler.describe()}")
        collector = make_collector(config, pool, policy, sampler)
        for split in config.evaluation.splits:
            tasks = panel(suite.tasks(split), episodes=config.evaluation.episodes, split=split)
            observer.begin(f"evaluate {split}", len(tasks))
            results.append(
                evaluate(collector, tasks, split=split, temperature=temperature, on_done=count_episodes(observer))
            )
    return results
