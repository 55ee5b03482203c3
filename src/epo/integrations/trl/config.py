"""`GRPOConfig` with the options of an entropy control method."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from epo.errors import UserError
from epo.integrations.trl.compatibility import GRPOConfig
from epo.objectives import METHODS, EntropyControl, make_control, method_options

PREFIX = "epo_"

_INSTEAD = {
    "clip_higher": "TRL has this clip itself: GRPOConfig(epsilon=..., epsilon_high=...)",
    "epo_release": "in every parameter it equals epo_method='bonus' with epo_aggregate='token'",
}
"""What a refused method can be had by."""


def _option(text: str) -> Any:
    return field(default=None, metadata={"help": f"{text} Default: the method's own."})


@dataclass
class EPOConfig(GRPOConfig):
    r"""
    Configuration class for the [`EPOTrainer`]: all of [`~trl.GRPOConfig`], and the entropy term.

    An option that is left at `None` has the default of its method (`docs/methods.md`); one that the method does not
    have is refused. TRL's own entropy bonus (`entropy_coef`, `use_adaptive_entropy`) must stay off.

    Parameters:
        epo_method (`str`, *optional*, defaults to `"epo"`):
            Entropy control method: `epo`, `epo_strong`, `epo_constant_beta`, `epo_decay`, `bonus` (also `epo_base`),
            `adaptive` or `none`. Methods that do more than add a term to the loss are refused.
        epo_coefficient (`float`, *optional*):
            λ, weight of the entropy bonus. All methods but `adaptive` and `none`.
        epo_aggregate (`str`, *optional*):
            `trajectory` weighs trajectories, their turns, and the tokens of a turn alike (equation E2); `token` weighs
            every token alike. All methods but `none`.
        epo_alpha (`float`, *optional*):
            Weight of the corridor's penalty inside the bonus. EPO.
        epo_kappa_low (`float`, *optional*):
            Lower edge of the corridor, over the historical entropy. EPO.
        epo_kappa_high (`float`, *optional*):
            Upper edge of the corridor, over the historical entropy. EPO.
        epo_gamma (`float`, *optional*):
            Rate of the phase weight β_k. EPO.
        epo_schedule (`str`, *optional*):
            Phase weight: `paper`, or `constant` for β = 1. EPO.
        epo_penalty (`str`, *optional*):
            `relu`, `squared` or `indicator`. EPO.
        epo_reference (`str`, *optional*):
            One historical entropy (`scalar`), or one for every turn index (`per_turn`). EPO.
        epo_history (`str`, *optional*):
            How the steps so far are averaged: `cumulative`, `sliding` or `ema`. EPO.
        epo_window (`int`, *optional*):
            Steps of a `sliding` history. EPO.
        epo_ema_decay (`float`, *optional*):
            Decay of an `ema` history. EPO.
        epo_decay (`str`, *optional*):
            What the bonus fades over: `turn` or `phase`. `epo_decay`.
        epo_rate (`float`, *optional*):
            Rate of the fading. `epo_decay`.
        epo_max_turns (`int`, *optional*):
            Turns after which an episode is cut off. Defaults to `max_tool_calling_iterations + 1` if that is set.
            `epo_decay`.
        epo_target (`float`, *optional*):
            Entropy below which the bonus acts, nats per token. `adaptive`.
        epo_delta (`float`, *optional*):
            Change of the coefficient per RL step. `adaptive`.
        epo_maximum (`float`, *optional*):
            Greatest coefficient. `adaptive`.
        epo_initial (`float`, *optional*):
            Coefficient before the first change. `adaptive`.
    """

    epo_method: str = field(
        default="epo",
        metadata={
            "help": "Entropy control method: epo, epo_strong, epo_constant_beta, epo_decay, bonus, epo_base, adaptive "
            "or none."
        },
    )
    epo_coefficient: float | None = _option("Weight of the entropy bonus.")
    epo_aggregate: Literal["trajectory", "token"] | None = _option(
        "Weights of the entropies: trajectories, turns and tokens alike (trajectory), or every token alike (token)."
    )
    epo_alpha: float | None = _option("Weight of the corridor's penalty inside the bonus.")
    epo_kappa_low: float | None = _option("Lower edge of the corridor, over the historical entropy.")
    epo_kappa_high: float | None = _option("Upper edge of the corridor, over the historical entropy.")
    epo_gamma: float | None = _option("Rate of the phase weight.")
    epo_schedule: Literal["paper", "constant"] | None = _option("Phase weight: the paper's, or constantly 1.")
    epo_penalty: Literal["relu", "indicator", "squared"] | None = _option("Form of the corridor's penalty.")
    epo_reference: Literal["scalar", "per_turn"] | None = _option(
        "One historical entropy (scalar), or one for every turn index (per_turn)."
    )
    epo_history: Literal["cumulative", "sliding", "ema"] | None = _option("How the steps so far are averaged.")
    epo_window: int | None = _option("Steps of a sliding history.")
    epo_ema_decay: float | None = _option("Decay of an ema history.")
    epo_decay: Literal["turn", "phase"] | None = _option("What the bonus of epo_decay fades over.")
    epo_rate: float | None = _option("Rate at which the bonus of epo_decay fades.")
    epo_max_turns: int | None = _option(
        "Turns after which an episode is cut off, for epo_decay; max_tool_calling_iterations + 1 if that is set."
    )
    epo_target: float | None = _option("Entropy below which the bonus of adaptive acts, nats per token.")
    epo_delta: float | None = _option("Change of adaptive's coefficient per RL step.")
    epo_maximum: float | None = _option("Greatest coefficient of adaptive.")
    epo_initial: float | None = _option("Coefficient of adaptive before its first change.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.entropy_coef != 0 or self.use_adaptive_entropy:
            raise UserError(
                f"entropy_coef={self.entropy_coef} and use_adaptive_entropy={self.use_adaptive_entropy} would add a "
                "second entropy bonus beside epo_method's: leave both off, or use trl.GRPOTrainer"
            )
        self.make_control()  # refuses bad options here rather than when the trainer is made

    def make_control(self) -> EntropyControl:
        """The entropy control that the options describe, with nothing observed yet.

        Raises:
            UserError: a method that cannot work in TRL, an option that the method does not have, or a bad value.
        """
        refuse_method(self.epo_method)
        options = {
            item.name.removeprefix(PREFIX): value
            for item in fields(EPOConfig)
            if item.name.startswith(PREFIX)
            and item.name != "epo_method"
            and (value := getattr(self, item.name)) is not None
        }
        valid = method_options(self.epo_method)
        for name in options:
            if name not in valid:
                named = ", ".join(PREFIX + option for option in valid) or "none"
                raise UserError(f"epo_{name} is no option of epo_method={self.epo_method!r}; its options: {named}")
        if "max_turns" in valid and "max_turns" not in options and self.max_tool_calling_iterations is not None:
            options["max_turns"] = self.max_tool_calling_iterations + 1
        if "max_turns" in valid and options.get("decay", valid["decay"]) == "turn" and "max_turns" not in options:
            raise UserError(
                f"epo_method={self.epo_method!r} over turns needs epo_max_turns (or max_tool_calling_iterations), "
                "the turns after which an episode is cut off; or set epo_decay='phase'"
            )
        try:
            return make_control(self.epo_method, **options)
        except ValueError as error:
            raise UserError(f"epo_method={self.epo_method!r}: {error}") from error


def refuse_method(method: str) -> None:
    """Refuse an entropy control method that does more than add a term to the loss.

    Raises:
        UserError: such a method, with the reason, or an unknown one.
    """
    working = [name for name in METHODS if not _reasons(METHODS[name].control)]
    if method not in METHODS:
        raise UserError(f"epo_method={method!r} is no entropy control method; with TRL work: {', '.join(working)}")
    reasons = _reasons(METHODS[method].control)
    if reasons:
        instead = f" ({_INSTEAD[method]})" if method in _INSTEAD else ""
        raise UserError(
            f"epo_method={method!r} does not work inside TRL: {'; '.join(reasons)}{instead}. With TRL work: "
            f"{', '.join(working)}"
        )


def _reasons(control: type[EntropyControl]) -> list[str]:
    """Hooks beyond `entropy_loss` and `observe` that a method needs, in words."""
    reasons: list[str] = []
    if control.previews:
        reasons.append("it looks at a whole mini-batch before its first micro-batch, for which TRL has no pass")
    if control.surrogate is not EntropyControl.surrogate:
        reasons.append("it replaces the policy loss, and that is TRL's (loss_type)")
    if control.shape_advantages is not EntropyControl.shape_advantages:
        reasons.append("it needs every token's entropy before the first update, which TRL does not compute")
    return reasons
