"""The entropy corridor of EPO (arXiv 2509.22576): history, penalty, phase weight.

Legend for tensor suffixes: _N trained tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from epo.objectives._shapes import require_same_shape
from epo.objectives.entropy import turn_means

PenaltyKind = Literal["relu", "indicator", "squared"]
ReferenceKind = Literal["scalar", "per_turn"]
HistoryAverage = Literal["cumulative", "sliding", "ema"]
Schedule = Literal["paper", "constant"]

_PENALTIES = ("relu", "indicator", "squared")
_REFERENCES = ("scalar", "per_turn")
_AVERAGES = ("cumulative", "sliding", "ema")
_SCHEDULES = ("paper", "constant")


class EntropyHistory:
    """Mean entropies of the RL steps so far, and the reference H_ref they give (equation E3).

    `scalar` keeps one mean per step; `per_turn` one for every turn index, over the steps that reached that turn, so
    short episodes leave the references of later turns untouched. How the steps are averaged:

        cumulative   their unweighted mean (the paper's, which rejects a sliding window)
        sliding      the unweighted mean of the latest `window` steps
        ema          ref <- ema_decay ref + (1 - ema_decay) mean, starting at the first mean

    Append after the update: the reference of a step never contains the step itself. The state is plain JSON.

    Example::

        history = EntropyHistory()
        history.reference()              # None: nothing has been seen
        history.append(1.2)
        history.append(0.8)
        history.reference()              # 1.0
    """

    def __init__(
        self,
        kind: ReferenceKind = "scalar",
        average: HistoryAverage = "cumulative",
        *,
        window: int = 20,
        ema_decay: float = 0.9,
    ) -> None:
        """Start empty.

        Args:
            kind: `scalar`, or `per_turn` for one reference per turn index.
            average: how the steps are averaged.
            window: number of latest steps that count in a `sliding` history (a turn's own latest ones in `per_turn`).
            ema_decay: in [0, 1), of an `ema` history.

        Raises:
            ValueError: an unknown choice, or a number out of its range.
        """
        _check_choice("reference", kind, _REFERENCES)
        _check_choice("history", average, _AVERAGES)
        if window < 1:
            raise ValueError(f"window must be at least 1 step, got {window}")
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {ema_decay}")
        self.kind: ReferenceKind = kind
        self.average: HistoryAverage = average
        self.window = window
        self.ema_decay = ema_decay
        self._steps: list[dict[int, float]] = []
        self._references: dict[int, float] = {}

    def __len__(self) -> int:
        """Number of steps seen."""
        return len(self._steps)

    def append(self, means: float | Mapping[int, float]) -> None:
        """Add one RL step.

        Args:
            means: the mean entropy in nats (`scalar`), or the mean by turn index (`per_turn`).

        Raises:
            TypeError: the form does not fit the kind.
            ValueError: a mean that is not finite.
        """
        if isinstance(means, Mapping) != (self.kind == "per_turn"):
            expected = "a mapping from turn to mean" if self.kind == "per_turn" else "one number"
            raise TypeError(f"a {self.kind} history takes {expected}, got {type(means).__name__}")
        step = dict(means) if isinstance(means, Mapping) else {_ALL_TURNS: float(means)}
        if not all(math.isfinite(mean) for mean in step.values()):
            raise ValueError(f"entropy means must be finite, got {means}")
        self._steps.append(step)
        self._refresh()

    def observe(self, entropy_N: Tensor, turn_ids_N: Tensor) -> None:
        """Add one RL step from its token entropies under the sampling policy. No tokens: nothing is added.

        Args:
            entropy_N: [N] nats, trained tokens of the whole batch.
            turn_ids_N: [N] integers >= 0.
        """
        if entropy_N.numel() == 0:
            return
        if self.kind == "scalar":
            self.append(float(entropy_N.detach().double().mean()))
            return
        means = turn_means(entropy_N, turn_ids_N)
        self.append({int(turn): float(mean) for turn, mean in zip(means.turn_ids_U, means.means_U, strict=True)})

    @overload
    def reference(self, turn_ids_N: None = None) -> float | None: ...
    @overload
    def reference(self, turn_ids_N: Tensor) -> Tensor: ...
    def reference(self, turn_ids_N: Tensor | None = None) -> float | Tensor | None:
        """H_ref in nats, without gradient.

        Args:
            turn_ids_N: [N] turn of each token, or None for the level in one number.

        Returns:
            With `turn_ids_N`, the reference of each token, float64, NaN where there is no history yet. Without, the
            reference (`scalar`) or the unweighted mean of all turns' references (`per_turn`), None if empty.
        """
        if turn_ids_N is None:
            return _mean(list(self._references.values())) if self._references else None
        device = turn_ids_N.device
        if self.kind == "scalar":
            value = self._references.get(_ALL_TURNS, math.nan)
            return torch.full(turn_ids_N.shape, value, dtype=torch.float64, device=device)
        if turn_ids_N.numel() == 0:
            return torch.empty(0, dtype=torch.float64, device=device)
        size = int(turn_ids_N.max()) + 1
        table = [self._references.get(turn, math.nan) for turn in range(size)]
        return torch.tensor(table, dtype=torch.float64, device=device)[turn_ids_N]

    def state_dict(self) -> dict[str, Any]:
        """Plain lists and numbers that survive JSON exactly."""
        return {"kind": self.kind, "steps": [[[turn, mean] for turn, mean in step.items()] for step in self._steps]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state. The means of all steps are in it, so they may be averaged in another way from here on.

        Raises:
            ValueError: the state belongs to a history of the other kind, or is none.
        """
        if state["kind"] != self.kind:
            raise ValueError(f"the saved entropy history is {state['kind']!r}, this run asks for {self.kind!r}")
        steps = [{int(turn): float(mean) for turn, mean in step} for step in state["steps"]]
        for step in steps:
            fits = set(step) == {_ALL_TURNS} if self.kind == "scalar" else all(turn >= 0 for turn in step)
            if not fits or not all(math.isfinite(mean) for mean in step.values()):
                raise ValueError(f"the saved {self.kind} entropy history has a step {step}")
        self._steps = steps
        self._refresh()

    def _refresh(self) -> None:
        means: dict[int, list[float]] = {}
        for step in self._steps:
            for turn, mean in step.items():
                means.setdefault(turn, []).append(mean)
        self._references = {turn: self._averaged(values) for turn, values in sorted(means.items())}

    def _averaged(self, means: list[float]) -> float:
        if self.average == "cumulative":
            return _mean(means)
        if self.average == "sliding":
            return _mean(means[-self.window :])
        reference = means[0]
        for mean in means[1:]:
            reference = self.ema_decay * reference + (1 - self.ema_decay) * mean
        return reference


class Corridor(NamedTuple):
    """How far each token lies outside kappa_low * H_ref <= H <= kappa_high * H_ref. 0 inside, and without history."""

    below_N: Tensor
    """max(0, kappa_low * H_ref - H)."""
    above_N: Tensor
    """max(0, H - kappa_high * H_ref)."""


def corridor(entropy_N: Tensor, reference: float | Tensor | None, *, kappa_low: float, kappa_high: float) -> Corridor:
    """Distances of token entropies from the corridor, differentiable, subgradient 0 on its edges.

    Args:
        entropy_N: [N] nats.
        reference: H_ref: a number, [N] numbers (NaN: no history for this token), or None (no history at all).
        kappa_low: lower edge over H_ref, >= 0; 0 means no floor.
        kappa_high: upper edge over H_ref, > kappa_low.

    Raises:
        ValueError: kappa_low and kappa_high that leave no corridor, or shapes that differ.
    """
    if not 0 <= kappa_low < kappa_high:
        raise ValueError(f"the corridor needs 0 <= kappa_low < kappa_high, got {kappa_low} and {kappa_high}")
    known = math.nan if reference is None else reference
    reference_N = torch.as_tensor(known, dtype=entropy_N.dtype, device=entropy_N.device).detach()
    if reference_N.dim() > 0:
        require_same_shape(entropy=entropy_N, reference=reference_N)
    is_unknown_N = reference_N.isnan()
    low_N = torch.where(is_unknown_N, -math.inf, kappa_low * reference_N)
    high_N = torch.where(is_unknown_N, math.inf, kappa_high * reference_N)
    return Corridor(torch.relu(low_N - entropy_N), torch.relu(entropy_N - high_N))


def smoothing_penalty(
    entropy_N: Tensor,
    reference: float | Tensor | None,
    *,
    kappa_low: float,
    kappa_high: float,
    kind: PenaltyKind = "relu",
) -> Tensor:
    """Penalty P of each token for leaving the corridor (equation E4), not yet times alpha.

    `relu` is the paper's: the distance. `squared` is its square. `indicator` is the first version's 1 outside and 0
    inside, whose gradient is zero everywhere: it changes the number that is logged and no parameter.

    Args:
        entropy_N: [N] nats.
        reference: as for `corridor`.
        kappa_low: lower edge over H_ref.
        kappa_high: upper edge over H_ref.
        kind: see above.

    Returns:
        [N], all zero without a reference.
    """
    return penalty_of(corridor(entropy_N, reference, kappa_low=kappa_low, kappa_high=kappa_high), kind)


def penalty_of(distances: Corridor, kind: PenaltyKind) -> Tensor:
    """`smoothing_penalty` from distances that are known already."""
    _check_choice("penalty", kind, _PENALTIES)
    below_N, above_N = distances
    if kind == "relu":
        return below_N + above_N
    if kind == "squared":
        return below_N.square() + above_N.square()
    return ((below_N > 0) | (above_N > 0)).to(below_N.dtype)


def penalty_slope(distances: Corridor, kind: PenaltyKind) -> Tensor:
    """dP/dH of each token, without gradient: what the penalty does to the weight of the entropy bonus."""
    _check_choice("penalty", kind, _PENALTIES)
    below_N, above_N = distances.below_N.detach(), distances.above_N.detach()
    if kind == "relu":
        return (above_N > 0).to(above_N.dtype) - (below_N > 0).to(below_N.dtype)
    if kind == "squared":
        return 2.0 * (above_N - below_N)
    return torch.zeros_like(above_N)


def phase_weight(step: int, total_steps: int, *, gamma: float = 3.0, schedule: Schedule = "paper") -> float:
    """Weight beta_k of the smoothing term at RL step k (equation E6).

    beta_k = 1 + exp(-gamma k / k_mid), k_mid = floor(K / 2), at least 1: from 2 at the start over 1 + e^-gamma in the
    middle towards 1. `constant` is 1 throughout (the paper's "w/o dynamic weight").

    Args:
        step: k, >= 0.
        total_steps: K, the configured number of RL steps, >= 1.
        gamma: rate of the schedule, >= 0.
        schedule: `paper` or `constant`.

    Raises:
        ValueError: a number out of its range, or an unknown schedule.
    """
    _check_choice("schedule", schedule, _SCHEDULES)
    if step < 0 or total_steps < 1 or not gamma >= 0:
        raise ValueError(
            f"phase_weight needs step >= 0, total_steps >= 1 and gamma >= 0, got {step}, {total_steps}, {gamma}"
        )
    return 1.0 if schedule == "constant" else 1.0 + math.exp(-gamma * step / max(1, total_steps // 2))


_ALL_TURNS = -1
"""Key of the one mean a scalar history keeps."""


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
