"""Importing the module registers with verl, and refuses a verl that does not fit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import verl.workers.utils.losses

from epo.errors import UserError
from epo.integrations.verl import _version

SOURCES = Path(__file__).parents[2] / "src"


def test_verl_imports_it_itself_when_it_is_named() -> None:
    """`VERL_USE_EXTERNAL_MODULES`, in a process that imports nothing but verl."""
    code = (
        "import verl; from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY; "
        "from verl.workers.engine import EngineRegistry; from verl.trainer.ppo.v1 import get_trainer_cls; "
        "print(sorted(n for n in ADV_ESTIMATOR_REGISTRY if n.startswith('epo')), 'epo' in POLICY_LOSS_REGISTRY, "
        "sorted(EngineRegistry._engines['epo']), get_trainer_cls('epo_sync').__name__)"
    )
    modules = "epo.integrations.verl,epo.integrations.verl.trainer"
    environment = os.environ | {"PYTHONPATH": str(SOURCES), "VERL_USE_EXTERNAL_MODULES": modules}
    said = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert said.stdout.splitlines()[-1] == (
        "['epo_bilevel_gae', 'epo_grpo', 'epo_trajectory_gae', 'epo_turn_gae'] True ['fsdp', 'fsdp2'] EPOTrainerSync"
    )


def test_this_verl_fits() -> None:
    _version.check()
    assert verl.__version__ == _version.WRITTEN_FOR


def test_other_parameters_are_refused_by_name_and_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """A verl whose loss is called in another way, or has moved."""
    monkeypatch.setattr(verl.workers.utils.losses, "ppo_loss", lambda config, model_output, batch: None)
    with pytest.raises(UserError) as error:
        _version.check()
    for part in ("verl 0.9.1", "verl.workers.utils.losses:ppo_loss takes (config, model_output, batch)", "dp_group"):
        assert part in str(error.value)
    monkeypatch.delattr(verl.workers.utils.losses, "ppo_loss")
    with pytest.raises(UserError, match="it has no verl"):
        _version.check()
