"""Memory of one device by part, in bytes.

Counted are the tensors that are alive at once. Weights, gradients and moments are divided over the devices (as FSDP2
does); activations, keys and values and the head's tiles are not: every device has rows and episodes of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from epo.config import Config
from epo.planning.hardware import Hardware
from epo.planning.shapes import ModelShape
from epo.planning.workload import Workload

TILE_TOKENS, TILE_VOCABULARY = 1024, 2048
"""Of `epo.objectives.token_logprobs_and_entropy`."""
RESERVE = 0.1
"""Share of a GPU's memory left to its driver, kernels and fragmentation."""
CPU_RESERVE = 0.5 * 2**30
"""Of a CPU: Python and the libraries. Environments are processes of their own (`Plan.environments`)."""
HEAP = 0.75
"""What glibc's heap holds beyond the living activations, in multiples of them, with its default settings: amid what was
seen, 0.3 to 1.3 (docs/plan.md). None of it on a GPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """Bytes of a number."""

    weights: int
    compute: int

    @property
    def is_mixed(self) -> bool:
        """Weights are cast for every product."""
        return self.weights != self.compute


def precision_of(config: Config, hardware: Hardware) -> Precision:
    """As `epo.training.hardware.resolve_compute` would choose there; a CPU is taken not to multiply bfloat16."""
    model = config.model
    if model.dtype == "bfloat16":
        return Precision(weights=2, compute=2)
    if model.compute != "auto":
        return Precision(weights=4, compute=2 if model.compute == "bfloat16" else 4)
    return Precision(weights=4, compute=4 if model.path == "tiny" or hardware.accelerator.is_cpu else 2)


def saved_per_layer(
    shape: ModelShape, precision: Precision, *, rank: int, targets: str, own_attention: bool = False
) -> int:
    """Bytes that autograd keeps of one token in one layer of transformers' Llama family, without checkpointing.

    Residual stream and normalised states before each of two norms; the inputs of the linear layers; queries, keys,
    values, the attention's result and its normaliser; four arrays of the gated feed-forward. Frozen norms do not keep
    the normalised states. Under autocast each layer that reads the stream keeps its own copy in the compute type.

    Args:
        own_attention: `epo.training.causal_attention`, which keeps a second number a head; with it, and autocast over
            weights without adapters, the layers of `epo.training.fused_layers`, which keep one copy of what is read.
    """
    d, i, w, c = shape.hidden, shape.intermediate, precision.weights, precision.compute
    if own_attention and precision.is_mixed and not rank and not shape.has_query_bias:
        kept = 2 * shape.query_width + 2 * shape.key_width + 3 * i + 2 * d
        return c * kept + (4 + c) * shape.heads + 2 * 4 * d + 2 * 4
    attention = c * (2 * shape.query_width + 2 * shape.key_width) + 4 * shape.heads
    attention += 2 * shape.heads if own_attention else 0
    # torch's own product with a frozen weight does not keep its input; oneDNN's in float32 does.
    feed_forward = c * (3 if rank and c == 2 and targets == "attention" else 4) * i
    if own_attention and precision.is_mixed and targets == "attention":
        feed_forward -= c * i  # the feed-forward part without adapters is a fused one
    norms = 2 * 4 * d + 2 * 4
    if rank == 0:
        norms += 2 * w * d
        inputs = (5 if precision.is_mixed else 2) * c * d
    elif c == 4:
        inputs = 2 * c * d
    else:
        inputs = (5 if targets == "all-linear" else 3) * c * d + c * shape.query_width
    low_rank = c * rank * (len(shape.matrices) if targets == "all-linear" else len(shape.attention_matrices))
    return attention + feed_forward + norms + inputs + low_rank


def memory_parts(
    config: Config, shape: ModelShape, hardware: Hardware, work: Workload
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """What is always there, what the rollout adds, and what the update adds: bytes of one device by part.

    The rollout's keys and values are given back before the update, so the peak is the first and the larger of the
    others.
    """
    precision = precision_of(config, hardware)
    model, algorithm = config.model, config.algorithm
    w, c, devices = precision.weights, precision.compute, hardware.devices
    rank, targets = model.lora.rank, model.lora.targets
    adapter = shape.adapter_parameters(rank, targets)
    trained, size = (adapter, 4) if rank else (shape.parameters, w)
    always = {
        "weights": shape.parameters * w / devices,
        "gradients": trained * size / devices,
        "moments": 2 * trained * size / devices,
    }
    if rank:
        always["weights"] += adapter * 4 / devices
    has_trunk = algorithm.name == "ppo" and algorithm.critic.trunk == "separate"
    if algorithm.name == "ppo":
        own = (adapter * 4 if rank else shape.trunk_parameters * w) if has_trunk else 0
        always["critic, its gradients and moments"] = 4 * (own + (shape.hidden + 1) * w) / devices
    if algorithm.kl_coefficient > 0:
        always["reference"] = (adapter * 4 if rank else shape.parameters * w) / devices
    if config.sampler.name == "vllm":
        always["vLLM's weights"] = shape.parameters * c
        always["vLLM's keys and values"] = config.sampler.kv_gib * 2**30
    elif hardware.accelerator.is_cpu:
        packed = shape.matrix_parameters * c + shape.embedding_parameters * 4
        always["sampler's packed weights"] = packed
    elif devices > 1:
        always["sampler's gathered weights"] = shape.parameters * c
    rollout: dict[str, float] = {}
    if config.sampler.name == "local":
        live = math.ceil(work.live / devices)
        longest = min(model.max_context, 256 * math.ceil(model.max_context / 256))
        rollout["keys and values"] = live * longest * shape.key_value_bytes(size=c)
        rollout["logits of a draw"] = 2 * live * shape.vocabulary * 4
    return always, rollout, _update_parts(config, shape, precision, hardware, work, has_trunk=has_trunk)


def _update_parts(
    config: Config, shape: ModelShape, precision: Precision, hardware: Hardware, work: Workload, *, has_trunk: bool
) -> dict[str, float]:
    model, c = config.model, precision.compute
    rank, targets = model.lora.rank, model.lora.targets
    tokens = micro_batch_tokens(config, work)
    # As `resolve_attention` chooses on a CPU that multiplies bfloat16: where one would ask for it.
    own_attention = (
        hardware.accelerator.is_cpu and c == 2 and model.path != "tiny" and model.attention in ("auto", "onednn")
    )
    per_layer = saved_per_layer(shape, precision, rank=rank, targets=targets, own_attention=own_attention)
    # One layer's own gradients while it goes backward: three arrays of the feed-forward and the stream's.
    working = tokens * (3 * shape.intermediate * c + 3 * shape.hidden * 4)
    last_norm = tokens * shape.hidden * (4 + precision.weights)
    if model.gradient_checkpointing:
        kept = tokens * shape.layers * shape.hidden * precision.weights
        activations = kept + tokens * per_layer + working + last_norm
    else:
        activations = tokens * shape.layers * per_layer + working + last_norm
    parts = {"activations of a micro-batch": activations}
    if has_trunk:
        parts["activations of the critic"] = activations - working
    if precision.is_mixed:
        # Autocast's copies are kept by the graph; checkpointing drops them layer by layer where weights are frozen.
        layers = 1 if model.gradient_checkpointing and rank else shape.layers
        parts["weights cast for products"] = (
            (2 if has_trunk else 1) * shape.matrix_parameters / shape.layers * layers * c
        )
    if hardware.devices > 1:
        layer = shape.matrix_parameters / shape.layers * c
        parts["gathered: two layers and the head"] = 2 * layer + shape.embedding_parameters * precision.weights
    share = min(1.0, work.decoded / work.processed)
    tiles = min(TILE_TOKENS, math.ceil(tokens * share)) * min(TILE_VOCABULARY, shape.vocabulary) * 4 * 3
    head = tiles + 4 * tokens * share * shape.hidden * 4
    if rank == 0:
        head += shape.embedding_parameters * precision.weights  # its gradient, before it joins the embedding's
    if precision.is_mixed:
        head += shape.embedding_parameters * c
    parts["token head"] = head
    if hardware.accelerator.is_cpu:
        parts["kept by the heap"] = HEAP * activations
    return parts


def micro_batch_tokens(config: Config, work: Workload) -> float:
    """Of the largest one: the budget, or one row that is longer; never more than a mini-batch has."""
    budget = max(config.optimizer.microbatch_tokens, min(config.model.max_context, math.ceil(work.row)))
    return min(float(budget), max(work.processed / config.optimizer.minibatches, work.row))


def usable_bytes(hardware: Hardware) -> float:
    """Of one device."""
    whole = hardware.accelerator.memory_gib * 2**30
    return whole - CPU_RESERVE if hardware.accelerator.is_cpu else whole * (1 - RESERVE)


def total(parts: Mapping[str, float]) -> float:
    return sum(parts.values())
