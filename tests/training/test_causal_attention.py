"""Attention of our own against brute force in float64, with torch's kernel as the measure of what rounding may do."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from epo.training import causal_attention as ours
from epo.training.causal_attention import causal_attention

UNIT = 2.0**-8
"""Relative error of one rounding to bfloat16, at most."""


def brute_force(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """[B, T, H, E], query by query: softmax over the keys up to its own."""
    rows = []
    group = query.shape[1] // key.shape[1]
    for b in range(query.shape[0]):
        for t in range(query.shape[2]):
            heads = []
            for h in range(query.shape[1]):
                scores = scale * (key[b, h // group, : t + 1] @ query[b, h, t])
                heads.append(scores.softmax(0) @ value[b, h // group, : t + 1])
            rows.append(torch.stack(heads))
    return torch.stack(rows).view(query.shape[0], query.shape[2], query.shape[1], -1)


def torchs(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    out = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


def result_and_gradients(attend: Any, tensors: list[Tensor], grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    out = attend(*leaves)
    found = torch.autograd.grad(out, leaves, grad.to(dtype))
    return [out.detach().double(), *(x.double() for x in found)]


def errors(found: list[Tensor], exact: list[Tensor]) -> tuple[float, float]:
    """Of the result and of all gradients together, relative to their size."""
    out = float((found[0] - exact[0]).norm() / exact[0].norm())
    size = sum(float(x.square().sum()) for x in exact[1:])
    return out, math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(found[1:], exact[1:], strict=True)) / size)


def drawn(batch: int, heads: int, key_heads: int, tokens: int, size: int, *, spread: float, seed: int) -> list[Tensor]:
    """Queries, keys, values as the linear layers lay them out, and the gradient of the result; values of bfloat16."""
    generator = torch.Generator().manual_seed(seed)

    def one(count: int, factor: float) -> Tensor:
        return (factor * torch.randn(batch, tokens, count, size, generator=generator)).to(torch.bfloat16)

    made = [one(heads, spread), one(key_heads, 1.0), one(key_heads, 1.0)]
    return [x.transpose(1, 2) for x in made] + [one(heads, 1.0)]


@given(
    batch=st.integers(1, 3),
    key_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    tokens=st.integers(1, 40),
    size=st.sampled_from([8, 16, 20]),
    spread=st.sampled_from([0.1, 1.0, 6.0]),
    scale=st.sampled_from([0.25, 0.3, 1.0]),
    step=st.sampled_from([16, 23, 128]),
    seed=st.integers(0, 5),
)
@settings(max_examples=25, deadline=None)
def test_result_and_gradients_are_those_of_brute_force(
    batch: int, key_heads: int, groups: int, tokens: int, size: int, spread: float, scale: float, step: int, seed: int
) -> None:
    """Whatever the number of blocks; a row of one token has but its own value, and gradients of zero elsewhere."""
    *tensors, grad = drawn(batch, key_heads * groups, key_heads, tokens, size, spread=spread, seed=seed)
    exact = result_and_gradients(partial(brute_force, scale=scale), tensors, grad, torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "_QUERIES", step)
        found = result_and_gradients(partial(causal_attention, scale=scale), tensors, grad, torch.bfloat16)
    query, key, value = (x.double() for x in tensors)
    # What cancels in the gradients of the scores leaves the rounding of what it was made of: dO v, times scale, k or q.
    made_of = scale * grad.double().norm() * value.norm(dim=-1).max()
    parts = (0, made_of * key.norm(dim=-1).max(), made_of * query.norm(dim=-1).max(), 0)
    for name, a, b, part in zip(("out", "query", "key", "value"), found, exact, parts, strict=True):
        assert (a - b).norm() <= UNIT * (4 * b.norm() + part), name


@pytest.mark.parametrize("spread", [0.2, 1.0, 4.0, 16.0])
@pytest.mark.parametrize("tokens", [130, 300])
def test_rounding_is_of_the_size_of_torchs_own(tokens: int, spread: float) -> None:
    """Scores up to 60. The result is within 1.7 times torch's error, all gradients together within 2 times; at 570
    tokens the gradients' error is smaller than torch's (docs/cost.md)."""
    *tensors, grad = drawn(2, 6, 2, tokens, 64, spread=spread, seed=0)
    scale = 0.125
    exact = result_and_gradients(partial(torchs, scale=scale), tensors, grad, torch.float64)
    theirs, found = (
        errors(result_and_gradients(partial(attend, scale=scale), tensors, grad, torch.bfloat16), exact)
        for attend in (torchs, causal_attention)
    )
    assert found[0] <= 1.7 * theirs[0] and found[1] <= 2 * theirs[1]
    assert 0 < found[0] < UNIT and 0 < found[1] < 4 * UNIT


def test_later_tokens_change_nothing() -> None:
    """Not in the last bit, and whatever they are."""
    query, key, value, _ = drawn(1, 4, 2, 200, 16, spread=2.0, seed=1)
    before = causal_attention(query, key, value, scale=0.25)
    for tensor in (query, key, value):
        tensor[:, :, 150:] = 100.0
    assert torch.equal(causal_attention(query, key, value, scale=0.25)[:, :150], before[:, :150])


def test_large_scores_stay_finite() -> None:
    """Of some 10,000, of which bfloat16 is off by up to 32."""
    query, key, value, grad = drawn(1, 2, 1, 60, 16, spread=1e3, seed=2)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    out = causal_attention(*leaves, scale=1.0)
    assert bool(out.isfinite().all())
    assert all(bool(x.isfinite().all()) for x in torch.autograd.grad(out, leaves, grad))
    best = torch.stack([(key[0, 0, : t + 1].double() @ query[0, 0, t].double()).argmax() for t in range(60)])
    torch.testing.assert_close(out[0, :, 0], value[0, 0, best], rtol=2 * UNIT, atol=0)


class _Module:
    is_causal = True
    num_key_value_groups = 2


@pytest.mark.parametrize("case", ["mask", "float32", "more keys", "both ways", "dropout"])
def test_everything_else_is_left_to_torch(case: str) -> None:
    query, key, value, _ = drawn(1, 4, 2, 12, 16, spread=1.0, seed=3)
    arguments: dict[str, Any] = {"attention_mask": None, "scaling": 0.25}
    if case == "mask":
        arguments["attention_mask"] = torch.ones(12, 12, dtype=torch.bool).tril().triu(-3)[None, None]
    elif case == "float32":
        query, key, value = query.float(), key.float(), value.float()
    elif case == "more keys":
        query = query[:, :, -1:]
    elif case == "both ways":
        arguments["is_causal"] = False
    else:
        arguments["dropout"] = 0.5
    torch.manual_seed(0)
    expected, _ = sdpa_attention_forward(_Module(), query, key, value, **arguments)  # type: ignore[arg-type]
    torch.manual_seed(0)
    found, _ = ours._attention_forward(_Module(), query, key, value, **arguments)
    assert torch.equal(found, expected)
    assert not found.requires_grad


def test_transformers_uses_it_by_its_name_and_masks_go_to_torch() -> None:
    ours.register()
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config).eval()
    ids_B_T = torch.randint(40, (2, 30))
    hidden = {}
    for name in ("sdpa", ours.NAME):
        model.set_attn_implementation(name)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden[name] = model.model(input_ids=ids_B_T, use_cache=False).last_hidden_state
            mask_B_T = torch.ones_like(ids_B_T)
            mask_B_T[0, :7] = 0
            hidden[name, "masked"] = model.model(
                input_ids=ids_B_T, attention_mask=mask_B_T, use_cache=False
            ).last_hidden_state
    size = hidden["sdpa"].norm()
    assert 0 < (hidden[ours.NAME] - hidden["sdpa"]).norm() < 4 * UNIT * size
    assert torch.equal(hidden[ours.NAME, "masked"], hidden["sdpa", "masked"])
