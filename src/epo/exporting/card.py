"""The model card: what was trained, how, and what it reached, all of it read from the run."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from epo.config import Config
from epo.methods import describe_method
from epo.models.catalogue import KNOWN
from epo.models.hub import is_hub_name
from epo.training.run_folder import RunFolder

TEMPLATE = "model_card.md.j2"


def write_card(folder: Path, run: RunFolder, config: Config, *, step: int, kind: str, base: str | None) -> None:
    """Write `README.md`.

    Args:
        folder: the exported folder; its name is not final.
        step: RL steps behind the weights.
        kind: `model`, `adapter` or `merged model`.
        base: of an adapter, the model it belongs to.
    """
    by_step = {entry["step"]: entry["panels"] for entry in run.evaluations()}
    panels, before = by_step.get(step, []), by_step.get(0, [])
    path = config.model.path
    known = None if os.path.isdir(path) else KNOWN.get(path)
    parent = base or (path if is_hub_name(path) and not os.path.isdir(path) else None)
    data = ModelCardData(
        base_model=parent,
        library_name="peft" if kind == "adapter" else "transformers",
        license=None if known is None else known.licence.lower(),  # as the hub writes it
        pipeline_tag="text-generation",
        tags=["epo", "reinforcement-learning", "agent", config.environment.suite],
        model_name=config.name,
        eval_results=[_result(panel, config) for panel in panels] or None,
    )
    provenance = run.provenance()
    text = resources.files("epo.exporting").joinpath(TEMPLATE).read_text(encoding="utf-8")
    card = ModelCard.from_template(
        data,
        template_str=text,
        config=config,
        kind=kind,
        step=step,
        parent=parent,
        known=known,
        start=_start(config, parent),
        method=describe_method(config.entropy.method)["summary"],
        rows=[(panel, _of_split(before, panel["split"])) for panel in panels],
        packages=provenance.get("packages", {}),
        commit=provenance.get("commit"),
        note=(provenance.get("suite") or {}).get("note"),
        has_plot=(folder / "training" / "plot.svg").is_file(),
    )
    (folder / "README.md").write_text(str(card).rstrip() + "\n", encoding="utf-8")


def _start(config: Config, parent: str | None) -> str:
    if config.model.path == "tiny":
        return "a small Llama made from nothing, with a tokenizer of its own"
    return parent or Path(config.model.path).name  # of a local directory no more than its name


def _of_split(panels: list[dict[str, Any]], split: str) -> dict[str, Any] | None:
    return next((panel for panel in panels if panel["split"] == split), None)


def _result(panel: dict[str, Any], config: Config) -> EvalResult:
    return EvalResult(
        task_type="reinforcement-learning",
        task_name="multi-turn agent",
        dataset_type=config.environment.suite,
        dataset_name=config.environment.suite,
        dataset_split=panel["split"],
        metric_type="success_rate",
        metric_name=f"success over {panel['episodes']} episodes at temperature {config.evaluation.temperature:g}",
        metric_value=panel["success"],
    )
