"""What the terminal shows of a run at work: stage, last steps, evaluations, alarms, curves, in a bounded block.

A frame is made for a width and a height. What has no room is left out, the least important first; nothing is wrapped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from epo.evaluation.panels import PanelResult
from epo.reporting.terminal.text import visible

STEPS_SHOWN = 8
MAX_HEIGHT = 20
"""Lines of a frame at most, however tall the terminal."""
_ALARMS_SHOWN = 3
_SPLITS_SHOWN = 4
_BARS = "▁▂▃▄▅▆▇█"
_ASCII_BARS = "_.-=*#"

_Metrics = Mapping[str, float]


@dataclass(slots=True)
class RunState:
    """What there is to show; the observer fills it in."""

    total: int
    """RL steps of the run."""
    stage: str = "starting"
    stage_total: int = 0
    stage_done: int = 0
    stage_note: str = ""
    stage_begin: float = field(default_factory=time.monotonic)
    history: list[tuple[int, _Metrics]] = field(default_factory=list[tuple[int, _Metrics]])
    """Finished steps of this session."""
    evaluation: tuple[int, Sequence[PanelResult]] | None = None
    left: float | None = None
    """Seconds to the last step, without evaluations."""
    alarm_titles: Mapping[str, str] = field(default_factory=dict[str, str])
    """How the alarms of `health/<alarm>` are called."""

    def frame(self) -> Frame:
        return Frame(self)


class Frame:
    """Renders a state within the console's width and height."""

    def __init__(self, state: RunState) -> None:
        self._state = state

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # One column and one line less than there are: terminals wrap and scroll differently at their edges.
        width, height = max(10, console.width - 1), max(1, min(MAX_HEIGHT, console.height - 1))
        plain = options.ascii_only
        stage = [stage_line(self._state, width=width, plain=plain)]
        blocks = [
            (4, evaluation_lines(self._state, width=width)),
            (5, alarm_lines(self._state, width=width)),
            (3, spark_lines(self._state, width=width, plain=plain)),
        ]
        room = height - len(stage)
        # A header and three steps come before everything but alarms.
        steps = min(STEPS_SHOWN, len(self._state.history))
        least = min(3, steps) + 1 if steps and room >= 2 else 0
        kept: list[list[Text]] = []
        spare = room - least
        for _, lines in sorted(blocks, key=lambda block: -block[0]):
            if len(lines) <= spare:
                spare -= len(lines)
                kept.append(lines)
        shown = min(steps, least - 1 + spare, room - 1) if least else 0
        if shown > 0:
            yield step_table(self._state, width=width, count=shown, plain=plain)
        for _, lines in blocks:
            if lines in kept:
                yield from lines
        yield from stage


def stage_line(state: RunState, *, width: int, plain: bool) -> Text:
    """The current stage, how far it is, and the time left."""
    name = visible(state.stage)
    count = f" {state.stage_done}/{state.stage_total}" if state.stage_total else ""
    elapsed = duration(time.monotonic() - state.stage_begin)
    rest = f"  left {duration(state.left)}" if state.left is not None else ""
    note = f"  {visible(state.stage_note)}" if state.stage_note else ""
    # In the order in which they are given up.
    for tail in (f"{note}  {elapsed}{rest}", f"{note}{rest}", rest, ""):
        room = width - len(name) - len(count) - len(tail)
        if room >= 12 or not tail:
            break
    else:
        tail, room = "", width - len(name) - len(count)
    text = Text(name, style="bold", no_wrap=True, overflow="ellipsis")
    if state.stage_total and room >= 8:
        size = min(24, room - 2)
        filled = min(size, size * state.stage_done // state.stage_total)
        full, empty = ("#", "-") if plain else ("━", "─")
        text.append("  ").append(full * filled, "green").append(empty * (size - filled), "dim")
    text.append(count).append(tail, "not bold")
    text.truncate(width, overflow="ellipsis")
    return text


def evaluation_lines(state: RunState, *, width: int) -> list[Text]:
    """Success on each split with its interval."""
    if state.evaluation is None:
        return []
    step, results = state.evaluation
    lines: list[Text] = []
    for result in results[:_SPLITS_SHOWN]:
        text = Text(f"{visible(result.split)} {result.success:.3f} ", no_wrap=True, overflow="ellipsis")
        text.append(f"[{result.low:.3f}, {result.high:.3f}]")
        text.append(f"  {result.episodes} episodes", "dim")
        if result.errors:
            text.append(f", {result.errors} lost", "bold red")
        text.append(f"  after step {step}", "dim")
        text.truncate(width, overflow="ellipsis")
        lines.append(text)
    return lines


def alarm_lines(state: RunState, *, width: int) -> list[Text]:
    """The alarms that were on at the last step."""
    last = state.history[-1][1] if state.history else {}
    names = [
        name.removeprefix("health/") for name, value in last.items() if name.startswith("health/") and value == 1.0
    ]
    lines = [Text(f"! {state.alarm_titles.get(name, name)}", style="bold red") for name in names[:_ALARMS_SHOWN]]
    if len(names) > _ALARMS_SHOWN:
        lines[-1].append(f"  and {len(names) - _ALARMS_SHOWN} more")
    for line in lines:
        line.no_wrap = True
        line.truncate(width, overflow="ellipsis")
    return lines


def spark_lines(state: RunState, *, width: int, plain: bool) -> list[Text]:
    """Success and entropy over the steps of this session."""
    lines: list[Text] = []
    for label, metric, low, high in (("success", "success/train", 0.0, 1.0), ("entropy", "entropy/mean", 0.0, None)):
        values = [metrics.get(metric) for _, metrics in state.history]
        finite = [value for value in values if value is not None and math.isfinite(value)]
        if len(finite) < 2:
            continue
        top = max(finite) if high is None else high
        ends = f"{label} {low:g} to {top:.2f} "
        if (room := width - len(ends)) < 4:
            continue
        lines.append(
            Text(ends, style="dim", no_wrap=True).append(sparkline(values, low, top, room, plain=plain), "not dim")
        )
    return lines


def sparkline(values: Sequence[float | None], low: float, high: float, width: int, *, plain: bool = False) -> str:
    """One character per value, or the mean of several neighbours where there are more values than `width`.

    What is missing or not finite is a space.
    """
    bars = _ASCII_BARS if plain else _BARS
    count = min(width, len(values))
    text = ""
    for place in range(count):
        some = values[place * len(values) // count : (place + 1) * len(values) // count]
        finite = [value for value in some if value is not None and math.isfinite(value)]
        if not finite:
            text += " "
            continue
        share = (sum(finite) / len(finite) - low) / (high - low) if high > low else 0.0
        text += bars[min(len(bars) - 1, max(0, math.floor(share * len(bars))))]
    return text


# ---------------------------------------------------------------- the table of steps


@dataclass(frozen=True, kw_only=True, slots=True)
class _Column:
    title: str
    short: str
    needs: tuple[str, ...]
    """Metrics without any of which the column says nothing."""
    cell: Callable[[_Metrics], str]
    rank: int
    """The lowest is given up last."""


def _number(metrics: _Metrics, name: str, form: str) -> str:
    value = metrics.get(name)
    return "-" if value is None else format(value, form)


def _plain(title: str, short: str, name: str, form: str, rank: int) -> _Column:
    return _Column(title=title, short=short, needs=(name,), cell=lambda m: _number(m, name, form), rank=rank)


def _early_late(metrics: _Metrics) -> str:
    early, late = metrics.get("entropy/turn_early"), metrics.get("entropy/turn_late")
    if early is None or late is None:
        return "-"
    arrow = "↗" if late > early * 1.05 else "↘" if late < early * 0.95 else "→"
    return f"{early:.2f}{arrow}{late:.2f}"


def _outside(metrics: _Metrics) -> str:
    if "entropy/below" not in metrics and "entropy/above" not in metrics:
        return "-"
    return f"{metrics.get('entropy/below', 0.0) + metrics.get('entropy/above', 0.0):.0%}"


_COLUMNS = (
    _plain("success", "succ", "success/train", ".2f", 0),
    _plain("reward", "reward", "reward/mean", "+.2f", 1),
    _plain("entropy", "H", "entropy/mean", ".3f", 12),
    _Column(
        title="early→late",
        short="early→late",
        needs=("entropy/turn_early", "entropy/turn_late"),
        cell=_early_late,
        rank=2,
    ),
    _plain("reference", "H_ref", "entropy/reference", ".2f", 6),
    _Column(title="outside", short="out", needs=("entropy/below", "entropy/above"), cell=_outside, rank=5),
    _plain("KL", "KL", "policy/kl", ".4f", 3),
    _plain("clipped", "clip", "policy/clip_fraction", ".1%", 9),
    _plain("gradient", "grad", "policy/grad_norm", ".2f", 7),
    _plain("explained", "e.v.", "value/explained_variance", ".2f", 10),
    _plain("invalid", "inv", "turns/invalid", ".1%", 4),
    _plain("tokens/s", "tok/s", "tokens/per_second", ".0f", 8),
)


def step_table(state: RunState, *, width: int, count: int, plain: bool = False) -> Table:
    """The last `count` steps, in as many columns as fit `width`."""
    recent = state.history[-count:]
    labels = [f"{step}" for step, _ in recent]
    cells = {
        column: [column.cell(metrics).translate(_ASCII if plain else {}) for _, metrics in recent]
        for column in _COLUMNS
        if any(name in metrics for name in column.needs for _, metrics in recent)
    }

    def total_width(columns: Sequence[_Column], *, is_short: bool, gap: int) -> int:
        first = max(4, *map(len, labels))
        return first + sum(
            gap + max(len(column.short if is_short else column.title), *map(len, cells[column])) for column in columns
        )

    chosen = list(cells)
    is_short, gap = False, 2
    if total_width(chosen, is_short=False, gap=2) > width:
        is_short, gap = True, 1
        for column in sorted(cells, key=lambda c: -c.rank):
            if total_width(chosen, is_short=True, gap=1) <= width:
                break
            chosen.remove(column)
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="dim", show_edge=False)
    table.add_column("step", justify="right", no_wrap=True)
    for column in chosen:
        title = column.short if is_short else column.title
        table.add_column(title.translate(_ASCII if plain else {}), justify="right", no_wrap=True)
    for place, label in enumerate(labels):
        style = "bold" if place == len(labels) - 1 else None
        table.add_row(label, *(cells[column][place] for column in chosen), style=style)
    return table


_ASCII = str.maketrans({"→": "-", "↗": "/", "↘": "\\"})


def duration(seconds: float) -> str:
    """`1h05m`, `3m20s` or `12s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
