"""SIREN: entropy held to where training began, on the most open choices among likely tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from epo.objectives.control.base import EntropyControl
from epo.objectives.loss import EntropyTerm


class SIRENControl(EntropyControl):
    """L = L^MT + coefficient (M - anchor)^2, M the mean nucleus entropy of the tokens above a quantile.

    The quantile is that of each trajectory's own nucleus entropies; tokens strictly above it are selected. M is the
    mean over trajectories of the mean over their selected tokens; a trajectory without any (all entropies equal) is
    left out. The anchor is M of the first mini-batch that is ever seen, before it is trained on.

    Source: SIREN, arXiv 2509.25133, its official code. There the sequence is one response, here a trajectory; the
    anchor is of the first step's whole batch, here of its first mini-batch; M and its square are of one forward pass,
    here of the mini-batch, however it is cut up; and the nucleus lacks the token at which its mass reaches `top_p`.
    """

    previews = True

    def __init__(self, *, coefficient: float = 0.005, top_p: float = 0.8, quantile: float = 0.8) -> None:
        """Set what is held; the defaults are those of the authors' script.

        Args:
            coefficient: weight of the squared distance from the anchor, >= 0.
            top_p: mass of the nucleus whose entropy counts, in (0, 1].
            quantile: of a trajectory's entropies, above which its tokens are selected, in [0, 1).

        Raises:
            ValueError: a number out of its range.
        """
        if not coefficient >= 0:
            raise ValueError(f"coefficient must be >= 0, got {coefficient}")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
        if not 0 <= quantile < 1:
            raise ValueError(f"quantile must lie in [0, 1), got {quantile}")
        self.coefficient = coefficient
        self.nucleus = top_p
        self.quantile = quantile
        self._anchor: float | None = None
        self._mean = 0.0

    @property
    def reference(self) -> float | None:
        return self._anchor

    def preview(
        self,
        logprobs_N: Tensor,
        old_logprobs_N: Tensor,
        advantages_N: Tensor,
        entropy_N: Tensor,
        trajectory_ids_N: Tensor,
        *,
        generator: torch.Generator,
    ) -> Tensor:
        """The weight of each token in M; 0 for those that are not selected."""
        del logprobs_N, old_logprobs_N, advantages_N, generator
        if entropy_N.dtype != torch.float64:
            entropy_N = entropy_N.float()
        marks_N = torch.zeros_like(entropy_N)
        for trajectory in set(cast("list[int]", trajectory_ids_N.tolist())):  # pyright: ignore[reportUnknownMemberType]
            member_N = trajectory_ids_N == trajectory
            selected_N = member_N & (entropy_N > torch.quantile(entropy_N[member_N], self.quantile))
            marks_N[selected_N] = 1.0 / max(1, int(selected_N.sum()))
        total = marks_N.sum()
        if total > 0:
            marks_N = marks_N / total
            self._mean = float((marks_N * entropy_N).sum())
            if self._anchor is None:
                self._anchor = self._mean
        return marks_N

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
        del weights_N, turn_ids_N, step, total_steps
        if marks_N is None:
            raise ValueError("siren needs the marks of preview(), called once for the whole mini-batch")
        if self._anchor is None:
            return EntropyTerm(entropy_N.new_zeros(()), {})
        # The square of the mini-batch's mean, as a sum over its tokens that has the right value and the right slope.
        gap = self._mean - self._anchor
        shares_N = marks_N * (gap**2 + 2 * gap * (entropy_N - entropy_N.detach()))
        metrics = {
            "siren/entropy": self._mean * float(marks_N.sum()),
            "siren/anchor": self._anchor * float(marks_N.sum()),
        }
        return EntropyTerm(self.coefficient * shares_N.sum(), metrics)

    def warnings(self) -> list[str]:
        if self.coefficient == 0:
            return ["coefficient = 0: nothing is held, the run equals method 'none'"]
        return []

    def state_dict(self) -> dict[str, Any]:
        return {"anchor": self._anchor}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if set(state) != {"anchor"}:
            raise ValueError("the checkpoint has no anchor: it was written with another entropy control method")
        anchor = state["anchor"]
        self._anchor = None if anchor is None else float(anchor)
