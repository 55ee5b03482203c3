"""A CPU as a verl platform, through verl's own registry: verl 0.9.1 ships accelerators only.

Selected with VERL_PLATFORM=cpu and VERL_USE_EXTERNAL_MODULES. It lets verl's workers run where the tests run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    return None


def _zero(*_args: Any, **_kwargs: Any) -> int:
    return 0


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """Everything a CPU has; memory figures are 0."""

    device_name = "cpu"
    vendor_name = "cpu"
    # What workers ask of `torch.cuda`, for a device that has none of it.
    device_module = SimpleNamespace(
        is_available=lambda: True,
        current_device=_zero,
        set_device=_nothing,
        synchronize=_nothing,
        empty_cache=_nothing,
        max_memory_allocated=_zero,
        max_memory_reserved=_zero,
        memory_allocated=_zero,
        memory_reserved=_zero,
        mem_get_info=lambda *_: (0, 0),
        reset_peak_memory_stats=_nothing,
        get_rng_state=torch.get_rng_state,
        set_rng_state=torch.set_rng_state,
        get_device_name=lambda *_: "CPU",
    )

    def is_available(self) -> bool:
        return True

    def current_device(self) -> Any:
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    set_device = synchronize = manual_seed = manual_seed_all = set_allocator_settings = empty_cache = _nothing
    profiler_start = profiler_stop = _nothing
    cudart = _nothing

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        del device_index
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        del msg
        yield

    def ray_resource_name(self) -> str:
        return "CPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False
