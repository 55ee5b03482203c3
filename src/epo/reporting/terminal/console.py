"""A run in the terminal: a live table where there is a terminal, plain lines where there is none."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from epo.evaluation.panels import PanelResult
from epo.reporting.terminal.live_table import STEPS_SHOWN, RunState, duration, step_table
from epo.reporting.terminal.text import visible
from epo.reporting.timetable import time_table

_REFRESH_SECONDS = 0.5
_NOTES_KEPT = 12
"""Notes that are printed again when the terminal changes its size."""
HEARTBEAT_SECONDS = 60.0
"""Without a terminal: after so long without a line there is one that says how far the stage is."""


class ConsoleObserver:
    """Shows a run while it is at work, and says at the end where the time of the steps went.

    In a terminal, a table of the last steps is drawn in place again and again, with notes above it; elsewhere there
    is a line per step, stage and evaluation, and one a minute while none of them comes. Never both.

    Args:
        total_steps: RL steps of the run.
        console: where to; progress belongs on stderr, so that stdout can carry JSON.
    """

    def __init__(self, total_steps: int, console: Console) -> None:
        self._total = total_steps
        self._console = console
        self._state = RunState(total=total_steps, alarm_titles=_alarm_titles())
        self._display = _LiveDisplay(self._state, console) if _can_redraw(console) else None
        self._durations: list[float] = []
        self._last_begin = self._last_advance = self._last_line = time.monotonic()
        self._seconds: Counter[str] = Counter()
        self._is_over = threading.Event()
        # By the clock and not by calls: while something hangs there are none.
        self._heartbeat = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        if self._display is not None:
            self._display.start()
        else:
            self._heartbeat.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        if self._heartbeat.is_alive():
            self._heartbeat.join(timeout=5)
        if self._display is not None:
            self._display.stop()
            if self._state.history:
                count = min(STEPS_SHOWN, len(self._state.history))
                self._console.print(step_table(self._state, width=self._console.width - 1, count=count))
        if self._durations:
            for line in time_table(self._seconds, steps=len(self._durations)):
                self._line(line)

    def begin(self, what: str, total: int) -> None:
        self._last_begin = self._last_advance = time.monotonic()
        state = self._state
        state.stage, state.stage_total, state.stage_done, state.stage_note = what, total, 0, ""
        state.stage_begin = self._last_begin
        if self._display is None and not what.startswith("step "):
            self._line(f"{what} ({total})" if total else what)
        self._refresh()

    def advance(self, done: int, note: str = "") -> None:
        self._state.stage_done, self._state.stage_note = done, note
        self._last_advance = time.monotonic()

    def step(self, step: int, metrics: dict[str, float]) -> None:
        # From the first episode of the step to the end of its update, without evaluations and set-up.
        self._durations.append(time.monotonic() - self._last_begin)
        self._seconds.update({name: value for name, value in metrics.items() if name.startswith("time/")})
        recent = self._durations[-10:]
        left = (self._total - step) * sum(recent) / len(recent)
        self._state.history.append((step, dict(metrics)))
        self._state.left = left
        if self._display is not None:
            self._refresh()
            return
        entropy = f"entropy {metrics['entropy/mean']:.3f}" if "entropy/mean" in metrics else "entropy -"
        if "entropy/turn_early" in metrics:
            entropy += f" (early {metrics['entropy/turn_early']:.3f}, late {metrics['entropy/turn_late']:.3f})"
        self._line(
            f"step {step:>3}/{self._total}  episodes {metrics['episodes']:.0f}  "
            f"success {metrics['success/train']:.2f}  reward {metrics['reward/mean']:+.2f}  {entropy}  "
            f"kl {metrics.get('policy/kl', 0.0):.4f}  {metrics['tokens/per_second']:.0f} tok/s  left {duration(left)}"
        )

    def evaluated(self, step: int, results: Sequence[PanelResult]) -> None:
        self._state.evaluation = (step, tuple(results))
        if self._display is not None:
            self._refresh()
            return
        for r in results:
            self._line(
                f"step {step:>3}/{self._total}  {r.split}: success {r.success:.3f} "
                f"(95 % interval {r.low:.3f} to {r.high:.3f}, {r.episodes} episodes), "
                f"score {r.score:.2f}, {r.turns:.1f} turns" + (f", {r.errors} lost" if r.errors else "")
            )

    def note(self, text: str) -> None:
        self._line(text)

    def _beat(self) -> None:
        while not self._is_over.wait(max(0.0, self._last_line + HEARTBEAT_SECONDS - time.monotonic())):
            if time.monotonic() - self._last_line >= HEARTBEAT_SECONDS:
                try:
                    self._line(self._stage_line())
                except Exception:  # a file that cannot be written must not end the run from here
                    return

    def _stage_line(self) -> str:
        """How far the stage is, how long it has taken, and what is awaited for how long."""
        state, now = self._state, time.monotonic()
        left = state.stage_total - state.stage_done
        count = f": {state.stage_done} of {state.stage_total}" if state.stage_total else ""
        note = f", {state.stage_note}" if state.stage_note else ""
        last = f", the last came {duration(now - self._last_advance)} ago" if state.stage_done else ""
        awaited = f"; {left} to go{last}" if left > 0 else ""
        return f"{state.stage}{count}{note}, {duration(now - state.stage_begin)} in it{awaited}"

    def _line(self, text: str) -> None:
        self._last_line = time.monotonic()
        shown = Text(visible(text, keep="\n"))
        if self._display is not None:
            self._display.say(shown)
        else:
            self._console.print(shown, soft_wrap=True)

    def _refresh(self) -> None:
        if self._display is not None:
            self._display.refresh()


class _LiveDisplay:
    """The block that is drawn in place, by a thread of its own, and the notes above it."""

    def __init__(self, state: RunState, console: Console) -> None:
        self._console = console
        self._state = state
        self._live = self._new_live()
        self._lock = threading.RLock()
        self._waiting: deque[Text] = deque()
        self._is_busy = False
        self._notes: deque[Text] = deque(maxlen=_NOTES_KEPT)
        self._size = console.size
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="live-table", daemon=True)
        self._loggers: list[logging.StreamHandler[Any]] = []

    def start(self) -> None:
        before = sys.stderr
        self._live.start(refresh=True)
        # Handlers made earlier write past the display; now their lines appear above it.
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is before:
                handler.setStream(sys.stderr)
                self._loggers.append(handler)
        self._thread.start()

    def stop(self) -> None:
        self._is_over.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)
        self._draw()
        self._live.stop()
        for handler in self._loggers:
            handler.setStream(sys.stderr)

    def say(self, text: Text) -> None:
        """Print `text` above the block, to stay. May be called while another call is under way, by a signal handler."""
        self._waiting.append(text)
        self._draw()

    def refresh(self) -> None:
        self._draw()

    def _draw(self) -> None:
        with self._lock:
            if self._is_busy:  # interrupted by a signal in this very thread: the call below goes on with it
                return
            self._is_busy = True
            try:
                if self._console.size != self._size and self._live.is_started:
                    self._start_afresh()
                while self._waiting:
                    text = self._waiting.popleft()
                    self._notes.append(text)
                    self._console.print(text, soft_wrap=True)
                if self._live.is_started:
                    self._live.refresh()
            finally:
                self._is_busy = False

    def _start_afresh(self) -> None:
        """After a change of size nobody knows where the block's lines are: terminals wrap, cut or scroll them."""
        self._size = self._console.size
        self._live.stop()
        self._console.clear()
        for text in self._notes:
            self._console.print(text, soft_wrap=True)
        self._live = self._new_live()  # the old one would go up over the notes, to where its block was
        self._live.start()

    def _new_live(self) -> Live:
        return Live(console=self._console, auto_refresh=False, transient=True, get_renderable=self._state.frame)

    def _run(self) -> None:
        while not self._is_over.wait(_REFRESH_SECONDS):
            try:
                self._draw()
            except Exception:  # a terminal that went away must not end the run
                return


def _can_redraw(console: Console) -> bool:
    """FORCE_COLOR and the like make a file look like a terminal to rich; nothing can be redrawn in it."""
    return console.is_terminal and not console.is_dumb_terminal and console.file.isatty()


def _alarm_titles() -> dict[str, str]:
    from epo.reporting.health.alarms import ALARMS

    return {name: alarm.title for name, alarm in ALARMS.items()}
