"""Objectives for training language-model agents, in plain torch: usable in any trainer.

Example::

    from epo.objectives import make_control, token_logprobs_and_entropy, trajectory_weights
"""

from __future__ import annotations

from epo.objectives.advantages import (
    Advantages,
    bilevel_gae,
    gae,
    trajectory_gae,
    turn_gae,
    whiten,
    within_turn_gae,
)
from epo.objectives.control import (
    METHODS,
    AdaptiveControl,
    AEMControl,
    AEPOClipControl,
    BonusControl,
    ClipCovControl,
    ClipHigherControl,
    EMPGControl,
    EntroPICControl,
    EntropyAdvantageControl,
    EntropyControl,
    EPOControl,
    EPODecayControl,
    EPOReleaseControl,
    KLCovControl,
    NoControl,
    SIRENControl,
    make_control,
    method_options,
)
from epo.objectives.corridor import EntropyHistory, phase_weight, smoothing_penalty
from epo.objectives.covariance import covariances
from epo.objectives.entropy import (
    TurnMeans,
    logits_logprobs_and_entropy,
    token_logprobs_and_entropy,
    trajectory_mean,
    trajectory_weights,
    turn_means,
)
from epo.objectives.filters import snr, starpo_s
from epo.objectives.groups import discounted_returns, gigpo, group_relative, leave_one_out, reinforce_plus_plus
from epo.objectives.loss import EntropyTerm, EPOLoss, epo_loss
from epo.objectives.nucleus import logits_nucleus_entropy, nucleus_entropy
from epo.objectives.policy import Surrogate, clipped_surrogate, importance_ratio, kl_penalty, value_loss
from epo.objectives.ranks import Gathered, gather_tokens

__all__ = [
    "METHODS",
    "AEMControl",
    "AEPOClipControl",
    "AdaptiveControl",
    "Advantages",
    "BonusControl",
    "ClipCovControl",
    "ClipHigherControl",
    "EMPGControl",
    "EPOControl",
    "EPODecayControl",
    "EPOLoss",
    "EPOReleaseControl",
    "EntroPICControl",
    "EntropyAdvantageControl",
    "EntropyControl",
    "EntropyHistory",
    "EntropyTerm",
    "Gathered",
    "KLCovControl",
    "NoControl",
    "SIRENControl",
    "Surrogate",
    "TurnMeans",
    "bilevel_gae",
    "clipped_surrogate",
    "covariances",
    "discounted_returns",
    "epo_loss",
    "gae",
    "gather_tokens",
    "gigpo",
    "group_relative",
    "importance_ratio",
    "kl_penalty",
    "leave_one_out",
    "logits_logprobs_and_entropy",
    "logits_nucleus_entropy",
    "make_control",
    "method_options",
    "nucleus_entropy",
    "phase_weight",
    "reinforce_plus_plus",
    "smoothing_penalty",
    "snr",
    "starpo_s",
    "token_logprobs_and_entropy",
    "trajectory_gae",
    "trajectory_mean",
    "trajectory_weights",
    "turn_gae",
    "turn_means",
    "value_loss",
    "whiten",
    "within_turn_gae",
]
