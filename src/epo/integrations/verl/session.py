"""What EPO knows from one update of the actor to the next, on each rank the same: control, step, and their file.

Legend for tensor suffixes: _N tokens of all ranks, _R those of this rank.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from epo.errors import UserError
from epo.files import write_atomically
from epo.objectives import EntropyControl, gather_tokens

FILE = "epo_state.json"

logger = logging.getLogger(__name__)


class Session:
    """The control of a run, made at its first update, when verl's loss brings the configuration."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self.control: EntropyControl | None = None
        self.method = ""
        self.step = 0
        """k: updates of the actor so far."""
        self._state: dict[str, Any] = {}
        self._observed: list[tuple[Tensor, Tensor, Tensor]] = []

    def start(self, control: EntropyControl, *, method: str, speaks: bool) -> EntropyControl:
        """Take the control, continue it from a restored file, and say its warnings.

        Args:
            control: without history.
            method: its name.
            speaks: this rank says the warnings.

        Raises:
            UserError: the file restored belongs to another method or other settings.
        """
        if self._state:
            if self._state["method"] != method:
                raise UserError(
                    f"the checkpoint was written with actor.policy_loss.method={self._state['method']!r}, this run "
                    f"asks for {method!r}"
                )
            try:
                control.load_state_dict(self._state["control"])
            except ValueError as error:
                raise UserError(f"actor.policy_loss.options do not fit the checkpoint: {error}") from None
        self.control, self.method = control, method
        for warning in control.warnings() if speaks else []:
            logger.warning("epo: %s", warning)
        return control

    @property
    def observes(self) -> bool:
        """The control learns from the entropies of the sampling policy."""
        return self.control is not None and type(self.control).observe is not EntropyControl.observe

    def keep(self, entropy_R: Tensor, trajectories_R: Tensor, turns_R: Tensor) -> None:
        """Remember a mini-batch until the update is over. Several epochs over a batch leave its means as they are."""
        self._observed.append((entropy_R.detach().float(), trajectories_R, turns_R))

    def end_update(self, *, group: dist.ProcessGroup | None, device: Any) -> None:
        """After the last mini-batch of an update: observe it, on all ranks the same tokens, and count it."""
        if self.control is None:
            return
        if self.observes:
            columns = [torch.cat(parts).to(device) for parts in zip(*self._observed, strict=True)]
            (entropy_N, trajectories_N, turns_N), _ = gather_tokens(*columns, group=group)
            self.control.observe(entropy_N, trajectories_N, turns_N)
        self._observed.clear()
        self.step += 1

    def save(self, folder: Path) -> None:
        """Write the state beside verl's checkpoint. All ranks write the same text; each replaces the file whole."""
        folder.mkdir(parents=True, exist_ok=True)
        state = self._state
        if self.control is not None:
            state = {"method": self.method, "step": self.step, "control": self.control.state_dict()}
        write_atomically(folder / FILE, json.dumps(state))

    def restore(self, folder: Path) -> None:
        """Read what `save` wrote.

        Raises:
            UserError: the file is missing or no such file.
        """
        file = folder / FILE
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
            step = int(state["step"]) if state else 0
        except FileNotFoundError:
            raise UserError(
                f"{file} is missing: the checkpoint was written without EPO, or its entropy history is lost. To go on "
                "from it with an empty history, write {} into that file"
            ) from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{file} does not hold a state of EPO; write {{}} into it for an empty history") from None
        self._state, self.step = state, step
