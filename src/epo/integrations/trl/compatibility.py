"""What of TRL the trainer builds on, checked when it is imported: most of it is not TRL's public interface."""

from __future__ import annotations

import inspect
from importlib.metadata import PackageNotFoundError, version

from epo.errors import UserError

TESTED = ("1.16.0",)
"""Versions of TRL the tests ran with."""

_METHODS: dict[str, tuple[str, ...]] = {
    "__init__": ("model", "reward_funcs", "args"),
    "training_step": ("model", "inputs", "num_items_in_batch"),
    "_generate_and_score_completions": ("inputs",),
    "_get_per_token_logps_and_entropies": ("model", "compute_entropy"),
    "_compute_loss": ("model", "inputs"),
    "_save_checkpoint": ("model", "trial"),
    "_load_optimizer_and_scheduler": ("checkpoint",),
}
"""Methods of `GRPOTrainer` that are overridden, and the arguments they must take."""

_ATTRIBUTES = ("_metrics", "_step", "num_iterations")
"""What a trainer must have, once it is made."""


def check_class(trainer: type) -> None:
    """Refuse a TRL whose `GRPOTrainer` cannot be built upon.

    Raises:
        UserError: an extension point is missing.
    """
    missing = [
        f"{name}({argument})"
        for name, arguments in _METHODS.items()
        for argument in arguments
        if argument not in _arguments(trainer, name)
    ]
    # Otherwise the Trainer divides by the number of micro-batches what is divided already.
    if getattr(trainer, "loss_is_scaled_for_ga", None) is not True:
        missing.append("loss_is_scaled_for_ga = True")
    _refuse(missing)


def check_instance(trainer: object) -> None:
    """The same for what only a trainer that was made has.

    Raises:
        UserError: an extension point is missing.
    """
    _refuse([name for name in _ATTRIBUTES if not hasattr(trainer, name)])


def installed_version() -> str:
    """TRL's version."""
    try:
        return version("trl")
    except PackageNotFoundError:
        return "(unknown)"


def _arguments(trainer: type, name: str) -> set[str]:
    method = getattr(trainer, name, None)
    return set(inspect.signature(method).parameters) if callable(method) else set()


def _refuse(missing: list[str]) -> None:
    if missing:
        raise UserError(
            f"epo.integrations.trl works with TRL {', '.join(TESTED)}; the installed TRL {installed_version()} lacks "
            f"what it builds on: GRPOTrainer.{', GRPOTrainer.'.join(missing)}. "
            f"Install a version that works: pip install 'trl=={TESTED[-1]}'"
        )


try:
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer
except ImportError as error:
    if error.name != "trl":
        raise
    raise UserError(
        f"epo.integrations.trl needs TRL {', '.join(TESTED)}, which is not installed: pip install 'trl=={TESTED[-1]}'"
    ) from error

check_class(GRPOTrainer)

__all__ = ["TESTED", "GRPOConfig", "GRPOTrainer", "check_class", "check_instance", "installed_version"]
