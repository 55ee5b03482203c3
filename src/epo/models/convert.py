"""A Llama model in GGUF, written as a Hugging Face model directory in float32.

Legend: H heads, R rotary pairs per head, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from epo.errors import UserError
from epo.models.gguf import GGUFFile

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3
"""`tokenizer.ggml.token_type` of tokens that no text spells."""


def convert_llama(gguf: Path, folder: Path) -> None:
    """Write weights (safetensors, float32), configuration, tokenizer and chat template into an existing folder.

    Raises:
        UserError: damaged, no Llama, or a tokenizer other than SmolLM's.
    """
    file = GGUFFile(gguf)
    try:
        config = _config(file)
        tensors = dict(_tensors(file))
        tokenizer = _tokenizer(file)
    except UserError:
        raise
    except Exception as error:  # keys that are missing or of another kind; tokenizers, for one, raises bare Exception
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"{str(gguf)!r} cannot be converted ({reason}): get it again, completely") from None
    weights = folder / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    config.save_pretrained(folder)
    # safetensors lets nobody else read what it writes; caches are shared.
    weights.chmod((folder / "config.json").stat().st_mode)
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _config(file: GGUFFile) -> LlamaConfig:
    given = file.metadata
    _require(file, "general.architecture", "llama")
    heads, size = given["llama.attention.head_count"], given["llama.embedding_length"]
    _require(file, "llama.rope.dimension_count", size // heads)
    if given.get("llama.rope.scaling.type", "none") != "none":
        raise UserError(f"{str(file.path)!r} scales its rotary positions, which is not converted: use another model")
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        vocab_size=len(given["tokenizer.ggml.tokens"]),
        hidden_size=size,
        intermediate_size=given["llama.feed_forward_length"],
        num_hidden_layers=given["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=given["llama.attention.head_count_kv"],
        max_position_embeddings=given["llama.context_length"],
        # Stored as float32; six digits are what its author wrote.
        rms_norm_eps=float(f"{given['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": given["llama.rope.freq_base"]},
        tie_word_embeddings="output.weight" not in file.tensors,
        bos_token_id=given["tokenizer.ggml.bos_token_id"],
        eos_token_id=given["tokenizer.ggml.eos_token_id"],
        pad_token_id=given["tokenizer.ggml.padding_token_id"],
    )


def _tensors(file: GGUFFile) -> Iterator[tuple[str, NDArray[np.float32]]]:
    heads = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
    for name in file.tensors:
        weight = file.tensor(name)
        match name.split("."):
            case ["blk", number, inner, "weight"] if inner in _INNER:
                if inner in heads:
                    weight = _to_halves(weight, num_heads=file.metadata[heads[inner]])
                yield f"model.layers.{number}.{_INNER[inner]}.weight", weight
            case [outer, "weight"] if outer in _OUTER:
                yield f"{_OUTER[outer]}.weight", weight
            case _:
                raise UserError(f"{str(file.path)!r} holds a tensor {name!r}, which no Llama has: use another model")


def _to_halves(weight: NDArray[np.float32], *, num_heads: int) -> NDArray[np.float32]:
    """Rows of a query or key projection from llama.cpp's order to that of transformers.

    Within a head llama.cpp keeps the two rows of a rotary pair together, transformers keeps all first rows, then all
    second rows.
    """
    weight_H_R_2_D = weight.reshape(num_heads, -1, 2, weight.shape[1])
    return np.ascontiguousarray(weight_H_R_2_D.swapaxes(1, 2)).reshape(weight.shape)


def _tokenizer(file: GGUFFile) -> Any:
    """A byte-level BPE that splits numbers into digits: what llama.cpp does for the pre-tokenizer named smollm."""
    given = {key.removeprefix("tokenizer.ggml."): value for key, value in file.metadata.items()}
    _require(file, "tokenizer.ggml.model", "gpt2")
    _require(file, "tokenizer.ggml.pre", "smollm")
    tokens: list[str] = given["tokens"]
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in given["merges"])]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, given["token_type"], strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[given["bos_token_id"]],
        eos_token=tokens[given["eos_token_id"]],
        unk_token=tokens[given["unknown_token_id"]],
        pad_token=tokens[given["padding_token_id"]],
        model_max_length=file.metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
        chat_template=file.metadata["tokenizer.chat_template"],
    )


def _require(file: GGUFFile, key: str, value: object) -> None:
    if file.metadata[key] != value:
        raise UserError(
            f"{str(file.path)!r} has {key}={file.metadata[key]!r}, and only {value!r} is converted: use another model"
        )
