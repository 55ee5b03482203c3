"""Model directories: reading them, and saying in one line what is wrong with one."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from epo.config import ModelConfig
from epo.errors import UserError
from epo.training.attention import CAPPED_LOGITS, CAPPING, layer_kinds, logit_cap, score_cap
from epo.training.causal_attention import register
from epo.training.hardware import resolve_attention, resolve_device


def load_directory(folder: Path, config: ModelConfig) -> tuple[Any, Any]:
    """Model and tokenizer of a Hugging Face model directory, on the CPU. No code of the directory is run.

    Raises:
        UserError: no such directory, a missing or half-written file, a model that reads less than `max_context`.
    """
    shards = _check_directory(folder)
    attention = resolve_attention(config, resolve_device(config.device))
    register()
    _check_sizes(folder, shards)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,  # left out, transformers would ask at the terminal whether to run it
            use_safetensors=True,
            dtype=getattr(torch, config.dtype),
            attn_implementation=attention,
            output_loading_info=True,
        )
        model, report = loaded
    except Exception as error:  # whatever is wrong with the files: tokenizers, for one, raises bare Exception
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(
            f"model.path={str(folder)!r} cannot be loaded ({reason}): copy the directory again, completely, "
            "or choose a model that this version of transformers knows"
        ) from None
    if config.attention == "auto" and score_cap(model.config) is not None and attention not in CAPPING:
        model.set_attn_implementation("eager")
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
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and config.max_context > limit:
        raise UserError(
            f"model.max_context={config.max_context} exceeds what {str(folder)!r} can read: at most {limit}"
        )
    return model, tokenizer


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a directory.

    Raises:
        UserError: its files are missing or damaged.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever is wrong with the files: tokenizers, for one, raises bare Exception
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(
            f"the tokenizer in {str(folder)!r} cannot be loaded ({reason}): copy the directory again, completely"
        ) from None


def _check_directory(folder: Path) -> set[str]:
    """The names of the files that hold its weights."""
    if not os.path.isdir(folder):  # unlike Path.is_dir, never raises
        raise UserError(
            f"model.path={str(folder)!r} is not a directory: give the path of a Hugging Face model directory, "
            "or 'tiny' for the embedded model, or a name that `epo models` lists"
        )
    for entry in os.scandir(folder):
        # Reading a pipe or a device may never end.
        if os.path.exists(entry.path) and not entry.is_file() and not entry.is_dir():
            raise UserError(
                f"model.path={str(folder)!r}: {entry.name!r} is no file: copy the directory again, completely"
            )
    if not (folder / "config.json").is_file():
        raise UserError(f"model.path={str(folder)!r} has no config.json: it is not a Hugging Face model directory")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
            if outside := sorted(name for name in shards if name != Path(name).name or name in (".", "..")):
                raise ValueError(outside[0])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{str(index)!r} is damaged: copy the model directory again, completely") from None
    else:
        shards = {"model.safetensors"}
    missing = sorted(name for name in shards if not (folder / name).is_file())
    if missing:
        raise UserError(
            f"model.path={str(folder)!r} lacks {', '.join(missing)}: copy it again, completely, or convert its weights "
            "to safetensors (pickled weights are not read)"
        )
    return shards


def _check_sizes(folder: Path, shards: set[str]) -> None:
    """Refuse a config.json that speaks of a model larger than its weights: building it could take forever."""
    shapes: list[list[int]] = []
    try:
        for name in shards:
            with safe_open(folder / name, framework="numpy") as weights:
                shapes += [weights.get_slice(key).get_shape() for key in weights.keys()]  # noqa: SIM118  no mapping
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"model.path={str(folder)!r} cannot be loaded ({reason}): copy the directory again, completely"
        ) from None
    try:
        claimed = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # the loader says what is wrong
    most = {name: len(shapes) for name in ("num_hidden_layers", "num_layers", "n_layer", "n_layers")}
    largest = max(map(math.prod, shapes), default=0)
    most |= dict.fromkeys(
        ("hidden_size", "intermediate_size", "vocab_size", "head_dim", "num_attention_heads"), largest
    )
    for name, limit in most.items():
        value = claimed.get(name) if isinstance(claimed, dict) else None
        if isinstance(value, int) and value > limit:
            raise UserError(
                f"model.path={str(folder)!r}: config.json says {name}={str(value)[:30]}, and its weights have "
                f"{len(shapes)} tensors of at most {largest} numbers: they do not belong together, copy both from the "
                "same place"
            )


def refuse_unsupported(model: Any, *, max_context: int) -> None:
    """Refuse what losses and sampler would compute wrongly.

    Raises:
        UserError: the head is more than a linear layer and a cap, or attention is computed otherwise than it should be.
    """
    config = model.config
    what = f"model.path={model.name_or_path!r} holds a model of type {getattr(config, 'model_type', '?')!r}"
    instead = "choose a model of another family, Llama or Qwen for example"
    if config.get_text_config() is not config:
        raise UserError(f"{what}, which reads more than text: choose one that reads text only")
    for name in ("logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise UserError(f"{what}, whose head applies {name}, which the losses do not: {instead}")
    if logit_cap(config) is not None and config.model_type not in CAPPED_LOGITS:
        raise UserError(f"{what}, whose head applies final_logit_softcapping in a way that was not tested: {instead}")
    layers = layer_kinds(config)
    if layers - {"full_attention", "sliding_attention"}:
        raise UserError(
            f"{what} with layers of kind {', '.join(sorted(layers))}, which the sampler cannot keep: {instead}"
        )
    if score_cap(config) is not None and config._attn_implementation not in CAPPING:
        raise UserError(
            f"{what} that caps attention scores, which model.attention={config._attn_implementation} does not: "
            "set model.attention to auto or eager"
        )
    longest = _unchanging_positions(config)
    if longest is not None and longest < max_context:
        raise UserError(
            f"{what} whose positions are turned otherwise in texts of more than {longest} tokens, which keys kept from "
            f"a shorter text do not follow: set model.max_context to {longest} or less"
        )


def _unchanging_positions(config: Any) -> int | None:
    """Tokens up to which rotary positions do not depend on the length of the text; None for any length."""
    rotations = getattr(config, "rope_parameters", None) or {}
    kinds = [rotations] if "rope_type" in rotations else [r for r in rotations.values() if isinstance(r, dict)]
    limits = [
        int(kind.get("original_max_position_embeddings") or config.max_position_embeddings)
        for kind in kinds
        if kind.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(limits, default=None)


def quiet_libraries() -> None:
    """Progress bars and advice of the model library do not belong between our lines."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
