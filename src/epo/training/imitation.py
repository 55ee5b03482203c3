"""The warm start: supervised learning on expert demonstrations, cached by everything that decides its result.

Legend: N predicted tokens of a batch, n of a micro-batch, T tokens of a row, B rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from epo.agent.prompts import prompt_source
from epo.config import Config
from epo.errors import UserError
from epo.files import cache_dir, exclusive, new_folder
from epo.models import resolve_model
from epo.objectives import token_logprobs_and_entropy
from epo.packing import pack
from epo.training.batch import micro_batches
from epo.training.demonstrations import Demonstration, as_trajectory, texts
from epo.training.policy import Policy, embedded_policy, load_policy
from epo.training.tiny import build_tokenizer
from epo.types import PackedRow, Trajectory


def warm_started_policy(
    config: Config,
    demonstrations: Sequence[Demonstration],
    *,
    on_batch: Callable[[int, float], None] | None = None,
) -> Policy:
    """The policy after imitation, from the cache or trained now.

    Args:
        demonstrations: expert episodes; with `model.path=tiny` the tokenizer is trained on their text.
        on_batch: called with (batches done, loss in nats per token).

    Raises:
        UserError: a demonstration is longer than the context.
    """
    folder = cache_dir() / "imitation" / imitation_digest(config, demonstrations)
    if not folder.is_dir():
        with exclusive(folder):  # the runs of a sweep share warm starts
            if not folder.is_dir():
                _make(folder, config, demonstrations, on_batch=on_batch)
    return load_policy(folder, config.model)


def _make(
    folder: Path,
    config: Config,
    demonstrations: Sequence[Demonstration],
    *,
    on_batch: Callable[[int, float], None] | None,
) -> None:
    """Learn from `demonstrations`, and leave the model in `folder`."""
    policy = _fresh_policy(config, demonstrations)
    size = config.model.max_context
    trajectories = [as_trajectory(d, policy.chat, config.agent, max_context=size) for d in demonstrations]
    longest = max(_length(t) for t in trajectories)
    if longest > config.model.max_context:
        raise UserError(
            f"a demonstration has {longest} tokens, more than model.max_context={config.model.max_context} holds: "
            f"raise model.max_context to {longest} or more"
        )
    imitate(policy, trajectories, config, on_batch=on_batch)
    with new_folder(folder) as draft:
        policy.save(draft)


def imitation_digest(config: Config, demonstrations: Sequence[Demonstration]) -> str:
    """Names the result of the warm start: the same digest, the same weights."""
    key = {
        "model": config.model.model_dump(mode="json"),
        "source": _fingerprint(config.model.path),
        "imitation": config.imitation.model_dump(mode="json"),
        "agent": config.agent.model_dump(mode="json"),
        "prompt": prompt_source(config.agent.prompt),
        "microbatch_tokens": config.optimizer.microbatch_tokens,
        "seed": config.seed,
        "demonstrations": [asdict(d) for d in demonstrations],
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def imitate(
    policy: Policy,
    trajectories: Sequence[Trajectory],
    config: Config,
    *,
    on_batch: Callable[[int, float], None] | None = None,
) -> None:
    """Maximise the log-probability of the experts' tokens, and of what they read where `observation_weight` says so.

    AdamW, linear warm-up over a tenth of the batches, then linear decay to 0.
    """
    imitation, rng = config.imitation, random.Random(f"imitation/{config.seed}")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=imitation.learning_rate, weight_decay=0.01, fused=True)
    warmup = max(1, imitation.batches // 10)
    deck: list[Trajectory] = []
    for number in range(imitation.batches):
        while len(deck) < imitation.batch_size:
            deck = [*rng.sample(list(trajectories), len(trajectories)), *deck]
        chosen = [deck.pop() for _ in range(imitation.batch_size)]
        remaining = (imitation.batches - number) / max(1, imitation.batches - warmup)
        optimizer.param_groups[0]["lr"] = imitation.learning_rate * min((number + 1) / warmup, remaining)
        loss = _imitation_step(policy, chosen, config, optimizer)
        if on_batch is not None:
            on_batch(number + 1, loss)
    policy.version += 1


def _imitation_step(
    policy: Policy, trajectories: Sequence[Trajectory], config: Config, optimizer: torch.optim.Optimizer
) -> float:
    """One optimiser step; returns the loss on the experts' tokens, in nats per token."""
    rows, spans, weights_N, expert_weights_N = _targets(trajectories, config.imitation.observation_weight)
    weights_N, expert_weights_N = weights_N.to(policy.device), expert_weights_N.to(policy.device)
    optimizer.zero_grad(set_to_none=True)
    expert_loss = 0.0
    for micro in micro_batches(
        rows, spans, range(len(rows)), max_tokens=config.optimizer.microbatch_tokens, device=policy.device
    ):
        hidden_B_T_D = policy.hidden(micro.token_ids_B_T, micro.lengths_B)
        head = policy.head(hidden_B_T_D[micro.row_n, micro.source_n])
        logprobs_n, _ = token_logprobs_and_entropy(
            head.hidden_N_D, head.weight_V_D, micro.targets_n, head_bias=head.bias_V, logit_softcap=head.softcap
        )
        torch.autograd.backward(-(weights_N[micro.index_n] * logprobs_n).sum())
        expert_loss -= (expert_weights_N[micro.index_n] * logprobs_n.detach()).sum().item()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    return expert_loss


def _targets(
    trajectories: Sequence[Trajectory], observation_weight: float
) -> tuple[list[PackedRow], list[slice], Tensor, Tensor]:
    """Rows in which every token that is to be predicted counts as trained, and the weight of each.

    The experts' tokens weigh 1 together, those they read `observation_weight` together. With weight 0 only the experts'
    tokens are predicted at all.
    """
    rows, spans, is_expert = [], [], []
    start = 0
    for row in pack(trajectories).rows:
        if observation_weight > 0:
            predicted_T = np.ones_like(row.trained_T)
            predicted_T[0] = False
        else:
            predicted_T = row.trained_T
        rows.append(replace(row, trained_T=predicted_T))
        is_expert.append(row.trained_T[predicted_T])
        spans.append(slice(start, start + len(is_expert[-1])))
        start = spans[-1].stop
    expert_N = torch.from_numpy(np.concatenate(is_expert))
    expert_weights_N = expert_N.float() / expert_N.sum()
    others = max(1, int((~expert_N).sum()))
    return rows, spans, expert_weights_N + observation_weight * (~expert_N).float() / others, expert_weights_N


def _fresh_policy(config: Config, demonstrations: Sequence[Demonstration]) -> Policy:
    if config.model.path != "tiny":
        return load_policy(config.model.path, config.model, seed=config.seed)
    tokenizer = build_tokenizer(texts(demonstrations), vocabulary_size=config.model.tiny.vocabulary_size)
    return embedded_policy(tokenizer, config.model, seed=config.seed)


def _length(trajectory: Trajectory) -> int:
    return max(len(turn.prompt_ids) + len(turn.response_ids) for turn in trajectory.turns)


def _fingerprint(path: str) -> list[tuple[str, int, int]] | None:
    """Names, sizes and times of a model directory's files: enough to notice that it was replaced."""
    if path == "tiny":
        return None
    folder = resolve_model(path)
    if not folder.is_dir():
        return None
    files = sorted(p for p in folder.iterdir() if p.is_file())
    return [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
