"""What a model's configuration says about its attention, beyond which kernels compute it, and about caps."""

from __future__ import annotations

from typing import Any

CAPPING = ("eager", "flash_attention_2")
"""Implementations of transformers that cap attention scores; sdpa leaves the cap out without a word."""

CAPPED_LOGITS = ("gemma2", "gemma3_text")
"""Types of models whose `final_logit_softcapping` is c tanh(logit / c)."""


def layer_kinds(config: Any) -> set[str]:
    """Kinds of attention layers, `full_attention` and `sliding_attention` among them."""
    window = getattr(config, "sliding_window", None)
    # Where the layers are not told apart (Mistral, Phi), a window is that of all of them.
    return set(getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])


def sliding_window(config: Any) -> int | None:
    """Tokens that some layers look back at most, the present one included; None where all see everything."""
    window = getattr(config, "sliding_window", None)
    return int(window) if window and "sliding_attention" in layer_kinds(config) else None


def score_cap(config: Any) -> float | None:
    """c of models that cap their attention scores, c tanh(score / c) (Gemma 2); None for all others."""
    cap = getattr(config, "attn_logit_softcapping", None)
    return None if cap is None else float(cap)


def logit_cap(config: Any) -> float | None:
    """c of models that cap their logits, c tanh(logit / c) (Gemma 2); None for all others."""
    cap = getattr(config, "final_logit_softcapping", None)
    return None if cap is None else float(cap)
