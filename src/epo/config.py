"""What a run is: one tree of pydantic models. `epo.recipe` reads it from YAML."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, get_type_hints

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False)


def _refuse_idle(section: Section, options: tuple[str, ...], *, idle: bool, without: str, mend: str) -> None:
    """An option that was given and does nothing is a mistake that costs a run."""
    for option in options if idle else ():
        value = getattr(section, option)
        if value != type(section).model_fields[option].default:
            raise ValueError(f"{option}={value} does nothing with {without}: leave it out, or {mend}")


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
    overflow: Literal["end", "drop_oldest"] = "end"
    """What happens when a prompt outgrows `model.max_context`. `end`: the episode ends. `drop_oldest`: a transcript
    goes on without its oldest turns after the first message, which begins a new training row; a window shows fewer
    pairs."""


class TinyModelConfig(Section):
    """The Llama-architecture model that is made from nothing when `model.path` is `tiny`."""

    vocabulary_size: int = Field(default=1024, ge=300, le=65536)
    """Upper bound on the entries of the byte-level BPE trained on the suite's text."""
    hidden_size: int = Field(default=128, ge=16, multiple_of=2)
    """Width; a multiple of twice the heads."""
    layers: int = Field(default=2, ge=1)
    """Transformer blocks. With few demonstrations two learn to copy names sooner than four."""
    heads: int = Field(default=4, ge=1)
    """Attention heads."""
    intermediate_size: int = Field(default=384, ge=16)
    """Width of the feed-forward layers."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of 2*heads ({2 * self.heads})")
        return self


class LoraConfig(Section):
    """Low-rank adapters (peft) beside frozen weights; one copy of them serves policy, critic and reference."""

    rank: int = Field(default=0, ge=0, le=1024)
    """Rank of the adapters; 0 trains all weights instead."""
    alpha: float = Field(default=32.0, gt=0)
    """Adapters are scaled by alpha / rank."""
    targets: Literal["all-linear", "attention"] = "all-linear"
    """Layers that get adapters; the head never does."""

    @model_validator(mode="after")
    def _options_have_their_adapters(self) -> Self:
        _refuse_idle(self, ("alpha", "targets"), idle=self.rank == 0, without="rank=0", mend="set rank")
        return self


class ModelConfig(Section):
    path: str = "tiny"
    """`tiny` for the embedded model, a name that `epo models` lists, a directory that holds a Hugging Face causal LM in
    safetensors, or the name of one on the Hugging Face hub."""
    tiny: TinyModelConfig = TinyModelConfig()
    max_context: int = Field(default=2048, ge=16)
    """Tokens of prompt and response together; the longest sequence that is sampled or trained."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model computes; `auto` takes a GPU if there is one."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of the model's computations; all cores by default. One is better where other programs keep the cores
    busy."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights. Training small learning rates in bfloat16 loses updates."""
    compute: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type in which the matrix products are computed (autocast), by sampler and learner alike. `auto`: float32 for
    `tiny`, otherwise bfloat16 where the hardware multiplies it natively."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention kernels of transformers; `auto` takes flash_attention_2 on a GPU if it is installed, else sdpa."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward: less memory, a third more time."""
    lora: LoraConfig = LoraConfig()


class ImitationConfig(Section):
    """Warm start on expert demonstrations of the training split."""

    demonstrations: int = Field(default=200, ge=0)
    """Expert episodes to learn from; 0 skips the warm start."""
    batches: int = Field(default=400, ge=1)
    """Optimiser steps."""
    batch_size: int = Field(default=8, ge=1)
    """Demonstrations in a batch."""
    learning_rate: float = Field(default=3e-3, gt=0)
    """Peak: linear warm-up over a tenth of the batches, then linear decay to 0."""
    observation_weight: float = Field(default=0.0, ge=0)
    """Weight of predicting what the expert read, relative to what it wrote. Teaches a model made from nothing to copy
    names and to know the world; leave it at 0 for pretrained models."""


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
    `auto`: `sampler` for local, `learner` for vllm."""
    importance_cap: float = Field(default=2.0, ge=1)
    """Upper bound on those importance weights."""
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
        _refuse_idle(self, engine, idle=self.name == "local", without="name=local", mend="set name to vllm")
        _refuse_idle(
            self,
            ("importance_cap",),
            idle=not self.is_rescored,
            without="the sampler's own log-probabilities",
            mend="set old_logprobs to learner",
        )
        return self

    @property
    def is_rescored(self) -> bool:
        """The learner computes log-probabilities and entropies anew: `old_logprobs`, resolved."""
        return self.old_logprobs == "learner" or (self.old_logprobs == "auto" and self.name == "vllm")


class CriticConfig(Section):
    trunk: Literal["shared", "separate"] = "shared"
    """`shared`: a value head on the policy's hidden states. `separate`: a copy of the model with its own value head;
    with LoRA, a second adapter on the same weights."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Of the value head, and of the separate trunk; constant over training."""
    coefficient: float = Field(default=0.5, ge=0)
    """Weight of the value loss."""
    clip: float | None = Field(default=None, gt=0)
    """Clip range of the value update; none by default (rewards are of the order of 1)."""


class AlgorithmConfig(Section):
    name: Literal["ppo", "grpo", "dr_grpo", "rloo", "reinforce_pp", "gigpo"] = "ppo"
    """Where advantages come from. `ppo`: a critic. `grpo`, `dr_grpo`, `rloo`: the other episodes of the task.
    `reinforce_pp`: the other tokens of the step. `gigpo`: the other episodes of the task, and their turns that began in
    the same observation. Dr. GRPO by its paper also has `aggregate: constant`."""
    advantage: Literal["turn", "within_turn", "token", "bilevel"] = "turn"
    """PPO's credit assignment. `turn`: GAE across turns. `within_turn`: inside each response only (the paper's
    release). `token`: GAE over all trained tokens of the episode. `bilevel`: turns, then tokens."""
    gamma: float = Field(default=1.0, ge=0, le=1)
    """PPO: discount per turn (per token for `within_turn` and `token`; the authors of `bilevel` use 0.95). REINFORCE++:
    discount per token."""
    lam: float = Field(default=1.0, ge=0, le=1)
    """PPO: trace decay of GAE, per turn or token like `gamma`."""
    normalise_std: bool = True
    """GRPO: divide by the standard deviation of the group."""
    group_statistics: Literal["trajectory", "row"] = "trajectory"
    """GRPO and GiGPO: what mean and deviation of a group are over. `trajectory`: its episodes. `row`: all their turns,
    each paid what its episode earned less its own penalty (the paper's release), so long episodes weigh more."""
    reinforce_baseline: bool = False
    """REINFORCE++: its variant with a baseline. Every token carries the episode's reward less the mean of the task's
    episodes, without discount."""
    gigpo_gamma: float = Field(default=0.95, ge=0, le=1)
    """GiGPO: discount per turn of the returns that turns are compared by."""
    gigpo_weight: float = Field(default=1.0, ge=0)
    """GiGPO: weight of the comparison of turns beside that of episodes."""
    gigpo_normalise_std: bool = False
    """GiGPO: divide both parts by the standard deviation of what is compared."""
    whiten: bool = True
    """PPO: normalise advantages to mean 0 and variance 1 over the tokens of the step."""
    filter: Literal["none", "starpo_s", "snr"] = "none"
    """Task groups that are trained on. `starpo_s`: a share of them, those whose rewards deviate most. `snr`: the fewest
    that hold a share of the deviation of rewards, and none whose rewards are all equal."""
    filter_keep: float | None = Field(default=None, gt=0, le=1)
    """That share; 0.25 for `starpo_s` and 0.9 for `snr` by default."""
    clip_low: float = Field(default=0.2, ge=0, le=1)
    """The probability ratio is clipped below at 1 - clip_low."""
    clip_high: float = Field(default=0.2, ge=0)
    """The probability ratio is clipped above at 1 + clip_high."""
    dual_clip: float | None = Field(default=3.0, gt=1)
    """Bound on the loss of a negative advantage, in multiples of it; none to leave it unbounded."""
    aggregate: Literal["token", "trajectory", "constant"] = "token"
    """Weights of the surrogate, the KL and the value loss. `token`: every token of the mini-batch equally.
    `trajectory`: every trajectory, then turn, then token equally. `constant`, as Dr. GRPO: every token 1 /
    (trajectories * environment.max_turns * agent.max_response_tokens), so that these losses weigh far less against the
    entropy's."""
    kl_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the KL loss to the frozen starting model; 0 keeps no reference model."""
    kl_kind: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of that KL."""
    critic: CriticConfig = CriticConfig()

    @model_validator(mode="after")
    def _options_have_their_algorithm(self) -> Self:
        owners = {
            "group_statistics": ("grpo", "gigpo"),
            "normalise_std": ("grpo",),
            "reinforce_baseline": ("reinforce_pp",),
            "gigpo_gamma": ("gigpo",),
            "gigpo_weight": ("gigpo",),
            "gigpo_normalise_std": ("gigpo",),
        }
        for option, names in owners.items():
            value = getattr(self, option)
            if self.name not in names and value != type(self).model_fields[option].default:
                raise ValueError(
                    f"{option}={value} does nothing with name={self.name}: leave it out, or set name to "
                    f"{' or '.join(names)}"
                )
        if self.filter == "none" and self.filter_keep is not None:
            raise ValueError(
                f"filter_keep={self.filter_keep} does nothing without a filter: set filter to starpo_s or snr"
            )
        return self

    @property
    def compares_episodes(self) -> str | None:
        """The setting, if any, that needs several episodes of a task."""
        if self.filter != "none":
            return f"algorithm.filter={self.filter}"
        if self.name == "reinforce_pp":
            return "algorithm.reinforce_baseline=true" if self.reinforce_baseline else None
        return None if self.name == "ppo" else f"algorithm.name={self.name}"


class EntropyConfig(Section):
    """Entropy control: a method by name, and beside the name the options of that method.

    The options come from the method's own signature in `epo.objectives.control`, with their defaults filled in.
    """

    model_config = ConfigDict(extra="allow")

    method: str = "none"
    """How entropy is controlled; `epo methods` lists the methods and their options."""

    @model_validator(mode="after")
    def _fill_in(self) -> Self:
        # Here, not above: torch takes a second to import, and most commands never look at the objectives.
        from epo.objectives.control import make_control, method_options

        given = dict(self.__pydantic_extra__ or {})
        try:
            is_known = given.keys() <= method_options(self.method).keys()
            checked = options_model(self.method).model_validate(given).model_dump() if is_known else given
            make_control(self.method, **checked)
        except ValidationError as error:
            first = error.errors()[0]
            name, given_value, message = first["loc"][0], repr(first["input"])[:200], first["msg"]
            raise ValueError(f"{name}={given_value} is not allowed: {message[0].lower()}{message[1:]}") from None
        self.__pydantic_extra__ = checked
        return self

    def options(self) -> dict[str, Any]:
        """The keyword options that `epo.objectives.make_control` takes for `method`."""
        return dict(self.__pydantic_extra__ or {})


def options_model(method: str) -> type[BaseModel]:
    """The options of an entropy control method as a model, made from the signature and docstring of its class."""
    from epo.objectives.control import METHODS, method_options

    control = METHODS[method].control
    hints = get_type_hints(control.__init__)
    fields: dict[str, Any] = {
        name: (hints[name], Field(default=default)) for name, default in method_options(method).items()
    }
    return create_model(
        f"{control.__name__}Options", __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **fields
    )


class OptimizerConfig(Section):
    learning_rate: float = Field(default=3e-6, gt=0)
    """Peak learning rate of the policy: linear warm-up, cosine decay to `min_ratio` of it."""
    warmup_fraction: float = Field(default=0.1, ge=0, le=1)
    """Share of the RL steps in which the rate rises from `min_ratio` to 1 of its peak."""
    min_ratio: float = Field(default=0.2, ge=0, le=1)
    """Where the rate starts and ends, as a share of its peak."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of AdamW\'s first and second moments."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Of AdamW, on all weights."""
    grad_clip: float = Field(default=1.0, gt=0)
    """Largest gradient norm, of the policy and of the critic each."""
    minibatches: int = Field(default=4, ge=1)
    """Optimiser steps per pass over the step's task groups; the number does not depend on how many rows there are."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the data of a step."""
    microbatch_tokens: int = Field(default=8192, ge=1)
    """Tokens, padding included, that one forward pass may hold; changes memory and speed, not the result."""


class EvaluationConfig(Section):
    every: int = Field(default=5, ge=0)
    """RL steps between evaluations; 0 evaluates before and after training only."""
    splits: list[str] = ["iid", "ood"]
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
    """Checkpoints kept."""


class HealthConfig(Section):
    """Alarms, judged every step from the metrics so far (docs/health.md). They change nothing of the training. The key
    of an alarm is its threshold."""

    halt: list[str] = []
    """Alarms that stop the run when they begin, before another checkpoint is written."""
    prompts: int = Field(default=4, ge=0, le=64)
    """Different tasks whose responses are scored under each other's prompts every step, for the mutual information of
    what the policy reads and writes; the cost grows with the square. 0 leaves it out."""
    warmup: int = Field(default=5, ge=3)
    """Steps before anything is compared with earlier steps."""
    window: int = Field(default=10, ge=3)
    """Steps whose median is what a step is compared with."""
    entropy_eruption: float = Field(default=2.0, gt=1)
    """`entropy/mean` above this many times its recent median."""
    entropy_collapse: float = Field(default=0.1, ge=0, lt=1)
    """`entropy/mean` below this share of what the run began with."""
    entropy_oscillation: float = Field(default=0.5, gt=0)
    """`entropy/oscillation` above this share of the mean entropy of the same steps."""
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

    @field_validator("halt")
    @classmethod
    def _name_alarms(cls, halt: list[str]) -> list[str]:
        if not halt:
            return halt
        from epo.reporting.alarms import ALARMS

        if unknown := [name for name in halt if name not in ALARMS]:
            raise ValueError(f"there is no alarm {', '.join(map(repr, unknown))}: choose from {', '.join(ALARMS)}")
        return halt


class RecordConfig(Section):
    """What is kept for people to look at; changes nothing of the training."""

    alternatives: int = Field(default=3, ge=0, le=20)
    """Most probable tokens kept beside every token that was drawn."""


class LoggingConfig(Section):
    """Where the metrics go besides the run folder; changes nothing of the training."""

    to: list[Literal["tensorboard", "wandb", "trackio"]] = ["tensorboard"]
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
        _refuse_idle(self, ("mode",), idle="wandb" not in self.to, without="to lacking wandb", mend="add wandb to it")
        return self


class Config(Section):
    name: str = Field(default="run", pattern=r"^[^/\\.][^/\\]*$")
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
    entropy: EntropyConfig = EntropyConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    record: RecordConfig = RecordConfig()
    logging: LoggingConfig = LoggingConfig()
    health: HealthConfig = HealthConfig()

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
        if self.sampler.name == "vllm" and not self.sampler.is_rescored:
            raise ValueError(
                "sampler.old_logprobs=sampler needs the entropy of every drawn token, which sampler.name=vllm does not "
                "deliver: set sampler.old_logprobs to learner or auto"
            )
        if self.entropy.options().get("max_turns", 0) is None:
            self.entropy.__pydantic_extra__ = self.entropy.options() | {"max_turns": self.environment.max_turns}
        return self

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
