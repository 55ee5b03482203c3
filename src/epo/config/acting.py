"""Where and how the agent acts: environment, context, episodes, sampler."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, JsonValue, model_validator

from epo.config.section import Section, refuse_idle


class EnvironmentConfig(Section):
    suite: str = "scienceworld"
    """Name of the task suite; `epo envs` lists them."""
    options: dict[str, JsonValue] = Field(default_factory=dict[str, JsonValue])
    """Options of the suite; `epo envs SUITE` describes them."""
    workers: int = Field(default=8, ge=1, le=512)
    """Worker processes, one environment each; also the number of episodes that are live at once."""
    max_turns: int = Field(default=30, ge=1, le=1000)
    """Turns after which an episode is truncated."""
    timeout_seconds: float = Field(default=60.0, gt=0)
    """Deadline of one environment call; after it the worker is replaced and the episode replayed."""
    worker_memory_mb: int | None = Field(default=1024, ge=64)
    """A worker that holds more MiB, its JVM included, is replaced before its next episode; null for no limit. What the
    suites here need is below 500."""


class AgentConfig(Section):
    context: Literal["transcript", "window"] = "transcript"
    """`transcript` appends each turn to the conversation; `window` renders the last turns anew as one message, as in
    the paper."""
    window: int = Field(default=2, ge=0)
    """Observation-action pairs that the `window` context shows."""
    format: Literal["action", "think_action"] = "think_action"
    """`action`: the response is the action. `think_action`: `<think>..</think><action>..</action>`."""
    list_actions: bool = False
    """Show the admissible actions, where the environment tells them."""
    prompt: str = "react"
    """Name of a prompt template shipped with the package, or a path to a Jinja file."""
    invalid_action_penalty: float = Field(default=0.1, ge=0)
    """Subtracted from the reward of a turn whose response lacks the required format."""
    max_response_tokens: int = Field(default=512, ge=1)
    """Tokens after which a response is cut."""
    max_action_characters: int = Field(default=500, ge=1)
    """A longer action is cut, and invalid. Games have shorter ones; calls of tools may be longer."""
    overflow: Literal["end", "drop_oldest"] = "end"
    """What happens when a prompt outgrows `model.max_context`. `end`: the episode ends. `drop_oldest`: a transcript
    goes on without its oldest turns after the first message, which begins a new training row; a window shows fewer
    pairs."""


class RolloutConfig(Section):
    tasks_per_step: int = Field(default=32, ge=1)
    """Different tasks in one RL step."""
    group_size: int = Field(default=1, ge=1)
    """Episodes of each task; what compares them (GRPO, RLOO, GiGPO, filters) needs at least 2."""
    balance: Literal["goal", "task"] = "goal"
    """`goal`: every task type equally often. `task`: every task equally often, so large types dominate."""
    temperature: float = Field(default=1.0, gt=0, le=10)
    """Of the training distribution: what is sampled from, and what log-probabilities and entropies are of."""


class SamplerConfig(Section):
    name: Literal["local", "vllm"] = "local"
    """`local`: the learner's own model. `vllm`: a vLLM engine beside it (extra `vllm`), given the new weights after
    every step."""
    old_logprobs: Literal["auto", "sampler", "learner"] = "auto"
    """Whose log-probabilities the probability ratio starts from. `sampler`: as drawn. `learner`: computed anew with the
    learner's numerics before the first optimiser step, and the difference corrected by truncated importance weights.
    `auto`: `sampler` for local, `learner` for vllm and with `cluster.max_staleness` above 0."""
    importance_cap: float = Field(default=2.0, ge=1)
    """Upper bound on those importance weights, each of a token (2 as in verl; TIS of Yao et al. 2025)."""
    kv_gib: float = Field(default=2.0, gt=0)
    """vLLM: memory for keys and values, GiB."""
    block_size: int = Field(default=32, ge=8)
    """vLLM: tokens per block of its prefix cache."""
    max_weight_error: float = Field(default=1e-3, gt=0)
    """vLLM: largest difference, in nats, between its log-probabilities of a probe text and the learner's after a weight
    update, in float32; in bfloat16 200 times that, as root mean square. Beyond it the run ends rather than sample from
    other weights."""

    @model_validator(mode="after")
    def _options_have_their_sampler(self) -> Self:
        engine = ("kv_gib", "block_size", "max_weight_error")
        refuse_idle(self, engine, idle=self.name == "local", without="name=local", mend="set name to vllm")
        return self
