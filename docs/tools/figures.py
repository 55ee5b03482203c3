"""Draws the figures of docs/concepts.md, docs/method.md and docs/findings.md: `python docs/tools/figures.py`.

Curves of runs come from `benchmarks/results`, formulas from `epo.objectives`, ratios from the tables of
docs/findings.md; nothing is drawn by eye but the schemes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from epo.objectives import EntropyHistory, phase_weight

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "docs" / "images"
FINDINGS = ROOT / "docs" / "findings.md"
COLLAPSED = ROOT / "benchmarks" / "results" / "cascade" / "none--seed3" / "metrics.jsonl"

INK, MUTED, LINE, PAPER = "#1f2933", "#5f6b7a", "#c8cfd8", "#ffffff"
BLUE, ORANGE, GREEN, BAND = "#2062a8", "#b8500a", "#2f7d4f", "#e3ebf5"


def main() -> None:
    for name, drawing in drawings().items():
        (IMAGES / name).write_text(drawing, encoding="utf-8")


def drawings() -> dict[str, str]:
    """Every figure, by the name of its file."""
    return {
        "cascade.svg": cascade(),
        "corridor.svg": corridor(),
        "phase-weight.svg": phase(),
        "trajectory.svg": trajectory(),
        "contexts.svg": contexts(),
        "findings.svg": findings(),
    }


@dataclass
class Drawing:
    """An SVG on white paper, so that it can be read on light and dark pages."""

    width: int
    height: int
    title: str
    parts: list[str] = field(default_factory=list[str])

    def text(self, x: float, y: float, words: str, *, colour: str = INK, size: int = 13, anchor: str = "start") -> None:
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" font-size="{size}" text-anchor="{anchor}">{words}</text>'
        )

    def box(
        self, x: float, y: float, width: float, height: float, *, fill: str, edge: str = "none", dashed: bool = False
    ) -> None:
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="3" fill="{fill}" '
            f'stroke="{edge}"{dash}/>'
        )

    def line(
        self, points: Sequence[tuple[float, float]], *, colour: str = LINE, width: float = 1, dash: str = ""
    ) -> None:
        where = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(
            f'<polyline points="{where}" fill="none" stroke="{colour}" stroke-width="{width:g}" '
            f'stroke-linejoin="round"{dashes}/>'
        )

    def area(self, points: Sequence[tuple[float, float]], *, fill: str) -> None:
        where = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polygon points="{where}" fill="{fill}"/>')

    def svg(self) -> str:
        body = "\n".join(self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'role="img" font-family="system-ui, sans-serif">\n<title>{self.title}</title>\n'
            f'<rect width="{self.width}" height="{self.height}" rx="8" fill="{PAPER}"/>\n{body}\n</svg>\n'
        )


@dataclass
class Axes:
    """Data to places on a drawing, with ticks and the names of the axes."""

    drawing: Drawing
    left: float
    top: float
    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return self.left + across * self.width, self.top + (1 - up) * self.height

    def frame(self, *, name: str, across: str, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> None:
        for tick in y_ticks:
            self.drawing.line([self.at(self.x[0], tick), self.at(self.x[1], tick)])
            self.drawing.text(self.left - 7, self.at(0, tick)[1] + 4, f"{tick:g}", colour=MUTED, size=12, anchor="end")
        for tick in x_ticks:
            place = self.at(tick, self.y[0])
            self.drawing.text(place[0], place[1] + 17, f"{tick:g}", colour=MUTED, size=12, anchor="middle")
        middle = self.left + self.width / 2
        self.drawing.text(middle, self.top + self.height + 36, across, colour=MUTED, size=12, anchor="middle")
        self.drawing.text(self.left, self.top - 12, name, size=13)

    def curve(self, ys: Sequence[float], *, colour: str, xs: Sequence[float] | None = None, dash: str = "") -> None:
        xs = list(range(1, len(ys) + 1)) if xs is None else xs
        points = [self.at(x, y) for x, y in zip(xs, ys, strict=True)]
        self.drawing.line(points, colour=colour, width=2, dash=dash)


def _metrics(file: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def cascade() -> str:
    """The run of plain PPO that lost its task: entropy of early and late turns, and success."""
    steps = _metrics(COLLAPSED)
    drawing = Drawing(760, 300, "Entropy of early and late turns and success of a run of plain PPO that collapsed")
    numbers = (1, len(steps))
    entropy = Axes(drawing, 52, 44, 300, 196, numbers, (0, 1.2))
    entropy.frame(name="entropy, nats a token", across="RL step", x_ticks=(1, 10, 20, 30), y_ticks=(0, 0.4, 0.8, 1.2))
    entropy.curve([step["entropy/turn_late"] for step in steps], colour=ORANGE)
    entropy.curve([step["entropy/turn_early"] for step in steps], colour=BLUE, dash="6 4")
    drawing.text(100, 96, "late turns", colour=ORANGE)
    drawing.text(128, 214, "early turns", colour=BLUE)
    success = Axes(drawing, 440, 44, 290, 196, numbers, (0, 1))
    success.frame(name="success, training episodes", across="RL step", x_ticks=(1, 10, 20, 30), y_ticks=(0, 0.5, 1))
    success.curve([step["success/train"] for step in steps], colour=GREEN)
    return drawing.svg()


def corridor() -> str:
    """What the corridor is around, in that run, and what a token's entropy weighs below, inside and above."""
    means = [step["entropy/mean"] for step in _metrics(COLLAPSED)]
    history, references = EntropyHistory(), list[float]()
    for mean in means:
        reference = history.reference()
        references.append(float("nan") if reference is None else reference)
        history.append(mean)
    low, high = 0.5, 1.5
    drawing = Drawing(760, 310, "The corridor of EPO around the mean entropy of the steps before")
    axes = Axes(drawing, 52, 44, 440, 206, (1, len(means)), (0, 1.2))
    xs = list(range(2, len(means) + 1))
    upper = [axes.at(x, high * r) for x, r in zip(xs, references[1:], strict=True)]
    lower = [axes.at(x, low * r) for x, r in zip(xs, references[1:], strict=True)]
    drawing.area([*upper, *reversed(lower)], fill=BAND)
    axes.frame(name="entropy, nats a token", across="RL step", x_ticks=(1, 10, 20, 30), y_ticks=(0, 0.4, 0.8, 1.2))
    axes.curve(references[1:], xs=xs, colour=MUTED, dash="6 4")
    axes.curve(means, colour=ORANGE)
    for y, words, colour in ((72, "above", ORANGE), (150, "inside", MUTED), (228, "below", BLUE)):
        drawing.text(520, y, words, colour=colour, size=14)
    drawing.text(520, y := 92, "weight λ (1 − αβ)")
    drawing.text(520, y + 18, "αβ &gt; 1: pushed down", colour=MUTED, size=12)
    drawing.text(520, 170, "weight λ, the plain bonus")
    drawing.text(520, 248, "weight λ (1 + αβ)")
    drawing.text(520, 266, "κ_l = 0: nothing is below", colour=MUTED, size=12)
    drawing.text(60, 64, "solid: the step's mean · dashed: H_ref · band: κ 0.5 to 1.5", colour=MUTED, size=12)
    return drawing.svg()


def phase() -> str:
    """alpha beta_k over training: where it stays below 1 the corridor never pushes entropy down."""
    steps = 125
    drawing = Drawing(760, 290, "alpha times beta over training, for the published and our own alpha")
    axes = Axes(drawing, 52, 44, 470, 190, (0, steps), (0, 20))
    axes.frame(name="αβ_k, K = 125", across="RL step k", x_ticks=(0, 62, 125), y_ticks=(0, 5, 10, 15, 20))
    xs = list(range(steps))
    for alpha, colour, dash in ((10.0, ORANGE, ""), (0.1, BLUE, "6 4"), (0.05, GREEN, "2 3")):
        values = [alpha * phase_weight(step, steps) for step in xs]
        axes.curve(values, xs=xs, colour=colour, dash=dash)
    drawing.line([axes.at(0, 1), axes.at(steps, 1)], colour=INK, width=1.5)
    for y, words, colour in (
        (140, "α = 10, epo_strong", ORANGE),
        (196, "1: the bonus turns around", INK),
        (216, "α = 0.1, ALFWorld", BLUE),
        (236, "α = 0.05, ScienceWorld", GREEN),
    ):
        drawing.text(532, y, words, colour=colour)
    return drawing.svg()


def trajectory() -> str:
    """An episode: turns of a prompt that is read and a response that is sampled, and what a token weighs."""
    drawing = Drawing(760, 250, "A trajectory, its turns and its tokens")
    drawing.text(20, 34, "one trajectory: T = 3 turns", size=14)
    cells: list[tuple[str, int, int]] = [("turn 0", 9, 4), ("turn 1", 4, 2), ("turn 2", 5, 6)]
    cell, left, top = 19.0, 20.0, 76.0
    for turn, (name, read, drawn) in enumerate(cells):
        drawing.text(left, top - 12, name, colour=MUTED)
        for place in range(read + drawn):
            sampled = place >= read
            drawing.box(left + place * cell, top, cell - 3, 34, fill=BLUE if sampled else BAND)
        brace = left + read * cell
        drawing.line(
            [
                (brace, top + 42),
                (brace, top + 48),
                (brace + drawn * cell - 3, top + 48),
                (brace + drawn * cell - 3, top + 42),
            ],
            colour=MUTED,
        )
        middle = brace + (drawn * cell - 3) / 2
        drawing.text(middle, top + 66, f"n = {drawn}", colour=INK, anchor="middle")
        drawing.text(middle, top + 84, f"1 / (3B · {drawn})", colour=MUTED, size=12, anchor="middle")
        left += (read + drawn) * cell + (18 if turn < 2 else 0)
    drawing.box(20, 196, 16, 16, fill=BAND)
    drawing.text(44, 209, "read: the prompt and what the environment says. No weight, no entropy, no loss.")
    drawing.box(20, 222, 16, 16, fill=BLUE)
    drawing.text(44, 235, "sampled: trained. Weight 1 / (B · T · n): episodes, turns, tokens count alike.")
    return drawing.svg()


def contexts() -> str:
    """The same three turns as training rows, under both contexts."""
    drawing = Drawing(760, 330, "Training rows of three turns, as a transcript and with a window")

    def row(top: float, parts: Sequence[tuple[str, float, str]]) -> None:
        left = 20.0
        for words, width, kind in parts:
            trained = kind == "trained"
            drawing.box(
                left,
                top,
                width - 4,
                28,
                fill=BLUE if trained else BAND,
                edge=LINE if kind == "again" else "none",
                dashed=kind == "again",
            )
            drawing.text(
                left + (width - 4) / 2, top + 18, words, size=12, colour=PAPER if trained else INK, anchor="middle"
            )
            left += width

    drawing.text(20, 34, "transcript: one row, every token once", size=14)
    row(
        48,
        [
            ("goal, o0", 120, "read"),
            ("a0", 60, "trained"),
            ("o1", 100, "read"),
            ("a1", 60, "trained"),
            ("o2", 100, "read"),
            ("a2", 60, "trained"),
        ],
    )
    drawing.text(20, 122, "window of 2 pairs: a row for each turn, earlier turns as text", size=14)
    row(136, [("goal, o0", 120, "read"), ("a0", 60, "trained")])
    row(174, [("goal", 80, "again"), ("o0 a0", 90, "again"), ("o1", 100, "read"), ("a1", 60, "trained")])
    row(
        212,
        [
            ("goal", 80, "again"),
            ("o0 a0", 90, "again"),
            ("o1 a1", 110, "again"),
            ("o2", 100, "read"),
            ("a2", 60, "trained"),
        ],
    )
    for left, words, kind in ((20, "trained", "trained"), (150, "read", "read"), (250, "read again", "again")):
        trained = kind == "trained"
        drawing.box(
            left,
            270,
            16,
            16,
            fill=BLUE if trained else BAND,
            edge=LINE if kind == "again" else "none",
            dashed=kind == "again",
        )
        drawing.text(left + 24, 283, words)
    drawing.text(20, 313, "o: observation, a: response", colour=MUTED, size=12)
    return drawing.svg()


SECTIONS = {
    "PPO on ScienceWorld at a learning rate somewhat too high": ("PPO, ScienceWorld, learning rate 1e-3", 1.5),
    "GRPO on household games at the recipe's learning rate": ("GRPO, household games, learning rate 5e-4", 1.2),
    "EPO's settings, one at a time": ("there, EPO's settings one at a time", 1.2),
    "An equally small search for every method": ("there, what an equally small search chose", 1.2),
}
"""Sections of docs/findings.md that are drawn: what they are called in the figure, and the aim for success."""
_RATIO = re.compile(r"(\d+\.\d\d) \((\d+\.\d\d) to (\d+\.\d\d)\)")


def findings() -> str:
    """Success and oscillation of every arm over its baseline's, with intervals, as the tables of the page have them."""
    groups = _ratios()
    rows = sum(len(arms) + 1 for arms in groups.values())
    drawing = Drawing(760, 80 + 18 * rows, "Success and oscillation of entropy of every arm over those of its baseline")
    panels = ((250.0, "success over the baseline's"), (520.0, "oscillation over the baseline's"))
    width, (low, high), top = 210.0, (0.25, 2.5), 52.0
    bottom = top + 18 * rows

    def across(left: float, ratio: float) -> float:
        place = math.log(min(max(ratio, low), high) / low) / math.log(high / low)
        return left + place * width

    for left, name in panels:
        drawing.text(left, 26, name)
        for tick in (0.25, 0.5, 1.0, 2.0):
            drawing.line([(across(left, tick), top - 8), (across(left, tick), bottom)])
            drawing.text(across(left, tick), bottom + 18, f"{tick:g}", colour=MUTED, size=12, anchor="middle")
        drawing.line([(across(left, 1), top - 8), (across(left, 1), bottom)], colour=INK, width=1.2)
    drawing.text(20, bottom + 18, "dashed: the aims", colour=ORANGE, size=12)
    y = top + 6
    for section, arms in groups.items():
        title, aim = SECTIONS[section]
        for (left, _), ratio in zip(panels, (aim, 0.5), strict=True):
            ends = [(across(left, ratio), y - 9), (across(left, ratio), y + 9 + 18 * len(arms))]
            drawing.line(ends, colour=ORANGE, width=1.2, dash="4 3")
        drawing.text(20, y + 4, title, size=12)
        y += 18
        for arm, ratios in arms.items():
            drawing.text(240, y + 4, arm, colour=MUTED, size=12, anchor="end")
            for (left, _), (mean, begin, end) in zip(panels, ratios, strict=True):
                colour = BLUE if begin < 1 < end else GREEN if (mean > 1) == (left == panels[0][0]) else ORANGE
                drawing.line([(across(left, begin), y), (across(left, end), y)], colour=colour, width=2)
                drawing.box(across(left, mean) - 3.5, y - 3.5, 7, 7, fill=colour)
            y += 18
    return drawing.svg()


def _ratios() -> dict[str, dict[str, list[tuple[float, float, float]]]]:
    """Section -> arm -> its two ratios with their intervals: success, then oscillation."""
    found: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    section = ""
    for line in FINDINGS.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        cells = [cell.strip() for cell in line.split("|")]
        if section not in SECTIONS or not line.startswith("| `") or len(cells) < 6:
            continue
        of_success = len(cells) > 11
        if ratio := _RATIO.fullmatch(cells[5 if of_success else 4]):
            arm = cells[1].split("`")[1]
            mean, low, high = (float(number) for number in ratio.groups())
            found.setdefault(section, {}).setdefault(arm, []).append((mean, low, high))
    return {section: {arm: two for arm, two in arms.items() if len(two) == 2} for section, arms in found.items()}


if __name__ == "__main__":
    main()
