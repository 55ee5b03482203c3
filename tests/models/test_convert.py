"""A random Llama written as GGUF the way llama.cpp's converter does comes back with the same weights and logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_bytes import F32, Tensor, Typed, f32, gguf
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM

from epo.config import ModelConfig
from epo.errors import UserError
from epo.models.convert import convert_llama
from epo.training.policy import load_policy

ALPHABET = sorted(ByteLevel.alphabet())
TOKENS = ["<|unk|>", "<|start|>", "<|end|>", *ALPHABET, "th", "the", "12"]
TEMPLATE = "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>{% endfor %}"
HEADS, GROUPS = 4, 2


def llama(*, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}
    rope: Any = {"rope_type": "default", "rope_theta": 5000.0}
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        rms_norm_eps=1e-5,
        rope_parameters=rope,
        tie_word_embeddings=tied,
        **sizes,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def metadata() -> dict[str, Typed]:
    integers = {
        "block_count": 2,
        "context_length": 64,
        "embedding_length": 32,
        "feed_forward_length": 48,
        "attention.head_count": HEADS,
        "attention.head_count_kv": GROUPS,
        "rope.dimension_count": 8,
    }
    floats = {"rope.freq_base": 5000.0, "attention.layer_norm_rms_epsilon": 1e-5}
    special = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "padding_token_id": 2}
    return {
        "general.architecture": Typed(8, "llama"),
        **{f"llama.{key}": Typed(4, value) for key, value in integers.items()},
        **{f"llama.{key}": Typed(6, value) for key, value in floats.items()},
        **{f"tokenizer.ggml.{key}": Typed(4, value) for key, value in special.items()},
        "tokenizer.ggml.model": Typed(8, "gpt2"),
        "tokenizer.ggml.pre": Typed(8, "smollm"),
        "tokenizer.ggml.tokens": Typed(8, TOKENS, items=True),
        "tokenizer.ggml.token_type": Typed(5, [3, 3, 3] + [1] * (len(TOKENS) - 3), items=True),
        "tokenizer.ggml.merges": Typed(8, ["t h", "th e", "1 2"], items=True),
        "tokenizer.chat_template": Typed(8, TEMPLATE),
    }


def rotary_pairs_together(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Row by row: within a head, llama.cpp's rows 2r and 2r+1 are rows r and r + half of transformers."""
    size = weight.shape[0] // heads
    rows = [
        weight[head * size + pair + second * size // 2]
        for head in range(heads)
        for pair in range(size // 2)
        for second in (0, 1)
    ]
    return torch.stack(rows)


def tensors(model: LlamaForCausalLM) -> dict[str, Tensor]:
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers": "blk",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    written = {}
    for name, parameter in model.named_parameters():  # a tied head is not named
        weight = parameter.detach()
        if "q_proj" in name:
            weight = rotary_pairs_together(weight, HEADS)
        if "k_proj" in name:
            weight = rotary_pairs_together(weight, GROUPS)
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        written[name] = Tensor(tuple(weight.shape), F32, f32(weight.flatten().tolist()))
    return written


def written(folder: Path, values: dict[str, Typed], weights: dict[str, Tensor]) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(gguf(values, weights)[0])
    return path


@pytest.mark.parametrize("tied", [True, False])
def test_weights_and_logits_come_back(tmp_path: Path, tied: bool) -> None:
    model = llama(tied=tied)
    (tmp_path / "out").mkdir()
    convert_llama(written(tmp_path, metadata(), tensors(model)), tmp_path / "out")
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) is not tied
    config = ModelConfig(path=str(tmp_path / "out"), device="cpu", compute="float32", max_context=64)
    policy = load_policy(tmp_path / "out", config)
    expected = model.state_dict()
    assert policy.model.state_dict().keys() == expected.keys()
    for name, tensor in policy.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    ids = torch.randint(0, len(TOKENS), (1, 20))
    with torch.inference_mode():
        assert torch.equal(policy.model(ids).logits, model(ids).logits)
    assert policy.tokenizer.convert_ids_to_tokens(policy.tokenizer("the 12<|end|>")["input_ids"]) == [
        "the",
        "Ġ",
        "1",
        "2",
        "<|end|>",
    ]
    assert policy.chat.stop_id == 2
    assert policy.model.generation_config.eos_token_id == 2


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("general.architecture", Typed(8, "gemma3"), "general.architecture='gemma3', and only 'llama' is converted"),
        ("tokenizer.ggml.pre", Typed(8, "qwen2"), "tokenizer.ggml.pre='qwen2', and only 'smollm' is converted"),
        ("llama.rope.scaling.type", Typed(8, "yarn"), "scales its rotary positions, which is not converted"),
        ("llama.rope.dimension_count", Typed(4, 4), "llama.rope.dimension_count=4, and only 8 is converted"),
        ("llama.block_count", Typed(8, "two"), "cannot be converted ("),
        ("llama.attention.head_count", Typed(4, 0), "cannot be converted ("),
        ("llama.context_length", None, "cannot be converted (KeyError: 'llama.context_length')"),
        ("tokenizer.ggml.token_type", Typed(5, [3], items=True), "cannot be converted ("),
    ],
)
def test_what_is_not_converted(tmp_path: Path, key: str, value: Typed | None, reason: str) -> None:
    values = metadata()
    if value is None:
        del values[key]
    else:
        values[key] = value
    assert reason in refusal(tmp_path, values, tensors(llama(tied=True)))


def test_a_tensor_that_no_llama_has(tmp_path: Path) -> None:
    weights = tensors(llama(tied=True)) | {"blk.0.attn_q.bias": Tensor((32,), F32, f32([0.0] * 32))}
    assert "holds a tensor 'blk.0.attn_q.bias', which no Llama has" in refusal(tmp_path, metadata(), weights)


def refusal(folder: Path, values: dict[str, Typed], weights: dict[str, Tensor]) -> str:
    path = written(folder, values, weights)
    (folder / "out").mkdir()
    with pytest.raises(UserError) as caught:
        convert_llama(path, folder / "out")
    assert list((folder / "out").iterdir()) == []
    return str(caught.value)
