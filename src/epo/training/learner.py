"""One RL step's update: advantages, then a fixed number of optimiser steps over the packed rows.

Legend: N trained tokens of the step, n of a micro-batch, B rows, T tokens, D hidden size.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from epo.config import Config
from epo.objectives import kl_penalty, trajectory_weights, value_loss
from epo.objectives.control import EntropyControl
from epo.packing import pack
from epo.seeds import CONTROL_STREAM, SHUFFLE_STREAM
from epo.training.batch import MicroBatch, TokenData, flatten
from epo.training.credit import critic_free_advantages, kept_groups, ppo_advantages
from epo.training.input_dependence import dependence_metrics
from epo.training.learner_files import read_learner, write_learner
from epo.training.passes import Passes
from epo.training.policy import Critic, Policy
from epo.training.ranks import Ranks
from epo.training.rescoring import (
    mismatch_metrics,
    rescored,
    staleness_metrics,
    truncated_importance_weights,
    weight_metrics,
)
from epo.training.skipped import SkippedBatch, skipped_batch
from epo.training.step_data import Minibatch, StepData
from epo.training.stopwatch import Stopwatch
from epo.types import Trajectory, TrajectoryGroup, Turn


class Learner:
    """Owns the optimiser and the critic; updates the policy in place.

    Args:
        start_policy: what the KL loss refers to, when `policy` is no longer at its starting weights (a resumed run).
        ranks: the others that this learner shares the work with; none by default.
    """

    def __init__(
        self,
        policy: Policy,
        config: Config,
        control: EntropyControl,
        *,
        start_policy: Policy | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.policy = policy
        self.config = config
        self.control = control
        self.stopwatch = Stopwatch(policy.device)
        self.skipped: list[SkippedBatch] = []
        """What the last `update` skipped because its loss or gradient was not finite."""
        self.ranks = ranks or Ranks()
        self._passes = Passes(config, self.ranks)
        self.critic = Critic(policy, config.algorithm.critic) if config.algorithm.name == "ppo" else None
        self.reference = (start_policy or policy).frozen_copy() if config.algorithm.kl_coefficient > 0 else None
        self._reference_digest = None if self.reference is None else self.reference.digest()
        self.ranks.shard(policy, self.critic, self.reference)
        optimizer = config.optimizer
        groups: list[dict[str, object]] = [{"params": list(policy.parameters()), "lr": optimizer.learning_rate}]
        if self.critic is not None:
            groups.append({"params": list(self.critic.parameters()), "lr": config.algorithm.critic.learning_rate})
        self.optimizer = torch.optim.AdamW(
            groups, betas=optimizer.betas, weight_decay=optimizer.weight_decay, fused=True
        )

    def seconds(self) -> dict[str, float]:
        """What everything below took since the last call, by phase (`epo.reporting.timetable`)."""
        return self.stopwatch.take()

    def reference_digest(self) -> str | None:
        """Names the weights that the KL loss refers to; None without one."""
        return self._reference_digest

    def write(self, folder: Path) -> dict[str, Any]:
        """Leave policy, critic and optimiser in `folder`; returns the entropy control's state. Of several ranks the
        first writes all, or with `cluster.sharded_checkpoints` each its share."""
        write_learner(
            folder,
            policy=self.policy,
            critic=self.critic,
            optimizer=self.optimizer,
            ranks=self.ranks,
            in_shares=self.config.cluster.sharded_checkpoints,
        )
        return self.control.state_dict()

    def read(self, folder: Path, control: dict[str, Any]) -> None:
        """Take over critic, optimiser and control; the policy was loaded from `folder` already."""
        read_learner(folder, critic=self.critic, optimizer=self.optimizer, ranks=self.ranks)
        self.control.load_state_dict(control)

    def rescore(self, groups: Sequence[TrajectoryGroup]) -> Sequence[TrajectoryGroup]:
        """The step's groups as `update` wants them: with the learner's log-probabilities and entropies where
        `sampler.old_logprobs` asks for them, else as they are. To be called before `update`.
        """
        if not self.config.is_rescored:
            return groups
        with self.stopwatch("old_logprobs"):
            return rescored(groups, self.policy, self._passes)

    def input_dependence(self, groups: Sequence[TrajectoryGroup], *, step: int) -> dict[str, float]:
        """How much responses depend on prompts, as `health.prompts` asks for it; to be called like `rescore`."""
        if self.config.health.prompts == 0:
            return {}
        with self.stopwatch("health"):
            return dependence_metrics(groups, self.policy, self._passes, self.config, step=step)

    def update(self, groups: Sequence[TrajectoryGroup], *, step: int) -> dict[str, float]:
        """Train on the survivors of the task groups that the filter keeps; returns metrics, and notes the advantage and
        the probability ratio of every token on the turns it trained on.

        A step without survivors, or of which the filter keeps nothing, changes nothing. The entropy control, too, sees
        the kept tokens only.
        """
        self.skipped = []
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
        _note([turn for group in kept for t in group for turn in t.turns], data)
        self.control.observe(data.tokens.old_entropy_N, data.tokens.trajectory_ids_N, data.tokens.turn_ids_N)
        skipped = metrics.pop("update/skipped", 0.0)
        averaged = {name: value / steps for name, value in metrics.items()}
        return {
            **averaged,
            **self._data_metrics(data),
            **filtering,
            **data.mismatch,
            "update/optimizer_steps": float(steps),
            "update/skipped": skipped,
            "update/learning_rate": rate,
        }

    # ---------------------------------------------------------------- before the first optimiser step

    def _prepare(self, survivors: Sequence[Sequence[Trajectory]]) -> StepData:
        trajectories = [t for group in survivors for t in group]
        batch = pack(trajectories)
        tokens = flatten(batch, trajectories, device=self.policy.device)
        groups_B = [number for number, group in enumerate(survivors) for _ in group]
        group_ids_N = torch.tensor(groups_B, device=self.policy.device)[tokens.trajectory_ids_N]
        algorithm = self.config.algorithm
        values_N = returns_N = None
        if self.critic is not None:
            with self.stopwatch("values"):
                values_N = self._passes.values(self.policy, self.critic, batch, tokens)
            advantages_N, returns_N = ppo_advantages(trajectories, tokens, values_N, algorithm)
        else:
            advantages_N = critic_free_advantages(survivors, tokens, algorithm)
        reference_N = None
        if self.reference is not None:
            with self.stopwatch("reference"):
                reference_N = self._passes.score(self.reference, batch, tokens)[0]
        importance_N, mismatch = None, {}
        if self.config.is_rescored:
            both, cap = (tokens.old_logprobs_N, tokens.sampler_logprobs_N), self.config.sampler.importance_cap
            importance_N = truncated_importance_weights(*both, cap=cap)
            mismatch = mismatch_metrics(*both) | weight_metrics(*both, cap=cap)
        if self.config.cluster.max_staleness:
            turns = [turn for t in trajectories for turn in t.turns]
            mismatch |= staleness_metrics(turns, version=self.policy.version)
        return StepData(
            batch=batch,
            tokens=tokens,
            advantages_N=self.control.shape_advantages(
                advantages_N, tokens.old_entropy_N, tokens.trajectory_ids_N, tokens.turn_ids_N, group_ids_N
            ),
            importance_N=importance_N,
            returns_N=returns_N,
            values_N=values_N,
            reference_N=reference_N,
            ratio_N=torch.ones_like(tokens.old_logprobs_N),
            mismatch=mismatch,
        )

    # ---------------------------------------------------------------- optimiser steps

    def _minibatch(self, data: StepData, trajectory_ids: set[int], *, step: int, number: int) -> dict[str, float]:
        """Accumulate the gradient over micro-batches and step once. Losses and metrics of micro-batches add up."""
        tokens = data.tokens
        rows = [i for i, row in enumerate(data.batch.rows) if row.trajectory_id in trajectory_ids]
        member_N = torch.zeros_like(tokens.old_logprobs_N, dtype=torch.bool)
        for i in rows:
            member_N[tokens.row_spans[i]] = True
        part = Minibatch(
            rows=rows,
            weights_N=self._weights(tokens, member_N, self.config.algorithm.aggregate),
            entropy_weights_N=self._weights(tokens, member_N, self.control.aggregate),
        )
        if self.control.previews:
            with self.stopwatch("forward"):
                part.marks_N = self._preview(data, part, member_N, step=step, number=number)
        found: dict[str, float] = defaultdict(float)
        logprobs_N = torch.zeros_like(tokens.old_logprobs_N)
        self.optimizer.zero_grad(set_to_none=True)
        for micro in self._passes.micro_batches(data.batch, tokens, rows):
            with self.stopwatch("forward"):
                loss, logprobs_n = self._loss(data, part, micro, found, step=step)
            with self.stopwatch("backward"):
                torch.autograd.backward(loss * self.ranks.gradient_scale())
            logprobs_N[micro.index_n] = logprobs_n.detach()
        metrics = self.ranks.totals(found)
        logprobs_N = self.ranks.total(logprobs_N)
        difference_n = logprobs_N[member_N] - tokens.old_logprobs_N[member_N]
        data.ratio_N[member_N] = difference_n.exp().float()
        if number == 0 and data.importance_N is None:
            # The first mini-batch is the only one in which sampler and learner hold the same weights.
            data.mismatch |= mismatch_metrics(logprobs_N[member_N], tokens.sampler_logprobs_N[member_N])
        with self.stopwatch("optimizer"):
            if not self._step(metrics):
                self.skipped.append(self._skipped(data, part, member_N, metrics, number=number))
        return metrics

    def _skipped(
        self, data: StepData, part: Minibatch, member_N: Tensor, numbers: dict[str, float], *, number: int
    ) -> SkippedBatch:
        networks = {"policy": self.policy.model} | ({} if self.critic is None else {"critic": self.critic})
        return skipped_batch(data, part, member_N, minibatch=number, numbers=numbers, networks=networks)

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
    def _preview(self, data: StepData, part: Minibatch, member_N: Tensor, *, step: int, number: int) -> Tensor | None:
        """Show the entropy control the whole mini-batch under the policy as it is now."""
        tokens = data.tokens
        logprobs_N, entropy_N = self._passes.score(
            self.policy, data.batch, tokens, rows=part.rows, top_p=self.control.nucleus
        )
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
        data: StepData,
        part: Minibatch,
        micro: MicroBatch,
        metrics: dict[str, float],
        *,
        step: int,
    ) -> tuple[Tensor, Tensor]:
        """This micro-batch's share of the mini-batch loss, and the log-probabilities of its trained tokens."""
        algorithm, tokens, index_n = self.config.algorithm, data.tokens, micro.index_n
        weights_n = part.weights_N[index_n]
        marks_n = None if part.marks_N is None else part.marks_N[index_n]
        hidden_B_T_D = self._passes.hidden(self.policy, micro)
        logprobs_n, entropy_n = self._passes.statistics(self.policy, hidden_B_T_D, micro)
        if len(index_n) == 0:  # nothing to learn; the others wait for this rank to take part all the same
            loss = logprobs_n.sum() + entropy_n.sum()
            if self.critic is not None:
                loss = loss + 0.0 * self.critic(hidden_B_T_D, micro.token_ids_B_T, micro.lengths_B).sum()
            return loss, logprobs_n
        if self.control.nucleus is not None:
            entropy_n = self._passes.nucleus(self.policy, hidden_B_T_D, micro, top_p=self.control.nucleus)
        surrogate = self.control.surrogate(
            logprobs_n,
            tokens.old_logprobs_N[index_n],
            data.advantages_N[index_n],
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
            dual_clip=algorithm.dual_clip,
            marks_N=marks_n,
        )
        policy_loss_n = surrogate.loss_N
        if data.importance_N is not None:
            policy_loss_n = data.importance_N[index_n] * policy_loss_n
        policy_loss = (weights_n * policy_loss_n).sum()
        entropy = self.control.entropy_loss(
            entropy_n,
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
            # Drawn from the old policy (up to the sampler's numerics), they estimate KL(old || new) without bias.
            kl_n = kl_penalty(tokens.old_logprobs_N[index_n], logprobs_n, kind="k3")
            # Metrics are means, whatever the weights of the loss add up to.
            shares_n = weights_n / part.weights_N.sum()
            metrics["policy/kl"] += (shares_n * kl_n).sum().item()
            metrics["policy/clip_fraction"] += (shares_n * surrogate.is_clipped_N).sum().item()
        if data.reference_N is not None:
            reference_kl_n = kl_penalty(logprobs_n, data.reference_N[index_n], kind=algorithm.kl_kind)
            loss = loss + algorithm.kl_coefficient * (weights_n * reference_kl_n).sum()
            metrics["policy/reference_kl"] += (shares_n * reference_kl_n.detach()).sum().item()
        if self.critic is not None:
            assert data.values_N is not None and data.returns_N is not None
            values_B_T = self.critic(hidden_B_T_D, micro.token_ids_B_T, micro.lengths_B)
            value_n = value_loss(
                values_B_T[micro.row_n, micro.source_n],
                data.values_N[index_n],
                data.returns_N[index_n],
                clip=algorithm.critic.clip,
            )
            critic_loss = (weights_n * value_n).sum()
            loss = loss + algorithm.critic.coefficient * critic_loss
            metrics["value/loss"] += critic_loss.item()
        return loss, logprobs_n

    def _step(self, metrics: dict[str, float]) -> bool:
        """Step with clipped gradients; False, with nothing changed, where a loss or a gradient is not finite."""
        groups = {"policy": list(self.policy.parameters())}
        if self.critic is not None:
            groups["value"] = list(self.critic.parameters())
        norms = {name: _gradient_norm(parameters) for name, parameters in groups.items()}
        for name, norm in norms.items():
            metrics[f"{name}/grad_norm"] = self.ranks.whole(norm).item()
        # A loss that is not finite can leave a finite gradient: max() passes none on where its arguments are NaN.
        numbers = [metrics[name] for name in (*_LOSSES, *(f"{group}/grad_norm" for group in groups)) if name in metrics]
        if not all(map(math.isfinite, numbers)):
            metrics["update/skipped"] = 1.0
            return False
        for name, parameters in groups.items():
            clip = self.config.optimizer.grad_clip
            torch.nn.utils.clip_grads_with_norm_(parameters, max_norm=clip, total_norm=norms[name])
        self.optimizer.step()
        return True

    # ---------------------------------------------------------------- numbers to look at

    def _set_learning_rate(self, step: int) -> float:
        """Linear warm-up from `min_ratio` of the peak, then cosine decay back to it; constant for the critic."""
        optimizer, total = self.config.optimizer, max(1, self.config.steps)
        rate = optimizer.learning_rate * learning_rate_factor(
            step, total, warmup_fraction=optimizer.warmup_fraction, min_ratio=optimizer.min_ratio
        )
        self.optimizer.param_groups[0]["lr"] = rate
        return rate

    def _data_metrics(self, data: StepData) -> dict[str, float]:
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
            metrics["value/std"] = data.values_N.std(correction=0).item()
            metrics["value/returns_std"] = math.sqrt(variance.item())
        return metrics


_LOSSES = ("policy/loss", "entropy/loss", "policy/reference_kl", "value/loss")


def _gradient_norm(parameters: Sequence[torch.nn.Parameter]) -> Tensor:
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def learning_rate_factor(step: int, total: int, *, warmup_fraction: float, min_ratio: float) -> float:
    """The learning rate of RL step `step` as a share of its peak (the release's schedule)."""
    warmup = math.floor(warmup_fraction * total)
    if step < warmup:
        return min_ratio + (1 - min_ratio) * step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _note(turns: Sequence[Turn], data: StepData) -> None:
    """Give every trained turn what the learner made of its tokens; the flat order is that of the turns."""
    ends = list(itertools.accumulate(len(turn.response_ids) for turn in turns))[:-1]
    advantages = np.split(data.advantages_N.float().cpu().numpy(), ends)
    ratios = np.split(data.ratio_N.cpu().numpy(), ends)
    for turn, advantages_R, ratios_R in zip(turns, advantages, ratios, strict=True):
        turn.advantages, turn.ratios = advantages_R, ratios_R


def _minibatches(survivors: Sequence[Sequence[Trajectory]], count: int, shuffle: np.random.Generator) -> list[set[int]]:
    """Deal whole task groups into `count` mini-batches (fewer when there are fewer groups), as trajectory ids."""
    ids: list[list[int]] = []
    start = 0
    for group in survivors:
        ids.append(list(range(start, start + len(group))))
        start += len(group)
    parts = np.array_split(shuffle.permutation(len(ids)), min(count, len(ids)))
    return [{i for g in part for i in ids[g]} for part in parts]
