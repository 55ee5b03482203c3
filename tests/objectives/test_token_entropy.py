"""Log-probability and entropy from hidden states or logits, against -sum p log p written out (conformance T7)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from epo.objectives import logits_logprobs_and_entropy, token_logprobs_and_entropy


def naive(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Straight from the definition, through autograd."""
    probabilities = torch.softmax(logits, dim=-1)
    log_probabilities = torch.log_softmax(logits, dim=-1)
    picked = log_probabilities[torch.arange(len(targets)), targets]
    return picked, -(probabilities * log_probabilities).sum(-1)


def random_head(num: int, vocab: int, size: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num, size, generator=generator, dtype=dtype)
    weight = torch.randn(vocab, size, generator=generator, dtype=dtype)
    bias = torch.randn(vocab, generator=generator, dtype=dtype)
    targets = torch.randint(vocab, (num,), generator=generator)
    return hidden, weight, bias, targets


@settings(max_examples=60, deadline=None)
@given(
    num=st.integers(1, 9),
    vocab=st.integers(1, 11),
    size=st.integers(1, 5),
    tile_tokens=st.integers(1, 10),
    tile_vocab=st.integers(1, 12),
    temperature=st.floats(0.3, 3.0),
    softcap=st.none() | st.floats(0.5, 30.0),
    has_bias=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_values_and_all_gradients_equal_the_definition_for_any_tiling(
    num: int,
    vocab: int,
    size: int,
    tile_tokens: int,
    tile_vocab: int,
    temperature: float,
    softcap: float | None,
    has_bias: bool,
    seed: int,
) -> None:
    hidden, weight, bias, targets = random_head(num, vocab, size, seed=seed)
    inputs = [hidden, weight, bias] if has_bias else [hidden, weight]
    upstream = torch.randn(2, num, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def run(function: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        logprobs, entropy = function(*leaves)
        loss = (upstream[0] * logprobs).sum() + (upstream[1] * entropy).sum()
        return logprobs, entropy, list(torch.autograd.grad(loss, leaves))

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return token_logprobs_and_entropy(
            hidden,
            weight,
            targets,
            head_bias=bias,
            temperature=temperature,
            logit_softcap=softcap,
            tile_tokens=tile_tokens,
            tile_vocab=tile_vocab,
        )

    def theirs(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
        return naive((logits if softcap is None else softcap * torch.tanh(logits / softcap)) / temperature, targets)

    for got, expected in zip(run(ours), run(theirs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_gradients_agree_with_finite_differences() -> None:
    hidden, weight, bias, targets = random_head(4, 7, 3)
    leaves = tuple(tensor.requires_grad_() for tensor in (hidden, weight, bias))

    def fused(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return token_logprobs_and_entropy(
            hidden, weight, targets, head_bias=bias, temperature=0.7, logit_softcap=2.0, tile_tokens=3, tile_vocab=2
        )

    assert torch.autograd.gradcheck(fused, leaves)
    logits = (hidden @ weight.T).detach().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: logits_logprobs_and_entropy(z, targets, temperature=0.7, tile_elements=9), (logits,)
    )


def test_entropy_gradient_is_minus_p_times_log_p_plus_entropy() -> None:
    logits = torch.randn(5, 13, dtype=torch.float64, requires_grad=True)
    _, entropy = logits_logprobs_and_entropy(logits, torch.zeros(5, dtype=torch.long))
    (gradient,) = torch.autograd.grad(entropy.sum(), logits)
    p = torch.softmax(logits.detach(), -1)
    expected = -p * (p.log() - (p * p.log()).sum(-1, keepdim=True))
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def test_logits_version_keeps_leading_dimensions_and_excludes_minus_infinity() -> None:
    logits = torch.randn(2, 3, 6, dtype=torch.float64)
    targets = torch.tensor([[0, 1, 2], [3, 0, 1]])
    full = torch.cat([logits, torch.full((2, 3, 4), -torch.inf, dtype=torch.float64)], dim=-1).requires_grad_()
    logprobs, entropy = logits_logprobs_and_entropy(full, targets)
    expected = naive(logits.view(6, 6), targets.view(6))
    torch.testing.assert_close(logprobs, expected[0].view(2, 3))
    torch.testing.assert_close(entropy, expected[1].view(2, 3))
    (gradient,) = torch.autograd.grad((logprobs + entropy).sum(), full)
    assert gradient.isfinite().all()
    assert (gradient[..., 6:] == 0).all()


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_bias_of_minus_infinity_excludes_an_entry(softcap: float | None, dtype: torch.dtype) -> None:
    hidden, weight, bias, targets = random_head(5, 8, 3, dtype=dtype)
    targets = targets % 4
    bias[4:] = -torch.inf
    hidden.requires_grad_()
    got = token_logprobs_and_entropy(
        hidden, weight, targets, head_bias=bias, temperature=0.8, logit_softcap=softcap, tile_vocab=3
    )
    logits = hidden @ weight[:4].T + bias[:4]
    expected = naive((logits if softcap is None else softcap * torch.tanh(logits / softcap)) / 0.8, targets)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(
            torch.autograd.grad(ours.sum(), hidden, retain_graph=True)[0],
            torch.autograd.grad(theirs.sum(), hidden, retain_graph=True)[0],
        )


def test_large_logits_do_not_cancel_in_float32() -> None:
    """Shifting all logits by 1e4 changes nothing but their rounding, which is the same for the reference."""
    logits = (torch.randn(20, 50) * 2 + 1e4).float()
    targets = torch.zeros(20, dtype=torch.long)
    logprobs, entropy = logits_logprobs_and_entropy(logits, targets)
    expected = naive(logits.double(), targets)
    torch.testing.assert_close(logprobs.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), expected[1], rtol=1e-5, atol=1e-5)


def test_a_certain_token_has_entropy_zero_and_never_less() -> None:
    logits = torch.randn(500, 40) * 1.0
    logits[:, 3] = 60.0
    _, entropy = logits_logprobs_and_entropy(logits, torch.full((500,), 3))
    assert (entropy >= 0).all()
    assert (entropy < 1e-6).all()


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def test_bfloat16_inputs_give_float32_values_and_gradients_within_their_own_rounding() -> None:
    """Rounding a gradient to bfloat16 once is a relative error of 1.7e-3 in norm; 2**-8 allows for two such steps."""
    hidden, weight, _, targets = random_head(200, 300, 64, dtype=torch.float32)
    low = [tensor.bfloat16().requires_grad_() for tensor in (hidden, weight / 4)]
    high = [tensor.detach().double().requires_grad_() for tensor in low]
    got = token_logprobs_and_entropy(low[0], low[1], targets, temperature=0.9, tile_tokens=16, tile_vocab=32)
    expected = naive(high[0] @ high[1].T / 0.9, targets)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(2, 200, generator=torch.Generator().manual_seed(1))
    for leaf, gradient, reference in zip(
        low,
        torch.autograd.grad((upstream[0] * got[0] + upstream[1] * got[1]).sum(), low),
        torch.autograd.grad((upstream[0] * expected[0] + upstream[1] * expected[1]).sum(), high),
        strict=True,
    ):
        assert gradient.dtype == leaf.dtype
        assert relative_error(gradient, reference) < 2**-8


def test_bfloat16_logits_are_those_of_a_plain_bfloat16_head() -> None:
    """As near to it as two orders of the same rounded sums, in values and gradients; never worse against the truth."""
    hidden, weight, _, targets = random_head(200, 300, 64, dtype=torch.float32)
    low = [tensor.bfloat16().requires_grad_() for tensor in (hidden, weight / 4)]
    high = [tensor.detach().double().requires_grad_() for tensor in low]
    options = {"temperature": 0.9, "tile_tokens": 16, "tile_vocab": 32}
    found = {
        "ours": token_logprobs_and_entropy(low[0], low[1], targets, float32_logits=False, **options),
        "plain": naive((low[0] @ low[1].T).float() / 0.9, targets),
        "truth": naive(high[0] @ high[1].T / 0.9, targets),
        "float32": token_logprobs_and_entropy(low[0], low[1], targets, **options),
    }
    upstream = torch.randn(2, 200, generator=torch.Generator().manual_seed(1))
    everything = {}
    for name, outputs in found.items():
        total = (upstream[0] * outputs[0] + upstream[1] * outputs[1]).sum()
        leaves = high if name == "truth" else low
        everything[name] = [*(x.detach() for x in outputs), *torch.autograd.grad(total, leaves)]
    for ours, plain, truth, exact in zip(*everything.values(), strict=True):
        assert relative_error(ours, truth) < 1.2 * relative_error(plain, truth)
        assert relative_error(exact, truth) < relative_error(ours, truth)
    assert everything["ours"][0].dtype == torch.float32
    # float32 inputs have nothing to be rounded to.
    exact = [token_logprobs_and_entropy(hidden, weight, targets, float32_logits=flag) for flag in (True, False)]
    assert all(torch.equal(a, b) for a, b in zip(*exact, strict=True))


def test_bfloat16_hidden_states_with_a_float32_head_keep_float32_gradients_of_the_head() -> None:
    """What autocast makes of a float32 model: activations are rounded, the head is not."""
    hidden, weight, _, targets = random_head(50, 70, 16, dtype=torch.float32)
    leaves = [hidden.bfloat16().requires_grad_(), weight.requires_grad_()]
    high = [tensor.detach().double().requires_grad_() for tensor in leaves]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = token_logprobs_and_entropy(leaves[0], leaves[1], targets, tile_vocab=32)
    expected = naive(high[0] @ high[1].T, targets)
    ours = torch.autograd.grad(sum(got).sum(), leaves)
    theirs = torch.autograd.grad(sum(expected).sum(), high)
    assert ours[0].dtype == torch.bfloat16
    assert relative_error(ours[0], theirs[0]) < 2**-8
    assert relative_error(ours[1], theirs[1]) < 1e-5


def test_autocast_does_not_lower_the_precision() -> None:
    hidden, weight, _, targets = random_head(17, 40, 8, dtype=torch.float32)
    plain = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    cast = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    expected = token_logprobs_and_entropy(plain[0], plain[1], targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = token_logprobs_and_entropy(cast[0], cast[1], targets)
        (got[0] + got[1]).sum().backward()
    (expected[0] + expected[1]).sum().backward()
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    for ours, theirs in zip(cast, plain, strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_frozen_inputs_get_no_gradient() -> None:
    hidden, weight, bias, targets = random_head(6, 9, 4)
    hidden.requires_grad_()
    logprobs, entropy = token_logprobs_and_entropy(hidden, weight, targets, head_bias=bias)
    (logprobs + entropy).sum().backward()
    assert weight.grad is None
    assert bias.grad is None
    with torch.no_grad():
        assert not token_logprobs_and_entropy(hidden, weight, targets)[1].requires_grad


class Recorder(TorchDispatchMode):
    """Sizes of all tensors that operations return, and how many products ran."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return result


def test_no_tensor_of_tokens_times_vocabulary_is_ever_made() -> None:
    num, vocab, size = 300, 500, 4
    hidden, weight, _, targets = random_head(num, vocab, size, dtype=torch.float32)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    with Recorder() as ours:
        logprobs, entropy = token_logprobs_and_entropy(hidden, weight, targets, tile_tokens=32, tile_vocab=64)
        torch.autograd.grad((logprobs + entropy).sum(), leaves)
    with Recorder() as theirs:
        logprobs, entropy = naive(hidden @ weight.T, targets)
        torch.autograd.grad((logprobs + entropy).sum(), leaves)
    assert theirs.largest >= num * vocab
    assert ours.largest == max(32 * 64, num * size, vocab * size)


def test_a_frozen_head_saves_the_product_for_its_gradient() -> None:
    products = {}
    for is_frozen in (False, True):
        hidden, weight, _, targets = random_head(10, 20, 3)
        weight.requires_grad_(not is_frozen)
        with Recorder() as recorder:
            sum(token_logprobs_and_entropy(hidden.requires_grad_(), weight, targets)).sum().backward()
        products[is_frozen] = recorder.products
    assert products == {False: 4, True: 3}


def test_tied_embedding_collects_both_gradients() -> None:
    torch.manual_seed(0)
    ids = torch.tensor([1, 4, 4, 2])
    targets = torch.tensor([4, 4, 2, 0])
    gradients = []
    for is_fused in (True, False):
        embedding = torch.linspace(-1, 1, 30, dtype=torch.float64).view(6, 5).sin().requires_grad_()
        hidden = torch.tanh(embedding[ids])
        logprobs, entropy = (
            token_logprobs_and_entropy(hidden, embedding, targets, tile_vocab=4)
            if is_fused
            else naive(hidden @ embedding.T, targets)
        )
        gradients.append(torch.autograd.grad((entropy - logprobs).sum(), embedding)[0])
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


class TiedModel(nn.Module):
    """Embedding and head are one weight, and the fused call stands inside forward, where FSDP has gathered it."""

    def __init__(self, vocab: int, size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, size, dtype=torch.float64)
        self.mix = nn.Linear(size, size, dtype=torch.float64)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        hidden = torch.tanh(self.mix(self.embedding(ids)))
        logprobs, entropy = token_logprobs_and_entropy(hidden, self.embedding.weight, targets, tile_vocab=4)
        return (entropy - logprobs).mean()


def sharded_gradients(rank: int, folder: str) -> None:
    """One of two ranks, each with its own tokens; saves gradients of the whole weights."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    model = TiedModel(vocab=7, size=3)
    plain_weight = model.embedding.weight.detach().clone()
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    ids, targets = rank_tokens(rank)
    model(ids, targets).backward()
    gradients = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}

    shards = distribute_tensor(plain_weight, mesh, [Shard(0)]).requires_grad_()
    logprobs, entropy = token_logprobs_and_entropy(
        plain_weight[ids], shards.full_tensor(grad_placements=[Partial()]), targets
    )
    (entropy - logprobs).mean().backward()
    gradients["gathered"] = shards.grad.full_tensor()
    with pytest.raises(ValueError, match="full_tensor"):
        token_logprobs_and_entropy(plain_weight[ids], shards, targets)
    if rank == 0:
        torch.save(gradients, f"{folder}/gradients.pt")
    dist.barrier()
    # What was to be saved is saved. Threads of gloo may still run, and would abort an interpreter that shuts down.
    os._exit(0)


def rank_tokens(rank: int) -> tuple[Tensor, Tensor]:
    ids = torch.tensor([[1, 4, 4, 2], [0, 6, 3, 5]][rank])
    return ids, ids.roll(-1)


def test_gradients_reach_the_shards_of_a_weight_gathered_by_fsdp(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(sharded_gradients, args=(str(tmp_path),), nprocs=2)
    got = torch.load(tmp_path / "gradients.pt")
    torch.manual_seed(0)
    model = TiedModel(vocab=7, size=3)
    sum(model(*rank_tokens(rank)) for rank in (0, 1)).div(2).backward()  # FSDP takes the mean over ranks
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-10, atol=1e-12)
    weight = model.embedding.weight.detach().requires_grad_()
    loss = torch.zeros((), dtype=torch.float64)
    for rank in (0, 1):
        ids, targets = rank_tokens(rank)
        logprobs, entropy = naive(weight.detach()[ids] @ weight.T, targets)
        loss = loss + (entropy - logprobs).mean()
    loss.backward()
    torch.testing.assert_close(got["gathered"], weight.grad, rtol=1e-10, atol=1e-12)


def test_an_output_that_is_not_used_contributes_nothing() -> None:
    hidden, weight, _, targets = random_head(6, 9, 4)
    hidden.requires_grad_()
    fused = token_logprobs_and_entropy(hidden, weight, targets)
    plain = naive(hidden @ weight.T, targets)
    for ours, theirs in zip(fused, plain, strict=True):
        torch.testing.assert_close(
            torch.autograd.grad(ours.sum(), hidden, retain_graph=True),
            torch.autograd.grad(theirs.sum(), hidden, retain_graph=True),
        )


def test_no_tokens_give_empty_results_and_zero_gradients() -> None:
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.ones(9, 4, requires_grad=True)
    logprobs, entropy = token_logprobs_and_entropy(hidden, weight, torch.zeros(0, dtype=torch.long))
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert torch.equal(weight.grad, torch.zeros(9, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets_N": torch.tensor([0, -100])}, r"targets must lie in \[0, 5\), got -100"),
        ({"targets_N": torch.tensor([0, 5])}, r"targets must lie in \[0, 5\), got 5"),
        ({"targets_N": torch.tensor([0])}, r"targets must be \[2\]"),
        ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
        ({"head_weight_V_D": torch.ones(5, 4)}, "same D"),
        ({"head_bias": torch.ones(4)}, r"head_bias must be \[5\]"),
        ({"tile_vocab": 0}, "at least 1"),
        ({"logit_softcap": 0.0}, "logit_softcap must be > 0 or None, got 0.0"),
    ],
)
def test_inputs_that_cannot_be_right_are_refused(change: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {
        "hidden_N_D": torch.ones(2, 3),
        "head_weight_V_D": torch.ones(5, 3),
        "targets_N": torch.tensor([0, 1]),
    }
    with pytest.raises(ValueError, match=message):
        token_logprobs_and_entropy(**(options | change))
