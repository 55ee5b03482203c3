"""What the tests of the vLLM sampler share: weights to change, responses to draw, an independent forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from epo.config import ModelConfig
from epo.sampling.base import Completion, Request, Sampler
from epo.training.policy import Policy
from epo.training.tiny import build_model


def lively_policy(tokenizer: Any, *, seed: int = 0) -> Policy:
    """Tied, about 300 entries, heads of 32 as vLLM's CPU kernels need them. Its predictions depend on the whole prompt,
    and some responses end by themselves."""
    tiny = {"vocabulary_size": 320, "hidden_size": 64, "layers": 2, "heads": 2, "intermediate_size": 96}
    config = ModelConfig.model_validate({"max_context": 256, "device": "cpu", "tiny": tiny})
    model = build_model(tokenizer, config, seed=seed)
    embedding = model.get_output_embeddings().weight
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(12)
    end = torch.randn(embedding.shape[1], generator=torch.Generator().manual_seed(seed))
    embedding.data[tokenizer.eos_token_id] = 0.5 * end
    return Policy(model.eval(), tokenizer, max_context=256)


def untie(policy: Policy) -> Policy:
    """An output head of its own, different from the embedding."""
    head = policy.model.get_output_embeddings()
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(head.weight.shape, generator=generator)
    head.weight = torch.nn.Parameter(head.weight.detach() * (1 + 0.1 * noise))
    policy.model.config.tie_word_embeddings = False
    return policy


@torch.no_grad()
def disturb(policy: Policy, *, seed: int) -> None:
    """Other weights in every tensor, as after an update."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters():
        parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
    policy.version += 1


def prompts(count: int, *, length: int = 40, seed: int = 0) -> list[list[int]]:
    return np.random.default_rng(seed).integers(3, 300, size=(count, length)).tolist()


def draw(
    sampler: Sampler,
    asked: Sequence[Sequence[int]],
    *,
    seed: int = 0,
    temperature: float = 1.0,
    train_temperature: float = 1.0,
    tokens: int = 12,
) -> list[Completion]:
    """One response per prompt; episode i has the random stream (seed, i)."""
    requests = [
        Request(episode=i, prompt_ids=ids, random=np.random.default_rng([seed, i])) for i, ids in enumerate(asked)
    ]
    return sampler.generate(requests, temperature=temperature, train_temperature=train_temperature, max_tokens=tokens)


def forced_logprobs(policy: Policy, prompt: Sequence[int], completion: Completion, *, temperature: float) -> Any:
    """Log-probabilities of the response by one plain forward pass of the model, in float64 from the logits on."""
    ids = torch.tensor([[*prompt, *completion.response_ids.tolist()]])
    with torch.inference_mode():
        logits_T_V = policy.model(input_ids=ids).logits[0].double()
    logprobs_T_V = torch.log_softmax(logits_T_V / temperature, dim=-1)
    return logprobs_T_V[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0].numpy()


def largest_difference(
    policy: Policy, asked: Sequence[Sequence[int]], drawn: Sequence[Completion], *, temperature: float = 1.0
) -> float:
    """Between the log-probabilities that were reported and those of a plain forward pass."""
    return max(
        float(np.abs(forced_logprobs(policy, ids, completion, temperature=temperature) - completion.logprobs).max())
        for ids, completion in zip(asked, drawn, strict=True)
    )
