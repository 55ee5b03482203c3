"""Entropy control by name. A new method is one module here and one line in `CONTROLS`."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from typing import Any

from epo.objectives.control.base import EntropyControl
from epo.objectives.control.bonus import BonusControl
from epo.objectives.control.epo import EPOControl
from epo.objectives.control.none import NoControl

CONTROLS: dict[str, type[EntropyControl]] = {
    "none": NoControl,
    "bonus": BonusControl,
    "epo_base": BonusControl,
    "epo": EPOControl,
}
"""Method name to class; `epo_base` is the paper's name for `bonus`."""


def make_control(method: str, **options: Any) -> EntropyControl:
    """The entropy control `method` with its options.

    Args:
        method: a key of `CONTROLS`.
        options: keyword arguments of its class.

    Raises:
        ValueError: an unknown method or option (the message lists the valid ones), or a bad value.

    Example::

        control = make_control("epo", alpha=1.0, kappa_low=0.5, kappa_high=1.5)
    """
    if method not in CONTROLS:
        raise ValueError(_unknown("entropy control method", method, list(CONTROLS)))
    control = CONTROLS[method]
    valid = list(inspect.signature(control).parameters)
    for name in options:
        if name not in valid:
            raise ValueError(_unknown(f"option of entropy control {method!r}", name, valid))
    return control(**options)


def _unknown(what: str, name: str, valid: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(name, valid, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
    return f"unknown {what}: {name!r}{hint} Valid: {', '.join(valid) or '(no options)'}"


__all__ = ["CONTROLS", "BonusControl", "EPOControl", "EntropyControl", "NoControl", "make_control"]
