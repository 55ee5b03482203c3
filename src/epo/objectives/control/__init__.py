"""Entropy control by name. A new method is one module here and one line in `METHODS`."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from epo.objectives.control.adaptive import AdaptiveControl
from epo.objectives.control.aem import AEMControl
from epo.objectives.control.aepo_clip import AEPOClipControl
from epo.objectives.control.base import EntropyControl
from epo.objectives.control.bonus import BonusControl
from epo.objectives.control.clip_cov import ClipCovControl
from epo.objectives.control.clip_higher import ClipHigherControl
from epo.objectives.control.decay import EPODecayControl
from epo.objectives.control.empg import EMPGControl
from epo.objectives.control.entropic import EntroPICControl
from epo.objectives.control.entropy_advantage import EntropyAdvantageControl
from epo.objectives.control.epo import EPOControl
from epo.objectives.control.kl_cov import KLCovControl
from epo.objectives.control.none import NoControl
from epo.objectives.control.release import EPOReleaseControl
from epo.objectives.control.siren import SIRENControl


class Method(NamedTuple):
    """What a method's name stands for."""

    summary: str
    control: type[EntropyControl]
    preset: Mapping[str, Any] = {}
    """Options in which the method differs from the defaults of its class."""


METHODS: dict[str, Method] = {
    "none": Method("no entropy control: the plain baseline", NoControl),
    "bonus": Method("an entropy bonus and nothing else", BonusControl),
    "epo_base": Method("the paper's name for `bonus`", BonusControl),
    "epo": Method("EPO at the paper's values: nearly inert, see its warnings", EPOControl),
    "epo_constant_beta": Method("EPO without its phase weight (w/o DW)", EPOControl, {"schedule": "constant"}),
    "epo_strong": Method(
        "EPO with a ceiling that pushes entropy down; ours, not the paper's",
        EPOControl,
        {"alpha": 10.0},
    ),
    "epo_decay": Method("EPO-Decay: a bonus that fades over turns or over training", EPODecayControl),
    "epo_release": Method("what the authors' release computes: without effect beside `bonus`", EPOReleaseControl),
    "clip_higher": Method("PPO's clip, wider above than below (DAPO)", ClipHigherControl),
    "clip_cov": Method("drops the gradient of a few tokens that cost much entropy", ClipCovControl),
    "kl_cov": Method("a KL penalty on the tokens that cost most entropy, and no clip", KLCovControl),
    "entropic": Method("a controller that weighs positive against negative samples (EntroPIC)", EntroPICControl),
    "aepo_clip": Method("tokens clipped above keep a bounded gradient (agentic AEPO)", AEPOClipControl),
    "adaptive": Method("a bonus that acts and grows only while entropy is below a target", AdaptiveControl),
    "ea": Method("tokens of high entropy gain advantage", EntropyAdvantageControl),
    "empg": Method("confident turns, and turns that lead to one, gain advantage (EMPG)", EMPGControl),
    "aem": Method("turns weighed by their certainty inside the task's group (AEM)", AEMControl),
    "siren": Method("entropy of the most open choices among likely tokens, held to its start (SIREN)", SIRENControl),
}
"""Every method by name."""


def method_options(method: str) -> dict[str, Any]:
    """The options of `method` with their defaults.

    Raises:
        ValueError: an unknown method.
    """
    if method not in METHODS:
        raise ValueError(_unknown("entropy control method", method, list(METHODS)))
    found = METHODS[method]
    parameters = inspect.signature(found.control).parameters
    return {name: found.preset.get(name, parameter.default) for name, parameter in parameters.items()}


def make_control(method: str, **options: Any) -> EntropyControl:
    """The entropy control `method` with its options.

    Args:
        method: a key of `METHODS`.
        options: keyword arguments of its class.

    Raises:
        ValueError: an unknown method or option (the message lists the valid ones), or a bad value.

    Example::

        control = make_control("epo", alpha=1.0, kappa_low=0.5, kappa_high=1.5)
    """
    valid = method_options(method)
    for name in options:
        if name not in valid:
            raise ValueError(_unknown(f"option of entropy control {method!r}", name, list(valid)))
    return METHODS[method].control(**{**METHODS[method].preset, **options})


def _unknown(what: str, name: str, valid: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(name, valid, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
    return f"unknown {what}: {name!r}{hint} Valid: {', '.join(valid) or '(no options)'}"


__all__ = [
    "METHODS",
    "AEMControl",
    "AEPOClipControl",
    "AdaptiveControl",
    "BonusControl",
    "ClipCovControl",
    "ClipHigherControl",
    "EMPGControl",
    "EPOControl",
    "EPODecayControl",
    "EPOReleaseControl",
    "EntroPICControl",
    "EntropyAdvantageControl",
    "EntropyControl",
    "KLCovControl",
    "Method",
    "NoControl",
    "SIRENControl",
    "make_control",
    "method_options",
]
