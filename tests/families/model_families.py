"""A tiny random model of every family, in a directory with the family's chat template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from chat_templates import style_tokenizer

WINDOW = 24
"""Tokens that sliding layers see: fewer than any prompt has."""
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
"""Layers, where a family has both."""


@dataclass(frozen=True, kw_only=True)
class Family:
    template: str
    """Of `chat_templates.STYLES`."""
    config: Callable[..., Any]
    model: Callable[..., Any]
    options: dict[str, Any]
    path: str
    """Of the local sampler, lean or generic."""


FAMILIES = {
    "qwen2.5": Family(
        template="qwen2_5",
        config=Qwen2Config,
        model=Qwen2ForCausalLM,
        options={"tie_word_embeddings": True},
        path="lean",
    ),
    "qwen2, windows": Family(
        template="qwen2_5",
        config=Qwen2Config,
        model=Qwen2ForCausalLM,
        options={"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        path="generic",
    ),
    "qwen3": Family(
        template="qwen3",
        config=Qwen3Config,
        model=Qwen3ForCausalLM,
        options={"head_dim": 16, "tie_word_embeddings": True},
        path="lean",
    ),
    "llama3": Family(template="llama3", config=LlamaConfig, model=LlamaForCausalLM, options={}, path="lean"),
    "llama3.2": Family(
        template="llama3_2",
        config=LlamaConfig,
        model=LlamaForCausalLM,
        options={"rope_parameters": LLAMA3, "tie_word_embeddings": True},
        path="lean",
    ),
    "smollm2": Family(
        template="smollm2",
        config=LlamaConfig,
        model=LlamaForCausalLM,
        options={"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48, "tie_word_embeddings": True},
        path="lean",
    ),
    # Every fourth layer without positions; here the third. Its own template is not at hand.
    "smollm3": Family(
        template="chatml",
        config=SmolLM3Config,
        model=SmolLM3ForCausalLM,
        options={"no_rope_layers": [1, 1, 0], "tie_word_embeddings": True},
        path="generic",
    ),
    "gemma": Family(
        template="gemma", config=GemmaConfig, model=GemmaForCausalLM, options={"head_dim": 16}, path="generic"
    ),
    "gemma2": Family(
        template="gemma",
        config=Gemma2Config,
        model=Gemma2ForCausalLM,
        # Caps that bite: the scores and logits of the models below go beyond them.
        options={
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "layer_types": KINDS,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 4.0,
        },
        path="generic",
    ),
    "gemma3": Family(
        template="gemma3",
        config=Gemma3TextConfig,
        model=Gemma3ForCausalLM,
        options={"head_dim": 16, "query_pre_attn_scalar": 16, "layer_types": KINDS, "sliding_window": WINDOW},
        path="generic",
    ),
    "phi3": Family(
        template="phi3", config=Phi3Config, model=Phi3ForCausalLM, options={"sliding_window": WINDOW}, path="generic"
    ),
    "mistral": Family(
        template="mistral",
        config=MistralConfig,
        model=MistralForCausalLM,
        options={"sliding_window": WINDOW, "head_dim": 16},
        path="generic",
    ),
}


def make_directory(name: str, folder: Path) -> Path:
    """Weights in safetensors, tokenizer and template of the family, as if they had been downloaded."""
    family = FAMILIES[name]
    tokenizer = style_tokenizer(family.template)
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id, "pad_token_id": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = family.model(family.config(**SIZES | {"vocab_size": len(tokenizer)} | ids | family.options)).eval()
        for key, parameter in model.named_parameters():
            if parameter.dim() == 2:  # predictions depend on all that is read
                parameter.data.mul_(12)
            elif "norm" in key:
                parameter.data.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
