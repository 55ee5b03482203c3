"""Everything a run needs to go on, in folders that are either whole or not there.

A checkpoint holds `policy/` (a Hugging Face model directory that any tool loads, or an adapter in
peft's layout), `critic.safetensors`,
`optimizer.safetensors`, and `state.json` (step, entropy history, format version, checksums). All randomness of a run is
a function of the seed, the step and the episode, so there is no generator state to keep.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from epo.errors import UserError
from epo.files import new_folder, write_atomically
from epo.training.learner import Learner

FORMAT = 1
"""Raised whenever an older reader would misunderstand a checkpoint."""

_NAME = re.compile(r"step_(\d{6,})")


def save_checkpoint(
    folder: Path, learner: Learner, *, step: int, state: dict[str, Any], keep: int, protect: int | None = None
) -> Path:
    """Write `folder/step_<step>` atomically, then drop all but the newest `keep` and that of step `protect`.

    `step` counts finished RL steps.
    """
    path = folder / f"step_{step:06d}"
    with new_folder(path) as draft:
        learner.policy.save(draft / "policy")
        if learner.critic is not None:
            save_file({k: v.contiguous() for k, v in learner.critic.state_dict().items()}, draft / "critic.safetensors")
        save_file(_optimizer_tensors(learner.optimizer), draft / "optimizer.safetensors")
        files = sorted(p for p in draft.rglob("*.safetensors"))
        content = {
            "format": FORMAT,
            "step": step,
            "control": learner.control.state_dict(),
            "state": state,
            "sha256": {p.relative_to(draft).as_posix(): _sha256(p) for p in files},
        }
        write_atomically(draft / "state.json", json.dumps(content, indent=1))
    for old in checkpoints(folder)[:-keep]:
        if step_of(old) != protect:
            shutil.rmtree(old)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The finished RL steps of a checkpoint, from its name."""
    return int(checkpoint.name.removeprefix("step_"))


def read_state(path: Path) -> dict[str, Any]:
    """Read and verify a checkpoint's `state.json`.

    Raises:
        UserError: not a checkpoint, written by a newer version, or damaged.
    """
    try:
        content = json.loads((path / "state.json").read_text(encoding="utf-8"))
        version, sums = int(content["format"]), dict(content["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"checkpoint {str(path)!r} cannot be read ({error}): delete it to go on from the one before"
        ) from None
    if version != FORMAT:
        raise UserError(
            f"checkpoint {str(path)!r} has format {version}, this version of epo reads {FORMAT}: "
            "use the epo that wrote it"
        )
    for name, expected in sums.items():
        file = path / name
        if not file.is_file() or _sha256(file) != expected:
            raise UserError(f"checkpoint {str(path)!r} is damaged ({name}): delete it to go on from the one before")
    return content


def load_checkpoint(path: Path, learner: Learner) -> dict[str, Any]:
    """Put a checkpoint into `learner`, whose policy was loaded from `path / "policy"`; returns the trainer's state."""
    content = read_state(path)
    try:
        if learner.critic is not None:
            learner.critic.load_state_dict(load_file(path / "critic.safetensors"))
        _load_optimizer(learner.optimizer, load_file(path / "optimizer.safetensors"))
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        raise UserError(f"checkpoint {str(path)!r} does not fit this run ({error})") from None
    learner.control.load_state_dict(content["control"])
    return dict(content["state"])


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": value.contiguous()
        for index, entries in state.items()
        for name, value in entries.items()
        if isinstance(value, Tensor)
    }


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    # Groups (parameters, learning rates, betas) come from the configuration; only the moments are restored.
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
