"""The contract of a method that controls entropy: hooks, each of which does nothing unless a method needs it.

Legend for tensor suffixes: _N trained tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from epo.objectives.loss import EntropyTerm
from epo.objectives.policy import Surrogate, clipped_surrogate

Aggregate = Literal["trajectory", "token"]


class EntropyControl:
    """Entropy control that leaves everything alone. A method overrides the hooks it needs.

    Order within one RL step: `shape_advantages` once; then for every mini-batch `preview` once (only for methods that
    ask for it), and `surrogate` and `entropy_loss` for each of its micro-batches; `observe` once after the last update.
    Losses and metrics of micro-batches add up to those of the mini-batch. The state is plain JSON, belongs to every
    checkpoint, and is the same on all ranks.

    Example::

        control = make_control("epo", alpha=0.1)
        term = control.entropy_loss(entropy_N, weights_N, turn_ids_N, step=3, total_steps=120)
        (policy_loss + term.loss).backward()
        control.observe(sampling_entropy_N, trajectory_ids_N, turn_ids_N)
    """

    aggregate: Aggregate = "trajectory"
    """Which weights `entropy_loss` wants: `trajectory_weights` of the mini-batch, or every token alike."""
    previews: ClassVar[bool] = False
    """The method chooses tokens with the whole mini-batch in view: `preview` must be called before its micro-batches.
    It costs one forward pass without gradient."""
    nucleus: float | None = None
    """Where a number, the entropies given to `preview` and `entropy_loss` are those of the top-p nucleus of this mass
    (`nucleus_entropy`) instead of the whole vocabulary's."""

    def shape_advantages(
        self,
        advantages_N: Tensor,
        entropy_N: Tensor,
        trajectory_ids_N: Tensor,
        turn_ids_N: Tensor,
        group_ids_N: Tensor,
    ) -> Tensor:
        """Advantages of the whole batch, given the entropies of the sampling policy. Neutral: unchanged.

        Args:
            advantages_N: [N] of the whole batch.
            entropy_N: [N] nats, under the sampling policy.
            trajectory_ids_N: [N] any integers.
            turn_ids_N: [N] integers >= 0.
            group_ids_N: [N] any integers; trajectories of one task share one.
        """
        del entropy_N, trajectory_ids_N, turn_ids_N, group_ids_N
        return advantages_N

    def preview(
        self,
        logprobs_N: Tensor,
        old_logprobs_N: Tensor,
        advantages_N: Tensor,
        entropy_N: Tensor,
        trajectory_ids_N: Tensor,
        *,
        generator: torch.Generator,
    ) -> Tensor | None:
        """Look at a whole mini-batch before its micro-batches. Neutral: nothing.

        Args:
            logprobs_N: [N] under the policy as it is now, without gradient.
            old_logprobs_N: [N] under the sampling policy.
            advantages_N: [N] as shaped.
            entropy_N: [N] nats, under the policy as it is now, without gradient.
            trajectory_ids_N: [N] any integers.
            generator: source of whatever is drawn at random; on the CPU.

        Returns:
            [N] a mark for each token, to be handed back to `surrogate` and `entropy_loss` with the tokens it belongs
            to; None where the method needs none.
        """
        del logprobs_N, old_logprobs_N, advantages_N, entropy_N, trajectory_ids_N, generator
        return None

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
        """Per-token policy loss. Neutral: `clipped_surrogate`.

        Args:
            logprobs_N: [N] under the policy that is trained, with gradient.
            old_logprobs_N: [N] under the sampling policy.
            advantages_N: [N] as shaped.
            clip_low: the recipe's width of the clip below 1; a method with a clip of its own leaves it.
            clip_high: the recipe's width of the clip above 1.
            dual_clip: the recipe's bound for negative advantages, or None.
            marks_N: [N] what `preview` said of these tokens.
        """
        del marks_N
        return clipped_surrogate(
            logprobs_N, old_logprobs_N, advantages_N, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip
        )

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
        """What entropy adds to the loss of one micro-batch. Neutral: 0.

        Args:
            entropy_N: [N] nats of the micro-batch's trained tokens, with gradient.
            weights_N: [N] the mini-batch's weights (see `aggregate`) at these tokens, so that terms add up.
            turn_ids_N: [N] integers >= 0.
            step: k, the RL step, from 0.
            total_steps: K, the configured number of RL steps.
            marks_N: [N] what `preview` said of these tokens.
        """
        del weights_N, turn_ids_N, step, total_steps, marks_N
        return EntropyTerm(entropy_N.new_zeros(()), {})

    def observe(self, entropy_N: Tensor, trajectory_ids_N: Tensor, turn_ids_N: Tensor) -> None:
        """Learn the sampling policy's entropies of the whole batch, after the update. Neutral: nothing is kept."""
        del entropy_N, trajectory_ids_N, turn_ids_N

    @property
    def reference(self) -> float | None:
        """The entropy the method steers by, in nats, for the log; None where there is none."""
        return None

    def warnings(self) -> list[str]:
        """What a user should know about these settings before the run, in plain words."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Everything that outlives a step, as plain JSON."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`.

        Raises:
            ValueError: the state belongs to another method or other settings.
        """
        if state:
            raise ValueError(
                f"{type(self).__name__} keeps no state, but the checkpoint has {', '.join(sorted(state))}: "
                "it was written with another entropy control method"
            )


def check_aggregate(aggregate: Aggregate) -> Aggregate:
    """`aggregate`, if it is one.

    Raises:
        ValueError: it is none.
    """
    if aggregate not in ("trajectory", "token"):
        raise ValueError(f"aggregate must be trajectory or token, got {aggregate!r}")
    return aggregate


def observed_mean(entropy_N: Tensor) -> float | None:
    """Token mean in nats of what a control observes; None for no tokens.

    Raises:
        ValueError: the mean is not finite, and a controller that took it in would never recover.
    """
    if entropy_N.numel() == 0:
        return None
    mean = float(entropy_N.detach().double().mean())
    if not math.isfinite(mean):
        raise ValueError(f"observed entropies must be finite, got a mean of {mean}")
    return mean
