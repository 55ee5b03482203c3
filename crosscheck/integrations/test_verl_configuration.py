"""The shipped example and the documented settings in verl's own configuration: keys exist, options are checked."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.errors import InstantiationException
from omegaconf import DictConfig
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl.workers.config import HFModelConfig

from epo.errors import UserError
from epo.integrations.verl import EPOPolicyLossConfig, epo_policy_loss
from epo.objectives import EPOControl

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/verl_epo.sh"


def example_overrides() -> list[str]:
    """What the script would hand to verl, by the shell itself."""
    assignments = EXAMPLE.read_text().split("exec python3")[0]
    said = subprocess.run(
        ["bash", "-c", assignments + '\nprintf "%s\\n" "${OVERRIDES[@]}"'],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "/usr/bin:/bin"},
    )
    return said.stdout.splitlines()


def documented(heading: str) -> list[str]:
    """Overrides of the shell block after a heading of docs/verl.md."""
    section = (ROOT / "docs/verl.md").read_text().split(f"## {heading}\n")[1]
    block = re.search(r"```\n(.*?)```", section, re.DOTALL)
    assert block is not None
    words = shlex.split(block.group(1).replace("\\\n", " "))
    return [word for word in words if "=" in word and not word.startswith("VERL_")]


def composed(overrides: list[str]) -> DictConfig:
    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        return hydra.compose("ppo_trainer", overrides=overrides)


def policy_loss(*options: str) -> Any:
    target = "actor_rollout_ref.actor.policy_loss._target_=epo.integrations.verl.EPOPolicyLossConfig"
    config = composed([target, "actor_rollout_ref.actor.policy_loss.loss_mode=epo", *options])
    return omega_conf_to_dataclass(config.actor_rollout_ref.actor.policy_loss)


def test_the_example_composes_and_verl_finds_it_valid() -> None:
    config = composed(example_overrides())
    validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert isinstance(actor.policy_loss, EPOPolicyLossConfig)
    control = actor.policy_loss.make_control()
    assert isinstance(control, EPOControl)
    assert (control.coefficient, control.kappa_low, control.alpha) == (0.001, 0.5, 2.0)
    assert get_policy_loss_fn(actor.policy_loss.loss_mode) is epo_policy_loss
    assert actor.calculate_entropy
    assert actor.entropy_coeff == 0
    assert config.actor_rollout_ref.model.model_type == "epo"
    assert "model_type" in HFModelConfig.__dataclass_fields__


def test_the_documented_settings_compose() -> None:
    """The shortest way, and the estimators."""
    shortest = composed(documented("Switching it on"))
    assert (
        shortest.actor_rollout_ref.model.model_type == shortest.actor_rollout_ref.actor.policy_loss.loss_mode == "epo"
    )
    estimators = composed(documented("Advantages over turns"))
    assert estimators.trainer.v1.trainer_mode == "epo_sync"
    assert get_adv_estimator_fn(estimators.algorithm.adv_estimator).__name__ == "turn_gae_estimator"
    assert need_critic(estimators)


def test_unknown_options_and_bad_values_are_refused_when_verl_reads_them() -> None:
    for option, said in {
        "+actor_rollout_ref.actor.policy_loss.options.alhpa=1": "did you mean 'alpha'",
        "+actor_rollout_ref.actor.policy_loss.options.kappa_low=3": "kappa_low",
        "+actor_rollout_ref.actor.policy_loss.method=epoo": "did you mean 'epo'",
        "+actor_rollout_ref.actor.policy_loss.total_steps=0": "at least 1",
        "+actor_rollout_ref.actor.policy_loss.metod=epo": "metod",
        "actor_rollout_ref.actor.policy_loss.loss_mode=vanilla": "loss_mode",
    }.items():
        with pytest.raises(InstantiationException, match=said):
            policy_loss(option)


@pytest.mark.parametrize("method", ["clip_cov", "kl_cov", "siren", "empg", "clip_higher"])
def test_methods_that_are_more_than_a_term_of_the_loss_are_refused(method: str) -> None:
    with pytest.raises(UserError, match="which inside verl is verl's"):
        EPOPolicyLossConfig(method=method)


@pytest.mark.parametrize("method", ["epo", "epo_base", "bonus", "epo_constant_beta", "epo_strong", "adaptive"])
def test_methods_of_the_loss_are_taken(method: str) -> None:
    assert policy_loss(f"+actor_rollout_ref.actor.policy_loss.method={method}").make_control().state_dict() is not None
