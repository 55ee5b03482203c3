"""What computes where and how precisely: devices, matrix products, attention kernels."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from epo.config import Config, ModelConfig
from epo.errors import UserError
from epo.objectives import make_control
from epo.training.hardware import resolve_attention, resolve_compute
from epo.training.learner import Learner
from epo.training.policy import Policy
from made_up import groups

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
IDS = torch.randint(3, 300, (3, 17), generator=torch.Generator().manual_seed(7))


def model(**given: Any) -> ModelConfig:
    return ModelConfig.model_validate({"path": "somewhere", **given})


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`machine(bfloat16=..., flash=...)`: what the hardware and the installation offer."""

    def offer(*, bfloat16: bool, flash: bool) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": bfloat16, "avx2": True})
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bfloat16)
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *a: (object() if flash else None) if name == "flash_attn" else find(name, *a),
        )

    return offer


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_matrix_products(device: torch.device, machine: Callable[..., None]) -> None:
    for native in (False, True):
        machine(bfloat16=native, flash=False)
        assert resolve_compute(model(), device) is (torch.bfloat16 if native else torch.float32)
        assert resolve_compute(model(path="tiny"), device) is torch.float32
        for name in ("float32", "bfloat16"):
            assert resolve_compute(model(compute=name), device) is getattr(torch, name)
            assert resolve_compute(model(compute=name, path="tiny"), device) is getattr(torch, name)


def test_bfloat16_weights_are_multiplied_in_bfloat16(machine: Callable[..., None]) -> None:
    machine(bfloat16=False, flash=False)
    assert resolve_compute(model(dtype="bfloat16"), CPU) is torch.bfloat16
    with pytest.raises(UserError, match=r"set model\.dtype=float32"):
        resolve_compute(model(dtype="bfloat16", compute="float32"), CPU)


def test_attention_kernels(machine: Callable[..., None]) -> None:
    machine(bfloat16=True, flash=True)
    assert resolve_attention(model(), CUDA) == "flash_attention_2"
    assert resolve_attention(model(), CPU) == "onednn"
    assert resolve_attention(model(dtype="bfloat16"), CPU) == "onednn"
    assert resolve_attention(model(compute="float32"), CPU) == "sdpa"
    assert resolve_attention(model(path="tiny"), CPU) == "sdpa"
    assert resolve_attention(model(compute="float32"), CUDA) == "sdpa"
    assert resolve_attention(model(dtype="bfloat16"), CUDA) == "flash_attention_2"
    for name in ("sdpa", "eager", "flash_attention_2"):
        assert resolve_attention(model(attention=name), CUDA) == name
    machine(bfloat16=True, flash=False)
    assert resolve_attention(model(), CUDA) == "sdpa"
    machine(bfloat16=False, flash=False)
    assert resolve_attention(model(compute="bfloat16"), CPU) == "sdpa"
    assert resolve_attention(model(compute="bfloat16", attention="onednn"), CPU) == "onednn"


@pytest.mark.parametrize(
    ("kernels", "device", "flash", "given", "fix"),
    [
        ("flash_attention_2", CPU, True, {}, "the device is cpu: set model.attention=sdpa"),
        (
            "flash_attention_2",
            CUDA,
            False,
            {},
            "needs the package flash-attn: pip install flash-attn, or set model.attention=sdpa",
        ),
        (
            "flash_attention_2",
            CUDA,
            True,
            {"compute": "float32"},
            "set model.compute=bfloat16, or model.attention=sdpa",
        ),
        ("onednn", CUDA, True, {}, "the device is cuda: set model.attention=sdpa"),
        ("onednn", CPU, True, {"compute": "float32"}, "set model.compute=bfloat16, or model.attention=sdpa"),
    ],
)
def test_kernels_that_cannot_run_are_refused(
    kernels: str, device: torch.device, flash: bool, given: dict[str, str], fix: str, machine: Callable[..., None]
) -> None:
    machine(bfloat16=True, flash=flash)
    with pytest.raises(UserError) as caught:
        resolve_attention(model(attention=kernels, **given), device)
    assert fix in str(caught.value) and f"model.attention='{kernels}'" in str(caught.value)


@torch.no_grad()
def rounding_error(policy: Policy, exact: Policy) -> float:
    """Of the hidden states, relative to their size."""
    difference = policy.hidden(IDS) - exact.hidden(IDS)
    return float(difference.square().mean().sqrt() / exact.hidden(IDS).square().mean().sqrt())


def test_bfloat16_products_differ_by_rounding_alone(make_policy: Callable[..., Policy]) -> None:
    exact, policy = make_policy(lively=False), make_policy(lively=False)
    assert rounding_error(policy, exact) == 0
    policy.compute = torch.bfloat16
    unit = 2.0**-8  # relative error of one rounding to bfloat16, at most
    assert 0.01 * unit < rounding_error(policy, exact) < 4 * unit
    assert policy.hidden(IDS).dtype == torch.float32  # the residual stream
    head, whole = policy.head(policy.hidden(IDS)[0]), exact.head(exact.hidden(IDS)[0])
    assert (head.hidden_N_D.dtype, head.weight_V_D.dtype) == (torch.bfloat16, torch.bfloat16)
    error = (head.weight_V_D.float() - whole.weight_V_D).abs()
    assert bool((error <= unit * whole.weight_V_D.abs()).all()) and error.max() > 0


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_weights_gradients_and_moments_stay_in_float32(
    name: str, make_policy: Callable[..., Policy], minute_config: Callable[..., Config]
) -> None:
    updates = []
    for compute in (torch.float32, torch.bfloat16):
        policy = make_policy(lively=False)
        policy.compute = compute
        config = minute_config(f"algorithm.name={name}", "rollout.group_size=2", "optimizer.minibatches=1")
        learner = Learner(policy, config, make_control("none"))
        before = torch.cat([p.detach().flatten() for p in policy.parameters()])
        learner.update(groups(np.random.default_rng(0)), step=1)
        tensors = [t for state in learner.optimizer.state.values() for t in state.values()]
        tensors += [x for p in policy.parameters() for x in (p, p.grad) if x is not None]
        assert {t.dtype for t in tensors} == {torch.float32}
        assert len(tensors) > 10
        updates.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
        assert not torch.equal(before, torch.cat([p.detach().flatten() for p in policy.parameters()]))
    difference = float((updates[0] - updates[1]).norm() / updates[0].norm())
    assert 0 < difference < 0.05


def test_a_frozen_head_is_rounded_once(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy(lively=False)
    policy.compute = torch.bfloat16
    hidden_N_D = torch.randn(4, 32)
    weight = policy.head_weight_V_D
    assert policy.head(hidden_N_D).weight_V_D is not policy.head(hidden_N_D).weight_V_D  # it is trained
    policy.model.requires_grad_(False)
    with torch.inference_mode():  # as the sampler asks first
        first = policy.head(hidden_N_D).weight_V_D
    assert policy.head(hidden_N_D).weight_V_D is first
    assert torch.equal(first, weight.to(torch.bfloat16))
    inputs = hidden_N_D.clone().requires_grad_(True)
    head = policy.head(inputs)
    torch.nn.functional.linear(head.hidden_N_D, head.weight_V_D).sum().backward()  # usable in a backward
    assert inputs.grad is not None
    with torch.no_grad():
        weight.mul_(2)
    assert torch.equal(policy.head(hidden_N_D).weight_V_D, weight.to(torch.bfloat16))
    trained = make_policy(lively=False)
    trained.compute = torch.bfloat16
    head = trained.head(torch.randn(4, 32))
    torch.nn.functional.linear(head.hidden_N_D, head.weight_V_D).sum().backward()
    assert trained.head_weight_V_D.grad is not None and trained.head_weight_V_D.grad.dtype == torch.float32
