"""An observer that keeps what it hears, and may act on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from epo.evaluation.panels import PanelResult


class QuietObserver:
    """Args: `on_step` is called with the number of every finished RL step."""

    def __init__(self, on_step: Callable[[int], None] | None = None) -> None:
        self.on_step = on_step
        self.notes: list[str] = []
        self.steps: list[dict[str, float]] = []
        self.evaluations: list[tuple[int, Sequence[PanelResult]]] = []

    def begin(self, what: str, total: int) -> None: ...

    def advance(self, done: int, note: str = "") -> None: ...

    def step(self, step: int, metrics: dict[str, float]) -> None:
        self.steps.append(metrics)
        if self.on_step is not None:
            self.on_step(step)

    def evaluated(self, step: int, results: Sequence[PanelResult]) -> None:
        self.evaluations.append((step, results))

    def note(self, text: str) -> None:
        self.notes.append(text)
