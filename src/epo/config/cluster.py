"""What a run is granted on a Ray cluster."""

from __future__ import annotations

from pydantic import Field

from epo.config.section import Section


class ClusterConfig(Section):
    """What `epo train --cluster` asks Ray for (docs/scaling.md). Changes where a run computes, not what, but for
    `max_staleness`. Without `--cluster` every step is synchronous."""

    workers: int = Field(default=2, ge=1)
    """Rollout workers: Ray actors, each with environments and a sampler of its own."""
    episodes_per_worker: int = Field(default=8, ge=1, le=512)
    """Episodes that are live at once in a worker; also its environment processes."""
    worker_cpus: float = Field(default=1.0, gt=0)
    """Cores that Ray sets aside for a worker; also its threads, unless `model.threads` says so."""
    worker_gpus: float = Field(default=0.0, ge=0)
    """GPUs that Ray sets aside for a worker."""
    max_staleness: int = Field(default=0, ge=0, le=16)
    """Updates by which the weights that drew a token may be older than those it is trained on. 0: a step's episodes
    begin when the update before it is done. n: those of the next n steps begin while the learner updates, and truncated
    importance weights (`sampler.importance_cap`) correct for the weights that drew them."""
    learners: int = Field(default=0, ge=0)
    """Ranks of the learner group, started by Ray Train, which share the passes, the weights and the optimiser (torch
    FSDP2). 0: the learner is in the process that was started by hand, and whole."""
    learner_cpus: float = Field(default=1.0, gt=0)
    """Cores that Ray sets aside for a rank; also its threads, unless `model.threads` says so."""
    learner_gpus: float = Field(default=0.0, ge=0)
    """GPUs that Ray sets aside for a rank; above 0 the ranks talk through NCCL, else gloo."""
    learner_seconds: float = Field(default=600.0, gt=0)
    """How long ranks wait for one another before the group counts as lost."""
    sharded_checkpoints: bool = False
    """Every rank writes a share of a checkpoint's tensors in files of its own, so that none holds all of them. Any
    number of ranks reads both kinds, and so does a single process."""
    episode_seconds: float = Field(default=1800.0, gt=0)
    """Deadline of an episode. One that is over it at the end of a turn is lost to an environment error; a worker from
    which nothing is heard for twice as long is replaced. The deadline of a turn is `environment.timeout_seconds`."""
    start_seconds: float = Field(default=600.0, gt=0)
    """How long Ray may take to bring up workers or learners, first or again, before the run fails."""
    max_losses: int = Field(default=3, ge=0)
    """How often an episode is played again because its worker was lost, and how often a lost learner is replaced,
    before the run fails."""
    object_store_mb: int | None = Field(default=None, ge=80)
    """Ray's shared memory with `--cluster local`; a third of the machine's by default."""
