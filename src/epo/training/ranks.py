"""How a learner shares its work with others. All ranks hold the data of the whole step and share the passes over it.

So every statistic, weight and decision is the same on all ranks without a word between them, and what is computed for
tokens is added up: a rank's tensor over the step's tokens is zero where another rank computes.

Legend: N trained tokens of the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from epo.training.policy import Critic, Policy


def holders_of(tensors: Mapping[str, Tensor], among: int) -> dict[str, int]:
    """Which of `among` ranks writes which tensor: the largest first, each to whoever has least."""
    load = [0] * among
    found: dict[str, int] = {}
    for name in sorted(tensors, key=lambda name: (-tensors[name].numel(), name)):
        found[name] = load.index(min(load))
        load[found[name]] += tensors[name].numel()
    return found


class Ranks:
    """A learner alone: it has all the rows, and every sum is its own. `epo.cluster.sharding` has the one for many."""

    size: int = 1
    number: int = 0
    """Of this rank; the one with 0 answers for all."""
    holds_parts: bool = False
    """Tensors are spread over the ranks, also where there is but one."""

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

    def deal(self, tensors: Mapping[str, Tensor], *, among: int) -> dict[str, Tensor]:
        """Whole, those of `tensors` that this rank writes when the first `among` ranks share the writing
        (`holders_of`). No rank holds more than one of the others' at a time. All ranks must ask."""
        del among
        return dict(tensors)

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
