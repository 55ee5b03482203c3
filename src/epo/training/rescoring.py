"""Log-probabilities and entropies computed anew by the learner, and the correction for what the sampler had otherwise.

A sampler of another make (an inference engine, other kernels, another precision) draws from a distribution a little off
the learner's, and one with older weights (`cluster.max_staleness`) from one further off. The probability ratio then
starts from the learner's own log-probabilities, with the weights that the update begins with, and each token's
surrogate is multiplied by a truncated importance weight: truncated importance sampling (TIS; Yao et al. 2025, "Your
Efficient RL Framework Secretly Brings You Off-Policy RL Training"), as verl (`rollout_is: token`, threshold 2) and TRL
(`vllm_importance_sampling_mode: token_truncate`) use it for engine mismatch. With older weights this is decoupled PPO
(Hilton et al., arXiv 2110.00641), as in AReaL (arXiv 2505.24298).

Legend: N trained tokens of the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from epo.objectives import kl_penalty
from epo.packing import pack
from epo.training.batch import flatten
from epo.training.passes import Passes
from epo.training.policy import Policy
from epo.types import Trajectory, TrajectoryGroup, Turn

RATIO_BAND = 0.1
"""How far from 1 a token's ratio may be before `sampler/ratio_outside` counts it."""


def rescored(groups: Sequence[TrajectoryGroup], policy: Policy, passes: Passes) -> list[TrajectoryGroup]:
    """Copies of `groups` whose turns carry the learner's log-probabilities beside the sampler's, and its entropies
    instead of the sampler's. One forward pass over all trajectories, lost ones included, since all are recorded."""
    trajectories = [t for group in groups for t in group.trajectories if t.turns]
    if not trajectories:
        return list(groups)
    batch = pack(trajectories)
    tokens = flatten(batch, trajectories, device=policy.device)
    logprobs_N, entropy_N = (x_N.cpu().numpy() for x_N in passes.score(policy, batch, tokens))
    done = 0

    def turn(old: Turn) -> Turn:
        nonlocal done
        span = slice(done, done + len(old.response_ids))
        done = span.stop
        return replace(old, learner_logprobs=logprobs_N[span], entropy=entropy_N[span])

    def trajectory(old: Trajectory) -> Trajectory:
        return replace(old, turns=[turn(t) for t in old.turns])

    found = [replace(group, trajectories=[trajectory(t) for t in group.trajectories]) for group in groups]
    assert done == len(logprobs_N)
    return found


def truncated_importance_weights(learner_logprobs_N: Tensor, sampler_logprobs_N: Tensor, *, cap: float) -> Tensor:
    """[N] min(pi_learner / pi_sampler, cap), without gradient: 1 where the two agree.

    Truncation bounds the variance (Ionides 2008) at the price of a bias on tokens the sampler undersamples.
    """
    return (learner_logprobs_N - sampler_logprobs_N).detach().exp().clamp(max=cap)


def mismatch_metrics(learner_logprobs_N: Tensor, sampler_logprobs_N: Tensor) -> dict[str, float]:
    """How far apart the two are on drawn tokens, with equal weights; nothing for no tokens. The ratio is
    pi_learner / pi_sampler, before any truncation."""
    if learner_logprobs_N.numel() == 0:
        return {}
    kl_N = kl_penalty(sampler_logprobs_N, learner_logprobs_N, kind="k3")
    difference_N = (learner_logprobs_N - sampler_logprobs_N).detach()
    ratio_N = difference_N.double().exp().cpu().numpy()  # torch.quantile takes no more than 2^24 numbers
    low, high = np.quantile(ratio_N, (0.01, 0.99))
    is_outside_N = (ratio_N < 1 - RATIO_BAND) | (ratio_N > 1 + RATIO_BAND)
    return {
        "sampler/mismatch_kl": kl_N.mean().item(),
        "sampler/mismatch_max": difference_N.abs().max().item(),
        "sampler/ratio_p01": float(low),
        "sampler/ratio_p99": float(high),
        "sampler/ratio_outside": float(is_outside_N.mean()),
    }


def staleness_metrics(turns: Sequence[Turn], *, version: int) -> dict[str, float]:
    """How many updates older than `version` the weights were that drew the tokens: mean over tokens, and the most."""
    ages = [version - turn.policy_version for turn in turns]
    tokens = [len(turn.response_ids) for turn in turns]
    if not sum(tokens):
        return {}
    mean = sum(age * count for age, count in zip(ages, tokens, strict=True)) / sum(tokens)
    return {"sampler/staleness": mean, "sampler/staleness_max": float(max(ages))}


def weight_metrics(learner_logprobs_N: Tensor, sampler_logprobs_N: Tensor, *, cap: float) -> dict[str, float]:
    """What the correction does: the mean weight, and the share of tokens whose weight was truncated."""
    weights_N = truncated_importance_weights(learner_logprobs_N, sampler_logprobs_N, cap=cap)
    is_truncated_N = learner_logprobs_N - sampler_logprobs_N > torch.tensor(cap).log()
    return {
        "sampler/importance_mean": weights_N.mean().item(),
        "sampler/importance_truncated": is_truncated_N.float().mean().item(),
    }
