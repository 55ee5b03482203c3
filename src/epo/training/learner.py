"""One RL step's update: advantages, then a fixed number of optimiser steps over the packed rows.

Legend: N trained tokens of the step, n of a micro-batch, B rows, T tokens, D hidden size.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from epo.config import Config
from epo.objectives import kl_penalty, token_logprobs_and_entropy, trajectory_weights, value_loss
from epo.objectives.control import EntropyControl
from epo.objectives.nucleus import nucleus_entropy
from epo.packing import pack
from epo.seeds import CONTROL_STREAM, SHUFFLE_STREAM
from epo.training.batch import MicroBatch, TokenData, flatten, micro_batches
from epo.training.credit import critic_free_advantages, kept_groups, ppo_advantages
from epo.training.policy import Critic, Policy
from epo.types import PackedBatch, Trajectory, TrajectoryGroup


@dataclass(kw_only=True, slots=True)
class _StepData:
    """Everything the mini-batches of one step read."""

    batch: PackedBatch
    tokens: TokenData
    advantages_N: Tensor
    returns_N: Tensor | None
    values_N: Tensor | None
    reference_N: Tensor | None


@dataclass(kw_only=True, slots=True)
class _Minibatch:
    """What one optimiser step reads besides. All [N] over the step's tokens; 0 for tokens of other mini-batches."""

    rows: list[int]
    weights_N: Tensor
    """Of the surrogate, the KL and the value loss."""
    entropy_weights_N: Tensor
    marks_N: Tensor | None = None
    """What the entropy control said of each token."""


class Learner:
    """Owns the optimiser and the critic; updates the policy in place.

    Args:
        start_policy: what the KL loss refers to, when `policy` is no longer at its starting weights (a resumed run).
    """

    def __init__(
        self, policy: Policy, config: Config, control: EntropyControl, *, start_policy: Policy | None = None
    ) -> None:
        self.policy = policy
        self.config = config
        self.control = control
        self.critic = Critic(policy, config.algorithm.critic) if config.algorithm.name == "ppo" else None
        self.reference = (start_policy or policy).frozen_copy() if config.algorithm.kl_coefficient > 0 else None
        optimizer = config.optimizer
        groups: list[dict[str, object]] = [{"params": list(policy.parameters()), "lr": optimizer.learning_rate}]
        if self.critic is not None:
            groups.append({"params": list(self.critic.parameters()), "lr": config.algorithm.critic.learning_rate})
        self.optimizer = torch.optim.AdamW(
            groups, betas=optimizer.betas, weight_decay=optimizer.weight_decay, fused=True
        )

    def update(self, groups: Sequence[TrajectoryGroup], *, step: int) -> dict[str, float]:
        """Train on the survivors of the task groups that the filter keeps; returns metrics.

        A step without survivors, or of which the filter keeps nothing, changes nothing. The entropy control, too, sees
        the kept tokens only.
        """
        survivors = [group.survivors for group in groups if group.survivors]
        kept = kept_groups(survivors, self.config.algorithm) if survivors else []
        filtering = {} if self.config.algorithm.filter == "none" else {"filter/kept_groups": float(len(kept))}
        if not kept:
            return {"update/optimizer_steps": 0.0, **filtering}
        data = self._prepare(kept)
        rate = self._set_learning_rate(step)
        metrics: dict[str, float] = defaultdict(float)
        shuffle = np.random.default_rng([self.config.seed, SHUFFLE_STREAM, step])
        steps = 0
        for _ in range(self.config.optimizer.epochs):
            for trajectory_ids in _minibatches(kept, self.config.optimizer.minibatches, shuffle):
                contribution = self._minibatch(data, trajectory_ids, step=step, number=steps)
                for name, value in contribution.items():
                    metrics[name] += value
                steps += 1
        self.policy.version += 1
        self.control.observe(data.tokens.old_entropy_N, data.tokens.trajectory_ids_N, data.tokens.turn_ids_N)
        # The first mini-batch is the only one in which sampler and learner hold the same weights.
        mismatch = metrics.pop("sampler/mismatch_kl", 0.0)
        skipped = metrics.pop("update/skipped", 0.0)
        averaged = {name: value / steps for name, value in metrics.items()}
        return {
            **averaged,
            **self._data_metrics(data),
            **filtering,
            "sampler/mismatch_kl": mismatch,
            "update/optimizer_steps": float(steps),
            "update/skipped": skipped,
            "update/learning_rate": rate,
        }

    # ---------------------------------------------------------------- before the first optimiser step

    def _prepare(self, survivors: Sequence[Sequence[Trajectory]]) -> _StepData:
        trajectories = [t for group in survivors for t in group]
        batch = pack(trajectories)
        tokens = flatten(batch, trajectories, device=self.policy.device)
        groups_B = [number for number, group in enumerate(survivors) for _ in group]
        group_ids_N = torch.tensor(groups_B, device=self.policy.device)[tokens.trajectory_ids_N]
        algorithm = self.config.algorithm
        values_N = returns_N = None
        if self.critic is not None:
            values_N = self._values(batch, tokens)
            advantages_N, returns_N = ppo_advantages(trajectories, tokens, values_N, algorithm)
        else:
            advantages_N = critic_free_advantages(survivors, tokens, algorithm)
        return _StepData(
            batch=batch,
            tokens=tokens,
            advantages_N=self.control.shape_advantages(
                advantages_N, tokens.old_entropy_N, tokens.trajectory_ids_N, tokens.turn_ids_N, group_ids_N
            ),
            returns_N=returns_N,
            values_N=values_N,
            reference_N=self._reference_logprobs(batch, tokens),
        )

    @torch.no_grad()
    def _values(self, batch: PackedBatch, tokens: TokenData) -> Tensor:
        assert self.critic is not None
        values_N = torch.zeros_like(tokens.old_logprobs_N)
        for micro in self._micro_batches(batch, tokens, range(len(batch.rows))):
            if self.critic.trunk is None:
                hidden_B_T_D = self._hidden(self.policy, micro)
            else:
                hidden_B_T_D = torch.empty(0, device=self.policy.device)
            values_B_T = self.critic(hidden_B_T_D, micro.token_ids_B_T)
            values_N[micro.index_n] = values_B_T[micro.row_n, micro.source_n]
        return values_N

    @torch.no_grad()
    def _reference_logprobs(self, batch: PackedBatch, tokens: TokenData) -> Tensor | None:
        if self.reference is None:
            return None
        reference_N = torch.zeros_like(tokens.old_logprobs_N)
        for micro in self._micro_batches(batch, tokens, range(len(batch.rows))):
            hidden_B_T_D = self._hidden(self.reference, micro)
            reference_N[micro.index_n] = self._head(self.reference, hidden_B_T_D, micro)[0]
        return reference_N

    # ---------------------------------------------------------------- optimiser steps

    def _minibatch(self, data: _StepData, trajectory_ids: set[int], *, step: int, number: int) -> dict[str, float]:
        """Accumulate the gradient over micro-batches and step once. Losses and metrics of micro-batches add up."""
        tokens = data.tokens
        rows = [i for i, row in enumerate(data.batch.rows) if row.trajectory_id in trajectory_ids]
        member_N = torch.zeros_like(tokens.old_logprobs_N, dtype=torch.bool)
        for i in rows:
            member_N[tokens.row_spans[i]] = True
        part = _Minibatch(
            rows=rows,
            weights_N=self._weights(tokens, member_N, self.config.algorithm.aggregate),
            entropy_weights_N=self._weights(tokens, member_N, self.control.aggregate),
        )
        if self.control.previews:
            part.marks_N = self._preview(data, part, member_N, step=step, number=number)
        metrics: dict[str, float] = defaultdict(float)
        self.optimizer.zero_grad(set_to_none=True)
        for micro in self._micro_batches(data.batch, tokens, rows):
            loss = self._loss(data, part, micro, metrics, step=step, on_policy=number == 0)
            torch.autograd.backward(loss)
        self._step(metrics)
        return metrics

    def _weights(self, tokens: TokenData, member_N: Tensor, aggregate: str) -> Tensor:
        """Weights of the mini-batch's tokens; they sum to 1, but for `constant`, which has no token count in it."""
        if aggregate == "token":
            return member_N.float() / member_N.sum()
        if aggregate == "constant":
            longest = self.config.environment.max_turns * self.config.agent.max_response_tokens
            return member_N.float() / (len(tokens.trajectory_ids_N[member_N].unique()) * longest)
        weights_N = torch.zeros_like(tokens.old_logprobs_N)
        found = trajectory_weights(tokens.trajectory_ids_N[member_N], tokens.turn_ids_N[member_N])
        weights_N[member_N] = found.to(weights_N.dtype)
        return weights_N

    @torch.no_grad()
    def _preview(self, data: _StepData, part: _Minibatch, member_N: Tensor, *, step: int, number: int) -> Tensor | None:
        """Show the entropy control the whole mini-batch under the policy as it is now."""
        tokens = data.tokens
        logprobs_N, entropy_N = torch.zeros_like(tokens.old_logprobs_N), torch.zeros_like(tokens.old_logprobs_N)
        for micro in self._micro_batches(data.batch, tokens, part.rows):
            hidden_B_T_D = self._hidden(self.policy, micro)
            logprobs_n, entropy_n = self._head(self.policy, hidden_B_T_D, micro)
            logprobs_N[micro.index_n] = logprobs_n
            entropy_N[micro.index_n] = self._controlled_entropy(hidden_B_T_D, micro, entropy_n)
        seed = np.random.SeedSequence([self.config.seed, CONTROL_STREAM, step, number])
        marks_n = self.control.preview(
            logprobs_N[member_N],
            tokens.old_logprobs_N[member_N],
            data.advantages_N[member_N],
            entropy_N[member_N],
            tokens.trajectory_ids_N[member_N],
            generator=torch.Generator().manual_seed(int(seed.generate_state(1)[0])),
        )
        if marks_n is None:
            return None
        marks_N = torch.zeros(len(member_N), dtype=marks_n.dtype, device=marks_n.device)
        marks_N[member_N] = marks_n
        return marks_N

    def _loss(
        self,
        data: _StepData,
        part: _Minibatch,
        micro: MicroBatch,
        metrics: dict[str, float],
        *,
        step: int,
        on_policy: bool,
    ) -> Tensor:
        """This micro-batch's share of the mini-batch loss."""
        algorithm, tokens, index_n = self.config.algorithm, data.tokens, micro.index_n
        weights_n = part.weights_N[index_n]
        marks_n = None if part.marks_N is None else part.marks_N[index_n]
        hidden_B_T_D = self._hidden(self.policy, micro)
        logprobs_n, entropy_n = self._head(self.policy, hidden_B_T_D, micro)
        surrogate = self.control.surrogate(
            logprobs_n,
            tokens.old_logprobs_N[index_n],
            data.advantages_N[index_n],
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
            dual_clip=algorithm.dual_clip,
            marks_N=marks_n,
        )
        policy_loss = (weights_n * surrogate.loss_N).sum()
        entropy = self.control.entropy_loss(
            self._controlled_entropy(hidden_B_T_D, micro, entropy_n),
            part.entropy_weights_N[index_n],
            tokens.turn_ids_N[index_n],
            step=step,
            total_steps=self.config.steps,
            marks_N=marks_n,
        )
        loss = policy_loss + entropy.loss
        metrics["policy/loss"] += policy_loss.item()
        metrics["entropy/loss"] += entropy.loss.item()
        for name, value in entropy.metrics.items():
            metrics[name] += value
        with torch.no_grad():
            # The tokens were drawn from the old policy, so this estimates KL(old || new) without bias.
            kl_n = kl_penalty(tokens.old_logprobs_N[index_n], logprobs_n, kind="k3")
            # Metrics are means, whatever the weights of the loss add up to.
            shares_n = weights_n / part.weights_N.sum()
            metrics["policy/kl"] += (shares_n * kl_n).sum().item()
            metrics["policy/clip_fraction"] += (shares_n * surrogate.is_clipped_N).sum().item()
            if on_policy:
                metrics["sampler/mismatch_kl"] += (shares_n * kl_n).sum().item()
        if data.reference_N is not None:
            reference_kl_n = kl_penalty(logprobs_n, data.reference_N[index_n], kind=algorithm.kl_kind)
            loss = loss + algorithm.kl_coefficient * (weights_n * reference_kl_n).sum()
            metrics["policy/reference_kl"] += (shares_n * reference_kl_n.detach()).sum().item()
        if self.critic is not None:
            assert data.values_N is not None and data.returns_N is not None
            values_B_T = self.critic(hidden_B_T_D, micro.token_ids_B_T)
            value_n = value_loss(
                values_B_T[micro.row_n, micro.source_n],
                data.values_N[index_n],
                data.returns_N[index_n],
                clip=algorithm.critic.clip,
            )
            critic_loss = (weights_n * value_n).sum()
            loss = loss + algorithm.critic.coefficient * critic_loss
            metrics["value/loss"] += critic_loss.item()
        return loss

    def _step(self, metrics: dict[str, float]) -> None:
        clip = self.config.optimizer.grad_clip
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), clip)
        metrics["policy/grad_norm"] += norm.item()
        # A loss that is not finite can leave a finite gradient: max() passes none on where its arguments are NaN.
        finite = bool(torch.isfinite(norm)) and math.isfinite(metrics["policy/loss"])
        if self.critic is not None:
            critic_norm = torch.nn.utils.clip_grad_norm_(self.critic.parameters(), clip)
            metrics["value/grad_norm"] += critic_norm.item()
            finite = finite and bool(torch.isfinite(critic_norm))
        if finite:
            self.optimizer.step()
        else:
            metrics["update/skipped"] += 1.0

    # ---------------------------------------------------------------- forward passes

    def _micro_batches(self, batch: PackedBatch, tokens: TokenData, indices: Sequence[int]) -> list[MicroBatch]:
        budget = self.config.optimizer.microbatch_tokens
        return list(micro_batches(batch.rows, tokens.row_spans, indices, max_tokens=budget, device=self.policy.device))

    def _hidden(self, policy: Policy, micro: MicroBatch) -> Tensor:
        return policy.hidden(micro.token_ids_B_T)

    def _head(self, policy: Policy, hidden_B_T_D: Tensor, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of the trained tokens only: the head never sees the others."""
        head = policy.head(hidden_B_T_D[micro.row_n, micro.source_n])
        return token_logprobs_and_entropy(
            head.hidden_N_D,
            head.weight_V_D,
            micro.targets_n,
            head_bias=head.bias_V,
            temperature=self.config.rollout.temperature,
        )

    def _controlled_entropy(self, hidden_B_T_D: Tensor, micro: MicroBatch, entropy_n: Tensor) -> Tensor:
        """The entropies that the control asks for: the whole vocabulary's, or its nucleus'."""
        if self.control.nucleus is None:
            return entropy_n
        head = self.policy.head(hidden_B_T_D[micro.row_n, micro.source_n])
        return nucleus_entropy(
            head.hidden_N_D,
            head.weight_V_D,
            top_p=self.control.nucleus,
            head_bias=head.bias_V,
            temperature=self.config.rollout.temperature,
        )

    # ---------------------------------------------------------------- numbers to look at

    def _set_learning_rate(self, step: int) -> float:
        """Linear warm-up from `min_ratio` of the peak, then cosine decay back to it; constant for the critic."""
        optimizer, total = self.config.optimizer, max(1, self.config.steps)
        rate = optimizer.learning_rate * learning_rate_factor(
            step, total, warmup_fraction=optimizer.warmup_fraction, min_ratio=optimizer.min_ratio
        )
        self.optimizer.param_groups[0]["lr"] = rate
        return rate

    def _data_metrics(self, data: _StepData) -> dict[str, float]:
        metrics = {
            "tokens/trained": float(data.batch.num_trained),
            "tokens/processed": float(data.batch.num_tokens),
            "rows": float(len(data.batch.rows)),
            "advantage/std": data.advantages_N.std(correction=0).item(),
        }
        if data.values_N is not None and data.returns_N is not None:
            variance = data.returns_N.var(correction=0)
            unexplained = (data.returns_N - data.values_N).var(correction=0)
            # A step whose returns are all equal has nothing to explain.
            metrics["value/explained_variance"] = (1 - unexplained / variance).item() if variance > 0 else 0.0
            metrics["value/mean"] = data.values_N.mean().item()
        return metrics


def learning_rate_factor(step: int, total: int, *, warmup_fraction: float, min_ratio: float) -> float:
    """The learning rate of RL step `step` as a share of its peak (the release's schedule)."""
    warmup = math.floor(warmup_fraction * total)
    if step < warmup:
        return min_ratio + (1 - min_ratio) * step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _minibatches(survivors: Sequence[Sequence[Trajectory]], count: int, shuffle: np.random.Generator) -> list[set[int]]:
    """Deal whole task groups into `count` mini-batches (fewer when there are fewer groups), as trajectory ids."""
    ids: list[list[int]] = []
    start = 0
    for group in survivors:
        ids.append(list(range(start, start + len(group))))
        start += len(group)
    parts = np.array_split(shuffle.permutation(len(ids)), min(count, len(ids)))
    return [{i for g in part for i in ids[g]} for part in parts]
