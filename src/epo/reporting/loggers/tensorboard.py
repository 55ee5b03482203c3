"""The metrics of a run for TensorBoard, in the run folder."""

from __future__ import annotations

from collections.abc import Mapping

from torch.utils.tensorboard import SummaryWriter  # a second's import, and an optional package

from epo.reporting.loggers import LoggedRun


class TensorBoardLogger:
    """Writes scalars into `tensorboard/`. Steps that a resumed run repeats replace the earlier ones."""

    repeats = True

    def __init__(self, run: LoggedRun) -> None:
        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.first_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
