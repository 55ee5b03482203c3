"""The configuration of a run of whatever version, as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from epo.bounded_yaml import load_yaml
from epo.errors import UserError
from epo.reporting.reading.trajectory_files import inside

_NEEDED = {
    "seed": int,
    "steps": int,
    "environment.suite": str,
    "environment.options": dict,
    "model.path": str,
    "rollout.tasks_per_step": int,
    "rollout.group_size": int,
    "algorithm.name": str,
    "entropy.method": str,
}
"""What every version writes into config.yaml, and pages and comparisons rely on."""


def read_config(path: Path) -> tuple[dict[str, Any], str]:
    """The configuration of the run in `path`, of whatever version, and the text of its file.

    Raises:
        UserError: `path` is no run.
    """
    file = inside(path, "config.yaml")
    if not file.is_file():
        raise UserError(f"{str(path)!r} is no run (it has no config.yaml): give a run folder, such as runs/quickstart")
    try:
        text = file.read_bytes().decode("utf-8")
        tree = plain(load_yaml(text))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{str(file)!r} cannot be read ({reason}): it is no run of epo, or damaged") from None
    config = cast("dict[str, Any]", tree) if isinstance(tree, dict) else {}
    for key, kind in _NEEDED.items():
        value: Any = config
        for part in key.split("."):
            value = cast("dict[str, Any]", value).get(part) if isinstance(value, dict) else None
        if type(value) is not kind:
            raise UserError(f"{str(path)!r} is no run of epo: {key}={value!r} in its config.yaml")
    return config, text


def plain(value: Any) -> Any:
    """`value` as strict JSON: numbers that are not finite become None, what JSON does not know becomes text."""
    if isinstance(value, float):
        return finite(value)
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in cast("Sequence[Any]", value)]
    return str(value)


def finite(value: float | None) -> float | None:
    """None for a number that is not finite."""
    return value if value is not None and math.isfinite(value) else None
