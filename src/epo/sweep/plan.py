"""What a sweep is: a recipe, arms that change it, and seeds. One run for each arm and seed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from epo.bounded_yaml import load_yaml
from epo.config import Config
from epo.errors import UserError
from epo.recipe import load_config
from epo.reporting.terminal.text import visible

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class SweepPlan(BaseModel):
    """A sweep's YAML. Sections of keys, or dotted keys, as in a recipe and its overrides."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    name: Name
    """Default name of the sweep's folder."""
    recipe: str
    """Name of a recipe, or path of one, seen from the sweep's file."""
    seeds: list[Seed] = Field(min_length=1)
    """Every arm is run with each of them."""
    set: dict[str, Any] = Field(default_factory=dict[str, Any])
    """What all arms have that the recipe has not."""
    arms: dict[Name, dict[str, Any] | None] = Field(min_length=1)
    """What is compared: for each arm, what it has that the others have not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRun:
    """One run of a sweep."""

    arm: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm}--seed{self.seed}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """A checked plan: the whole configuration of every arm, with the first seed."""

    plan: SweepPlan
    configs: dict[str, Config]

    def runs(self) -> list[PlannedRun]:
        """All runs, seed by seed, so that the arms can be compared early."""
        return [PlannedRun(arm=arm, seed=seed) for seed in self.plan.seeds for arm in self.configs]


def load_sweep(file: Path) -> Sweep:
    """Read and check a sweep, every arm of it.

    A run has one thread, so that runs can share the cores, unless the sweep sets `model.threads`.

    Raises:
        UserError: names the file, the field or arm, its value and what is allowed.
    """
    plan = _read(file)
    beside = str(file.parent / plan.recipe)
    recipe = beside if plan.recipe.endswith((".yaml", ".yml")) and os.path.isfile(beside) else plan.recipe
    configs: dict[str, Config] = {}
    for arm, own in plan.arms.items():
        settings = {"model.threads": 1} | _flat(plan.set) | _flat(own or {})
        if arm == "config":  # its file would make the folder of the arms look like a run
            raise UserError(f"{str(file)!r}: an arm cannot be called 'config': give it another name")
        if "seed" in settings:
            raise UserError(f"{str(file)!r}, arm {arm!r}: seed={settings['seed']} is not for arms: put it into seeds")
        overrides = [f"{key}={_as_yaml(value)}" for key, value in settings.items()]
        try:
            configs[arm] = load_config(recipe, [*overrides, f"seed={plan.seeds[0]}"])
        except UserError as error:
            raise UserError(f"{str(file)!r}, arm {arm!r}: {error}") from None
    return Sweep(plan=plan, configs=configs)


def _read(file: Path) -> SweepPlan:
    try:
        tree = load_yaml(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"sweep {str(file)!r} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"sweep {str(file)!r} must be a mapping with recipe, seeds and arms")
    fields = cast("dict[str, Any]", tree)
    fields.setdefault("name", file.name.removesuffix(".yml").removesuffix(".yaml"))
    try:
        plan = SweepPlan.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = visible(".".join(str(part) for part in first["loc"]))[:200]
        if first["type"] == "extra_forbidden":
            raise UserError(
                f"sweep {str(file)!r}: unknown key {where!r}. Valid here: {', '.join(SweepPlan.model_fields)}"
            ) from None
        given = "" if first["type"] == "missing" else f"={repr(first['input'])[:100]}"
        raise UserError(f"sweep {str(file)!r}: {where}{given} is not allowed: {first['msg']}") from None
    if len(set(plan.seeds)) < len(plan.seeds):
        raise UserError(f"sweep {str(file)!r}: seeds={plan.seeds} names a seed twice")
    return plan


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Sections as dotted keys: what an arm leaves out stays as the recipe has it."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flat(cast("dict[str, Any]", value), f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _as_yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
