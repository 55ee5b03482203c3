"""EPO-Decay: an entropy bonus that fades, over the turns of an episode or over training."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from epo.objectives.control.base import Aggregate
from epo.objectives.control.bonus import BonusControl
from epo.objectives.loss import EntropyTerm, bonus_term

DecayOver = Literal["turn", "phase"]


class EPODecayControl(BonusControl):
    """L = L^MT - lambda sum_i w_i d_i H_i with a falling weight d of mean 1.

    d is proportional to 1 + exp(-rate x). Over turns, x = t / T for turn t of at most T, and the mean is over those T
    turns: early turns explore, late ones do not. Over phases, x = k / K for RL step k of K, and the mean is over the
    K steps.

    Source: EPO-Decay, a baseline of arXiv 2509.22576 version 2. Its section 5.4 describes a decay over turns, its
    appendix B.4.1 one over training; neither prints a formula. The form and its constants are our reading (those of
    beta_k), and uncertain.
    """

    def __init__(
        self,
        *,
        coefficient: float = 0.001,
        decay: DecayOver = "turn",
        rate: float = 3.0,
        max_turns: int | None = None,
        aggregate: Aggregate = "trajectory",
    ) -> None:
        """Set the decay.

        Args:
            coefficient: lambda, mean weight of the entropy bonus, >= 0.
            decay: over the turns of an episode (`turn`) or over training (`phase`).
            rate: of the exponential, >= 0; 0 is the plain bonus.
            max_turns: T, the turns after which episodes are cut off; `turn` needs it. Recipes fill in
                `environment.max_turns`.
            aggregate: weights w, `trajectory` or `token`.

        Raises:
            ValueError: a number out of its range, or an unknown choice.
        """
        super().__init__(coefficient=coefficient, aggregate=aggregate)
        if decay not in ("turn", "phase"):
            raise ValueError(f"decay must be turn or phase, got {decay!r}")
        if not rate >= 0:
            raise ValueError(f"rate must be >= 0, got {rate}")
        if max_turns is not None and max_turns < 1:
            raise ValueError(f"max_turns must be >= 1, got {max_turns}")
        self.decay: DecayOver = decay
        self.rate = rate
        self.max_turns = max_turns

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
        if self.decay == "phase":
            weight = decay_weights(total_steps, rate=self.rate)[min(step, total_steps - 1)]
            return bonus_term(entropy_N, weight * weights_N, coefficient=self.coefficient)
        if self.max_turns is None:
            raise ValueError("epo_decay over turns needs max_turns, the turns after which episodes are cut off")
        by_turn = torch.tensor(
            decay_weights(self.max_turns, rate=self.rate), dtype=weights_N.dtype, device=weights_N.device
        )
        weights_N = weights_N * by_turn[turn_ids_N.clamp(max=self.max_turns - 1)]
        return bonus_term(entropy_N, weights_N, coefficient=self.coefficient)


def decay_weights(count: int, *, rate: float) -> list[float]:
    """Weights proportional to 1 + exp(-rate x), x = 0, 1/count, .., (count - 1)/count, of mean 1."""
    raw = [1.0 + math.exp(-rate * index / count) for index in range(count)]
    mean = math.fsum(raw) / count
    return [weight / mean for weight in raw]
