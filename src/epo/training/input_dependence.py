"""How much the policy's responses depend on what it read: the mutual information of prompt and response, estimated
inside a step.

Entropy says how much responses vary for one prompt, not whether they differ between prompts. RAGEN-2 (arXiv 2604.06268)
scores every response under every prompt of the batch instead: with l_ij the log-probability of response i after
prompt j, M prompts, and the prompts taken as equally likely,

    I = mean_i [ l_ii - log( 1/M sum_j exp l_ij ) ]        nats per response, at most log M; 0 if prompts do not matter
    retrieval accuracy = share of responses whose own prompt gives them the highest l_ij; chance is 1/M

The l_ij are sums over the response's tokens, so I is a mutual information. RAGEN-2's code also has a variant in which
each l_ij is a mean over tokens before the logarithm; that one is none.

Legend: M responses, each with its prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from epo.config import Config
from epo.packing import pack
from epo.seeds import HEALTH_STREAM
from epo.training.batch import flatten
from epo.training.passes import Passes
from epo.training.policy import Policy
from epo.types import Task, Trajectory, TrajectoryGroup, Turn

TIE = 1e-4
"""Log-probabilities closer than this, in nats, do not tell two prompts apart."""
_CROSSED = Task(suite="", id="", split="")
"""The response of one task after the prompt of another belongs to none."""


def dependence_metrics(
    groups: Sequence[TrajectoryGroup], policy: Policy, passes: Passes, config: Config, *, step: int
) -> dict[str, float]:
    """`input/*` of a step, to be taken while the policy has the weights that sampled; {} for fewer than two prompts.

    Which turns are looked at follows from the seed and the step. Draws no other random numbers and changes nothing.
    """
    turns = sample_turns(groups, config, step=step)
    if len(turns) < 2:
        return {}
    return dependence(cross_scores(turns, policy, passes), torch.tensor([len(turn.response_ids) for turn in turns]))


def sample_turns(groups: Sequence[TrajectoryGroup], config: Config, *, step: int) -> list[Turn]:
    """One turn of each of `health.prompts` different tasks: tasks, episodes and turns drawn evenly, prompts distinct.

    Prompts that would not leave room for another's response are left out.
    """
    rng = np.random.default_rng([config.seed, HEALTH_STREAM, step])
    longest = config.model.max_context - config.agent.max_response_tokens
    found: dict[tuple[int, ...], Turn] = {}
    tasks: set[str] = set()
    for number in rng.permutation(len(groups)):
        if len(found) == config.health.prompts:
            break
        if groups[number].task.id in tasks:
            continue
        fitting = [
            [turn for turn in t.turns if len(turn.response_ids) and len(turn.prompt_ids) <= longest]
            for t in groups[number].survivors
        ]
        episodes = [turns for turns in fitting if turns]
        if episodes:
            turns = episodes[rng.integers(len(episodes))]
            turn = turns[rng.integers(len(turns))]
            found.setdefault(tuple(turn.prompt_ids.tolist()), turn)
            tasks.add(groups[number].task.id)
    return list(found.values())


def cross_scores(turns: Sequence[Turn], policy: Policy, passes: Passes) -> Tensor:
    """[M, M] log-probability, at training temperature, of the response of turn i after the prompt of turn j, nats."""
    pairs = [
        Trajectory(task=_CROSSED, turns=[replace(response, prompt_ids=prompt.prompt_ids, learner_logprobs=None)])
        for response in turns
        for prompt in turns
    ]
    batch = pack(pairs)
    tokens = flatten(batch, pairs, device=policy.device)
    logprobs_N, _ = passes.score(policy, batch, tokens)
    scores = torch.zeros(len(pairs), dtype=torch.float64, device=policy.device)
    scores.index_add_(0, tokens.trajectory_ids_N, logprobs_N.double())
    return scores.view(len(turns), len(turns)).cpu()


def dependence(scores_M_M: Tensor, lengths_M: Tensor) -> dict[str, float]:
    """The metrics from the scores. Among prompts that score alike (`TIE`), a retrieval is a guess."""
    count = len(scores_M_M)
    own_M = scores_M_M.diagonal()
    gains_M = own_M - (torch.logsumexp(scores_M_M, dim=1) - math.log(count))
    tied_M_M = scores_M_M >= scores_M_M.max(dim=1, keepdim=True).values - TIE
    retrieved_M = tied_M_M.diagonal().double() / tied_M_M.sum(dim=1)
    return {
        "input/mutual_information": gains_M.mean().item(),
        "input/mutual_information_per_token": (gains_M.sum() / lengths_M.sum()).item(),
        "input/retrieval_accuracy": retrieved_M.mean().item(),
        "input/retrieval_chance": 1 / count,
    }
