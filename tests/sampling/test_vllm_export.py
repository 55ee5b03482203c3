"""What is handed to a vLLM engine, and what is said where there is none. Needs no vLLM."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, LlamaForCausalLM

from epo.config import LoraConfig, SamplerConfig
from epo.errors import UserError
from epo.sampling.vllm import VllmSampler, engine_model_config, export_weights
from epo.training.adapters import Adapters, Base
from epo.training.policy import Policy

IDS = torch.tensor([[5, 9, 200, 31, 7, 250, 12]])


def exported(policy: Policy, folder: Path, *, temperature: float) -> LlamaForCausalLM:
    """A plain model made of nothing but the exported files."""
    (folder / "config.json").write_text(json.dumps(engine_model_config(policy)))
    model = LlamaForCausalLM(AutoConfig.from_pretrained(folder))
    export_weights(policy, folder / "weights.safetensors", temperature=temperature)
    model.load_state_dict(load_file(folder / "weights.safetensors"), strict=True)
    return model.eval()


@torch.no_grad()
def test_the_head_is_its_own_and_divided_by_the_training_temperature(policy: Policy, tmp_path: Path):
    assert policy.model.config.tie_word_embeddings
    model = exported(policy, tmp_path, temperature=1.7)
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    torch.testing.assert_close(model(IDS).logits, policy.model(IDS).logits / 1.7, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_adapters_are_merged(make_policy: Callable[..., Policy], tmp_path: Path):
    pytest.importorskip("peft")
    plain = make_policy(seed=2)
    before = plain.model(IDS).logits
    adapters = Adapters(plain.model, LoraConfig(rank=2), Base(path="tiny", sha256=""), seed=0)
    policy = Policy(plain.model, plain.tokenizer, max_context=plain.max_context, adapters=adapters)
    for parameter in policy.parameters():
        parameter.data.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    adapted = policy.model(IDS).logits
    assert (adapted - before).abs().max() > 0.5
    torch.testing.assert_close(exported(policy, tmp_path, temperature=1.0)(IDS).logits, adapted, atol=1e-3, rtol=1e-3)


def test_the_engine_computes_in_the_type_of_the_learner_s_products(policy: Policy, tmp_path: Path):
    policy.compute = torch.bfloat16
    export_weights(policy, tmp_path / "weights.safetensors", temperature=1.0)
    assert {tensor.dtype for tensor in load_file(tmp_path / "weights.safetensors").values()} == {torch.bfloat16}
    assert policy.head_weight_V_D.dtype == torch.float32


def test_a_missing_package_is_said(policy: Policy, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"sampler\.name='vllm' needs the package vllm.* set sampler\.name=local"):
        VllmSampler(policy, SamplerConfig(name="vllm"), max_episodes=2)
