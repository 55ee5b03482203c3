"""A whole run: all sections, and what must fit between them."""

from __future__ import annotations

from typing import Self

import yaml
from pydantic import Field, model_validator

from epo.config.acting import AgentConfig, EnvironmentConfig, RolloutConfig, SamplerConfig
from epo.config.cluster import ClusterConfig
from epo.config.learning import AlgorithmConfig, EntropyConfig, OptimizerConfig
from epo.config.model import ImitationConfig, ModelConfig
from epo.config.section import FOLDER_NAME, Section
from epo.config.watching import CheckpointConfig, EvaluationConfig, HealthConfig, LoggingConfig, RecordConfig


class Config(Section):
    name: str = Field(default="run", pattern=FOLDER_NAME, max_length=200)
    """Name of the recipe; the default name of the run folder."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """All randomness of the run follows from it."""
    steps: int = Field(default=100, ge=0)
    """RL steps in all; the schedules of EPO and of the learning rate span them."""
    environment: EnvironmentConfig = EnvironmentConfig()
    agent: AgentConfig = AgentConfig()
    model: ModelConfig = ModelConfig()
    imitation: ImitationConfig = ImitationConfig()
    rollout: RolloutConfig = RolloutConfig()
    sampler: SamplerConfig = SamplerConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    # A factory: the section's default asks the objectives, and torch takes seconds to import.
    entropy: EntropyConfig = Field(default_factory=EntropyConfig)
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    record: RecordConfig = RecordConfig()
    logging: LoggingConfig = LoggingConfig()
    health: HealthConfig = HealthConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _cross_checks(self) -> Self:
        if self.optimizer.minibatches > self.rollout.tasks_per_step:
            raise ValueError(
                f"optimizer.minibatches {self.optimizer.minibatches} cannot be dealt whole task groups from "
                f"rollout.tasks_per_step {self.rollout.tasks_per_step}: lower the first or raise the second"
            )
        if self.health.halt and self.checkpoint.keep < 2:
            raise ValueError(
                "health.halt needs the checkpoint before the newest, since weights show how good they are in the next "
                "step only: set checkpoint.keep to 2 or more"
            )
        if len(set(self.evaluation.splits)) < len(self.evaluation.splits):
            raise ValueError(f"evaluation.splits names a split twice: {', '.join(self.evaluation.splits)}")
        if (comparing := self.algorithm.compares_episodes) and self.rollout.group_size < 2:
            raise ValueError(f"{comparing} compares episodes of one task: set rollout.group_size to 2 or more")
        if self.model.path == "tiny" and self.imitation.demonstrations == 0:
            raise ValueError(
                "model.path='tiny' is made from demonstrations: set imitation.demonstrations, or give a model directory"
            )
        if self.agent.max_response_tokens >= self.model.max_context:
            raise ValueError(
                f"agent.max_response_tokens {self.agent.max_response_tokens} leaves no room for a prompt: "
                f"set it below model.max_context {self.model.max_context}"
            )
        if self.imitation.observation_weight > 0 and self.agent.overflow == "drop_oldest":
            raise ValueError(
                "imitation.observation_weight would teach what agent.overflow=drop_oldest shows again in a later row "
                "twice: set the first to 0 or the second to end"
            )
        if self.sampler.old_logprobs == "sampler" and self.cluster.max_staleness:
            raise ValueError(
                "sampler.old_logprobs=sampler knows nothing of the weights that an update begins with, which with "
                f"cluster.max_staleness={self.cluster.max_staleness} are not those that drew: set sampler.old_logprobs "
                "to learner or auto"
            )
        cap = self.sampler.importance_cap
        if not self.is_rescored and cap != SamplerConfig.model_fields["importance_cap"].default:
            raise ValueError(
                f"sampler.importance_cap={cap} does nothing with the sampler's own log-probabilities: leave it out, or "
                "set sampler.old_logprobs to learner"
            )
        if self.sampler.name == "vllm" and not self.is_rescored:
            raise ValueError(
                "sampler.old_logprobs=sampler needs the entropy of every drawn token, which sampler.name=vllm does not "
                "deliver: set sampler.old_logprobs to learner or auto"
            )
        if self.entropy.options().get("max_turns", 0) is None:
            self.entropy.__pydantic_extra__ = self.entropy.options() | {"max_turns": self.environment.max_turns}
        return self

    @property
    def is_rescored(self) -> bool:
        """The learner computes log-probabilities and entropies anew: `sampler.old_logprobs`, resolved."""
        sampler = self.sampler
        others = sampler.name == "vllm" or self.cluster.max_staleness > 0
        return sampler.old_logprobs == "learner" or (sampler.old_logprobs == "auto" and others)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
