"""Weights on their way to samplers: whole, or the adapter alone, and the folder of a policy as data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from epo.cluster.weights import packed, policy_files, unpack, write_files
from epo.config import ModelConfig
from epo.training.policy import Policy, embedded_policy, load_policy

IDS = torch.tensor([[5, 9, 17, 200, 3]])


def adapted(tiny_config: ModelConfig, tokenizer: object, *, seed: int) -> Policy:
    config = ModelConfig.model_validate(tiny_config.model_dump() | {"lora": {"rank": 4}})
    return embedded_policy(tokenizer, config, seed=seed)


def stir(policy: Policy) -> None:
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter))


def test_all_weights(make_policy: Callable[..., Policy]):
    learner, sampler = make_policy(seed=1), make_policy(seed=2)
    assert not torch.equal(learner.hidden(IDS), sampler.hidden(IDS))
    unpack(packed(learner.tensors()), sampler)
    assert learner.digest() == sampler.digest()
    assert torch.equal(learner.hidden(IDS), sampler.hidden(IDS))


def test_with_adapters_only_the_adapter_travels(tiny_config: ModelConfig, tokenizer: object):
    learner, sampler = (adapted(tiny_config, tokenizer, seed=0) for _ in range(2))
    stir(learner)
    data = packed(learner.tensors())
    assert data.nbytes < 0.6 * sum(p.nbytes for p in learner.model.parameters())
    unpack(data, sampler)
    assert learner.digest() == sampler.digest()
    assert torch.equal(learner.hidden(IDS), sampler.hidden(IDS))


def test_other_weights_are_refused(make_policy: Callable[..., Policy], tiny_config: ModelConfig, tokenizer: object):
    with pytest.raises(ValueError, match="other"):
        unpack(packed(adapted(tiny_config, tokenizer, seed=0).tensors()), make_policy())


def test_a_policy_is_made_anew_from_its_files(tiny_config: ModelConfig, tokenizer: object, tmp_path: Path):
    policy = adapted(tiny_config, tokenizer, seed=0)
    stir(policy)
    write_files(policy_files(policy), tmp_path)
    config = ModelConfig.model_validate(tiny_config.model_dump() | {"lora": {"rank": 4}})
    assert load_policy(tmp_path, config).digest() == policy.digest()
