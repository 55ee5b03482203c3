"""What the EPO authors' release computes: an entropy bonus, and a smoothing term that changes no parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from epo.objectives.control.base import EntropyControl
from epo.objectives.corridor import EntropyHistory, corridor, penalty_of
from epo.objectives.loss import EntropyTerm


class EPOReleaseControl(EntropyControl):
    """The released form of EPO, kept to show that it is `bonus` with `aggregate=token`, bit for bit.

    Its penalty is an indicator (alpha outside the corridor, 0 inside), a constant wherever it is differentiable. So
    what surrounds it has no effect either: one reference per turn that includes the current step, a gate that opens at
    turn 25, and a schedule for 150 steps whatever the run's length.

    Source: repository WujiangXu/EPO at commit 5b6fa98, with the values of its launcher. Left out, because they act on
    the logged number only: front padding of short histories and finished environments inside the averages. The gate is
    per token here; the release opens it for a whole micro-batch if any of its rows is late.
    """

    aggregate = "token"

    def __init__(
        self,
        *,
        coefficient: float = 0.001,
        alpha: float = 0.1,
        kappa_low: float = 0.5,
        kappa_high: float = 1.5,
        late_turn: int = 25,
    ) -> None:
        """Set the bonus and the number beside it.

        Args:
            coefficient: lambda, >= 0.
            alpha: the indicator's value outside the corridor, >= 0.
            kappa_low: lower edge of the corridor over the turn's reference.
            kappa_high: upper edge of the corridor over the turn's reference.
            late_turn: first turn whose tokens are counted.

        Raises:
            ValueError: a number out of its range.
        """
        if not coefficient >= 0 or not alpha >= 0:
            raise ValueError(f"coefficient and alpha must be >= 0, got {coefficient} and {alpha}")
        if not 0 <= kappa_low < kappa_high:
            raise ValueError(f"the corridor needs 0 <= kappa_low < kappa_high, got {kappa_low} and {kappa_high}")
        self.coefficient = coefficient
        self.alpha = alpha
        self.kappa_low = kappa_low
        self.kappa_high = kappa_high
        self.late_turn = late_turn
        self.history = EntropyHistory("per_turn")

    def shape_advantages(
        self,
        advantages_N: Tensor,
        entropy_N: Tensor,
        trajectory_ids_N: Tensor,
        turn_ids_N: Tensor,
        group_ids_N: Tensor,
    ) -> Tensor:
        """Unchanged. The history takes in the step before its update: the release's reference includes it."""
        del trajectory_ids_N, group_ids_N
        self.history.observe(entropy_N, turn_ids_N)
        return advantages_N

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
        del total_steps, marks_N
        weights_N = weights_N.detach()
        bonus = (weights_N * entropy_N).sum()
        distances = corridor(
            entropy_N.detach(),
            self.history.reference(turn_ids_N),
            kappa_low=self.kappa_low,
            kappa_high=self.kappa_high,
        )
        counted_N = weights_N * (turn_ids_N >= self.late_turn)
        smoothing = self.alpha * (counted_N * penalty_of(distances, "indicator")).sum()
        beta, share = release_schedule(step), float(weights_N.sum())
        metrics = {
            "entropy/below": float(weights_N[distances.below_N > 0].sum()),
            "entropy/above": float(weights_N[distances.above_N > 0].sum()),
            "epo/smoothing": float(smoothing),
            "epo/beta": beta * share,
            "epo/effective_weight": self.coefficient * share,
            "epo/gradient_share": 0.0,
        }
        level = self.history.reference()
        if level is not None:
            metrics["entropy/reference"] = level * share
        return EntropyTerm(-self.coefficient * (bonus - beta * smoothing), metrics)

    @property
    def reference(self) -> float | None:
        return self.history.reference()

    def warnings(self) -> list[str]:
        return [
            "the released smoothing term has no gradient: this run equals method 'bonus' with aggregate=token in every "
            "parameter; use 'epo' for the paper's corridor, 'epo_strong' for one that acts"
        ]

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "history" not in state:
            raise ValueError(
                "the checkpoint has no entropy history: it was written with another entropy control method"
            )
        self.history.load_state_dict(state["history"])


def release_schedule(step: int) -> float:
    """The release's weight on its penalty: falls from 1 to 0.827 at step 75, then from 0.769 to 0.04 at step 149."""
    half = 75
    if step <= half:
        return 1.0 - 0.2 * (1.0 - math.exp(-2.0 * step / half))
    return 0.8 * math.exp(-3.0 * (step - half) / half)
