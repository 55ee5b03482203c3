"""A policy's weights on their way to those who sample with them: numbered, and as safetensors bytes.

With adapters only the adapter travels; everybody has the base.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch import Tensor

from epo.training.adapters import POLICY
from epo.training.policy import Policy

Files = dict[str, bytes]
"""The files of a folder by their relative paths."""


@dataclass(frozen=True, slots=True)
class Weights:
    """What a policy's trained weights are at `version`, without the data themselves."""

    version: int
    data: Any
    """Reference to an array of bytes in Ray's object store."""


def packed(tensors: Mapping[str, Tensor]) -> NDArray[np.uint8]:
    """An array, since Ray shares arrays between the processes of a machine without a copy."""
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    return np.frombuffer(data, dtype=np.uint8)


def load_weights(policy: Policy, weights: Weights) -> None:
    """Make `policy` what it is at that version."""
    unpack(ray.get(weights.data), policy)
    policy.version = weights.version


@torch.no_grad()
def unpack(data: NDArray[np.uint8], policy: Policy) -> None:
    """Overwrite what an update changes with what `packed` made of another policy like this one.

    Raises:
        ValueError: other weights than this policy's.
    """
    tensors = load(data.tobytes())
    if policy.adapters is not None:
        policy.adapters.load(POLICY, tensors)
        return
    own = policy.tensors()
    if own.keys() != tensors.keys():
        raise ValueError(f"other weights, {min(own.keys() ^ tensors.keys())} for one")
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def publisher(policy: Policy) -> Callable[[], Weights]:
    """What gives the weights of `policy` as they are at the moment, put into the object store once per version."""
    newest: list[Weights] = []

    def publish() -> Weights:
        if not newest or newest[0].version != policy.version:
            newest[:] = [Weights(policy.version, ray.put(packed(policy.tensors())))]
        return newest[0]

    return publish


def policy_files(policy: Policy) -> Files:
    """What `load_policy` needs of `policy` as it is at the moment; of one without its adapter, an adapter that has no
    effect."""
    weights = None
    if policy.adapters is not None and policy.adapter is None:
        weights = {name: torch.zeros_like(tensor) for name, tensor in policy.tensors().items()}
    with tempfile.TemporaryDirectory() as folder:
        policy.save(Path(folder), weights)
        return read_files(Path(folder))


def read_files(folder: Path) -> Files:
    """A folder's content, to be sent to machines that do not share its disk."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_files(files: Files, folder: Path) -> None:
    """The opposite of `read_files`."""
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
