"""What a run is: one tree of pydantic models, read from YAML recipes, checked before anything starts.

A recipe may name a parent with `extends:`; dotted overrides (`optimizer.learning_rate=1e-4`) come last. Unknown keys
are errors that offer the nearest valid name.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from epo.errors import UserError

Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False)


class EnvironmentConfig(Section):
    suite: str = "scienceworld"
    """Name of the task suite; `epo envs` lists them."""
    options: dict[str, Any] = Field(default_factory=dict[str, Any])
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


class TinyModelConfig(Section):
    """The Llama-architecture model that is made from nothing when `model.path` is `tiny`."""

    vocabulary_size: int = Field(default=1024, ge=300, le=65536)
    """Upper bound on the entries of the byte-level BPE trained on the suite's text."""
    hidden_size: int = Field(default=192, ge=16, multiple_of=2)
    layers: int = Field(default=4, ge=1)
    heads: int = Field(default=4, ge=1)
    intermediate_size: int = Field(default=512, ge=16)

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of 2*heads ({2 * self.heads})")
        return self


class ModelConfig(Section):
    path: str = "tiny"
    """`tiny` for the embedded model, or a directory that holds a Hugging Face causal LM in safetensors."""
    tiny: TinyModelConfig = TinyModelConfig()
    max_context: int = Field(default=2048, ge=16)
    """Tokens of prompt and response together; the longest sequence that is sampled or trained."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of the model's computations; all cores by default. One is better where other programs keep the cores
    busy."""
    dtype: Literal["float32", "bfloat16"] = "float32"


class ImitationConfig(Section):
    """Warm start on expert demonstrations of the training split."""

    demonstrations: int = Field(default=200, ge=0)
    """Expert episodes to learn from; 0 skips the warm start."""
    batches: int = Field(default=400, ge=1)
    batch_size: int = Field(default=8, ge=1)
    """Demonstrations in a batch."""
    learning_rate: float = Field(default=3e-3, gt=0)
    observation_weight: float = Field(default=0.0, ge=0)
    """Weight of predicting what the expert read, relative to what it wrote. Teaches a model made from nothing to copy
    names and to know the world; leave it at 0 for pretrained models."""


class RolloutConfig(Section):
    tasks_per_step: int = Field(default=32, ge=1)
    """Different tasks in one RL step."""
    group_size: int = Field(default=1, ge=1)
    """Episodes of each task; GRPO needs at least 2."""
    balance: Literal["goal", "task"] = "goal"
    """`goal`: every task type equally often. `task`: every task equally often, so large types dominate."""
    temperature: float = Field(default=1.0, gt=0, le=10)


class CriticConfig(Section):
    trunk: Literal["shared", "separate"] = "shared"
    """`shared`: a value head on the policy's hidden states. `separate`: a copy of the model with its own value head."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Of the value head, and of the separate trunk; constant over training."""
    coefficient: float = Field(default=0.5, ge=0)
    """Weight of the value loss."""
    clip: float | None = Field(default=None, gt=0)
    """Clip range of the value update; none by default (rewards are of the order of 1)."""


class AlgorithmConfig(Section):
    name: Literal["ppo", "grpo"] = "ppo"
    advantage: Literal["turn", "within_turn", "token", "bilevel"] = "turn"
    """PPO's credit assignment. `turn`: GAE across turns. `within_turn`: inside each response only (the paper's
    release). `token`: GAE over all trained tokens of the episode. `bilevel`: turns, then tokens."""
    gamma: float = Field(default=1.0, ge=0, le=1)
    lam: float = Field(default=1.0, ge=0, le=1)
    normalise_std: bool = True
    """GRPO: divide by the standard deviation of the group."""
    whiten: bool = True
    """PPO: normalise advantages to mean 0 and variance 1 over the tokens of the step."""
    clip_low: float = Field(default=0.2, ge=0)
    clip_high: float = Field(default=0.2, ge=0)
    dual_clip: float | None = Field(default=3.0, gt=1)
    aggregate: Literal["token", "trajectory"] = "token"
    """Weights of the surrogate: every token of the mini-batch equally, or every trajectory, then turn, then token
    equally."""
    kl_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the KL loss to the frozen starting model; 0 keeps no reference model."""
    kl_kind: Literal["k1", "k2", "k3"] = "k3"
    critic: CriticConfig = CriticConfig()


class EntropyConfig(Section):
    """Entropy control; the symbols are those of EPO, arXiv 2509.22576 v2."""

    method: Literal["none", "bonus", "epo"] = "none"
    """`none`: coefficient 0. `bonus`: the entropy term alone (EPO-Base). `epo`: with the smoothing corridor."""
    coefficient: float = Field(default=0.001, ge=0)
    """lambda: weight of the entropy term."""
    alpha: float = Field(default=0.05, ge=0)
    """Weight of the smoothing penalty relative to the entropy term."""
    kappa_low: float = Field(default=0.0, ge=0)
    """Lower edge of the corridor as a multiple of the historical entropy; 0 means no floor."""
    kappa_high: float = Field(default=2.0, gt=0)
    """Upper edge of the corridor as a multiple of the historical entropy."""
    gamma: float = Field(default=3.0, gt=0)
    """Decay of the phase weight beta."""
    penalty: Literal["relu", "indicator", "squared"] = "relu"
    history: Literal["scalar", "per_turn"] = "scalar"
    schedule: Literal["paper", "constant"] = "paper"

    @model_validator(mode="after")
    def _corridor_is_open(self) -> Self:
        if self.kappa_low >= self.kappa_high:
            raise ValueError(f"kappa_low {self.kappa_low} must be below kappa_high {self.kappa_high}")
        return self

    def options(self) -> dict[str, Any]:
        """The keyword options that `epo.objectives.make_control` takes for `method`."""
        if self.method == "none":
            return {}
        if self.method == "bonus":
            return {"coefficient": self.coefficient}
        return self.model_dump(exclude={"method"})


class OptimizerConfig(Section):
    learning_rate: float = Field(default=3e-6, gt=0)
    """Peak learning rate of the policy: linear warm-up, cosine decay to `min_ratio` of it."""
    warmup_fraction: float = Field(default=0.1, ge=0, le=1)
    min_ratio: float = Field(default=0.2, ge=0, le=1)
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    weight_decay: float = Field(default=0.01, ge=0)
    grad_clip: float = Field(default=1.0, gt=0)
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
    episodes: int = Field(default=128, ge=1)
    """Episodes of the fixed panel of each split at the first and the last evaluation."""
    interim_episodes: int | None = Field(default=None, ge=1)
    """Episodes at evaluations in between, the first ones of the same panel; all by default."""
    temperature: float = Field(default=0.4, ge=0)
    """0 is greedy."""


class CheckpointConfig(Section):
    every: int = Field(default=5, ge=1)
    """RL steps between checkpoints; the last step and an interruption always write one."""
    keep: int = Field(default=2, ge=1)
    """Checkpoints kept."""


class Config(Section):
    name: str = "run"
    """Name of the recipe; the default name of the run folder."""
    seed: int = Field(default=0, ge=0)
    steps: int = Field(default=100, ge=0)
    """RL steps in all; the schedules of EPO and of the learning rate span them."""
    environment: EnvironmentConfig = EnvironmentConfig()
    agent: AgentConfig = AgentConfig()
    model: ModelConfig = ModelConfig()
    imitation: ImitationConfig = ImitationConfig()
    rollout: RolloutConfig = RolloutConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    entropy: EntropyConfig = EntropyConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _cross_checks(self) -> Self:
        if self.algorithm.name == "grpo" and self.rollout.group_size < 2:
            raise ValueError("algorithm.name=grpo compares episodes of one task: set rollout.group_size to 2 or more")
        if self.model.path == "tiny" and self.imitation.demonstrations == 0:
            raise ValueError(
                "model.path='tiny' is made from demonstrations: set imitation.demonstrations, or give a model directory"
            )
        if self.agent.max_response_tokens >= self.model.max_context:
            raise ValueError(
                f"agent.max_response_tokens {self.agent.max_response_tokens} leaves no room for a prompt: "
                f"set it below model.max_context {self.model.max_context}"
            )
        return self

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


# Besides its own errors PyYAML lets those of Python's constructors through: 2024-13-45 is a ValueError.
_YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError)


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package, folders as prefixes. `_name` files are parts of recipes."""
    root = Path(str(resources.files("epo") / "recipes"))
    files = [path for path in root.rglob("*.yaml") if not path.name.startswith("_")]
    # Not with_suffix: model names in recipe names have dots.
    return sorted(path.relative_to(root).as_posix().removesuffix(".yaml") for path in files)


def load_config(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe by name or path, apply `key=value` overrides, and check everything.

    Raises:
        UserError: unknown recipe or key (the nearest name is offered), bad value, unreadable file.
    """
    tree = _read(recipe, seen=())
    tree.setdefault("name", Path(recipe).name.removesuffix(".yaml"))
    return parse_config(_override(tree, overrides))


def apply_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """`config` with `key=value` overrides applied, checked again.

    Raises:
        UserError: unknown key or bad value.
    """
    return parse_config(_override(config.model_dump(mode="json"), overrides))


def parse_config(tree: Mapping[str, Any]) -> Config:
    """Check a plain tree of values.

    Raises:
        UserError: names the first bad field, its value, and what is allowed.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(error)) from None


def _read(recipe: str, *, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = _locate(recipe)
    if path in seen:
        raise UserError(f"recipe {recipe!r} extends itself: " + " -> ".join(p.name for p in (*seen, path)))
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, *_YAML_ERRORS) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"recipe {str(path)!r} cannot be read as YAML: {reason}") from None
    if loaded is None:
        loaded = {}
    if not isinstance(loaded, dict):
        raise UserError(f"recipe {str(path)!r} must be a mapping of sections, not a {type(loaded).__name__}")
    tree = cast("dict[str, Any]", loaded)
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    beside = [str(path.parent / f"{parent}{suffix}") for suffix in (".yaml", "")]
    base = _read(next((p for p in beside if _is_recipe_file(p)), str(parent)), seen=(*seen, path))
    base.pop("name", None)
    return _merge(base, tree)


def _locate(recipe: str) -> Path:
    if _is_recipe_file(recipe):
        return Path(recipe).resolve()
    if recipe in recipe_names():
        return Path(str(resources.files("epo") / "recipes" / f"{recipe}.yaml"))
    raise UserError(
        f"unknown recipe {recipe!r}{_nearest(recipe, recipe_names())}. Recipes: {', '.join(recipe_names())}; "
        "or give the path of a .yaml file"
    )


def _is_recipe_file(name: str) -> bool:
    # Not Path.is_file, which raises when a name is too long for the file system.
    return name.endswith((".yaml", ".yml")) and os.path.isfile(name)


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            if key == "environment" and "suite" in value:
                _leave_suite(base[key], value["suite"])
            _merge(base[key], cast("dict[str, Any]", value))
        else:
            base[key] = value
    return base


def _leave_suite(environment: dict[str, Any], suite: Any) -> None:
    """`environment.options` belong to one suite: a new suite starts from no options."""
    if suite != environment.get("suite", EnvironmentConfig.model_fields["suite"].default):
        environment.pop("options", None)


def _override(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    # The suite first: options on the same command line are meant for it, in whatever order they are given.
    for override in sorted(overrides, key=lambda text: not text.startswith("environment.suite=")):
        _apply(tree, override)
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r} is not of the form key=value, for example optimizer.learning_rate=1e-4")
    try:
        value = yaml.safe_load(text)
    except _YAML_ERRORS:
        raise UserError(f"override {override!r}: the value {text!r} is not valid YAML; quote it") from None
    node = tree
    *parents, leaf = key.split(".")
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"override {override!r}: {parent!r} is a value, not a section")
        node = cast("dict[str, Any]", child)
    if key == "environment.suite":
        _leave_suite(node, value)
    node[leaf] = value


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        fields = _fields_at(first["loc"][:-1])
        name = str(first["loc"][-1])
        everywhere = [f for f in _all_fields(Config) if f.split(".")[-1] == name]
        hint = _nearest(name, fields) or (f" (did you mean {everywhere[0]!r}?)" if everywhere else "")
        return f"unknown key {where!r}{hint}. Valid here: {', '.join(fields)}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "model_type":
        message = "a section of keys and values goes here"
    if first["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where}={_shorten(repr(first['input']))} is not allowed: {message[0].lower()}{message[1:]}"


def _shorten(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = Config
    for part in location:
        annotation = model.model_fields[str(part)].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        model = annotation
    return list(model.model_fields)


def _all_fields(model: type[BaseModel], prefix: str = "") -> list[str]:
    names: list[str] = []
    for name, info in model.model_fields.items():
        names.append(prefix + name)
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            names += _all_fields(info.annotation, f"{prefix}{name}.")
    return names


def _nearest(name: str, options: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def cache_dir() -> Path:
    """Where prepared things live between runs: `$EPO_CACHE`, else `~/.cache/epo`."""
    root = os.environ.get("EPO_CACHE")
    return Path(root) if root else Path.home() / ".cache" / "epo"
