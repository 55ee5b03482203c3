"""The policy, and what it imitates before it is trained by rewards."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from epo.config.section import Section, refuse_idle


class TinyModelConfig(Section):
    """The Llama-architecture model that is made from nothing when `model.path` is `tiny`."""

    vocabulary_size: int = Field(default=1024, ge=300, le=65536)
    """Upper bound on the entries of the byte-level BPE trained on the suite's text."""
    hidden_size: int = Field(default=128, ge=16, multiple_of=2)
    """Width; a multiple of twice the heads."""
    layers: int = Field(default=2, ge=1)
    """Transformer blocks. With few demonstrations two learn to copy names sooner than four."""
    heads: int = Field(default=4, ge=1)
    """Attention heads."""
    intermediate_size: int = Field(default=384, ge=16)
    """Width of the feed-forward layers."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of 2*heads ({2 * self.heads})")
        return self


class LoraConfig(Section):
    """Low-rank adapters (peft) beside frozen weights; one copy of them serves policy, critic and reference."""

    rank: int = Field(default=0, ge=0, le=1024)
    """Rank of the adapters; 0 trains all weights instead."""
    alpha: float = Field(default=32.0, gt=0)
    """Adapters are scaled by alpha / rank."""
    targets: Literal["all-linear", "attention"] = "all-linear"
    """Layers that get adapters; the head never does."""

    @model_validator(mode="after")
    def _options_have_their_adapters(self) -> Self:
        refuse_idle(self, ("alpha", "targets"), idle=self.rank == 0, without="rank=0", mend="set rank")
        return self


class ModelConfig(Section):
    path: str = "tiny"
    """`tiny` for the embedded model, a name that `epo models` lists, a directory that holds a Hugging Face causal LM in
    safetensors, or the name of one on the Hugging Face hub."""
    tiny: TinyModelConfig = TinyModelConfig()
    max_context: int = Field(default=2048, ge=16)
    """Tokens of prompt and response together; the longest sequence that is sampled or trained."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model computes; `auto` takes a GPU if there is one."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of the model's computations; all cores by default. One is better where other programs keep the cores
    busy."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights. Training small learning rates in bfloat16 loses updates."""
    compute: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type in which the matrix products are computed (autocast), by sampler and learner alike. `auto`: float32 for
    `tiny`, otherwise bfloat16 where the hardware multiplies it natively."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "onednn"] = "auto"
    """Attention kernels of transformers, and `onednn` of epo's own. `auto` takes flash_attention_2 on a GPU if it is
    installed, onednn on a CPU that multiplies bfloat16 natively where products are computed in it, else sdpa, and eager
    for models that cap attention scores (Gemma 2)."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward: less memory, a third more time."""
    lora: LoraConfig = LoraConfig()


class ImitationConfig(Section):
    """Warm start on expert demonstrations of the training split."""

    demonstrations: int = Field(default=200, ge=0)
    """Expert episodes to learn from; 0 skips the warm start."""
    batches: int = Field(default=400, ge=1)
    """Optimiser steps."""
    batch_size: int = Field(default=8, ge=1)
    """Demonstrations in a batch."""
    learning_rate: float = Field(default=3e-3, gt=0)
    """Peak: linear warm-up over a tenth of the batches, then linear decay to 0."""
    observation_weight: float = Field(default=0.0, ge=0)
    """Weight of predicting what the expert read, relative to what it wrote. Teaches a model made from nothing to copy
    names and to know the world; leave it at 0 for pretrained models."""
