"""An entropy bonus whose coefficient rises while entropy is below a target and falls otherwise (Skywork-OR1)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from epo.objectives.control.base import Aggregate, EntropyControl, check_aggregate, observed_mean
from epo.objectives.loss import EntropyTerm, bonus_term


class AdaptiveControl(EntropyControl):
    """L = L^MT - c [H < target] L^H; after each RL step c rises by `delta` if H < target, else falls, in [0, maximum].

    H is the token mean under the sampling policy of the step before. Before anything is observed, entropy is not known
    to be low: there is no bonus.

    Source: Skywork-OR1, arXiv 2505.22312, read in its official code, whose coefficient starts at 0 and changes once,
    after each RL step; equation numbers were not checked. There H is estimated by the mean of -log pi of the sampled
    tokens, here it is the mean entropy; and theirs acts at once if it starts above 0.
    """

    def __init__(
        self,
        *,
        target: float = 0.2,
        delta: float = 1e-4,
        maximum: float = 0.005,
        initial: float = 0.0,
        aggregate: Aggregate = "token",
    ) -> None:
        """Set the controller.

        Args:
            target: entropy below which the bonus acts, nats per token, >= 0.
            delta: change of the coefficient per RL step, >= 0.
            maximum: greatest coefficient, >= 0.
            initial: coefficient before the first change, in [0, maximum].
            aggregate: `token` for the plain mean over tokens, `trajectory` for L^H of EPO's equation E2.

        Raises:
            ValueError: a number out of its range or an unknown choice.
        """
        for name, value in (("target", target), ("delta", delta), ("maximum", maximum)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite, got {value}")
        if not 0 <= initial <= maximum:
            raise ValueError(f"initial must lie in [0, maximum = {maximum}], got {initial}")
        self.target = target
        self.delta = delta
        self.maximum = maximum
        self.aggregate = check_aggregate(aggregate)
        self._coefficient = initial
        self._entropy: float | None = None

    @property
    def coefficient(self) -> float:
        """Weight of the bonus in the step that comes: c while the entropy observed last is below the target, else 0."""
        return self._coefficient if self._entropy is not None and self._entropy < self.target else 0.0

    @property
    def reference(self) -> float | None:
        return self.target

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
        """The bonus; metric `adaptive/coefficient`, the weight it has."""
        del turn_ids_N, step, total_steps, marks_N
        weights_N = weights_N.detach()
        term = bonus_term(entropy_N, weights_N, coefficient=self.coefficient)
        return EntropyTerm(term.loss, {"adaptive/coefficient": self.coefficient * float(weights_N.sum())})

    def observe(self, entropy_N: Tensor, trajectory_ids_N: Tensor, turn_ids_N: Tensor) -> None:
        """Change the coefficient; a batch without tokens changes nothing."""
        del trajectory_ids_N, turn_ids_N
        mean = observed_mean(entropy_N)
        if mean is None:
            return
        self._entropy = mean
        change = self.delta if self._entropy < self.target else -self.delta
        self._coefficient = max(0.0, min(self.maximum, self._coefficient + change))

    def warnings(self) -> list[str]:
        if self.target == 0:
            return ["target = 0: entropy is never below it, the run equals method 'none'"]
        if self.maximum == 0 or (self.delta == 0 and self._coefficient == 0):
            return ["the coefficient cannot leave 0: the run equals method 'none'"]
        return []

    def state_dict(self) -> dict[str, Any]:
        return {"coefficient": self._coefficient, "entropy": self._entropy}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if set(state) != {"coefficient", "entropy"}:
            raise ValueError(
                "the checkpoint has no coefficient and entropy: it was written with another entropy control method"
            )
        coefficient = float(state["coefficient"])
        if not 0 <= coefficient <= self.maximum:
            raise ValueError(
                f"the checkpoint's coefficient must lie in [0, maximum = {self.maximum}], got {coefficient}: "
                "it was written with other settings"
            )
        self._coefficient = coefficient
        self._entropy = None if state["entropy"] is None else float(state["entropy"])
