"""The shapes of models: how many numbers their weights, and what they keep of a token, are made of."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epo.config import ModelConfig
from epo.errors import UserError
from epo.models.catalogue import KNOWN

GATED = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose layers are what `ModelShape` describes: grouped queries, RMS norms, a gated feed-forward."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """A decoder of the Llama family."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    head_size: int
    intermediate: int
    is_tied: bool
    has_query_bias: bool = False
    """Queries, keys and values have a bias (Qwen2)."""
    source: str
    """Where the numbers come from."""

    @property
    def query_width(self) -> int:
        return self.heads * self.head_size

    @property
    def key_width(self) -> int:
        """Of keys; values are as wide."""
        return self.key_value_heads * self.head_size

    @property
    def attention_matrices(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of the linear layers of one layer's attention."""
        q, kv, d = self.query_width, self.key_width, self.hidden
        return (d, q), (d, kv), (d, kv), (q, d)

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of all linear layers of one layer."""
        d, i = self.hidden, self.intermediate
        return *self.attention_matrices, (d, i), (d, i), (i, d)

    @property
    def matrix_parameters(self) -> int:
        """Of all layers' matrices: what a token is multiplied with."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.matrices)

    @property
    def embedding_parameters(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def trunk_parameters(self) -> int:
        """Embedding, layers, last norm; the head is not in it."""
        biases = self.query_width + 2 * self.key_width if self.has_query_bias else 0
        return (
            self.embedding_parameters + self.matrix_parameters + self.layers * (2 * self.hidden + biases) + self.hidden
        )

    @property
    def parameters(self) -> int:
        return self.trunk_parameters + (0 if self.is_tied else self.embedding_parameters)

    def adapter_parameters(self, rank: int, targets: str) -> int:
        """Of one low-rank adapter on every layer."""
        matrices = self.matrices if targets == "all-linear" else self.attention_matrices
        return self.layers * rank * sum(inputs + outputs for inputs, outputs in matrices)

    def key_value_bytes(self, *, size: int) -> int:
        """Of one token of context, at `size` bytes a number."""
        return 2 * self.layers * self.key_width * size


_QWEN = "config.json of Qwen/{} (Apache-2.0 or Qwen licence); arXiv 2412.15115, table 1"

# name: (vocabulary, hidden, layers, heads, key-value heads, intermediate, tied)
SHAPES = {
    # config.json as `epo models pull smollm2-135m` converts it; arXiv 2502.02737.
    "SmolLM2-135M": ModelShape(
        vocabulary=49152, hidden=576, layers=30, heads=9, key_value_heads=3, head_size=64, intermediate=1536,
        is_tied=True, source="config.json of HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "Qwen2.5-0.5B": ModelShape(
        vocabulary=151936, hidden=896, layers=24, heads=14, key_value_heads=2, head_size=64, intermediate=4864,
        is_tied=True, has_query_bias=True, source=_QWEN.format("Qwen2.5-0.5B-Instruct"),
    ),
    "Qwen2.5-1.5B": ModelShape(
        vocabulary=151936, hidden=1536, layers=28, heads=12, key_value_heads=2, head_size=128, intermediate=8960,
        is_tied=True, has_query_bias=True, source=_QWEN.format("Qwen2.5-1.5B-Instruct"),
    ),
    "Qwen2.5-3B": ModelShape(
        vocabulary=151936, hidden=2048, layers=36, heads=16, key_value_heads=2, head_size=128, intermediate=11008,
        is_tied=True, has_query_bias=True, source=_QWEN.format("Qwen2.5-3B-Instruct"),
    ),
    "Qwen2.5-7B": ModelShape(
        vocabulary=152064, hidden=3584, layers=28, heads=28, key_value_heads=4, head_size=128, intermediate=18944,
        is_tied=False, has_query_bias=True, source=_QWEN.format("Qwen2.5-7B-Instruct"),
    ),
}  # fmt: skip


def shape_of(config: ModelConfig) -> ModelShape:
    """The shape of `model.path`: the embedded model's, that of a directory's config.json, or one of `SHAPES` by the
    last part of the name. Nothing is downloaded.

    Raises:
        UserError: a config.json that is damaged or of another architecture, or a name that is not known.
    """
    if config.path == "tiny":
        tiny = config.tiny
        return ModelShape(
            vocabulary=tiny.vocabulary_size,
            hidden=tiny.hidden_size,
            layers=tiny.layers,
            heads=tiny.heads,
            key_value_heads=tiny.heads,
            head_size=tiny.hidden_size // tiny.heads,
            intermediate=tiny.intermediate_size,
            is_tied=True,
            source="model.tiny",
        )
    folder = Path(config.path)
    if not os.path.isdir(folder) and config.path in KNOWN and KNOWN[config.path].is_ready():
        folder = KNOWN[config.path].folder
    if os.path.isdir(folder):
        return read_shape(folder / "config.json")
    name = folder.name.lower().removesuffix("-instruct")
    for known, shape in SHAPES.items():
        if known.lower() == name:
            return shape
    raise UserError(
        f"model.path={config.path!r} is no directory here and its shape is not known: give a directory that holds "
        f"config.json (nothing else is read), or one of {', '.join(SHAPES)}"
    )


def read_shape(file: Path) -> ModelShape:
    """The shape that a Hugging Face config.json states.

    Raises:
        UserError: it cannot be read, or its architecture is another.
    """
    try:
        values: Any = json.loads(file.read_text(encoding="utf-8"))
        if (kind := values.get("model_type")) not in GATED:
            raise UserError(f"{str(file)!r} is of a model of type {kind!r}, and plans are for {', '.join(GATED)}")
        heads, hidden = int(values["num_attention_heads"]), int(values["hidden_size"])
        shape = ModelShape(
            vocabulary=int(values["vocab_size"]),
            hidden=hidden,
            layers=int(values["num_hidden_layers"]),
            heads=heads,
            key_value_heads=int(values.get("num_key_value_heads") or heads),
            head_size=int(values.get("head_dim") or hidden // heads),
            intermediate=int(values["intermediate_size"]),
            is_tied=bool(values.get("tie_word_embeddings", False)),
            has_query_bias=kind == "qwen2" or bool(values.get("attention_bias", False)),
            source=str(file),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise UserError(f"{str(file)!r} does not say what shape the model has ({reason}): copy it again") from None
    return shape
