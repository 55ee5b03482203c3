"""Where ranks that share a machine find each other: in a file that only their user can open.

Ray Train would have them meet at a `torch.distributed.TCPStore`. That one listens on all of the machine's addresses,
whatever host it is told, and does what anybody asks of it.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend


@dataclass
class FileMeeting(TorchConfig):
    """Ray Train's own, but for where ranks meet: in a file in `folder`, which has to be of this machine and private."""

    folder: str = ""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _FileBackend


class _FileBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        assert isinstance(backend_config, FileMeeting)
        worker_group.execute(_set_torch_distributed_env_vars)
        file = Path(backend_config.folder) / uuid.uuid4().hex  # a new one: an old one's entries would be believed
        size = len(worker_group)
        joining = [
            worker_group.execute_single_async(
                rank, _setup_torch_process_group,
                backend=backend_config.backend, world_rank=rank, world_size=size, init_method=f"file://{file}",
                timeout_s=backend_config.timeout_s,
            )
            for rank in range(size)
        ]  # fmt: skip
        ray.get(joining)
