"""Everything a run needs to go on, in folders that are either whole or not there.

A checkpoint holds `policy/` (a Hugging Face model directory that any tool loads, or an adapter in
peft's layout), `critic.safetensors`, `optimizer.safetensors`, `state.json` (step, entropy history, format version) and
`SHA256SUMS`, the checksums of all of them. All randomness of a run is a function of the seed, the step and the episode,
so there is no generator state to keep.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError

from epo.errors import UserError
from epo.files import new_folder, remove_folder, write_atomically
from epo.training.checksums import SUMS_FILE, find_damage, find_irregular, first_difference, write_checksums

FORMAT = 2
"""Raised whenever an older reader would misunderstand a checkpoint. Format 1 had the checksums of the tensors, and no
others, in `state.json`; it is read as well."""

_NAME = re.compile(r"step_(\d{6,})")


class DamagedCheckpoint(UserError):
    """A checkpoint that is not what was written. The text names the file; who catches it adds the mend."""


class Kept(Protocol):
    """What a checkpoint holds of: a learner."""

    def write(self, folder: Path) -> dict[str, Any]:
        """Leave everything but the control's state in `folder`, and return that."""
        ...

    def read(self, folder: Path, control: dict[str, Any]) -> None:
        """Take over what `write` left and returned."""


def save_checkpoint(
    folder: Path,
    learner: Kept,
    *,
    step: int,
    state: dict[str, Any],
    keep: int,
    protect: Collection[int] = (),
    run: str | None = None,
) -> Path:
    """Write `folder/step_<step>` atomically, then drop all but the newest `keep` and those of the steps `protect`.

    `step` counts finished RL steps; `run` names the run that the checkpoint belongs to.

    Raises:
        StorageError: the disk is full. Every earlier checkpoint is still there.
    """
    path = folder / f"step_{step:06d}"
    with new_folder(path) as draft:
        control = learner.write(draft)
        content = {
            "format": FORMAT,
            "run": run,
            "step": step,
            "control": control,
            "state": state,
        }
        write_atomically(draft / "state.json", json.dumps(content, indent=1))
        write_checksums(draft)
    for old in checkpoints(folder)[:-keep]:
        if step_of(old) not in protect:
            remove_folder(old)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The finished RL steps of a checkpoint, from its name."""
    return int(checkpoint.name.removeprefix("step_"))


def newest_checkpoint(folder: Path, *, run: str | None = None) -> Path | None:
    """The checkpoint that a run goes on from, verified; None if it has none yet.

    Raises:
        UserError: it cannot be used. The message says which older one can.
    """
    saved = checkpoints(folder)
    if not saved:
        return None
    try:
        read_state(saved[-1], run=run)
    except DamagedCheckpoint as error:
        for number, older in enumerate(reversed(saved[:-1]), start=1):
            if is_whole(older, run=run):
                doomed = " and ".join(repr(str(path)) for path in saved[-number:])
                raise UserError(
                    f"{error}: delete {doomed}; {older.name!r} is whole, and --resume then goes on from it "
                    f"(epo eval: --checkpoint {step_of(older)})"
                ) from None
        raise UserError(
            f"{error}, and no older one is whole: delete {str(folder)!r}, and --resume starts the run again"
        ) from None
    return saved[-1]


def choose_checkpoint(
    folder: Path, which: str, *, evaluations: Sequence[Mapping[str, Any]], run: str | None = None
) -> Path | None:
    """The checkpoint that a user names, verified: `last`, `best` (by evaluation), or a number of finished steps.

    Args:
        evaluations: lines of the run's `eval.jsonl`.

    Returns:
        None if the run has no checkpoint yet.

    Raises:
        UserError: no such checkpoint, or it cannot be used.
    """
    if which == "last":
        return newest_checkpoint(folder, run=run)
    saved = {step_of(path): path for path in checkpoints(folder)}
    if not saved:
        return None
    choices = ", ".join(("last", *map(str, saved)))
    if which == "best":
        best = best_evaluation(evaluations)
        if best is None or best[0] not in saved:
            was = "nothing was evaluated yet" if best is None else f"that of step {best[0]}, the best, was not kept"
            raise UserError(f"--checkpoint best: {was} (checkpoint.best keeps it): choose from {choices}")
        step = best[0]
    elif which.isascii() and which.isdigit() and int(which) in saved:
        step = int(which)
    else:
        raise UserError(f"--checkpoint {which!r} is not there: choose from {choices}, best")
    try:
        read_state(saved[step], run=run)
    except DamagedCheckpoint as error:
        raise UserError(f"{error}: choose another --checkpoint ({choices})") from None
    return saved[step]


def best_evaluation(evaluations: Sequence[Mapping[str, Any]]) -> tuple[int, float] | None:
    """Step and success of the best of a run's evaluations, by the mean success over its panels; the first among equals.

    None before anything was evaluated, or where no split is.
    """
    rated = [
        (entry["step"], sum(p["success"] for p in entry["panels"]) / len(entry["panels"]))
        for entry in evaluations
        if entry["panels"]
    ]
    return max(rated, key=lambda pair: pair[1], default=None)


def is_whole(path: Path, *, run: str | None = None) -> bool:
    try:
        read_state(path, run=run)
    except UserError:
        return False
    return True


def read_state(path: Path, *, run: str | None = None) -> dict[str, Any]:
    """Verify a whole checkpoint and read its `state.json`.

    Args:
        run: the run that it must belong to, where that is known.

    Raises:
        DamagedCheckpoint: not a checkpoint, or not as it was written, or that of another run or step.
        UserError: written by a newer version.
    """
    what = f"checkpoint {str(path)!r}"
    has_sums = os.path.lexists(path / SUMS_FILE)
    damage = find_damage(path) if has_sums else find_irregular(path)
    if damage is not None:
        raise DamagedCheckpoint(f"{what} is damaged ({damage})")
    try:
        content: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
        version, step = content["format"], content["step"]
        if type(version) is not int or type(step) is not int or version < 1:
            raise ValueError(f"format={version!r}, step={step!r}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or f"no state of a checkpoint: {' '.join(str(error).split())[:100]}"
        raise DamagedCheckpoint(f"{what} is damaged (state.json: {reason})") from None
    if version > FORMAT:
        raise UserError(
            f"{what} has format {version}, this version of epo reads up to {FORMAT}: use the epo that wrote it"
        )
    if version == 1:
        sums = content.pop("sha256", None)
        if not isinstance(sums, dict) or not sums:
            raise DamagedCheckpoint(f"{what} is damaged (state.json: it has no checksums)")
        damage = first_difference(path, ((str(name), str(digest)) for name, digest in sums.items()))
        if damage is not None:
            raise DamagedCheckpoint(f"{what} is damaged ({damage})")
    elif not has_sums:
        raise DamagedCheckpoint(f"{what} is damaged ({SUMS_FILE}: missing)")
    if step != step_of(path):
        raise DamagedCheckpoint(f"{what} is not what its name says (state.json: it is that of step {step})")
    owner = content.get("run")
    if run is not None and owner is not None and owner != run:
        raise DamagedCheckpoint(f"{what} is that of another run (state.json: of a run with another configuration)")
    return content


def refuse_damaged_source(model: str | Path) -> None:
    """Refuse a model directory that is the policy of a damaged checkpoint.

    Raises:
        UserError: the checkpoint is not what was written.
    """
    folder = Path(model).parent
    # Unlike Path's, never raises; a link to nowhere is there, too.
    if os.path.lexists(folder / SUMS_FILE) and (damage := find_damage(folder)) is not None:
        raise UserError(
            f"{str(model)!r} belongs to a checkpoint that is damaged ({damage}): choose another checkpoint of that run"
        )


def load_checkpoint(path: Path, learner: Kept, *, run: str | None = None) -> dict[str, Any]:
    """Put a checkpoint into `learner`, whose policy was loaded from `path / "policy"`; returns the trainer's state.

    Raises:
        UserError: it cannot be used, or is not that of such a run.
    """
    content = read_state(path, run=run)
    try:
        learner.read(path, content["control"])
        return dict(content["state"])
    except (
        OSError, SafetensorError, RuntimeError, ArithmeticError, AttributeError, LookupError, ValueError, TypeError,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"checkpoint {str(path)!r} does not fit this run ({reason}): put back what the run wrote, or delete it"
        ) from None
