"""The contract of a method that controls entropy: five hooks, each of which does nothing unless a method needs it.

Legend for tensor suffixes: _N trained tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from epo.objectives.loss import EntropyTerm
from epo.objectives.policy import Surrogate, clipped_surrogate


class EntropyControl:
    """Entropy control that leaves everything alone. A method overrides the hooks it needs.

    Order within one RL step: `shape_advantages` once; `surrogate` and `entropy_loss` for every micro-batch of every
    update; `observe` once after the last update. The state is plain JSON, belongs to every checkpoint, and is the same
    on all ranks.

    Example::

        control = make_control("epo", alpha=0.1)
        term = control.entropy_loss(entropy_N, weights_N, turn_ids_N, step=3, total_steps=120)
        (policy_loss + term.loss).backward()
        control.observe(sampling_entropy_N, trajectory_ids_N, turn_ids_N)
    """

    def shape_advantages(
        self, advantages_N: Tensor, entropy_N: Tensor, trajectory_ids_N: Tensor, turn_ids_N: Tensor
    ) -> Tensor:
        """Advantages of the whole batch, given the entropies of the sampling policy. Neutral: unchanged."""
        del entropy_N, trajectory_ids_N, turn_ids_N
        return advantages_N

    def surrogate(
        self,
        logprobs_N: Tensor,
        old_logprobs_N: Tensor,
        advantages_N: Tensor,
        *,
        clip_low: float,
        clip_high: float,
        dual_clip: float | None,
    ) -> Surrogate:
        """Per-token policy loss. Neutral: `clipped_surrogate`."""
        return clipped_surrogate(
            logprobs_N, old_logprobs_N, advantages_N, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip
        )

    def entropy_loss(
        self, entropy_N: Tensor, weights_N: Tensor, turn_ids_N: Tensor, *, step: int, total_steps: int
    ) -> EntropyTerm:
        """What entropy adds to the loss of one micro-batch. Neutral: 0.

        Args:
            entropy_N: [N] nats of the micro-batch's trained tokens, with gradient.
            weights_N: [N] the mini-batch's `trajectory_weights` at these tokens, so that terms add up.
            turn_ids_N: [N] integers >= 0.
            step: k, the RL step, from 0.
            total_steps: K, the configured number of RL steps.
        """
        del weights_N, turn_ids_N, step, total_steps
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
