"""How a learner shares its work with others. All ranks hold the data of the whole step and share the passes over it.

So every statistic, weight and decision is the same on all ranks without a word between them, and what is computed for
tokens is added up: a rank's tensor over the step's tokens is zero where another rank computes.

Legend: N trained tokens of the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from epo.training.policy import Critic, Policy


class Ranks:
    """A learner alone: it has all the rows, and every sum is its own. `epo.cluster.sharding` has the one for many."""

    size: int = 1
    writes: bool = True
    """This rank is the one that answers and writes files for all."""

    def own(self, rows: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """Those of `rows` that this rank computes.

        Args:
            lengths: tokens of every row of the step, by its number.
        """
        del lengths
        return list(rows)

    def most(self, count: int) -> int:
        """The largest `count` of any rank."""
        return count

    def total(self, tensor_N: Tensor) -> Tensor:
        """The sum over the ranks, the same on all."""
        return tensor_N

    def totals(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The sums over the ranks, by name, the same on all."""
        return dict(metrics)

    def shard(self, policy: Policy, critic: Critic | None, reference: Policy | None) -> None:
        """Spread the weights over the ranks, before the optimiser is made."""

    def policy_weights(self, policy: Policy) -> dict[str, Tensor] | None:
        """All weights of its model by name, whole; None where the model has them whole itself. All ranks must ask."""
        return None

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor of which every rank may hold a part, as a whole. All ranks must ask."""
        return tensor

    def part(self, tensor: Tensor, like: Tensor) -> Tensor:
        """What this rank holds of a whole `tensor` that is spread as `like` is."""
        del like
        return tensor

    def gradient_scale(self) -> float:
        """What the loss is multiplied with, so that gradients are summed over the ranks."""
        return 1.0
