"""Linear layers through oneDNN: the numbers of `nn.Linear`, in float32, under autocast, and in a whole model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from epo.objectives.products import onednn_is_right
from epo.training.linear import OneDnnLinear, through_onednn


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 1)])
def test_values_and_gradients_are_those_of_the_definition(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 7, bias=bias)
    exact = copy.deepcopy(layer).double()
    through_onednn(layer)
    assert type(layer) is OneDnnLinear
    x = torch.randn(*shape, 6, requires_grad=True)
    y = x.detach().double().requires_grad_()
    weights = torch.randn(*shape, 7)
    (layer(x) * weights).sum().backward()
    (exact(y) * weights.double()).sum().backward()
    pairs = [
        (layer(x), exact(y)),
        (x.grad, y.grad),
        *((p.grad, q.grad) for p, q in zip(layer.parameters(), exact.parameters(), strict=True)),
    ]
    for found, wanted in pairs:
        assert found is not None and wanted is not None
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


def test_frozen_weights_and_inputs_get_no_gradient() -> None:
    layer = nn.Linear(3, 4)
    through_onednn(layer)
    layer.requires_grad_(False)
    x = torch.randn(2, 3, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None
    torch.testing.assert_close(x.grad, layer.weight.detach().sum(dim=0).expand(2, 3))
    layer.requires_grad_(True)
    layer(torch.randn(2, 3)).sum().backward()
    assert layer.weight.grad is not None


def test_autocast_computes_in_its_own_type() -> None:
    layer = nn.Linear(8, 8)
    through_onednn(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2, 8)).dtype is torch.bfloat16


def test_a_model_keeps_its_names_and_its_numbers() -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    torch.manual_seed(1)
    plain = LlamaForCausalLM(config).eval()
    fast = copy.deepcopy(plain)
    through_onednn(fast)
    assert list(plain.state_dict()) == list(fast.state_dict())
    ids = torch.randint(64, (2, 9))
    losses = [model(input_ids=ids, labels=ids).loss for model in (plain, fast)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(plain.named_parameters(), fast.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert (p.grad - q.grad).norm() <= 1e-5 * p.grad.norm(), name
    if onednn_is_right(torch.float32):
        grad = losses[1].grad_fn
        seen = set()

        def names(node: object) -> None:
            if node is not None and node not in seen:
                seen.add(node)
                for child, _ in node.next_functions:  # type: ignore[attr-defined]
                    names(child)

        names(grad)
        assert any("_Linear" in type(node).__name__ for node in seen)
