"""What the smoothing term of EPO really does to the entropy bonus, measured by gradients, as numbers and as a plot.

Legend for tensor suffixes: _G entropies of a grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from epo.errors import UserError
from epo.objectives.control import METHODS, BonusControl, EPOControl, EPOReleaseControl, make_control

PROFILES: dict[str, tuple[str, dict[str, Any]]] = {
    "epo_base": ("epo_base", {}),
    "epo, paper for ScienceWorld": ("epo", {}),
    "epo, paper for ALFWorld": ("epo", {"alpha": 0.1}),
    "epo_constant_beta": ("epo_constant_beta", {}),
    "epo_release": ("epo_release", {}),
    "epo_strong": ("epo_strong", {}),
}
"""What `epo explain smoothing` compares when no setting is given: label, method, options."""

# Okabe and Ito's palette: distinguishable with any kind of colour vision; the styles help without colour.
_LINES = (("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", "-."), ("#CC79A7", ":"))

_NOTHING = 1e-9
_TURN = 29
"""A turn late enough for the release's gate."""


@dataclass(frozen=True, kw_only=True)
class EffectiveWeights:
    """Weight of each token's entropy in the gradient, as a multiple of lambda: 1 is the plain bonus."""

    label: str
    steps: tuple[int, ...]
    """RL steps at which it was measured."""
    ratios: tuple[float, ...]
    """Token entropies over the historical entropy."""
    weights: tuple[tuple[float, ...], ...]
    """By step, then by ratio."""
    has_corridor: bool
    kappa_low: float
    kappa_high: float

    def at(self, step: int, ratio: float) -> float:
        """The weight at a ratio that was measured."""
        return self.weights[self.steps.index(step)][self.ratios.index(ratio)]

    @property
    def below(self) -> float | None:
        """A measured ratio below the corridor; None where the corridor has no floor."""
        return self.kappa_low / 2 if self.kappa_low > 0 else None

    @property
    def inside(self) -> float:
        """A measured ratio inside the corridor."""
        return (self.kappa_low + self.kappa_high) / 2

    @property
    def above(self) -> float:
        """A measured ratio above the corridor."""
        return self.kappa_high + 0.5

    def verdict(self) -> str:
        """What these numbers mean for a run, in one line."""
        if all(abs(weight - 1) < _NOTHING for weights in self.weights for weight in weights):
            return "no effect: the plain entropy bonus"
        below, above = self._between(0, self.kappa_low), self._between(self.kappa_high, self.ratios[-1] + 1)
        ceiling = self._ceiling(above)
        if self.below is None:
            return f"{ceiling}; no floor"
        lows = [weight for weights in below for _, weight in weights]
        return (
            f"{ceiling}; below {self.kappa_low:g} H_ref the bonus is {min(lows):.2g} to {max(lows):.2g} times as strong"
        )

    def _between(self, low: float, high: float) -> list[list[tuple[float, float]]]:
        """Ratios in (low, high) and their weights, by step."""
        return [
            [(ratio, weight) for ratio, weight in zip(self.ratios, weights, strict=True) if low < ratio < high]
            for weights in self.weights
        ]

    def _ceiling(self, above: list[list[tuple[float, float]]]) -> str:
        edge = f"above {self.kappa_high:g} H_ref"
        lowest = [min(weight for _, weight in weights) for weights in above]
        pushing = [step for step, weight in zip(self.steps, lowest, strict=True) if weight < -_NOTHING]
        if not pushing:
            return f"never pushes entropy down: {edge} the bonus keeps at least {min(lowest):.0%} of its weight"
        when = "at every step" if len(pushing) == len(self.steps) else f"until step {max(pushing)} at least, not later"
        starts = [min(ratio for ratio, weight in weights if weight < 0) for weights in above if weights[-1][1] < 0]
        if max(starts) <= above[0][0][0]:
            return f"pushes entropy down {edge} {when}"
        return (
            f"pushes entropy down {when}, the more the higher it is: {edge} the bonus only weakens until "
            f"{min(starts):.2g} to {max(starts):.2g} H_ref (for H_ref = 1 nat)"
        )


def effective_weights(label: str, method: str, options: Mapping[str, Any], *, total_steps: int) -> EffectiveWeights:
    """Measure a setting: the gradient of its entropy loss by token entropies from 0 to twice the upper edge.

    The history is one step whose entropies all equal 1, so an entropy is its own ratio to H_ref.

    Args:
        label: its name in table and plot.
        method: a method with a corridor, or the plain bonus.
        options: of the method.
        total_steps: K, RL steps of the run.

    Raises:
        UserError: a method without entropy bonus and corridor, or a bonus of 0.
    """
    control = make_control(method, **options)
    coefficient = getattr(control, "coefficient", None)
    has_corridor = hasattr(control, "kappa_low")
    if coefficient is None or not (has_corridor or type(control) is BonusControl):
        names = ", ".join(name for name, found in METHODS.items() if found.control in (EPOControl, EPOReleaseControl))
        raise UserError(f"entropy.method={method!r} has no smoothing term to explain; methods that have one: {names}")
    if coefficient == 0:
        raise UserError("entropy.coefficient=0 switches bonus and smoothing off: set it above 0 to see their ratio")
    # A bonus without a corridor is looked at over the same range as the paper's.
    kappa_low, kappa_high = getattr(control, "kappa_low", 0.0), getattr(control, "kappa_high", 2.0)
    top = max(3.0, 2 * kappa_high)
    probes = {kappa_low / 2, (kappa_low + kappa_high) / 2, kappa_high + 0.5}
    # The middle of each of 601 cells, so that hardly a ratio lies exactly on an edge.
    grid = {(cell + 0.5) * top / 601 for cell in range(601)}
    ratios_G = torch.tensor(sorted(grid | probes), dtype=torch.float64)
    turns_G = torch.full(ratios_G.shape, _TURN)
    past = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.long), torch.full((1,), _TURN)
    control.shape_advantages(past[0], *past, past[1])
    control.observe(*past)
    steps = tuple(sorted({0, total_steps // 4, total_steps // 2, total_steps - 1}))
    weights: list[tuple[float, ...]] = []
    for step in steps:
        leaf_G = ratios_G.clone().requires_grad_()
        term = control.entropy_loss(leaf_G, torch.ones_like(leaf_G), turns_G, step=step, total_steps=total_steps)
        (grad_G,) = torch.autograd.grad(term.loss, leaf_G)
        weights.append(tuple((-grad_G / coefficient).tolist()))
    return EffectiveWeights(
        label=label,
        steps=steps,
        ratios=tuple(ratios_G.tolist()),
        weights=tuple(weights),
        has_corridor=has_corridor,
        kappa_low=kappa_low,
        kappa_high=kappa_high,
    )


def compare_profiles(*, total_steps: int) -> list[EffectiveWeights]:
    """The profiles side by side, the ALFWorld values of the paper among them."""
    return [
        effective_weights(label, method, options, total_steps=total_steps)
        for label, (method, options) in PROFILES.items()
    ]


def plot_effective_weights(settings: Sequence[EffectiveWeights], path: Path) -> None:
    """One panel per setting: weight over lambda against entropy over H_ref, a line per step.

    Raises:
        UserError: `path` cannot be written, or is no image file.
    """
    from matplotlib.figure import Figure

    if path.is_dir() or not path.suffix:
        raise UserError(f"--plot {str(path)!r} is not an image file: give a name such as plot.png")

    columns = min(3, len(settings))
    rows = -(-len(settings) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
    for number, setting in enumerate(settings, start=1):
        axes = figure.add_subplot(rows, columns, number)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.axhline(1, color="gray", linewidth=0.8, linestyle=":")
        if setting.has_corridor:
            axes.axvspan(setting.kappa_low, setting.kappa_high, color="gray", alpha=0.12, label="corridor")
        for (colour, style), step, weights in zip(_LINES, setting.steps, setting.weights, strict=False):
            axes.plot(setting.ratios, weights, color=colour, linestyle=style, linewidth=1.6, label=f"step {step}")
        lowest = min(min(weights) for weights in setting.weights)
        highest = max(max(weights) for weights in setting.weights)
        axes.set_ylim(min(-0.2, 1.1 * lowest), max(1.4, 1.1 * highest))
        axes.set_title(setting.label, fontsize=10)
        axes.set_xlabel("token entropy / historical entropy")
        axes.set_ylabel("weight of the entropy / λ")
        axes.legend(fontsize=7, loc="best")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--plot {str(path)!r} cannot be written ({reason}): give a file such as plot.png") from None
