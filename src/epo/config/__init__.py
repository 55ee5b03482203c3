"""What a run is: one tree of pydantic models. `epo.recipe` reads it from YAML."""

from epo.config.acting import AgentConfig, EnvironmentConfig, RolloutConfig, SamplerConfig
from epo.config.cluster import ClusterConfig
from epo.config.learning import AlgorithmConfig, CriticConfig, EntropyConfig, OptimizerConfig, options_model
from epo.config.model import ImitationConfig, LoraConfig, ModelConfig, TinyModelConfig
from epo.config.run import Config
from epo.config.section import Section
from epo.config.watching import CheckpointConfig, EvaluationConfig, HealthConfig, LoggingConfig, RecordConfig

__all__ = [
    "AgentConfig",
    "AlgorithmConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "CriticConfig",
    "EntropyConfig",
    "EnvironmentConfig",
    "EvaluationConfig",
    "HealthConfig",
    "ImitationConfig",
    "LoggingConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RecordConfig",
    "RolloutConfig",
    "SamplerConfig",
    "Section",
    "TinyModelConfig",
    "options_model",
]
