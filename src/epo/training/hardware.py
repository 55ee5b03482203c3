"""What the machine offers a model: device, precision of matrix products, attention kernels, memory."""

from __future__ import annotations

import importlib.util

import torch

from epo.config import Config, ModelConfig
from epo.errors import UserError
from epo.planning.hardware import gpu_here, parse_hardware
from epo.planning.plan import GIB, Plan, make_plan


def resolve_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("model.device='cuda' but PyTorch sees no GPU: set model.device=cpu, or install a CUDA build")
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name if name != "auto" else "cpu")


def resolve_compute(config: ModelConfig, device: torch.device) -> torch.dtype:
    """The type of the matrix products: as configured, or what the hardware multiplies fastest without harm."""
    if config.dtype == "bfloat16":
        if config.compute == "float32":
            raise UserError(
                "model.compute='float32' cannot be had from model.dtype='bfloat16': set model.dtype=float32, or leave "
                "model.compute out"
            )
        return torch.bfloat16
    if config.compute != "auto":
        return getattr(torch, config.compute)
    if config.path == "tiny":  # too small to gain, and the same on every machine
        return torch.float32
    return torch.bfloat16 if _multiplies_bfloat16(device) else torch.float32


def resolve_attention(config: ModelConfig, device: torch.device) -> str:
    """The attention implementation of transformers: as configured, or the fastest that is installed.

    Raises:
        UserError: flash_attention_2 or onednn without what it needs.
    """
    has_package = importlib.util.find_spec("flash_attn") is not None
    # Its kernels take 16-bit numbers only.
    is_16_bit = torch.bfloat16 in (resolve_compute(config, device), getattr(torch, config.dtype))
    if config.attention == "auto":
        if device.type == "cpu":
            return "onednn" if is_16_bit and _multiplies_bfloat16(device) else "sdpa"
        return "flash_attention_2" if has_package and is_16_bit else "sdpa"
    if config.attention == "onednn":
        what = "model.attention='onednn'"
        if device.type != "cpu":
            raise UserError(f"{what} runs on a CPU only, and the device is {device}: set model.attention=sdpa")
        if not is_16_bit:
            raise UserError(f"{what} computes in bfloat16 only: set model.compute=bfloat16, or model.attention=sdpa")
    if config.attention == "flash_attention_2":
        what = "model.attention='flash_attention_2'"
        if device.type != "cuda":
            raise UserError(f"{what} runs on a GPU only, and the device is {device}: set model.attention=sdpa")
        if not has_package:
            raise UserError(f"{what} needs the package flash-attn: pip install flash-attn, or set model.attention=sdpa")
        if not is_16_bit:
            raise UserError(f"{what} computes in 16 bits only: set model.compute=bfloat16, or model.attention=sdpa")
    return config.attention


def memory_note(config: Config, device: torch.device) -> str:
    """One line for people: what a plan estimates training to hold at its peak on `device`. Never fails."""
    try:
        plan = _plan_here(config, device)
    except Exception:  # a model that plans do not know; whatever it is, an estimate ends no run
        return "memory: no estimate; epo plan says why"
    peak, usable = f"{plan.peak / GIB:.1f} GiB", f"{plan.usable / GIB:.1f}"
    if not plan.fits:
        return f"memory: an estimated peak of {peak}, more than the {usable} usable here; epo plan says what would fit"
    return f"memory: an estimated peak of {peak} in training, of {usable} usable here (epo plan has its parts)"


def _plan_here(config: Config, device: torch.device) -> Plan:
    here = parse_hardware("cpu")
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        here = gpu_here(found.name, found.total_memory / GIB)
    # Where `auto` leaves it open, a plan assumes; here it is known.
    compute = str(resolve_compute(config.model, device)).removeprefix("torch.")
    model = config.model.model_copy(update={"compute": compute})
    return make_plan(config.model_copy(update={"model": model}), here)


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
        return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False
