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
from typing import Any, Protocol

from safetensors import SafetensorError

from epo.errors import UserError
from epo.files import new_folder, write_atomically

FORMAT = 1
"""Raised whenever an older reader would misunderstand a checkpoint."""

_NAME = re.compile(r"step_(\d{6,})")


class Kept(Protocol):
    """What a checkpoint holds of: a learner."""

    def write(self, folder: Path) -> dict[str, Any]:
        """Leave everything but the control's state in `folder`, and return that."""
        ...

    def read(self, folder: Path, control: dict[str, Any]) -> None:
        """Take over what `write` left and returned."""


def save_checkpoint(
    folder: Path, learner: Kept, *, step: int, state: dict[str, Any], keep: int, protect: int | None = None
) -> Path:
    """Write `folder/step_<step>` atomically, then drop all but the newest `keep` and that of step `protect`.

    `step` counts finished RL steps.
    """
    path = folder / f"step_{step:06d}"
    with new_folder(path) as draft:
        control = learner.write(draft)
        files = sorted(p for p in draft.rglob("*.safetensors"))
        content = {
            "format": FORMAT,
            "step": step,
            "control": control,
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


def load_checkpoint(path: Path, learner: Kept) -> dict[str, Any]:
    """Put a checkpoint into `learner`, whose policy was loaded from `path / "policy"`; returns the trainer's state."""
    content = read_state(path)
    try:
        learner.read(path, content["control"])
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        raise UserError(f"checkpoint {str(path)!r} does not fit this run ({error})") from None
    return dict(content["state"])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
