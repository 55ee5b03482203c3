"""Operations and seconds of one RL step, from rates: a simple model, stated in docs/plan.md."""

from __future__ import annotations

import math
from dataclasses import dataclass

from epo.config import Config
from epo.planning.hardware import Hardware
from epo.planning.memory import micro_batch_tokens, precision_of
from epo.planning.shapes import ModelShape
from epo.planning.workload import Workload

GPU_UTILISATION, CPU_UTILISATION = 0.4, 0.6
"""Of the dense rate, in training and prefill. On a CPU 0.53 to 0.73 were measured; on a GPU assumed."""
DECODE_UTILISATION = 0.6
"""Of the memory bandwidth, by decoding; assumed."""
LINK = 50e9
"""Bytes per second that a GPU exchanges with other nodes: a 400 Gbit/s adapter for each."""
ENVIRONMENT_SECONDS = {"scienceworld": 0.03, "household": 0.03, "alfworld": 0.05, "corridor": 0.001}
"""Of one turn: scienceworld from kept runs (0.007 to 0.033), the others assumed."""
PREVIEWING = ("clip_cov", "kl_cov", "siren")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What a device sustains; None takes the table's figure."""

    products: float
    """Operations per second, utilisation included."""
    bandwidth: float
    """Bytes per second that decoding sustains."""
    environment_seconds: float


def rates_of(
    config: Config,
    hardware: Hardware,
    *,
    utilisation: float | None = None,
    environment_seconds: float | None = None,
) -> Rates:
    device = hardware.accelerator
    peak = device.bfloat16 if precision_of(config, hardware).compute == 2 else device.float32
    share = CPU_UTILISATION if device.is_cpu else GPU_UTILISATION
    seconds = ENVIRONMENT_SECONDS.get(config.environment.suite, 0.05)
    return Rates(
        products=peak * (share if utilisation is None else utilisation),
        bandwidth=device.bandwidth * DECODE_UTILISATION,
        environment_seconds=seconds if environment_seconds is None else environment_seconds,
    )


def forward_operations(shape: ModelShape, *, tokens: float, pairs: float) -> float:
    """Of the layers: 2 per matrix parameter and token, and attention's two products for each pair of positions."""
    return 2 * shape.matrix_parameters * tokens + 4 * pairs * shape.query_width * shape.layers


def update_operations(config: Config, shape: ModelShape, work: Workload) -> dict[str, float]:
    """Of one RL step's update, over all devices, by part. What is computed again in backward is counted."""
    model, algorithm, epochs = config.model, config.algorithm, config.optimizer.epochs
    once = forward_operations(shape, tokens=work.processed, pairs=work.pairs)
    attention = 4 * work.pairs * shape.query_width * shape.layers
    matrices = once - attention
    low_rank = 2 * work.processed * shape.adapter_parameters(model.lora.rank, model.lora.targets)
    # Frozen weights need no gradient of their own: the backward of their products is one product instead of two.
    backward = (matrices if model.lora.rank else 2 * matrices) + 2 * attention + 2 * low_rank
    again = once + low_rank if model.gradient_checkpointing else 0.0
    head = 2 * shape.embedding_parameters * work.decoded
    has_trunk = algorithm.name == "ppo" and algorithm.critic.trunk == "separate"
    trunk = once + low_rank + backward + again
    parts = {
        "layers, forward and backward": epochs * trunk,
        "token head": epochs * (3 if model.lora.rank else 4) * head,
    }
    if has_trunk:
        parts["critic, forward and backward"] = epochs * trunk
    if algorithm.name == "ppo":
        parts["values"] = once + low_rank
    if algorithm.kl_coefficient > 0:
        parts["reference"] = once + low_rank + head
    if config.is_rescored:
        parts["log-probabilities anew"] = once + low_rank + head
    if config.entropy.method in PREVIEWING:
        parts["preview"] = epochs * (once + low_rank + head)
    return parts


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of one RL step by part."""

    prefill: float
    decode: float
    environment: float
    update: float
    limit: str
    """What keeps more devices from helping most."""

    @property
    def total(self) -> float:
        return self.prefill + self.decode + self.environment + self.update


def step_time(config: Config, shape: ModelShape, hardware: Hardware, work: Workload, rates: Rates) -> StepTime:
    """Seconds of a step, part after part (nothing overlaps).

    Devices beyond the live episodes do not help the rollout, nor those beyond an optimiser step's micro-batches the
    update.
    """
    c = precision_of(config, hardware).compute
    players = min(hardware.devices, work.live)
    waves = math.ceil(work.episodes / work.live)
    prefill_pairs = work.prefilled * work.context
    head = 2 * shape.embedding_parameters
    prefill = forward_operations(shape, tokens=work.prefilled, pairs=prefill_pairs) / players / rates.products
    # One pass draws a token of every live episode: all weights are read once, and every episode's keys and values.
    passes = waves * work.decoded / work.episodes
    together = math.ceil(work.live / players)
    read = (shape.matrix_parameters + shape.embedding_parameters) * c
    read += together * work.context * shape.key_value_bytes(size=c)
    computed = together * (forward_operations(shape, tokens=1, pairs=work.context) + head)
    decode = passes * max(read / rates.bandwidth, computed / rates.products)
    at_once = min(work.live, hardware.cores) if hardware.accelerator.is_cpu else work.live
    environment = work.episodes * work.turns / at_once * rates.environment_seconds
    compute, exchange, learners = _update_time(config, shape, hardware, work, rates)
    update = max(compute, exchange)
    parts = {"prefill": prefill, "decode": decode, "environment": environment, "update": update}
    worst = max(parts, key=lambda name: parts[name])
    limits = {
        "prefill": "live episodes (environment.workers)" if players < hardware.devices else "prefill's products",
        "decode": "a token of one episode after the other" if players < hardware.devices else "decode's memory traffic",
        "environment": "the environments",
        "update": "exchange between nodes"
        if exchange > compute
        else "micro-batches of an optimiser step"
        if learners < hardware.devices
        else "the update's products",
    }
    return StepTime(**parts, limit=limits[worst])


def _update_time(
    config: Config, shape: ModelShape, hardware: Hardware, work: Workload, rates: Rates
) -> tuple[float, float, int]:
    """Seconds of products and of exchange between nodes, and how many devices have something to do."""
    micro = micro_batch_tokens(config, work)
    per_step = math.ceil(work.processed / config.optimizer.minibatches / min(micro, work.row))
    learners = min(hardware.devices, max(1, per_step))
    compute = sum(update_operations(config, shape, work).values()) / learners / rates.products
    if hardware.nodes == 1:
        return compute, 0.0, learners
    # FSDP2: weights are gathered for forward and for backward, gradients scattered, in every round of micro-batches.
    rounds = math.ceil(per_step * min(micro, work.row) / micro / learners)
    sent = 3 * shape.parameters * precision_of(config, hardware).compute
    if config.model.lora.rank:
        sent *= 2 / 3
    steps = config.optimizer.minibatches * config.optimizer.epochs
    return compute, steps * rounds * sent / LINK / hardware.per_node, learners
