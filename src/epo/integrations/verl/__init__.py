"""EPO inside verl 0.9.1. Importing it registers with verl, by verl's own means::

    VERL_USE_EXTERNAL_MODULES=epo.integrations.verl python -m verl.trainer.main_ppo \\
        actor_rollout_ref.model.model_type=epo \\
        actor_rollout_ref.actor.policy_loss.loss_mode=epo ...

Registered are the policy loss `epo`, the engine `epo` that hands it what verl's losses do not get (entropies, turns,
trajectories), and the advantage estimators `epo_*`. docs/verl.md has the whole configuration and its limits.
"""

from __future__ import annotations

from epo.integrations.verl import _version as _version  # refuses a verl that does not fit, before anything registers
from epo.integrations.verl.advantages import (
    bilevel_gae_estimator,
    grpo_estimator,
    trajectory_gae_estimator,
    turn_gae_estimator,
)
from epo.integrations.verl.engine import EPOEngine
from epo.integrations.verl.policy_loss import EPOPolicyLossConfig, epo_policy_loss

__all__ = [
    "EPOEngine",
    "EPOPolicyLossConfig",
    "bilevel_gae_estimator",
    "epo_policy_loss",
    "grpo_estimator",
    "trajectory_gae_estimator",
    "turn_gae_estimator",
]
