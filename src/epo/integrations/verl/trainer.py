# pyright: reportMissingImports=false, reportUntypedBaseClass=false, reportUntypedClassDecorator=false
"""verl's synchronous trainer under the name `epo_sync`: it hands estimators `epo_*` values and trajectories.

Needed for them alone, and imported on request, because it brings all of verl's trainer::

    VERL_USE_EXTERNAL_MODULES=epo.integrations.verl,epo.integrations.verl.trainer
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import transfer_queue
from tensordict import TensorDict
from verl.trainer.ppo.v1 import PPOTrainerSync, register_trainer

from epo.integrations.verl import _version
from epo.integrations.verl.advantages import StepRows, step_rows

_version.check(
    {
        "verl.trainer.ppo.v1:PPOTrainerSync._compute_advantage": ("self", "batch", "metrics"),
        "verl.trainer.ppo.v1:PPOTrainerSync.__init__": ("self", "config"),
    }
)


@register_trainer("epo_sync")
class EPOTrainerSync(PPOTrainerSync):
    """`trainer.v1.trainer_mode=epo_sync`."""

    def __init__(self, config: Any) -> None:
        """As verl's. The rest of verl asks for the mode by its name, and this one is `sync`."""
        config = copy.deepcopy(config)
        config.trainer.v1.trainer_mode = "sync"
        super().__init__(config)

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        """As verl's, with each row's place in its trajectory known here and, as `turn_index`, to the engine."""
        place = {"keys": batch.keys, "partition_id": batch.partition_id}
        names = [name_of(key) for key in batch.keys]
        turns = torch.tensor([turn for _, turn in names])
        transfer_queue.kv_batch_put(**place, fields=TensorDict({"turn_index": turns}, batch_size=len(names)))
        fields = ["response_mask", "rm_scores"] + (["values"] if self.use_critic else [])
        data = transfer_queue.kv_batch_get(**place, select_fields=fields).to_padded_tensor()
        rows = StepRows(
            trajectories_B=[trajectory for trajectory, _ in names],
            turns_B=[turn for _, turn in names],
            mask_B_L=data["response_mask"].bool(),
            scores_B_L=data["rm_scores"],
            values_B_L=data["values"] if self.use_critic else None,
        )
        with step_rows(rows):
            return super()._compute_advantage(batch, metrics)


def name_of(key: str) -> tuple[str, int]:
    """Trajectory and place in it, from a key of verl's: `{uid}_{session_id}_{index}`."""
    trajectory, _, index = key.rpartition("_")
    return trajectory, int(index)
