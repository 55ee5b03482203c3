"""An entropy bonus and nothing else: EPO-Base, the ablation that must stand beside EPO."""

from __future__ import annotations

from torch import Tensor

from epo.objectives.control.base import EntropyControl
from epo.objectives.loss import EntropyTerm, bonus_term


class BonusControl(EntropyControl):
    """L = L^MT - lambda L^H (EPO-Base of arXiv 2509.22576)."""

    def __init__(self, *, coefficient: float = 0.001) -> None:
        """Set the bonus.

        Args:
            coefficient: lambda, >= 0.

        Raises:
            ValueError: a negative coefficient.
        """
        if not coefficient >= 0:
            raise ValueError(f"coefficient must be >= 0, got {coefficient}")
        self.coefficient = coefficient

    def entropy_loss(
        self, entropy_N: Tensor, weights_N: Tensor, turn_ids_N: Tensor, *, step: int, total_steps: int
    ) -> EntropyTerm:
        del turn_ids_N, step, total_steps
        return bonus_term(entropy_N, weights_N, coefficient=self.coefficient)
