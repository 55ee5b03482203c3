"""What is measured, kept and shown. Only `evaluation` and `checkpoint` decide when a run pauses for it."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from epo.config.section import Section, refuse_idle


class EvaluationConfig(Section):
    every: int = Field(default=5, ge=0)
    """RL steps between evaluations; 0 evaluates before and after training only."""
    splits: list[str] = Field(default=["iid", "ood"])
    """Splits whose panels are played."""
    episodes: int = Field(default=128, ge=1)
    """Episodes of the fixed panel of each split before and after training; at most all tasks of the split."""
    interim_episodes: int | None = Field(default=None, ge=1)
    """Episodes at evaluations in between, the first ones of the same panel; all by default."""
    temperature: float = Field(default=0.4, ge=0)
    """0 is greedy."""


class CheckpointConfig(Section):
    every: int = Field(default=5, ge=1)
    """RL steps between checkpoints; the last step and an interruption always write one."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints kept. The last good one (docs/health.md) and the best one are kept besides."""
    best: bool = True
    """An evaluation that beats all before it (mean success over its panels) writes a checkpoint, which is kept until
    another beats it: `epo eval RUN --checkpoint best`. The evaluation before RL is the first to beat. Evaluations are
    compared as they are: fewer `evaluation.interim_episodes` are more luck."""


class HealthConfig(Section):
    """Alarms, judged every step from the metrics so far (docs/health.md). They change nothing of the training. The key
    of an alarm is its threshold."""

    halt: list[str] = Field(default=[])
    """Alarms that stop the run when they begin, before another checkpoint is written."""
    prompts: int = Field(default=4, ge=0, le=64)
    """Different tasks whose responses are scored under each other's prompts every step, for the mutual information of
    what the policy reads and writes; the cost grows with the square. 0 leaves it out."""
    warmup: int = Field(default=3, ge=3)
    """Steps before anything is compared with earlier steps."""
    window: int = Field(default=10, ge=3)
    """Steps whose median is what a step is compared with."""
    entropy_eruption: float = Field(default=2.0, gt=1)
    """`entropy/mean` above this many times its recent median."""
    entropy_collapse: float = Field(default=0.1, ge=0, lt=1)
    """`entropy/mean` below this share of what the run began with."""
    entropy_oscillation: float = Field(default=0.5, gt=0)
    """`entropy/oscillation` above this share of the mean entropy of the steps before."""
    cascade: float = Field(default=2.0, gt=1)
    """Entropy of late turns less that of early turns, above this many times its recent median."""
    reward_variance: float = Field(default=0.25, ge=0, lt=1)
    """`reward/std` below this share of the best level it had."""
    gradient_spike: float = Field(default=5.0, gt=1)
    """`policy/grad_norm` or `value/grad_norm` above this many times its recent median."""
    invalid_actions: float = Field(default=0.1, gt=0, le=1)
    """`turns/invalid` or `turns/not_understood` this far above its recent median."""
    length: float = Field(default=1.5, gt=1)
    """`response/tokens` above this many times its recent median."""
    repetition: float = Field(default=0.1, gt=0, le=1)
    """`response/repetition` or `turns/repeated` this far above its recent median."""
    template_collapse: float = Field(default=0.25, ge=0, lt=1)
    """`input/mutual_information` below this share of the best level it had."""
    sampler_mismatch: float = Field(default=0.01, gt=0)
    """`sampler/mismatch_kl` above this many nats per token."""
    equal_groups: float = Field(default=0.8, ge=0, lt=1)
    """`groups/all_equal` above this share."""
    dead_critic: float = Field(default=0.01, lt=1)
    """`value/explained_variance` below this in every one of the last `window` steps."""
    environment_errors: float = Field(default=0.1, ge=0, lt=1)
    """`stop/environment_error` above this share of the step's episodes."""

    @field_validator("halt")
    @classmethod
    def _name_alarms(cls, halt: list[str]) -> list[str]:
        if not halt:
            return halt
        from epo.reporting.health.alarms import ALARMS

        if unknown := [name for name in halt if name not in ALARMS]:
            raise ValueError(f"there is no alarm {', '.join(map(repr, unknown))}: choose from {', '.join(ALARMS)}")
        return halt


class RecordConfig(Section):
    """What is kept for people to look at; changes nothing of the training."""

    alternatives: int = Field(default=3, ge=0, le=20)
    """Most probable tokens kept beside every token that was drawn."""
    skipped: int = Field(default=4, ge=0, le=100)
    """Batches of optimiser steps skipped for a loss or gradient that is not finite that are kept in `skipped/`, the
    first of the run (docs/reliability.md)."""


class LoggingConfig(Section):
    """Where the metrics go besides the run folder; changes nothing of the training."""

    to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default=["tensorboard"])
    """Loggers; `[]` for none. The run folder always has everything."""
    project: str = Field(default="epo", pattern=r"^[\w.-]+$")
    """Project of Weights & Biases and trackio."""
    run_name: str | None = None
    """Name of the run in them; default: that of the run folder."""
    mode: Literal["offline", "online"] = "offline"
    """`online` sends metrics and configuration to the Weights & Biases server while training. trackio stays on this
    machine in either mode."""

    @model_validator(mode="after")
    def _online_has_a_server(self) -> Self:
        if len(set(self.to)) < len(self.to):
            raise ValueError(f"to names a logger twice: {', '.join(self.to)}")
        refuse_idle(self, ("mode",), idle="wandb" not in self.to, without="to lacking wandb", mend="add wandb to it")
        return self
