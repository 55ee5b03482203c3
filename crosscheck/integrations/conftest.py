"""verl on a CPU, in this process and in those of its workers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from cpu_platform import PlatformCPU
from verl.plugin.platform import platform_manager


@pytest.fixture(scope="session", autouse=True)
def cpu() -> Iterator[None]:
    """A process group of one, and verl's device is the CPU."""
    before = platform_manager.get_platform()
    platform_manager.set_platform(PlatformCPU())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    platform_manager.set_platform(before)
