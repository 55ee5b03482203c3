"""The networks of a run: the policy with its tokenizer, the critic, the frozen reference.

Legend: B rows, T tokens, D hidden size, N trained tokens.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from epo.agent.chat import ChatFormat
from epo.config import CriticConfig, ModelConfig
from epo.errors import UserError
from epo.models import resolve_model


class HeadInputs(NamedTuple):
    """What logits are made of, in the precision in which they are defined."""

    hidden_N_D: Tensor
    weight_V_D: Tensor
    bias_V: Tensor | None


class Policy:
    """A causal LM, its tokenizer, and how it talks.

    `version` counts updates: whoever caches anything computed with the weights compares it.

    Args:
        compute: type of the matrix products. bfloat16 over float32 weights means autocast: the residual stream, the
            norms and the logits stay in float32.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, max_context: int, compute: torch.dtype = torch.float32
    ) -> None:
        _refuse_unsupported(model, max_context=max_context)
        self.model = model
        self.tokenizer = tokenizer
        self.chat = ChatFormat(tokenizer)
        self.max_context = max_context
        self.compute = compute
        self.version = 0

    @property
    def trunk(self) -> nn.Module:
        """The model without its head: token ids to hidden states."""
        return self.model.base_model

    @property
    def head_weight_V_D(self) -> Tensor:
        return self.model.get_output_embeddings().weight

    @property
    def head_bias_V(self) -> Tensor | None:
        return self.model.get_output_embeddings().bias

    @property
    def device(self) -> torch.device:
        return self.head_weight_V_D.device

    def hidden(self, token_ids_B_T: Tensor) -> Tensor:
        """Hidden states [B, T, D] of right-padded rows.

        No padding mask: with padding on the right, causality alone keeps real tokens from seeing it, and a plain causal
        mask is the fast path of every attention kernel.
        """
        with self.autocast():
            return self.trunk(input_ids=token_ids_B_T, use_cache=False).last_hidden_state

    def autocast(self) -> AbstractContextManager[None]:
        """The precision in which this policy computes, for the learner and for every sampler."""
        return torch.autocast(self.device.type, dtype=self.compute, enabled=self.compute is not torch.float32)

    def head(self, hidden_N_D: Tensor) -> HeadInputs:
        """Hidden states and head as every log-probability of this policy is computed from them, in float32.

        Where products are computed in bfloat16 both factors are rounded to it, so that sampler and learner agree.
        """
        weight_V_D, bias_V = self.head_weight_V_D, self.head_bias_V
        if self.compute is torch.float32:
            return HeadInputs(hidden_N_D, weight_V_D, bias_V)
        return HeadInputs(hidden_N_D.to(self.compute), weight_V_D.to(self.compute), bias_V)

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.model.parameters()

    def save(self, folder: Path) -> None:
        """Write a Hugging Face model directory (safetensors) that any tool can load."""
        self.model.save_pretrained(folder, safe_serialization=True)
        self.tokenizer.save_pretrained(folder)

    def digest(self) -> str:
        """SHA-256 of all weights: equal for equal models."""
        total = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            total.update(name.encode())
            total.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        return total.hexdigest()

    def frozen_copy(self) -> Policy:
        """The reference policy: the same weights, never trained."""
        model = copy.deepcopy(self.model).eval()
        model.requires_grad_(False)
        return Policy(model, self.tokenizer, max_context=self.max_context, compute=self.compute)


class Critic(nn.Module):
    """State values, one per token position: the value before that token's successor is drawn."""

    def __init__(self, policy: Policy, config: CriticConfig) -> None:
        super().__init__()
        hidden_size = int(policy.model.config.hidden_size)
        self.trunk = copy.deepcopy(policy.trunk) if config.trunk == "separate" else None
        self.autocast = policy.autocast
        self.head = nn.Linear(hidden_size, 1, device=policy.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, hidden_B_T_D: Tensor, token_ids_B_T: Tensor) -> Tensor:
        """Values [B, T] in fp32, from the policy's hidden states or from the own trunk."""
        if self.trunk is not None:
            with self.autocast():
                hidden_B_T_D = self.trunk(input_ids=token_ids_B_T, use_cache=False).last_hidden_state
        return self.head(hidden_B_T_D.to(self.head.weight.dtype)).squeeze(-1).float()


def resolve_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("model.device='cuda' but PyTorch sees no GPU: set model.device=cpu, or install a CUDA build")
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name if name != "auto" else "cpu")


def resolve_compute(config: ModelConfig, device: torch.device) -> torch.dtype:
    """The type of the matrix products: as configured, or what the hardware multiplies fastest without harm."""
    if config.compute != "auto":
        return getattr(torch, config.compute)
    if config.path == "tiny":  # too small to gain, and the same on every machine
        return torch.float32
    return torch.bfloat16 if _multiplies_bfloat16(device) else torch.float32


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
        return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def resolve_attention(config: ModelConfig, device: torch.device) -> str:
    """The attention implementation of transformers: as configured, or the fastest that is installed."""
    if config.attention != "auto":
        return config.attention
    has_flash = device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if has_flash else "sdpa"


def load_policy(folder: str | Path, config: ModelConfig) -> Policy:
    """Load a model by directory or name (`epo.models.resolve_model`). No code of the model is run.

    Only the name of a model on the Hugging Face hub that is not on this machine yet causes a download.

    Raises:
        UserError: no such directory, a missing or half-written file, no chat template, unsupported architecture.
    """
    folder = resolve_model(folder)
    device = resolve_device(config.device)
    _check_directory(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            dtype=getattr(torch, config.dtype),
            attn_implementation=resolve_attention(config, device),
            output_loading_info=True,
        )
        model, report = loaded
    except Exception as error:  # whatever is wrong with the files: tokenizers, for one, raises bare Exception
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(
            f"model.path={str(folder)!r} cannot be loaded ({reason}): copy the directory again, completely, "
            "or choose a model that this version of transformers knows"
        ) from None
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would go on with random numbers in their place
        raise UserError(
            f"model.path={str(folder)!r} has no weights for {', '.join(missing[:3])}"
            f"{f' and {len(missing) - 3} more' if len(missing) > 3 else ''}: copy the directory again, completely"
        )
    entries = model.get_input_embeddings().weight.shape[0]
    # Without added tokens: many a directory declares a padding token that no text ever needs.
    if tokenizer.vocab_size > entries:
        raise UserError(
            f"model.path={str(folder)!r}: the tokenizer has {tokenizer.vocab_size} entries, the model {entries}: "
            "they do not belong together, copy both from the same place"
        )
    model.to(device)
    model.eval()  # no dropout: the sampler and the learner must compute the same numbers
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and config.max_context > limit:
        raise UserError(
            f"model.max_context={config.max_context} exceeds what {str(folder)!r} can read: at most {limit}"
        )
    return Policy(model, tokenizer, max_context=config.max_context, compute=resolve_compute(config, device))


def _check_directory(folder: Path) -> None:
    if not os.path.isdir(folder):  # unlike Path.is_dir, never raises
        raise UserError(
            f"model.path={str(folder)!r} is not a directory: give the path of a Hugging Face model directory, "
            "or 'tiny' for the embedded model, or a name that `epo models` lists"
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"model.path={str(folder)!r} has no config.json: it is not a Hugging Face model directory")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{str(index)!r} is damaged: copy the model directory again, completely") from None
    else:
        shards = {"model.safetensors"}
    missing = sorted(name for name in shards if not (folder / name).is_file())
    if missing:
        raise UserError(
            f"model.path={str(folder)!r} lacks {', '.join(missing)}: copy it again, completely, or convert its weights "
            "to safetensors (pickled weights are not read)"
        )


def _refuse_unsupported(model: Any, *, max_context: int) -> None:
    config = model.config
    what = f"model.path={model.name_or_path!r} holds a model of type {getattr(config, 'model_type', '?')!r}"
    instead = "choose a model of another family, Llama or Qwen for example"
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise UserError(f"{what}, whose head applies {name}, which the losses do not: {instead}")
    window = getattr(config, "sliding_window", None)
    # Where the layers are not told apart (Mistral, Phi), a window is that of all of them.
    layers = set(getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
    if layers - {"full_attention", "sliding_attention"}:
        raise UserError(
            f"{what} with layers of kind {', '.join(sorted(layers))}, which the sampler cannot keep: {instead}"
        )
    if "sliding_attention" in layers and window and window < max_context:
        raise UserError(
            f"{what} that attends to {window} tokens only in some layers, which the sampler does not: "
            f"set model.max_context to {window} or less"
        )
