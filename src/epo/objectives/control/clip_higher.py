"""Clip-Higher: a wider clip above than below, so that unlikely tokens may rise."""

from __future__ import annotations

from torch import Tensor

from epo.objectives.control.base import EntropyControl
from epo.objectives.policy import Surrogate, clipped_surrogate


class ClipHigherControl(EntropyControl):
    """PPO's clip with widths 0.2 below and 0.28 above (DAPO, arXiv 2503.14476).

    The widths were seen in scripts that reproduce it; the paper's equations were not.

    The same as setting `algorithm.clip_low` and `algorithm.clip_high`; a method of its own so that it can be compared
    by name.
    """

    def __init__(self, *, clip_low: float = 0.2, clip_high: float = 0.28) -> None:
        """Set the widths; they replace the recipe's.

        Args:
            clip_low: width of the clip below 1, in [0, 1].
            clip_high: width of the clip above 1, >= 0.

        Raises:
            ValueError: a width out of its range.
        """
        if not 0 <= clip_low <= 1 or not clip_high >= 0:
            raise ValueError(f"clip_low must lie in [0, 1] and clip_high be >= 0, got {clip_low} and {clip_high}")
        self.clip_low = clip_low
        self.clip_high = clip_high

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
        del clip_low, clip_high, marks_N
        return clipped_surrogate(
            logprobs_N,
            old_logprobs_N,
            advantages_N,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=dual_clip,
        )

    def warnings(self) -> list[str]:
        if self.clip_high > self.clip_low:
            return []
        return [f"clip_high = {self.clip_high:g} is not above clip_low = {self.clip_low:g}: nothing is higher"]
