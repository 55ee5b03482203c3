"""The metrics of a run for TensorBoard, under the same names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from epo.evaluation.panels import PanelResult


class TensorBoardLog:
    """Writes scalars into `folder`. A resumed run writes on; steps it repeats replace the earlier ones.

    Args:
        purge_step: first step that is written again after a resume.
    """

    def __init__(self, folder: Path, *, purge_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # a second's import, and an optional package

        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def evaluated(self, step: int, results: Sequence[PanelResult]) -> None:
        for result in results:
            self._writer.add_scalar(f"eval/{result.split}/success", result.success, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
