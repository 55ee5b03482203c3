"""Low-rank adapters (LoRA, arXiv 2106.09685) beside one frozen model: policy, critic and reference without copies.

peft makes the adapted layers; it is imported only where adapters are asked for.

Legend: B rows, T tokens, D hidden size, O outputs and I inputs of a linear layer.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from epo.config import LoraConfig
from epo.errors import UserError

POLICY, CRITIC, REFERENCE = "policy", "critic", "reference"
BASE_FILE, WEIGHTS_FILE, CONFIG_FILE = "base.json", "adapter_model.safetensors", "adapter_config.json"
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """What adapters were trained on, as the file beside them tells."""

    path: str
    """What `load_policy` takes; `tiny` for the embedded model."""
    sha256: str
    """Of its weights."""
    seed: int | None = None
    """With which the embedded model is made again."""

    @classmethod
    def read(cls, folder: Path) -> Base:
        try:
            content = json.loads((folder / BASE_FILE).read_text(encoding="utf-8"))
            seed = content["seed"]
            return cls(
                path=str(content["path"]), sha256=str(content["sha256"]), seed=None if seed is None else int(seed)
            )
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{str(folder / BASE_FILE)!r} is damaged: copy the adapter again, completely") from None


class Adapters:
    """The adapters of one model, of which one or none computes at a time.

    All adapted layers hold the same list of active names. So switching costs nothing however many layers there are, and
    it never touches `requires_grad`, as peft's own switching would.

    Args:
        model: a causal LM; its linear layers are replaced in place, its weights frozen.
        seed: of the adapter `policy`, which starts without effect.

    Raises:
        UserError: peft is not installed, or the model has no linear layers to adapt.
    """

    def __init__(self, model: Any, config: LoraConfig, base: Base, *, seed: int) -> None:
        try:
            import peft
            from peft.tuners.lora import LoraLayer
        except ImportError as error:
            raise UserError(
                f"model.lora.rank={config.rank} needs the package peft ({error}): pip install peft, or set it to 0"
            ) from None
        self.model = model
        self.base = base
        self._trainable: set[str] = {POLICY}
        self._active = [POLICY]
        self._config: Any = peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]  # declared int, used as a float
            lora_dropout=0.0,
            target_modules=_target_names(model, config),
            bias="none",
            task_type="CAUSAL_LM",
            base_model_name_or_path=base.path,
        )
        with _seeded(seed):
            self._tuner: Any = peft.LoraModel(model, {POLICY: copy.deepcopy(self._config)}, POLICY)  # type: ignore[arg-type]
        self._layers: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
        self._settle(POLICY)

    def add(self, name: str, *, like: str, trainable: bool) -> str:
        """A new adapter with the weights of another; returns the name it got."""
        free, number = name, 1
        while free in self._tuner.peft_config:
            number += 1
            free = f"{name}_{number}"
        self._tuner.peft_config[free] = copy.deepcopy(self._config)
        with _seeded(0):  # peft draws what is overwritten below
            self._tuner.inject_adapter(self.model, free)
        if trainable:
            self._trainable.add(free)
        self._settle(free)
        self.load(free, self.tensors(like))
        return free

    def frozen(self, name: str | None) -> str | None:
        """An adapter that stays as `name` is now; none where `name` has no effect yet."""
        if name is None or name not in self._trainable:
            return name
        return None if self.has_no_effect(name) else self.add(REFERENCE, like=name, trainable=False)

    def using(self, name: str | None) -> AbstractContextManager[None]:
        """Within the context the model computes with the adapter `name`; with None, as without adapters."""
        return _Using(self._active, [] if name is None else [name])

    def recomputation(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For `torch.utils.checkpoint`: backward recomputes with the adapter that was active in forward."""
        return nullcontext(), _Using(self._active, self._active)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The weights of an adapter by layer, in the model's order."""
        return {
            f"{layer}.{part}.weight": getattr(module, part)[name].weight
            for layer, module in self._layers.items()
            for part in ("lora_A", "lora_B")
        }

    def parameters(self, name: str | None) -> Iterator[nn.Parameter]:
        """The trainable weights of an adapter."""
        if name is not None:
            for tensor in self.tensors(name).values():
                if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
                    yield tensor

    @torch.no_grad()
    def load(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite an adapter.

        Raises:
            ValueError: other layers or other sizes.
        """
        own = self.tensors(name)
        if own.keys() != tensors.keys():
            raise ValueError(f"other layers, {min(own.keys() ^ tensors.keys())} for one")
        for key, tensor in own.items():
            if tensor.shape != tensors[key].shape:
                raise ValueError(f"{key} is {tuple(tensors[key].shape)} instead of {tuple(tensor.shape)}")
            tensor.copy_(tensors[key])

    def has_no_effect(self, name: str) -> bool:
        return not any(bool(t.any()) for key, t in self.tensors(name).items() if ".lora_B." in key)

    def digest(self, name: str | None) -> str:
        """SHA-256 of base and adapter: equal for equal weights."""
        if name is None or self.has_no_effect(name):
            return self.base.sha256
        return hashlib.sha256((self.base.sha256 + tensors_digest(self.tensors(name).items())).encode()).hexdigest()

    def save(self, folder: Path, name: str, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write an adapter in peft's layout, and beside it what it belongs to.

        Args:
            weights: the adapter's, as `tensors` names them, where the layers hold parts of them only.
        """
        folder.mkdir(parents=True, exist_ok=True)
        config = copy.copy(self._config)
        config.target_modules = sorted(config.target_modules)  # a set would be written in any order
        config.inference_mode = True
        config.save_pretrained(str(folder))
        found = self.tensors(name) if weights is None else weights
        tensors = {_PEFT_PREFIX + key: t.detach().cpu().contiguous() for key, t in found.items()}
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        (folder / BASE_FILE).write_text(json.dumps(asdict(self.base), indent=1), encoding="utf-8")

    def read(self, folder: Path, name: str) -> None:
        """Overwrite an adapter with one that `save` wrote.

        Raises:
            UserError: another rank, scale or set of layers than this one's, or damaged files.
        """
        what, again = f"the adapter {str(folder)!r}", "copy it again, completely"
        try:
            written = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
            rank, alpha = int(written["r"]), float(written["lora_alpha"])
            tensors = load_file(folder / WEIGHTS_FILE)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(f"{what} cannot be read ({reason}): {again}") from None
        if (rank, alpha) != (self._config.r, self._config.lora_alpha):
            raise UserError(
                f"{what} has rank {rank} and alpha {alpha:g}, not model.lora.rank={self._config.r} and "
                f"model.lora.alpha={self._config.lora_alpha:g}: set them to what it has"
            )
        try:
            self.load(name, {key.removeprefix(_PEFT_PREFIX): t for key, t in tensors.items()})
        except ValueError as error:
            raise UserError(f"{what} does not fit ({error}): set model.lora.targets as it was trained") from None

    def _settle(self, name: str) -> None:
        """Undo what peft does to every adapter when it makes one."""
        for module in self._layers.values():
            module.set_adapter(self._active)
            if module.active_adapters is not self._active:
                raise RuntimeError("this version of peft keeps copies of the names of active adapters")
            for part in (module.lora_A, module.lora_B):
                part[name].float()  # beside bfloat16 weights, too: small steps would be lost in it
                for key, linear in part.items():
                    linear.requires_grad_(key in self._trainable)


class AdapterTrunk(nn.Module):
    """The trunk of a model as one of its adapters has it. As a module it holds that adapter's weights and no others."""

    def __init__(self, adapters: Adapters, name: str, trunk: nn.Module) -> None:
        super().__init__()
        self._adapters, self._name = adapters, name
        self.follow(trunk)

    def follow(self, trunk: nn.Module) -> None:
        """Compute through `trunk`, with the adapter's weights as its layers hold them by now."""
        self._trunk = [trunk]  # in a list, so that it is no part of this module
        # A parameter's name may not contain dots.
        tensors = self._adapters.tensors(self._name)
        self.weights = nn.ParameterDict({key.replace(".", "/"): t for key, t in tensors.items()})

    @property
    def model(self) -> nn.Module:
        return self._trunk[0]

    def forward(self, **kwargs: Any) -> Any:
        with self._adapters.using(self._name):
            return self.model(**kwargs)


class _Using(AbstractContextManager[None]):
    """Can be entered again, as a recomputation may be repeated."""

    def __init__(self, active: list[str], names: list[str]) -> None:
        self._active, self._names = active, list(names)
        self._before: list[list[str]] = []

    def __enter__(self) -> None:
        self._before.append(list(self._active))
        self._active[:] = self._names

    def __exit__(self, *exc: object) -> None:
        self._active[:] = self._before.pop()


def effective_weight(linear: Any, *, adapter: str = POLICY) -> Tensor:
    """The weight [O, I] of a linear layer with the policy's adapter merged into it; detached, in the base's type."""
    if not hasattr(linear, "lora_A"):
        return linear.weight.detach()
    base_O_I = linear.base_layer.weight.detach()
    low_rank_O_I = linear.lora_B[adapter].weight.detach() @ linear.lora_A[adapter].weight.detach()
    return (base_O_I.float() + linear.scaling[adapter] * low_rank_O_I).to(base_O_I.dtype)


def merged_tensors(model: Any, *, adapter: str | None) -> Iterator[tuple[str, Tensor]]:
    """A model's weights under the names they have without adapters, one adapter merged in; with None, the base's."""
    for name, tensor in model.state_dict().items():
        if ".lora_" in name:
            continue
        layer, adapted, part = name.partition(".base_layer.")
        if adapted and part == "weight" and adapter is not None:
            tensor = effective_weight(model.get_submodule(layer), adapter=adapter)
        yield (f"{layer}.{part}" if adapted else name), tensor


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, types, shapes and values, in the order of names."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        values: Any = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
        total.update(values)
    return total.hexdigest()


def files_digest(folder: Path) -> str:
    """SHA-256 of a model directory's weights as they are on disk, however they are cut into files."""

    def stored() -> Iterator[tuple[str, str]]:
        for file in folder.glob("*.safetensors"):
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  # not a mapping
                    yield name, tensors_digest([(name, opened.get_tensor(name))])

    return hashlib.sha256(json.dumps(sorted(stored())).encode()).hexdigest()


def _target_names(model: Any, config: LoraConfig) -> list[str]:
    """The linear layers to adapt: by the last part of their names where that says which, by their whole names else."""
    head = model.get_output_embeddings()
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head}
    chosen = linear if config.targets == "all-linear" else {n for n in linear if re.search(r"attn|attention", n)}
    if not chosen:
        raise UserError(
            f"model.lora.targets={config.targets!r} finds no linear layers in a model of type "
            f"{getattr(model.config, 'model_type', '?')!r}: set model.lora.rank=0 to train all its weights"
        )
    endings = {name.rpartition(".")[2] for name in chosen}
    matched = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in endings}
    return sorted(endings if matched == chosen else chosen)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The caller's random state is none of our business. CPU only: that is where peft draws."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
