"""A run in the terminal: a live bar where there is a terminal, plain lines where there is none."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from epo.evaluation.panels import PanelResult
from epo.reporting.timetable import time_table


class ConsoleObserver:
    """Prints one line per step and evaluation, shows the current stage with its progress, and says at the end where the
    time of the steps went.

    Args:
        total_steps: RL steps of the run.
        console: where to; progress belongs on stderr, so that stdout can carry JSON.
    """

    def __init__(self, total_steps: int, console: Console) -> None:
        self._total = total_steps
        self._console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("starting", total=None, note="")
        self._durations: list[float] = []
        self._last_begin = time.monotonic()
        self._seconds: Counter[str] = Counter()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if self._durations:
            for line in time_table(self._seconds, steps=len(self._durations)):
                self._line(line)

    def begin(self, what: str, total: int) -> None:
        self._last_begin = time.monotonic()
        self._progress.reset(self._task, description=what, total=total, completed=0, note="")
        if not self._console.is_terminal and not what.startswith("step "):
            self._line(f"{what} ({total})")

    def advance(self, done: int, note: str = "") -> None:
        self._progress.update(self._task, completed=done, note=note)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        # From the first episode of the step to the end of its update, without evaluations and set-up.
        self._durations.append(time.monotonic() - self._last_begin)
        self._seconds.update({name: value for name, value in metrics.items() if name.startswith("time/")})
        recent = self._durations[-10:]
        left = (self._total - step) * sum(recent) / len(recent)
        entropy = f"entropy {metrics['entropy/mean']:.3f}" if "entropy/mean" in metrics else "entropy -"
        if "entropy/turn_early" in metrics:
            entropy += f" (early {metrics['entropy/turn_early']:.3f}, late {metrics['entropy/turn_late']:.3f})"
        self._line(
            f"step {step:>3}/{self._total}  episodes {metrics['episodes']:.0f}  "
            f"success {metrics['success/train']:.2f}  reward {metrics['reward/mean']:+.2f}  {entropy}  "
            f"kl {metrics.get('policy/kl', 0.0):.4f}  {metrics['tokens/per_second']:.0f} tok/s  left {_duration(left)}"
        )

    def evaluated(self, step: int, results: Sequence[PanelResult]) -> None:
        for r in results:
            self._line(
                f"step {step:>3}/{self._total}  {r.split}: success {r.success:.3f} "
                f"(95 % interval {r.low:.3f} to {r.high:.3f}, {r.episodes} episodes), "
                f"score {r.score:.2f}, {r.turns:.1f} turns" + (f", {r.errors} lost" if r.errors else "")
            )

    def note(self, text: str) -> None:
        self._line(text)

    def _line(self, text: str) -> None:
        self._console.print(escape(text), highlight=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
