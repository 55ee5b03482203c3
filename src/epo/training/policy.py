"""The networks of a run: the policy with its tokenizer, the critic, the frozen reference.

Legend: B rows, T tokens, D hidden size, N trained tokens.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from epo.agent.chat import ChatFormat
from epo.config import CriticConfig, ModelConfig
from epo.errors import UserError
from epo.models import resolve_model
from epo.training import causal_attention
from epo.training.adapters import (
    BASE_FILE,
    CRITIC,
    POLICY,
    Adapters,
    AdapterTrunk,
    Base,
    files_digest,
    tensors_digest,
)
from epo.training.attention import logit_cap
from epo.training.fused_layers import fuse_layers
from epo.training.hardware import resolve_compute, resolve_device
from epo.training.linear import through_onednn
from epo.training.model_directory import load_directory, load_tokenizer, refuse_unsupported
from epo.training.padding_free import flat_rows
from epo.training.recomputation import enable_recomputation, recomputing
from epo.training.tiny import build_model


class HeadInputs(NamedTuple):
    """What logits are made of, in the precision in which they are defined."""

    hidden_N_D: Tensor
    weight_V_D: Tensor
    bias_V: Tensor | None
    softcap: float | None
    """c of logits that are capped, c tanh(logit / c); None for those that are not."""

    def logits(self) -> Tensor:
        """[N, V] in float32, not yet divided by a temperature."""
        bias_V = None if self.bias_V is None else self.bias_V.float()
        logits_N_V = nn.functional.linear(self.hidden_N_D.float(), self.weight_V_D.float(), bias_V)
        return logits_N_V if self.softcap is None else self.softcap * torch.tanh(logits_N_V / self.softcap)


class Policy:
    """A causal LM, its tokenizer, and how it talks.

    `version` counts updates: whoever caches anything computed with the weights compares it.

    Args:
        compute: type of the matrix products. bfloat16 over float32 weights means autocast: the residual stream, the
            norms and the logits stay in float32.
        adapters: those of `model`, where it has any.
        adapter: which of them this policy computes with; None for the model without them.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_context: int,
        compute: torch.dtype = torch.float32,
        adapters: Adapters | None = None,
        adapter: str | None = POLICY,
    ) -> None:
        refuse_unsupported(model, max_context=max_context)
        self.model = model
        self.tokenizer = tokenizer
        self.chat = ChatFormat(tokenizer)
        self.max_context = max_context
        self.compute = compute
        self.adapters = adapters
        self.adapter = adapter
        self.version = 0
        self.folder: Path | None = None
        """Where it was loaded from."""
        self._rounded_head: dict[tuple[int, int], Tensor] = {}
        self._trunk: nn.Module | None = None

    @property
    def trunk(self) -> nn.Module:
        """The model without its head: token ids to hidden states. With adapters, the trained policy's. May be set to a
        module that computes the same by other means."""
        return self.model.base_model if self._trunk is None else self._trunk

    @trunk.setter
    def trunk(self, trunk: nn.Module) -> None:
        self._trunk = trunk

    @property
    def head_weight_V_D(self) -> Tensor:
        return self.model.get_output_embeddings().weight

    @property
    def head_bias_V(self) -> Tensor | None:
        return self.model.get_output_embeddings().bias

    @property
    def device(self) -> torch.device:
        return self.head_weight_V_D.device

    def hidden(self, token_ids_B_T: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Hidden states [B, T, D] of right-padded rows.

        Args:
            lengths_B: real tokens of each row. With them, and a kernel for rows of different lengths, nothing is
                computed for padding, whose hidden states are zeros then.
        """
        using = nullcontext() if self.adapters is None else self.adapters.using(self.adapter)
        with self.autocast(), using:
            return trunk_hidden(self.trunk, token_ids_B_T, lengths_B)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision in which this policy computes, for the learner and for every sampler."""
        return torch.autocast(self.device.type, dtype=self.compute, enabled=self.compute is not torch.float32)

    def head(self, hidden_N_D: Tensor) -> HeadInputs:
        """Hidden states and head as every log-probability of this policy is computed from them, in float32.

        Where products are computed in bfloat16 both factors are rounded to it, so that sampler and learner agree.
        """
        weight_V_D, bias_V, softcap = self.head_weight_V_D, self.head_bias_V, logit_cap(self.model.config)
        if self.compute is torch.float32:
            return HeadInputs(hidden_N_D, weight_V_D, bias_V, softcap)
        return HeadInputs(hidden_N_D.to(self.compute), self._rounded(weight_V_D), bias_V, softcap)

    def _rounded(self, weight_V_D: Tensor) -> Tensor:
        """The head in the type of the products; rounded once where it is frozen."""
        if weight_V_D.requires_grad or weight_V_D.is_inference():
            return weight_V_D.to(self.compute)
        key = (weight_V_D.data_ptr(), weight_V_D._version)
        if key not in self._rounded_head:
            self._rounded_head.clear()
            # A tensor made in inference mode could not take part in a backward later.
            with torch.inference_mode(False):
                self._rounded_head[key] = weight_V_D.detach().to(self.compute)
        return self._rounded_head[key]

    def parameters(self) -> Iterator[nn.Parameter]:
        """What training changes."""
        if self.adapters is not None:
            return self.adapters.parameters(self.adapter)
        return (parameter for parameter in self.model.parameters() if parameter.requires_grad)

    def tensors(self) -> dict[str, Tensor]:
        """What a directory of it holds, by name: the weights of its adapter, or of its model (a tied one once)."""
        if self.adapters is not None:
            return self.adapters.tensors(self.adapter or POLICY)
        return dict(self.model.named_parameters())

    def describe(self) -> str:
        """One line for people: size, device, and the types and kernels that were chosen."""
        total = sum(parameter.numel() for parameter in self.model.parameters())
        trained = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
        kinds = {"weights": self.head_weight_V_D.dtype, "products": self.compute}
        types = ", ".join(f"{what} {str(dtype).removeprefix('torch.')}" for what, dtype in kinds.items())
        attention = self.model.config._attn_implementation
        return f"{total:,} parameters, {trained:,} trained, on {self.device}; {types}, attention {attention}"

    def save(self, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write a Hugging Face model directory (safetensors) that any tool can load, or with adapters, one of peft.

        Args:
            weights: as `tensors` names them, where the model itself holds parts of them only.
        """
        if self.adapters is not None:
            if self.adapter is None and weights is None:
                raise ValueError("a policy without its adapter is the base model, which is saved already")
            self.adapters.save(folder, self.adapter or POLICY, weights)
        else:
            state = None if weights is None else dict(weights)
            self.model.save_pretrained(folder, state_dict=state, safe_serialization=True)
        self.tokenizer.save_pretrained(folder)

    def digest(self) -> str:
        """SHA-256 of all weights: equal for equal models."""
        if self.adapters is not None:
            return self.adapters.digest(self.adapter)
        total = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            total.update(name.encode())
            total.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        return total.hexdigest()

    def frozen_copy(self) -> Policy:
        """The reference policy: the same weights, never trained. Of adapters only the adapter is copied."""
        if self.adapters is not None:
            adapter = self.adapters.frozen(self.adapter)
            twin = Policy(
                self.model,
                self.tokenizer,
                max_context=self.max_context,
                compute=self.compute,
                adapters=self.adapters,
                adapter=adapter,
            )
            twin._rounded_head = self._rounded_head
            return twin
        model = copy.deepcopy(self.model).eval()
        model.requires_grad_(False)
        return Policy(model, self.tokenizer, max_context=self.max_context, compute=self.compute)


class Critic(nn.Module):
    """State values, one per token position: the value before that token's successor is drawn."""

    def __init__(self, policy: Policy, config: CriticConfig) -> None:
        super().__init__()
        hidden_size = int(policy.model.config.hidden_size)
        self.trunk: nn.Module | None = None
        if config.trunk == "separate":
            self.trunk = copy.deepcopy(policy.trunk) if policy.adapters is None else _second_trunk(policy)
        self.autocast = policy.autocast
        self.head = nn.Linear(hidden_size, 1, device=policy.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, hidden_B_T_D: Tensor, token_ids_B_T: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Values [B, T] in fp32, from the policy's hidden states or from the own trunk (`Policy.hidden`)."""
        if self.trunk is not None:
            with self.autocast():
                hidden_B_T_D = trunk_hidden(self.trunk, token_ids_B_T, lengths_B)
        return self.head(hidden_B_T_D.to(self.head.weight.dtype)).squeeze(-1).float()


def _second_trunk(policy: Policy) -> AdapterTrunk:
    """The policy's trunk with an adapter of its own, which starts as the policy's."""
    adapters = policy.adapters
    assert adapters is not None and policy.adapter is not None
    return AdapterTrunk(adapters, adapters.add(CRITIC, like=policy.adapter, trainable=True), policy.trunk)


def trunk_hidden(trunk: nn.Module, token_ids_B_T: Tensor, lengths_B: Tensor | None = None) -> Tensor:
    """Hidden states [B, T, D] of right-padded rows, in the precision of the caller.

    No padding mask: with padding on the right, causality alone keeps real tokens from seeing it, and a plain causal
    mask is the fast path of every attention kernel.
    """
    model = trunk.model if isinstance(trunk, AdapterTrunk) else trunk
    with recomputing(model):
        if lengths_B is None or not _keeps_rows_apart(model):
            return trunk(input_ids=token_ids_B_T, use_cache=False).last_hidden_state
        rows = flat_rows(token_ids_B_T, lengths_B)
        flat_1_N_D = trunk(
            input_ids=rows.token_ids_1_N,
            position_ids=rows.position_ids_1_N,
            use_cache=False,
            **rows.attention_arguments(),
        ).last_hidden_state
    return rows.padded(flat_1_N_D)


def _keeps_rows_apart(model: Any) -> bool:
    """Whether its attention takes rows of different lengths without padding."""
    return model.device.type == "cuda" and model.config._attn_implementation == "flash_attention_2"


def load_policy(folder: str | Path, config: ModelConfig, *, seed: int = 0) -> Policy:
    """Load a model, or an adapter and its base, by directory or name (`epo.models.resolve_model`).

    Only the name of a model on the Hugging Face hub that is not on this machine yet, given or written beside an adapter
    as its base, causes a download. No code of the model is run.

    Args:
        seed: of a new adapter, where the configuration asks for one and the directory holds none.

    Raises:
        UserError: no such directory, a missing or half-written file, no chat template, unsupported architecture, an
            adapter that is not what the configuration says, or whose base is not the one it was trained on.
    """
    path, folder = str(folder), resolve_model(folder)
    if os.path.isfile(folder / BASE_FILE):  # unlike Path.is_file, never raises
        return _load_adapted(folder, config)
    model, tokenizer = load_directory(folder, config)
    base = None
    if config.lora.rank > 0:
        # A name may stand for another directory elsewhere, a relative path from elsewhere.
        base = Base(path=os.path.abspath(path) if os.path.isdir(path) else path, sha256=files_digest(folder))
    return _ready_policy(model, tokenizer, config, base=base, seed=seed, folder=folder)


def embedded_policy(tokenizer: Any, config: ModelConfig, *, seed: int) -> Policy:
    """The embedded model for `tokenizer` as a policy, untrained."""
    model: Any = build_model(tokenizer, config, seed=seed)
    base = None
    if config.lora.rank > 0:
        base = Base(path="tiny", sha256=tensors_digest(model.state_dict().items()), seed=seed)
        model.to(getattr(torch, config.dtype))
    return _ready_policy(model, tokenizer, config, base=base, seed=seed, folder=None)


def resumed_policy(folder: Path, config: ModelConfig, *, start: Policy) -> tuple[Policy, Policy]:
    """The policy that was saved in `folder`, and the one that training started from, frozen; adapters on one base."""
    if start.adapters is None:
        return load_policy(folder, config), start
    frozen = start.frozen_copy()
    start.adapters.read(folder, POLICY)
    return start, frozen


def _load_adapted(folder: Path, config: ModelConfig) -> Policy:
    base = Base.read(folder)
    if config.lora.rank == 0:
        raise UserError(
            f"{str(folder)!r} holds an adapter of {base.path!r}: set model.lora.rank to that of the adapter"
        )
    tokenizer = load_tokenizer(folder)
    if base.path == "tiny":
        policy = embedded_policy(tokenizer, config, seed=base.seed or 0)
    else:
        base_folder = resolve_model(base.path)
        if not os.path.isdir(base_folder):
            raise UserError(
                f"{base.path!r}, which the adapter {str(folder)!r} was trained on, is not there: put it back, or set "
                f"'path' in {str(folder / BASE_FILE)!r} to where it is"
            )
        model, _ = load_directory(base_folder, config)
        found = Base(path=base.path, sha256=files_digest(base_folder))
        policy = _ready_policy(model, tokenizer, config, base=found, seed=0, folder=folder)
    adapters = policy.adapters
    assert adapters is not None
    if adapters.base != base:
        raise UserError(
            f"{base.path!r} is not the model that the adapter {str(folder)!r} was trained on: put that one in its "
            f"place, or set 'path' in {str(folder / BASE_FILE)!r} to where it is"
        )
    adapters.read(folder, POLICY)
    policy.folder = folder
    return policy


def _ready_policy(
    model: Any, tokenizer: Any, config: ModelConfig, *, base: Base | None, seed: int, folder: Path | None
) -> Policy:
    device = resolve_device(config.device)
    model.to(device)
    model.eval()  # no dropout: the sampler and the learner must compute the same numbers
    adapters = None if base is None else Adapters(model, config.lora, base, seed=seed)
    through_onednn(model)
    if model.config._attn_implementation == causal_attention.NAME:
        fuse_layers(model)
    if config.gradient_checkpointing:
        enable_recomputation(model, adapters)
    compute = resolve_compute(config, device)
    policy = Policy(model, tokenizer, max_context=config.max_context, compute=compute, adapters=adapters)
    policy.folder = folder
    return policy
