"""EPO: an entropy bonus with a corridor around the entropies of the past (arXiv 2509.22576, version 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from epo.objectives.control.base import Aggregate, EntropyControl, check_aggregate
from epo.objectives.corridor import (
    EntropyHistory,
    HistoryAverage,
    PenaltyKind,
    ReferenceKind,
    Schedule,
    phase_weight,
    smoothing_penalty,
)
from epo.objectives.loss import EntropyTerm, corridor_term


class EPOControl(EntropyControl):
    """L = L^MT - lambda [L^H - beta_k L^smooth] (equation E7). The defaults are the paper's for ScienceWorld."""

    def __init__(
        self,
        *,
        coefficient: float = 0.001,
        alpha: float = 0.05,
        kappa_low: float = 0.0,
        kappa_high: float = 2.0,
        gamma: float = 3.0,
        penalty: PenaltyKind = "relu",
        reference: ReferenceKind = "scalar",
        history: HistoryAverage = "cumulative",
        window: int = 20,
        ema_decay: float = 0.9,
        schedule: Schedule = "paper",
        aggregate: Aggregate = "trajectory",
    ) -> None:
        """Set the corridor; the history starts empty.

        Args:
            coefficient: lambda, weight of the entropy bonus, >= 0.
            alpha: weight of the penalty inside the bonus, >= 0; above 1 / beta the penalty can push entropy down.
            kappa_low: lower edge of the corridor over H_ref; 0 means no floor.
            kappa_high: upper edge of the corridor over H_ref.
            gamma: rate of the schedule, >= 0.
            penalty: `relu` (the paper's), `squared`, or `indicator` (no gradient: EPO-Base with a logged number).
            reference: `scalar` (the paper's), or `per_turn` for one corridor per turn index.
            history: `cumulative` (the paper's), `sliding`, or `ema`: see `EntropyHistory`.
            window: number of latest RL steps of a `sliding` history.
            ema_decay: share of the old reference that an `ema` history keeps at each step.
            schedule: `paper`, or `constant` for beta = 1 ("w/o dynamic weight").
            aggregate: `trajectory` (the paper's), or `token` for plain means over tokens.

        Raises:
            ValueError: a number out of its range or an unknown choice.
        """
        if not coefficient >= 0 or not alpha >= 0:
            raise ValueError(f"coefficient and alpha must be >= 0, got {coefficient} and {alpha}")
        self.coefficient = coefficient
        self.alpha = alpha
        self.kappa_low = kappa_low
        self.kappa_high = kappa_high
        self.gamma = gamma
        self.penalty: PenaltyKind = penalty
        self.schedule: Schedule = schedule
        self.aggregate = check_aggregate(aggregate)
        self.history = EntropyHistory(reference, history, window=window, ema_decay=ema_decay)
        self._max_beta = phase_weight(0, 1, gamma=gamma, schedule=schedule)
        # Refuses bad settings now rather than in the middle of the first step.
        smoothing_penalty(torch.zeros(1), None, kappa_low=kappa_low, kappa_high=kappa_high, kind=penalty)

    def entropy_loss(
        self,
        entropy_N: Tensor,
        weights_N: Tensor,
        turn_ids_N: Tensor,
        *,
        step: int,
        total_steps: int,
        marks_N: Tensor | None = None,
    ) -> EntropyTerm:
        del marks_N
        return corridor_term(
            entropy_N,
            weights_N,
            self.history.reference(turn_ids_N),
            level=self.history.reference(),
            beta=phase_weight(step, total_steps, gamma=self.gamma, schedule=self.schedule),
            coefficient=self.coefficient,
            alpha=self.alpha,
            kappa_low=self.kappa_low,
            kappa_high=self.kappa_high,
            penalty=self.penalty,
        )

    def observe(self, entropy_N: Tensor, trajectory_ids_N: Tensor, turn_ids_N: Tensor) -> None:
        del trajectory_ids_N
        self.history.observe(entropy_N, turn_ids_N)

    @property
    def reference(self) -> float | None:
        return self.history.reference()

    def warnings(self) -> list[str]:
        found: list[str] = []
        strength = self.alpha * self._max_beta
        if self.penalty == "indicator":
            found.append(
                "penalty='indicator' has no gradient: the run equals method 'bonus' in every parameter; "
                "use 'relu' for a corridor that acts"
            )
        elif self.penalty == "relu" and strength <= 1:
            found.append(
                f"alpha * beta_max = {strength:g} <= 1: the corridor can weaken the entropy bonus "
                f"but never push entropy down; that needs alpha > {1 / self._max_beta:g}"
            )
        if self.kappa_low == 0:
            found.append("kappa_low = 0: the corridor has no floor, it cannot stop entropy from collapsing")
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "history" not in state:
            raise ValueError(
                "the checkpoint has no entropy history: it was written with another entropy control method"
            )
        self.history.load_state_dict(state["history"])
