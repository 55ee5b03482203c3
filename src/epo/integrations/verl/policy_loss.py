# pyright: reportMissingImports=false, reportUntypedFunctionDecorator=false
"""The policy loss `epo` and its options, as verl registers and configures them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla, register_policy_loss
from verl.workers.config import PolicyLossConfig

from epo.errors import UserError
from epo.objectives import EntropyControl, make_control

LOSS_MODE = "epo"

_HOOKS_OF_OTHER_PLACES = ("shape_advantages", "preview", "surrogate")
"""Hooks of `EntropyControl` that change what verl's own loss and estimators compute."""


@dataclass
class EPOPolicyLossConfig(PolicyLossConfig):
    """`actor_rollout_ref.actor.policy_loss` with `_target_: epo.integrations.verl.EPOPolicyLossConfig`.

    Options are checked when verl reads its configuration, before anything is loaded.
    """

    loss_mode: str = LOSS_MODE
    method: str = "epo"
    """A key of `epo.objectives.METHODS` that adds to the loss and changes nothing else."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the method; unknown ones are refused."""
    total_steps: int | None = None
    """K of the phase weight: updates of the actor in the whole run. None: verl's `optim.total_training_steps`."""

    def __post_init__(self) -> None:
        if self.loss_mode != LOSS_MODE:
            raise UserError(
                f"actor.policy_loss.loss_mode is {self.loss_mode!r}, but actor.policy_loss._target_ is "
                f"EPOPolicyLossConfig; set loss_mode={LOSS_MODE}, or leave _target_ as it is"
            )
        if self.total_steps is not None and self.total_steps < 1:
            raise UserError(f"actor.policy_loss.total_steps must be at least 1, got {self.total_steps}")
        self.make_control()

    def make_control(self) -> EntropyControl:
        """A new control without history.

        Raises:
            UserError: an unknown method or option, a bad value, or a method that needs more than the loss.
        """
        try:
            control = make_control(self.method, **self.options)
        except ValueError as error:
            raise UserError(f"actor.policy_loss (method {self.method!r}): {error}") from None
        needs = [
            hook for hook in _HOOKS_OF_OTHER_PLACES if getattr(type(control), hook) != getattr(EntropyControl, hook)
        ]
        needs += ["nucleus"] if control.nucleus is not None else []
        if needs:
            raise UserError(
                f"actor.policy_loss.method={self.method!r} works by {', '.join(needs)}, which inside verl is verl's; "
                "take a method that acts by the loss alone, such as epo, epo_strong, epo_decay, bonus or adaptive"
            )
        return control


class LossCall:
    """One call of verl's loss: what the registered function was configured with, for the engine that made the call."""

    actor_config: Any = None
    """verl's `ActorConfig`; None until `epo_policy_loss` has run."""


_CALL: ContextVar[LossCall | None] = ContextVar("epo_verl_loss_call", default=None)


@contextmanager
def loss_call() -> Iterator[LossCall]:
    """Around a call of verl's loss by an engine that adds the entropy term to its result."""
    call = LossCall()
    token = _CALL.set(call)
    try:
        yield call
    finally:
        _CALL.reset(token)


@register_policy_loss(LOSS_MODE)
def epo_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """verl's clipped surrogate (`vanilla`), to which the engine `epo` adds the entropy term.

    verl gives a registered loss neither entropies nor trajectories; outside the engine it would be `vanilla` without a
    word, so it refuses.

    Raises:
        UserError: called by an engine that adds no entropy term, or with verl's own entropy bonus beside it.
    """
    call = _CALL.get()
    if call is None:
        raise UserError(
            f"actor.policy_loss.loss_mode={LOSS_MODE} needs the engine that adds the entropy term: set "
            "actor_rollout_ref.model.model_type=epo, with actor_rollout_ref.actor.strategy=fsdp or fsdp2"
        )
    if config.entropy_coeff != 0:
        raise UserError(
            f"actor.entropy_coeff={config.entropy_coeff} would add verl's own entropy bonus to EPO's; set it to 0 "
            "and give the coefficient in actor.policy_loss.options"
        )
    call.actor_config = config
    return compute_policy_loss_vanilla(
        old_log_prob=old_log_prob,
        log_prob=log_prob,
        advantages=advantages,
        response_mask=response_mask,
        loss_agg_mode=loss_agg_mode,
        config=config,
        rollout_is_weights=rollout_is_weights,
    )
