"""Forward passes of a step's packed rows, in micro-batches of bounded size.

Legend: N trained tokens of the step, n of a micro-batch, B rows, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from epo.config import Config
from epo.objectives import token_logprobs_and_entropy
from epo.objectives.nucleus import nucleus_entropy
from epo.training.batch import MicroBatch, TokenData, empty_micro_batch, micro_batches
from epo.training.policy import Critic, Policy
from epo.training.ranks import Ranks
from epo.types import PackedBatch


class Passes:
    """How rows go through a model: cut by the token budget, statistics at the training temperature.

    Every rank computes its share of the rows, and all get the same [N].
    """

    def __init__(self, config: Config, ranks: Ranks | None = None) -> None:
        self._temperature = config.rollout.temperature
        self._max_tokens = config.optimizer.microbatch_tokens
        self._ranks = ranks or Ranks()

    def micro_batches(self, batch: PackedBatch, tokens: TokenData, rows: Sequence[int]) -> list[MicroBatch]:
        """This rank's share of `rows`; as many on every rank, since sharded weights are gathered by all at once."""
        device = tokens.old_logprobs_N.device
        own = self._ranks.own(rows, [len(row) for row in batch.rows])
        found = list(micro_batches(batch.rows, tokens.row_spans, own, max_tokens=self._max_tokens, device=device))
        missing = self._ranks.most(len(found)) - len(found)
        return found + [empty_micro_batch(device) for _ in range(missing)]

    def hidden(self, policy: Policy, micro: MicroBatch) -> Tensor:
        return policy.hidden(micro.token_ids_B_T, micro.lengths_B)

    def statistics(self, policy: Policy, hidden_B_T_D: Tensor, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies [n] of the trained tokens only: the head never sees the others."""
        head = policy.head(hidden_B_T_D[micro.row_n, micro.source_n])
        return token_logprobs_and_entropy(
            head.hidden_N_D,
            head.weight_V_D,
            micro.targets_n,
            head_bias=head.bias_V,
            temperature=self._temperature,
            logit_softcap=head.softcap,
        )

    def nucleus(self, policy: Policy, hidden_B_T_D: Tensor, micro: MicroBatch, *, top_p: float) -> Tensor:
        """Entropies [n] of the trained tokens' nuclei of mass `top_p`."""
        head = policy.head(hidden_B_T_D[micro.row_n, micro.source_n])
        return nucleus_entropy(
            head.hidden_N_D,
            head.weight_V_D,
            top_p=top_p,
            head_bias=head.bias_V,
            temperature=self._temperature,
            logit_softcap=head.softcap,
        )

    @torch.no_grad()
    def score(
        self,
        policy: Policy,
        batch: PackedBatch,
        tokens: TokenData,
        *,
        rows: Sequence[int] | None = None,
        top_p: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies [N] under `policy`, without gradient; 0 outside `rows` (all by default).

        Args:
            top_p: entropies of the nucleus of this mass instead of the whole vocabulary's.
        """
        logprobs_N, entropy_N = torch.zeros_like(tokens.old_logprobs_N), torch.zeros_like(tokens.old_logprobs_N)
        for micro in self.micro_batches(batch, tokens, range(len(batch.rows)) if rows is None else rows):
            hidden_B_T_D = self.hidden(policy, micro)
            logprobs_n, entropy_n = self.statistics(policy, hidden_B_T_D, micro)
            logprobs_N[micro.index_n] = logprobs_n
            is_whole = top_p is None
            entropy_N[micro.index_n] = entropy_n if is_whole else self.nucleus(policy, hidden_B_T_D, micro, top_p=top_p)
        return self._ranks.total(logprobs_N), self._ranks.total(entropy_N)

    @torch.no_grad()
    def values(self, policy: Policy, critic: Critic, batch: PackedBatch, tokens: TokenData) -> Tensor:
        """The critic's values [N] before each trained token is drawn."""
        values_N = torch.zeros_like(tokens.old_logprobs_N)
        for micro in self.micro_batches(batch, tokens, range(len(batch.rows))):
            own = critic.trunk is not None
            hidden_B_T_D = torch.empty(0, device=values_N.device) if own else self.hidden(policy, micro)
            values_B_T = critic(hidden_B_T_D, micro.token_ids_B_T, micro.lengths_B)
            values_N[micro.index_n] = values_B_T[micro.row_n, micro.source_n]
        return self._ranks.total(values_N)
