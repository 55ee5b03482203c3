"""The lean forward against transformers' modules: all architectures it takes, both precisions, what it refuses."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from epo.config import LoraConfig
from epo.sampling import packed
from epo.sampling.base import Completion, Request
from epo.sampling.draw import draw_and_score, draw_tokens
from epo.sampling.forward import Row
from epo.sampling.generic import GenericForward
from epo.sampling.keys import SlotKeys
from epo.sampling.lean import LeanForward, NotLean
from epo.sampling.local import LocalSampler
from epo.training.adapters import POLICY, Adapters, Base
from epo.training.policy import Policy

MakePolicy = Callable[..., Policy]
VOCABULARY = 331  # no multiple of anything
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 700,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama-untied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)),
    "llama-biases": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "llama-one-key-head": lambda: LlamaForCausalLM(LlamaConfig(**SIZES | {"num_key_value_heads": 1})),
    "llama-no-groups": lambda: LlamaForCausalLM(LlamaConfig(**SIZES | {"num_key_value_heads": 6})),
    "llama-llama3-positions": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=LLAMA3)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
    "mistral-head-size": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None, head_dim=16)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True)),
}
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


@pytest.fixture
def make(tokenizer: Any) -> Callable[..., Policy]:
    """`make(kind, compute)`: a policy whose predictions depend on all it reads; norms and biases are not trivial."""

    def make(kind: str, compute: torch.dtype = FLOAT32, *, max_context: int = 640) -> Policy:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            model = MODELS[kind]().eval()
            for name, parameter in model.named_parameters():
                if parameter.dim() == 2:
                    parameter.data.mul_(8)
                elif "norm" in name:
                    parameter.data.uniform_(0.5, 1.5)
                else:
                    parameter.data.normal_(std=0.3)
        return Policy(model, tokenizer, max_context=max_context, compute=compute)

    return make


def ids(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCABULARY, size=length).tolist()


@torch.inference_mode()
def walk(forward: Any, cuts: dict[int, Sequence[int]]) -> torch.Tensor:
    """[forwards, V] logits: slot s reads its text in the pieces that cuts[s] names; rows join and leave."""
    texts = {slot: ids(slot, ends[-1]) for slot, ends in cuts.items()}
    out: list[torch.Tensor] = []
    for step in range(max(map(len, cuts.values())) - 1):
        rows = [
            Row(slot, ends[step], texts[slot][ends[step] : ends[step + 1]])
            for slot, ends in sorted(cuts.items())
            if step + 1 < len(ends)
        ]
        out.append(forward.logits(forward.hidden(rows)))
    return torch.cat(out)


# Ragged prefills, single tokens beside long pieces, decodes with gaps between the slots, over a growth of the memory.
CUTS = {
    0: [0, 7, 8, 9, 10, 30, 31],
    1: [0, 3, 4, 300, 301, 302, 303],
    3: [0, 250, 251, 252, 253],
    4: [0, 1, 2, 3, 4, 5, 6],
    7: [0, 40, 41],
}


@pytest.mark.parametrize("kind", MODELS)
def test_logits_are_those_of_transformers_in_float32(make: MakePolicy, kind: str) -> None:
    policy = make(kind)
    got, expected = walk(LeanForward(policy, num_slots=8), CUTS), walk(GenericForward(policy, num_slots=8), CUTS)
    assert expected.std() > 0.5
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)
    assert (got - expected).abs().mean() < 2e-5


@pytest.mark.parametrize("in_products", [False, True])
@pytest.mark.parametrize("kind", ["llama", "llama-biases", "llama-no-groups", "qwen2", "qwen3"])
def test_logits_in_bfloat16_differ_by_its_rounding_only(make: MakePolicy, kind: str, in_products: bool) -> None:
    policy = make(kind, BFLOAT16)
    forward = LeanForward(policy, num_slots=8)
    forward._in_products = in_products
    got, peer = walk(forward, CUTS), walk(GenericForward(policy, num_slots=8), CUTS)
    exact = walk(GenericForward(make(kind), num_slots=8), CUTS)
    rounding = (peer - exact).abs().mean()
    # As near to the exact numbers as transformers' modules. Errors of the two that had nothing in common would make
    # them differ by 1.4 of that from each other.
    assert (got - exact).abs().mean() < 1.25 * rounding
    assert (got - peer).abs().mean() < (1.1 if in_products else 0.7) * rounding


def test_a_forward_with_a_fault_is_noticed_when_it_is_made(make: MakePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    original = packed.PackedLinear.__init__

    def without_bias(self: Any, weights: Any, biases: Any, **kwargs: Any) -> None:
        original(self, weights, [None for _ in biases], **kwargs)

    policy = make("qwen2")
    monkeypatch.setattr(packed.PackedLinear, "__init__", without_bias)
    with pytest.raises(NotLean, match="its logits are off by"):
        LeanForward(policy, num_slots=8)
    sampler = LocalSampler(policy, max_episodes=1)
    assert sampler.path == "generic"
    assert "off by" in sampler.path_reason


def test_what_it_does_not_know_goes_through_transformers(make: MakePolicy, tokenizer: Any) -> None:
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=2)).eval()
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    stretched = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=dynamic)).eval()
    gelu = LlamaForCausalLM(LlamaConfig(**SIZES, hidden_act="gelu")).eval()
    half = LlamaForCausalLM(LlamaConfig(**SIZES)).eval().to(BFLOAT16)
    hooked = make("llama").model
    hooked.model.layers[1].mlp.extra = torch.nn.Dropout(0.5)
    wrapped = make("llama").model
    wrapped.model.layers[1].mlp.up_proj = torch.nn.Sequential(wrapped.model.layers[1].mlp.up_proj)
    for model, reason in (
        (gpt2, "not of the Llama family"),
        (stretched, "dynamic"),
        (gelu, "gelu"),
        (half, "float32"),
        (hooked, "unknown"),
        (wrapped, "Sequential"),
    ):
        sampler = LocalSampler(Policy(model, tokenizer, max_context=64), max_episodes=1)
        assert (sampler.path, reason in sampler.path_reason) == ("generic", True), sampler.path_reason
        assert len(generate(sampler, {0: [1, 2, 3]})[0].response_ids)
    assert LocalSampler(make("llama"), max_episodes=1, lean=False).path == "generic"


def generate(sampler: LocalSampler, prompts: dict[int, list[int]], *, tokens: int = 6) -> dict[int, Completion]:
    requests = [
        Request(episode=e, prompt_ids=prompt, random=np.random.default_rng([e, len(prompt)]))
        for e, prompt in prompts.items()
    ]
    drawn = sampler.generate(requests, temperature=1.0, train_temperature=1.0, max_tokens=tokens)
    return {completion.episode: completion for completion in drawn}


def company(sampler: LocalSampler, rounds: Sequence[Sequence[int]]) -> dict[int, list[tuple[list[int], list[float]]]]:
    """Play: every round draws for the episodes it names, in that order; an episode leaves after its last round."""
    prompts = {e: ids(e, 5 + 37 * e % 101) for named in rounds for e in named}
    played: dict[int, list[tuple[list[int], list[float]]]] = {e: [] for e in prompts}
    for number, named in enumerate(rounds):
        for e, completion in generate(sampler, {e: prompts[e] for e in named}).items():
            response = completion.response_ids.tolist()
            played[e].append((response, completion.logprobs.tolist()))
            prompts[e] = [*prompts[e], *response, *ids(1000 * e + len(played[e]), 3 + e % 5)]
            if not any(e in later for later in rounds[number + 1 :]):
                sampler.release(e)
    return played


# Six episodes of four turns each: together, in another order, joining and leaving at different times.
TOGETHER = [[0, 1, 2, 3, 4, 5]] * 4
SHUFFLED = [[3, 5, 0, 4, 1, 2], [5, 4, 3, 2, 1, 0], [2, 0, 4, 1, 5, 3], [1, 2, 0, 5, 3, 4]]
STAGGERED = [[0, 2], [2, 0, 5], [0, 1, 5, 2, 3], [4, 3, 2, 0, 5], [5, 1, 4, 3], [1, 3, 4], [4, 1]]


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_episodes_are_token_identical_whatever_their_company(make: MakePolicy, kind: str) -> None:
    policy = make(kind)
    sampler = LocalSampler(policy, max_episodes=6)
    assert sampler.path == "lean"
    alone = {e: company(LocalSampler(policy, max_episodes=1), [[e]] * 4)[e] for e in range(6)}
    # The same sampler for all: slots are used again, in other orders.
    for rounds in (TOGETHER, SHUFFLED, STAGGERED):
        for e, turns in company(sampler, rounds).items():
            for (response, logprobs), (response_alone, logprobs_alone) in zip(turns, alone[e], strict=True):
                assert response == response_alone
                np.testing.assert_allclose(logprobs, logprobs_alone, atol=2e-6, rtol=0)


def test_rows_of_packed_products_do_not_depend_on_their_number() -> None:
    if not packed.onednn_is_right(FLOAT32):
        pytest.skip("torch was built without oneDNN")
    generator = torch.Generator().manual_seed(1)
    weight_O_I = torch.randn(200, 96, generator=generator)
    product = packed.PackedLinear([weight_O_I[:70], weight_O_I[70:]], [None, None], dtype=FLOAT32)
    x_N_I = torch.randn(65, 96, generator=generator)
    whole_N_O = product(x_N_I)
    torch.testing.assert_close(whole_N_O, x_N_I @ weight_O_I.T, atol=1e-4, rtol=0)
    for rows in (1, 2, 5, 16, 17, 64):
        assert torch.equal(product(x_N_I[:rows].clone()), whole_N_O[:rows])


def test_without_onednn_the_products_are_those_of_torch(make: MakePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make("qwen2")
    expected = walk(GenericForward(policy, num_slots=8), CUTS)
    monkeypatch.setattr(packed, "onednn_is_right", lambda dtype: False)
    forward = LeanForward(policy, num_slots=8)
    monkeypatch.setattr(packed, "_multiply", None)
    torch.testing.assert_close(walk(forward, CUTS), expected, atol=1e-3, rtol=0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_used_for_what_is_written_and_goes_with_the_last_episode() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    cache = SlotKeys(layers=2, slots=64, heads=4, positions=4096, head_size=64, dtype=FLOAT32)
    before = resident()
    for _ in range(3):
        cache.reserve()
        keys, values = cache.keys, cache.values
        assert sum(tensor.nbytes for tensor in (*keys, *values)) == 2**30
        for tensor in (*keys, *values):
            tensor[:, :, :10] = 1
        assert 2**22 <= resident() - before < 2**25
        assert torch.count_nonzero(keys[0][:, :, 10:20]) == 0
        cache.reserve()
        assert cache.keys is keys
        del keys, values, tensor
        cache.clear()
        assert resident() - before < 2**21


def test_the_last_episode_takes_its_memory_along(make: MakePolicy) -> None:
    forward = LeanForward(make("llama"), num_slots=8)
    sampler = LocalSampler(make("llama"), max_episodes=8)
    sampler._forward = forward
    generate(sampler, {0: ids(0, 20), 1: ids(1, 30)})
    sampler.release(0)
    assert forward._cache.keys
    sampler.release(1)
    assert not forward._cache.keys


@pytest.mark.parametrize(("compute", "in_products"), [(FLOAT32, False), (BFLOAT16, False), (BFLOAT16, True)])
def test_an_episode_reads_nothing_of_those_before_it_in_its_slot(
    make: MakePolicy, compute: torch.dtype, in_products: bool
) -> None:
    policy = make("llama", compute)
    fresh, used = (LeanForward(policy, num_slots=8) for _ in range(2))
    fresh._in_products = used._in_products = in_products
    walk(used, {slot: [0, 600, 620, 621] for slot in range(8)})
    assert torch.equal(walk(used, CUTS), walk(fresh, CUTS))


def test_clocks_and_counters_grow(make: MakePolicy) -> None:
    sampler = LocalSampler(make("llama"), max_episodes=2)
    assert (sampler.prefill_seconds, sampler.decode_seconds, sampler.pack_seconds) == (0.0, 0.0, 0.0)
    generate(sampler, {0: ids(0, 20), 1: ids(1, 30)})
    assert sampler.prefill_seconds > 0
    assert sampler.decode_seconds > 0
    assert sampler.prefilled_tokens == 50


def test_adapters_beside_rounded_weights_are_left_to_the_modules(make: MakePolicy, tokenizer: Any) -> None:
    """The sum of weight and adapter, rounded to bfloat16, would lose small adapters, which the learner adds apart."""
    model = make("llama").model
    adapters = Adapters(model, LoraConfig(rank=4, alpha=8.0), Base(path="none", sha256="0"), seed=3)
    policy = Policy(model, tokenizer, max_context=640, compute=BFLOAT16, adapters=adapters)
    sampler = LocalSampler(policy, max_episodes=2)
    assert sampler.path == "generic" and "adapter" in sampler.describe()


@pytest.mark.parametrize("adapter", [POLICY, None])
def test_adapters_are_merged_and_again_after_an_update(make: MakePolicy, tokenizer: Any, adapter: str | None) -> None:
    model = make("qwen2").model
    adapters = Adapters(model, LoraConfig(rank=4, alpha=8.0), Base(path="none", sha256="0"), seed=3)
    policy = Policy(model, tokenizer, max_context=640, adapters=adapters, adapter=adapter)
    adapters.add("critic", like=POLICY, trainable=True)
    sampler = LocalSampler(policy, max_episodes=8)
    assert sampler.path == "lean", sampler.path_reason
    before = walk(sampler._forward, CUTS)
    generator = torch.Generator().manual_seed(2)
    for name in (POLICY, "critic"):
        for key, tensor in adapters.tensors(name).items():
            if "lora_B" in key:
                tensor.data.normal_(std=0.3, generator=generator)
    policy.version += 1
    generate(sampler, {0: ids(0, 4)})
    assert sampler.path == "lean", sampler.path_reason
    assert sampler.pack_seconds > 0
    sampler.release(0)
    after = walk(sampler._forward, CUTS)
    torch.testing.assert_close(after, walk(GenericForward(policy, num_slots=8), CUTS), atol=1e-3, rtol=0)
    assert (float((after - before).abs().mean()) > 0.1) == (adapter is not None)


@pytest.mark.parametrize("vocabulary", [5, 256, 700])
@pytest.mark.parametrize(("temperature", "train_temperature"), [(1.0, 1.0), (0.4, 1.3)])
def test_draws_are_the_inversion_of_the_exact_distribution(
    vocabulary: int, temperature: float, train_temperature: float
) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits_B_V = 3 * torch.randn(40, vocabulary, generator=generator)
    logits_B_V[::3, ::2] = -torch.inf
    uniform = np.random.default_rng(vocabulary).random(40).tolist()
    exact_B_V = torch.softmax(logits_B_V.double() / temperature, dim=-1).cumsum(-1).numpy()
    expected = [int(np.searchsorted(row, u, side="right")) for row, u in zip(exact_B_V, uniform, strict=True)]
    drawn = draw_and_score(
        logits_B_V.clone(), uniform=uniform, temperature=temperature, train_temperature=train_temperature
    )
    assert drawn.tokens == expected
    log_probs_B_V = torch.log_softmax(logits_B_V.double() / train_temperature, dim=-1)
    chosen_B = log_probs_B_V[torch.arange(40), torch.tensor(expected)]
    entropy_B = torch.special.entr(log_probs_B_V.exp()).sum(-1)
    np.testing.assert_allclose(drawn.logprobs, chosen_B.numpy(), atol=2e-6)
    np.testing.assert_allclose(drawn.entropy, entropy_B.numpy(), atol=2e-6)
    one_by_one = [int(draw_tokens(row[None] / temperature, [u])) for row, u in zip(logits_B_V, uniform, strict=True)]
    assert one_by_one == expected
