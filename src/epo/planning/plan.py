"""A plan: does a run fit, what is in the memory, what does it cost; and what would fit if it does not."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from epo.config import Config
from epo.planning.hardware import Hardware
from epo.planning.memory import memory_parts, total, usable_bytes
from epo.planning.shapes import ModelShape, shape_of
from epo.planning.timing import Rates, StepTime, rates_of, step_time, update_operations
from epo.planning.workload import Workload, workload_of

GIB = 2**30
NODES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """What a recipe does not say; None for the plan's own assumption."""

    turns: float | None = None
    response: float | None = None
    observation: float | None = None
    prompt: float | None = None
    utilisation: float | None = None
    environment_seconds: float | None = None
    worker_mb: float | None = None
    """MiB of an environment worker (`TaskSuite.worker_mb`). Without it none is counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    config: Config
    shape: ModelShape
    hardware: Hardware
    work: Workload
    rates: Rates
    always: dict[str, float]
    rollout: dict[str, float]
    update: dict[str, float]
    usable: float
    time: StepTime
    operations: dict[str, float]

    @property
    def peak(self) -> float:
        """Bytes of one device: what is always there, and the larger phase."""
        return total(self.always) + max(total(self.rollout), total(self.update))

    @property
    def environments(self) -> float:
        """Bytes of all environment workers, in the memory of the machine."""
        return self.config.environment.workers * (self.answers.worker_mb or 0.0) * 2**20

    @property
    def needed(self) -> float:
        """Bytes: the peak, and on a CPU, whose memory they share, the environments."""
        return self.peak + (self.environments if self.hardware.accelerator.is_cpu else 0.0)

    @property
    def fits(self) -> bool:
        return self.needed <= self.usable

    @property
    def largest(self) -> tuple[str, float]:
        """The part that takes most at the peak, without those that only follow from another."""
        phase = self.update if total(self.update) >= total(self.rollout) else self.rollout
        parts = {name: size for name, size in (self.always | phase).items() if name != "kept by the heap"}
        if self.hardware.accelerator.is_cpu:
            parts["environment workers"] = self.environments
        return max(parts.items(), key=lambda part: part[1])

    @property
    def hours(self) -> float:
        """Of all RL steps; warm start and evaluations come on top."""
        return self.time.total * self.config.steps / 3600

    def node_curve(self, price: float | None) -> list[dict[str, Any]]:
        """The same run on 1 to 64 nodes."""
        rows: list[dict[str, Any]] = []
        for nodes in NODES:
            plan = make_plan(self.config, self.hardware.with_nodes(nodes), of=self.answers)
            row: dict[str, Any] = {"nodes": nodes, "fits": plan.fits, "peak_gib": plan.peak / GIB}
            row |= {"step_seconds": plan.time.total, "hours": plan.hours, "node_hours": plan.hours * nodes}
            rows.append(
                row | {"price": None if price is None else plan.hours * nodes * price, "limit": plan.time.limit}
            )
        return rows

    answers: Answers = Answers()

    def as_dict(self, price: float | None = None) -> dict[str, Any]:
        device = self.hardware.accelerator
        return {
            "recipe": self.config.name,
            "model": asdict(self.shape) | {"parameters": self.shape.parameters},
            "hardware": {"name": str(self.hardware), "devices": self.hardware.devices, "memory_gib": device.memory_gib},
            "fits": self.fits,
            "peak_gib": self.peak / GIB,
            "usable_gib": self.usable / GIB,
            "environments_gib": self.environments / GIB,
            "memory_gib": {
                phase: {name: size / GIB for name, size in parts.items()}
                for phase, parts in (("always", self.always), ("rollout", self.rollout), ("update", self.update))
            },
            "step": asdict(self.work),
            "operations": self.operations,
            "seconds": {k: v for k, v in asdict(self.time).items() if k != "limit"} | {"step": self.time.total},
            "steps": self.config.steps,
            "hours": self.hours,
            "nodes": [] if device.is_cpu else self.node_curve(price),
            "would_fit": [] if self.fits else what_would_fit(self),
        }


def make_plan(config: Config, hardware: Hardware, *, of: Answers = Answers()) -> Plan:
    """Plan a run.

    Raises:
        UserError: the model's shape is not known.
    """
    shape = shape_of(config.model)
    work = workload_of(
        config, turns=of.turns, response=of.response, observation=of.observation, prompt=of.prompt
    )  # fmt: skip
    rates = rates_of(config, hardware, utilisation=of.utilisation, environment_seconds=of.environment_seconds)
    always, rollout, update = memory_parts(config, shape, hardware, work)
    return Plan(
        config=config,
        shape=shape,
        hardware=hardware,
        work=work,
        rates=rates,
        always=always,
        rollout=rollout,
        update=update,
        usable=usable_bytes(hardware),
        time=step_time(config, shape, hardware, work, rates),
        operations=update_operations(config, shape, work),
        answers=of,
    )


def what_would_fit(plan: Plan) -> list[str]:
    """Changes that make a plan fit, found by planning them: single ones first, then pairs of them."""
    model, optimizer = plan.config.model, plan.config.optimizer
    changes: list[dict[str, Any]] = []
    if not model.gradient_checkpointing:
        changes.append({"model.gradient_checkpointing": True})
    smaller = optimizer.microbatch_tokens
    while smaller > model.max_context:
        smaller = max(model.max_context, smaller // 2)
        changes.append({"optimizer.microbatch_tokens": smaller})
    if model.lora.rank == 0:
        changes.append({"model.lora.rank": 16})
    workers = plan.config.environment.workers
    while plan.hardware.accelerator.is_cpu and plan.environments and workers > 1:
        workers //= 2
        changes.append({"environment.workers": workers})
    found = [change for change in changes if _changed(plan, change).fits]
    if not found:
        pairs = [one | two for i, one in enumerate(changes) for two in changes[i + 1 :] if one.keys() != two.keys()]
        found = [change for change in pairs if _changed(plan, change).fits]
    if not found and (everything := {k: v for change in changes for k, v in change.items()}):
        found = [everything] if _changed(plan, everything).fits else []
    seen: dict[tuple[str, ...], dict[str, Any]] = {}
    for change in found:
        seen.setdefault(tuple(change), change)  # the mildest of its kind
    said = [" ".join(f"{k}={str(v).lower()}" for k, v in change.items()) for change in seen.values()]
    if not plan.hardware.accelerator.is_cpu:
        for nodes in NODES:
            bigger = plan.hardware.with_nodes(nodes)
            if nodes > plan.hardware.nodes and make_plan(plan.config, bigger, of=plan.answers).fits:
                said.append(f"--hardware {bigger}")
                break
    return said


def refusal(plan: Plan) -> str:
    """One line: which part, how much is missing, what would fit."""
    name, size = plan.largest
    missing = (plan.needed - plan.usable) / GIB
    options = what_would_fit(plan)
    mend = f"fits with {'; or '.join(options)}" if options else "nothing that was tried fits: take larger devices"
    return (
        f"{plan.config.name} does not fit {plan.hardware}: {plan.needed / GIB:.1f} GiB a device of "
        f"{plan.usable / GIB:.1f} usable, {missing:.1f} GiB missing; largest part: {name}, {size / GIB:.1f} GiB; {mend}"
    )


def _changed(plan: Plan, change: dict[str, Any]) -> Plan:
    tree = plan.config.model_dump()
    for key, value in change.items():
        node = tree
        *parents, leaf = key.split(".")
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    return make_plan(Config.model_validate(tree), plan.hardware, of=plan.answers)
