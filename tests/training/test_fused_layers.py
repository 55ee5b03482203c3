"""Fused layers: each part against autograd of its definition in float64, whole models against transformers'."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from epo.config import Config, LoraConfig, ModelConfig
from epo.objectives import make_control
from epo.sampling.local import LocalSampler
from epo.training import causal_attention, fused_layers
from epo.training.adapters import Adapters, Base
from epo.training.fused_layers import fuse_layers, unfuse_layers
from epo.training.learner import Learner
from epo.training.linear import through_onednn
from epo.training.policy import Policy, load_policy
from epo.training.recomputation import enable_recomputation, recomputing
from made_up import groups

UNIT = 2.0**-8
"""Relative error of one rounding to bfloat16, at most."""
SIZES = {
    "vocab_size": 60,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def rounded(*shape: int, seed: int = 0) -> Tensor:
    """Values that bfloat16 has."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def check(fused: Callable[..., Any], definition: Callable[..., Any], inputs: list[Tensor]) -> None:
    """Values and gradients within two roundings of the definition's in float64."""

    def run(function: Callable[..., Any], leaves: list[Tensor]) -> list[Tensor]:
        out = function(*leaves)
        outs = list(out) if isinstance(out, tuple) else [out]
        grads = [rounded(*x.shape, seed=9 + n).to(x.dtype) for n, x in enumerate(outs)]
        return [*(x.detach() for x in outs), *torch.autograd.grad(outs, leaves, grads)]

    found = run(fused, [x.clone().requires_grad_() for x in inputs])
    exact = run(definition, [x.double().requires_grad_() for x in inputs])
    for number, (a, b) in enumerate(zip(found, exact, strict=True)):
        assert (a.double() - b).norm() <= 2 * UNIT * b.norm(), number
        assert (a.double() - b).abs().max() <= 8 * UNIT * b.abs().max(), number


@pytest.mark.parametrize("shape", [(1, 1), (2, 5)])
def test_norm(shape: tuple[int, int]) -> None:
    def definition(x: Tensor, weight_D: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-2).sqrt() * weight_D

    inputs = [rounded(*shape, 24).float() * 0.3, 1 + 0.1 * rounded(24, seed=1).float()]
    check(lambda x, w: fused_layers._rms_norm(x, w, 1e-2), definition, inputs)


def test_products_that_read_one_input() -> None:
    def definition(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.cat([x @ weight.T for weight in weights], dim=-1)

    inputs = [rounded(2, 5, 16), rounded(16, 16, seed=1).float(), rounded(8, 16, seed=2).float()]
    check(fused_layers._products, definition, inputs)


def test_gated() -> None:
    def definition(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return gate / (1 + (-gate).exp()) * up

    check(fused_layers._gated, definition, [rounded(3, 4, 40) * 2])


@pytest.mark.parametrize("batch", [1, 3])
def test_positions(batch: int) -> None:
    """Also positions that differ from row to row."""
    angle_B_T_E = rounded(batch, 7, 8, seed=3).float().repeat(1, 1, 2)
    cos, sin = angle_B_T_E.cos(), angle_B_T_E.sin()

    def definition(x_B_T_S_E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (part.transpose(1, 2) for part in x_B_T_S_E.split([6, 2, 2], dim=2))
        return (*apply_rotary_pos_emb(query, key, cos.double(), sin.double()), value)

    check(lambda x: fused_layers._turned(x, cos, sin, 2), definition, [rounded(3, 7, 10, 16)])


MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 4096}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
}
FUSED = {"llama": 4, "mistral": 4, "qwen2": 3, "qwen3": 3}
"""Modules of a layer: two norms, the feed-forward part, and attention where it has no bias and no norms of its own."""


def made(name: str) -> Any:
    """With linear layers and attention as `load_policy` has them."""
    causal_attention.register()
    make_config, make_model, options = MODELS[name]
    torch.manual_seed(0)
    model: Any = make_model(make_config(**SIZES | options)).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.set_attn_implementation(causal_attention.NAME)
    through_onednn(model)
    return model


IDS_B_T = torch.randint(60, (3, 37), generator=torch.Generator().manual_seed(5))


def hidden_and_gradients(model: Any, *, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16), recomputing(model):
        hidden = model.base_model(input_ids=IDS_B_T, use_cache=False).last_hidden_state
    (hidden * rounded(*hidden.shape, seed=7).to(hidden.dtype)).sum().backward()
    gradients = {n: p.grad.detach().double() for n, p in model.named_parameters() if p.grad is not None}
    return {"hidden": hidden.detach().double(), **gradients}


def count(model: Any) -> int:
    return sum(isinstance(module, fused_layers._Fused) for module in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_as_exact_as_transformers_is_under_autocast(name: str) -> None:
    model = made(name)
    fused = copy.deepcopy(model)
    fuse_layers(fused)
    assert count(fused) == SIZES["num_hidden_layers"] * FUSED[name]
    assert list(model.state_dict()) == list(fused.state_dict())
    exact = copy.deepcopy(model).double()
    exact.set_attn_implementation("sdpa")
    want = hidden_and_gradients(exact, dtype=torch.float64)
    model.set_attn_implementation("sdpa")
    plain, ours = hidden_and_gradients(model), hidden_and_gradients(fused)
    assert plain.keys() == ours.keys() == want.keys()
    total = [0.0, 0.0]
    for key, b in want.items():
        errors = [float((a[key] - b).norm() / b.norm()) for a in (ours, plain)]
        assert 0 < errors[0] < 2 * errors[1] + UNIT / 4, key
        total = [sum_ + error**2 for sum_, error in zip(total, errors, strict=True)]
    assert total[0] < 1.2**2 * total[1]


def test_without_autocast_nothing_is_different() -> None:
    model = made("llama")
    before = hidden_and_gradients(model, dtype=torch.float32)
    fuse_layers(model)
    after = hidden_and_gradients(model, dtype=torch.float32)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_it_can_be_undone_and_copied() -> None:
    model = made("llama")
    before = hidden_and_gradients(model)
    classes = [type(module) for module in model.modules()]
    fuse_layers(model)
    twin = copy.deepcopy(model)
    assert count(twin) == count(model) > 0
    unfuse_layers(model)
    assert [type(module) for module in model.modules()] == classes
    after = hidden_and_gradients(model)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert count(twin) > 0


def test_recomputation_gives_the_same_gradients() -> None:
    model = made("llama")
    fuse_layers(model)
    before = hidden_and_gradients(model)
    enable_recomputation(model, None)
    after = hidden_and_gradients(model)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_frozen_weights_get_no_gradient() -> None:
    model = made("llama")
    fuse_layers(model)
    whole = hidden_and_gradients(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name and ("up_proj" in name or "k_proj" in name))
    found = hidden_and_gradients(model)
    assert len(found) == 3
    assert all(torch.equal(found[key], whole[key]) for key in found)


def test_other_layers_stay_as_they_are() -> None:
    adapted = made("llama")
    Adapters(adapted, LoraConfig(rank=2), Base(path="x", sha256="x"), seed=0)
    partly = made("llama")
    Adapters(partly, LoraConfig(rank=2, targets="attention"), Base(path="x", sha256="x"), seed=0)
    rounded_weights = made("llama").to(torch.bfloat16)
    for model, expected in ((adapted, 0), (partly, 2 * SIZES["num_hidden_layers"]), (rounded_weights, 0)):
        fuse_layers(model)
        assert count(model) == expected
    masked = made("llama")
    want = made("llama")
    fuse_layers(masked)
    mask_B_T = torch.ones_like(IDS_B_T)
    mask_B_T[0, :5] = 0
    for model in (masked, want):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.base_model(input_ids=IDS_B_T, attention_mask=mask_B_T, use_cache=False).last_hidden_state
        model.found = hidden.detach()
    assert (masked.found - want.found).norm() < 4 * UNIT * want.found.norm()


@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize("recompute", [False, True])
def test_an_update_is_that_of_transformers_layers_up_to_rounding(
    lora: int, recompute: bool, policy: Policy, tmp_path: Path, minute_config: Callable[..., Config]
) -> None:
    """Through a model directory, as any model is loaded; sampler and learner agree as well as with `sdpa`."""
    policy.save(tmp_path / "model")
    data = groups(np.random.default_rng(0))
    found: dict[str, Tensor] = {}
    for attention in ("onednn", "sdpa"):
        options = {
            "compute": "bfloat16",
            "attention": attention,
            "gradient_checkpointing": recompute,
            "max_context": 256,
        }
        loaded = load_policy(tmp_path / "model", ModelConfig.model_validate(options | {"lora": {"rank": lora}}))
        assert f"attention {attention}" in loaded.describe()
        assert (count(loaded.model) > 0) == (attention == "onednn" and not lora)
        assert LocalSampler(loaded, max_episodes=2).path == ("generic" if lora else "lean")
        config = minute_config("algorithm.name=grpo", "rollout.group_size=2", "optimizer.minibatches=1")
        metrics = Learner(loaded, config, make_control("none")).update(data, step=1)
        assert metrics["policy/grad_norm"] > 0 and metrics["update/skipped"] == 0
        gradients = [p.grad.flatten() for p in loaded.parameters() if p.grad is not None]
        found[attention] = torch.cat(gradients)
    assert 0 < (found["onednn"] - found["sdpa"]).norm() < 0.1 * found["sdpa"].norm()
