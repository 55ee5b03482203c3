# pyright: reportMissingImports=false
"""Whether the verl that is installed is one this package was written for. Checked at import, before anything trains."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any, cast

from epo.errors import UserError

WRITTEN_FOR = "0.9.1"

try:
    import verl
except ModuleNotFoundError as missing:
    if missing.name != "verl":
        raise
    raise UserError(
        f"epo.integrations.verl needs verl, which is not installed: pip install verl=={WRITTEN_FOR}"
    ) from None

CALLED: dict[str, tuple[str, ...]] = {
    "verl.workers.utils.losses:ppo_loss": ("config", "model_output", "data", "dp_group"),
    "verl.workers.utils.padding:no_padding_2_padding": ("tensor", "data"),
    "verl.workers.utils.padding:response_to_nested": ("tensor", "response_mask"),
    "verl.trainer.ppo.core_algos:compute_policy_loss_vanilla": (
        "old_log_prob",
        "log_prob",
        "advantages",
        "response_mask",
        "loss_agg_mode",
        "config",
        "rollout_is_weights",
    ),
    "verl.workers.engine:FSDPEngineWithLMHead.__init__": (
        "self",
        "model_config",
        "engine_config",
        "optimizer_config",
        "checkpoint_config",
    ),
    "verl.workers.engine:FSDPEngineWithLMHead.forward_backward_batch": (
        "self",
        "data",
        "loss_function",
        "forward_only",
    ),
    "verl.workers.engine:FSDPEngineWithLMHead.lr_scheduler_step": ("self",),
    "verl.workers.engine:FSDPEngineWithLMHead.get_data_parallel_group": ("self",),
    "verl.workers.engine:FSDPEngineWithLMHead.get_data_parallel_size": ("self",),
    "verl.workers.engine:FSDPEngineWithLMHead.save_checkpoint": (
        "self",
        "local_path",
        "hdfs_path",
        "global_step",
        "max_ckpt_to_keep",
        "kwargs",
    ),
    "verl.workers.engine:FSDPEngineWithLMHead.load_checkpoint": (
        "self",
        "local_path",
        "hdfs_path",
        "del_local_after_load",
        "kwargs",
    ),
}
"""Parameters of what is called or overridden here, as `module:name`."""


def check(called: Mapping[str, tuple[str, ...]] = CALLED) -> None:
    """Refuse a verl whose functions are not the ones this package was written for.

    Args:
        called: the parameters expected, by `module:name`.

    Raises:
        UserError: something is missing, or takes other parameters.
    """
    for place, expected in called.items():
        module, _, path = place.partition(":")
        try:
            found: Any = importlib.import_module(module)
            for name in path.split("."):
                found = getattr(found, name)
            parameters = tuple(inspect.signature(found).parameters)
        except (AttributeError, ModuleNotFoundError) as error:
            if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("verl"):
                raise
            raise _refusal(f"it has no {place}") from None
        if parameters != expected:
            raise _refusal(f"{place} takes ({', '.join(parameters)}), expected was ({', '.join(expected)})")


def _refusal(difference: str) -> UserError:
    installed = cast("Any", verl).__version__
    return UserError(
        f"epo.integrations.verl was written for verl {WRITTEN_FOR} and does not fit verl {installed}: {difference}. "
        f"Install verl=={WRITTEN_FOR}, or leave epo.integrations.verl out of VERL_USE_EXTERNAL_MODULES"
    )


check()
