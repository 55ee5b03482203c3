"""An entropy bonus and nothing else: EPO-Base, the ablation that must stand beside EPO."""

from __future__ import annotations

from torch import Tensor

from epo.objectives.control.base import Aggregate, EntropyControl, check_aggregate
from epo.objectives.loss import EntropyTerm, bonus_term


class BonusControl(EntropyControl):
    """L = L^MT - lambda L^H (EPO-Base of arXiv 2509.22576)."""

    def __init__(self, *, coefficient: float = 0.001, aggregate: Aggregate = "trajectory") -> None:
        """Set the bonus.

        Args:
            coefficient: lambda, >= 0.
            aggregate: `trajectory` for L^H of equation E2, `token` for the plain mean over tokens that most trainers
                (and the EPO release) use.

        Raises:
            ValueError: a negative coefficient, or an unknown aggregate.
        """
        self.aggregate = check_aggregate(aggregate)
        if not coefficient >= 0:
            raise ValueError(f"coefficient must be >= 0, got {coefficient}")
        self.coefficient = coefficient

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
        del turn_ids_N, step, total_steps, marks_N
        return bonus_term(entropy_N, weights_N, coefficient=self.coefficient)
