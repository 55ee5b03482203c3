"""EntroPIC: a proportional-integral controller that weighs positive against negative samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from epo.objectives.control.base import EntropyControl, observed_mean
from epo.objectives.policy import Surrogate, clipped_surrogate, importance_ratio


class EntroPICControl(EntropyControl):
    """PPO's loss, - c r |A| on tokens of a probability above a threshold, with c steered by the entropy's error.

    e = H - target; c = clip(K_p e + K_i sum of all e so far, -1, 1). c > 0 (entropy too high): likely tokens gain
    weight 1 + c where A > 0 and lose it, 1 - c, where A < 0, which sharpens the policy; c < 0 the other way round. The
    added term is not clipped: a likely token that PPO clips keeps a gradient while c is not 0.

    Source: EntroPIC, arXiv 2511.15248; form and values were read in the authors' repository (yk7333/EntroPIC), the
    paper's equations were not. The defaults are those of its launcher and of its loss. It differs in when and over what
    it averages. There H and c belong to each micro-batch under the policy as it is; here H is the token mean of a whole
    batch under the sampling policy, so that c is one number per RL step, follows the step before, and is 0 at first.
    There the added term is a mean over likely tokens only; here it has the weights of the loss it is added to, so that
    c = 1 or -1 silences likely tokens of one sign exactly.
    """

    def __init__(
        self,
        *,
        target: float = 0.1,
        proportional: float = 1.0,
        integral: float = 0.01,
        limit: float = 1.0,
        threshold: float = 0.95,
    ) -> None:
        """Set the controller.

        Args:
            target: entropy to hold, nats per token, >= 0.
            proportional: K_p, >= 0.
            integral: K_i, >= 0.
            limit: bound on |c|, in (0, 1].
            threshold: tokens of a higher probability under the policy as it is are weighed, in [0, 1); 0 weighs all.

        Raises:
            ValueError: a number out of its range.
        """
        if not 0 <= target < math.inf:
            raise ValueError(f"target must be finite and >= 0, got {target}")
        if not 0 <= proportional < math.inf or not 0 <= integral < math.inf:
            raise ValueError(f"proportional and integral must be finite and >= 0, got {proportional} and {integral}")
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
        advantages_N, gain = advantages_N.detach(), self.gain
        is_likely_N = logprobs_N.detach() > (math.log(self.threshold) if self.threshold > 0 else -math.inf)
        steering_N = torch.where(is_likely_N, gain * advantages_N.abs(), 0.0)
        loss_N = plain.loss_N - steering_N * importance_ratio(logprobs_N - old_logprobs_N.detach())
        # c = 1 or -1 can cancel what PPO has left, and c can revive what PPO has clipped.
        left_N = torch.where(plain.is_clipped_N, 0.0, advantages_N) + steering_N
        return plain._replace(loss_N=loss_N, is_clipped_N=(left_N == 0) & (advantages_N != 0))

    def observe(self, entropy_N: Tensor, trajectory_ids_N: Tensor, turn_ids_N: Tensor) -> None:
        del trajectory_ids_N, turn_ids_N
        mean = observed_mean(entropy_N)
        if mean is None:
            return
        self._error = mean - self.target
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
