"""EntroPIC: a proportional-integral controller that weighs positive against negative samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from epo.objectives.control.base import EntropyControl
from epo.objectives.policy import Surrogate, clipped_surrogate, importance_ratio


class EntroPICControl(EntropyControl):
    """PPO's loss - c r |A| on tokens of probability above a threshold, with c steered by the entropy's error.

    e = H - target; c = clip(K_p e + K_i sum of all e so far, -1, 1). c > 0 (entropy too high): likely tokens gain
    weight 1 + c where A > 0 and lose it, 1 - c, where A < 0, which sharpens the policy; c < 0 the other way round.

    H is the token mean under the sampling policy, so c follows the step before; it is 0 at the first step.

    Source: EntroPIC, arXiv 2511.15248, the form of its public description. Target, gains and threshold could not be
    checked: the defaults are ours.
    """

    def __init__(
        self,
        *,
        target: float = 0.5,
        proportional: float = 1.0,
        integral: float = 0.01,
        limit: float = 1.0,
        threshold: float = 0.5,
    ) -> None:
        """Set the controller.

        Args:
            target: entropy to hold, nats per token, >= 0.
            proportional: K_p, >= 0.
            integral: K_i, >= 0.
            limit: bound on |c|, in (0, 1]; 1 is the paper's.
            threshold: tokens of at least this probability under the sampling policy are weighed, in [0, 1).

        Raises:
            ValueError: a number out of its range.
        """
        if not target >= 0:
            raise ValueError(f"target must be >= 0, got {target}")
        if not proportional >= 0 or not integral >= 0:
            raise ValueError(f"proportional and integral must be >= 0, got {proportional} and {integral}")
        if not 0 < limit <= 1:
            raise ValueError(f"limit must lie in (0, 1], got {limit}")
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold must lie in [0, 1), got {threshold}")
        self.target = target
        self.proportional = proportional
        self.integral = integral
        self.limit = limit
        self.threshold = threshold
        self._error = 0.0
        self._total_error = 0.0

    @property
    def gain(self) -> float:
        """c of the step that comes."""
        raw = self.proportional * self._error + self.integral * self._total_error
        return max(-self.limit, min(self.limit, raw))

    @property
    def reference(self) -> float | None:
        return self.target

    def surrogate(
        self,
        logprobs_N: Tensor,
        old_logprobs_N: Tensor,
        advantages_N: Tensor,
        *,
        clip_low: float,
        clip_high: float,
        dual_clip: float | None,
        marks_N: Tensor | None = None,
    ) -> Surrogate:
        del marks_N
        plain = clipped_surrogate(
            logprobs_N, old_logprobs_N, advantages_N, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip
        )
        old_logprobs_N = old_logprobs_N.detach()
        is_likely_N = old_logprobs_N >= math.log(max(self.threshold, 1e-300))
        ratio_N = importance_ratio(logprobs_N - old_logprobs_N)
        steered_N = torch.where(is_likely_N, -self.gain * ratio_N * advantages_N.detach().abs(), 0.0)
        has_none_N = plain.is_clipped_N & ((steered_N == 0) | (plain.log_ratio_N.abs() > 20))
        return plain._replace(loss_N=plain.loss_N + steered_N, is_clipped_N=has_none_N)

    def observe(self, entropy_N: Tensor, trajectory_ids_N: Tensor, turn_ids_N: Tensor) -> None:
        del trajectory_ids_N, turn_ids_N
        if entropy_N.numel() == 0:
            return
        self._error = float(entropy_N.detach().double().mean()) - self.target
        self._total_error += self._error

    def warnings(self) -> list[str]:
        if self.proportional == 0 and self.integral == 0:
            return ["proportional and integral are 0: nothing is steered, the run equals method 'none'"]
        return []

    def state_dict(self) -> dict[str, Any]:
        return {"error": self._error, "total_error": self._total_error}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if set(state) != {"error", "total_error"}:
            raise ValueError(
                "the checkpoint has no controller state: it was written with another entropy control method"
            )
        self._error, self._total_error = float(state["error"]), float(state["total_error"])
