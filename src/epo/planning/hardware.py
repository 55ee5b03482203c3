"""What a run is planned on: accelerators by name, and how `--hardware` spells them."""

from __future__ import annotations

import difflib
import math
import os
import re
from dataclasses import dataclass, replace

from epo.environments.worker_memory import usable_memory
from epo.errors import UserError

GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Accelerator:
    """One device, by its vendor's figures: dense, without sparsity."""

    name: str
    memory_gib: float
    bfloat16: float
    """Operations per second."""
    float32: float
    bandwidth: float
    """Bytes per second."""
    is_cpu: bool = False


def _gpu(name: str, memory_gib: float, *, bfloat16: float, float32: float, bandwidth: float) -> Accelerator:
    """bfloat16 and float32 in Tflop/s, bandwidth in GB/s."""
    return Accelerator(
        name=name, memory_gib=memory_gib, bfloat16=bfloat16 * 1e12, float32=float32 * 1e12, bandwidth=bandwidth * 1e9
    )


# float32 is that of the ordinary units: torch does not use TF32 for matrix products unless it is told to.
ACCELERATORS = {
    found.name: found
    for found in (
        # NVIDIA A100 data sheet (2021): SXM, both sizes.
        _gpu("A100-40G", 40, bfloat16=312, float32=19.5, bandwidth=1555),
        _gpu("A100-80G", 80, bfloat16=312, float32=19.5, bandwidth=2039),
        # NVIDIA H100 data sheet: SXM; 1,979 with sparsity.
        _gpu("H100-80G", 80, bfloat16=989, float32=67, bandwidth=3350),
        # NVIDIA H200 data sheet: SXM.
        _gpu("H200-141G", 141, bfloat16=989, float32=67, bandwidth=4800),
        # NVIDIA DGX B200 data sheet, an eighth of 1,440 GB, 64 TB/s and 36 Pflop/s (sparse, so half of that); HGX: 75.
        _gpu("B200", 180, bfloat16=2250, float32=75, bandwidth=8000),
        # NVIDIA L40S data sheet; 733 with sparsity.
        _gpu("L40S", 48, bfloat16=362, float32=91.6, bandwidth=864),
        # NVIDIA Ada GPU architecture white paper, appendix A: bfloat16 with float32 sums.
        _gpu("RTX4090", 24, bfloat16=165.2, float32=82.6, bandwidth=1008),
        # NVIDIA L4 data sheet; 242 with sparsity.
        _gpu("L4", 24, bfloat16=121, float32=30.3, bandwidth=300),
    )
}
_SHORT = {"A100": "A100-80G", "H100": "H100-80G", "H200": "H200-141G", "4090": "RTX4090"}

# A core of a server processor: a 2048^3 product in float32 through oneDNN (docs/cost.md), and a core's share of memory
# bandwidth. No vendor's figures: `benchmarks/plan_check.py` measures yours.
_CORE_FLOAT32, _CORE_BANDWIDTH = 100e9, 10e9


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """`nodes` machines with `per_node` accelerators each. A CPU with its cores is one accelerator."""

    accelerator: Accelerator
    per_node: int
    nodes: int = 1
    cores: int = 1
    """Of a CPU."""

    @property
    def devices(self) -> int:
        return self.nodes * self.per_node

    def with_nodes(self, nodes: int) -> Hardware:
        return replace(self, nodes=nodes)

    def __str__(self) -> str:
        if self.accelerator.is_cpu:
            return f"cpu:{self.cores}x{self.accelerator.memory_gib:g}G"
        nodes = f"{self.nodes}x" if self.nodes > 1 else ""
        return f"{nodes}{self.per_node}x{self.accelerator.name}"


def parse_hardware(text: str) -> Hardware:
    """`H100-80G`, `8xH100-80G`, `4x8xH100-80G` (nodes x GPUs of each), `cpu:2x24G` (cores x memory), `cpu` (this one).

    Raises:
        UserError: another form, or an accelerator that is not in the table.
    """
    given = text.strip()
    if given.lower() == "cpu":
        return _cpu(os.cpu_count() or 1, round(usable_memory() / GIB, 1))
    if match := re.fullmatch(r"cpu:(\d+)x(\d+(?:\.\d+)?)G(?:iB)?", given, re.IGNORECASE):
        cores, memory = int(match[1]), float(match[2])
        if cores < 1 or memory <= 0:
            raise UserError(f"--hardware {text!r} has no cores or no memory: for example cpu:2x24G")
        return _cpu(cores, memory)
    match = re.fullmatch(r"(?:(\d{1,5})x)?(?:(\d{1,5})x)?([A-Za-z0-9][\w -]*)", given)
    if match is None or "0" in (match[1], match[2]):
        raise UserError(f"--hardware {text!r} is not understood: for example 8xH100-80G, 4x8xH100-80G or cpu:2x24G")
    counts = [int(count) for count in (match[1], match[2]) if count is not None]
    nodes, per_node = ([1] * (2 - len(counts)) + counts)[:2]
    name = match[3].upper().replace(" ", "").removesuffix("B") if match[3][-2:].upper() == "GB" else match[3].upper()
    name = _SHORT.get(name.replace(" ", ""), name.replace(" ", ""))
    if name not in ACCELERATORS:
        near = difflib.get_close_matches(name, [*ACCELERATORS, *_SHORT], n=1, cutoff=0.0)[0]
        raise UserError(
            f"--hardware {text!r}: {match[3]!r} is not known (did you mean {near!r}?). Known: "
            f"{', '.join(ACCELERATORS)}, cpu:CORESxMEMORYG"
        )
    return Hardware(accelerator=ACCELERATORS[name], per_node=per_node, nodes=nodes)


def gpu_here(name: str, memory_gib: float) -> Hardware:
    """One GPU as its driver describes it. Its rates are not known: in a plan on it every time is NaN."""
    gpu = _gpu(name, memory_gib, bfloat16=math.nan, float32=math.nan, bandwidth=math.nan)
    return Hardware(accelerator=gpu, per_node=1)


def _cpu(cores: int, memory_gib: float) -> Hardware:
    rate = cores * _CORE_FLOAT32
    cpu = Accelerator(
        name="CPU", memory_gib=memory_gib, bfloat16=rate, float32=rate, bandwidth=cores * _CORE_BANDWIDTH, is_cpu=True
    )
    return Hardware(accelerator=cpu, per_node=1, cores=cores)
