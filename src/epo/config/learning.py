"""What is optimised, and how: advantages, surrogate, entropy control, optimiser."""

from __future__ import annotations

from typing import Any, Literal, Self, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from epo.config.section import Decay, Section


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
