"""Runs with adapters: repeated, stopped and resumed they are the same to the last bit, and their files are small."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from quiet import QuietObserver
from safetensors.torch import load_file
from test_runs_repeat import files_of, metrics_of

from epo.config import Config
from epo.errors import UserError
from epo.evaluation.session import evaluate_target
from epo.training.policy import Policy, load_policy
from epo.training.session import train_run

LORA = (
    "model.lora={rank: 4, alpha: 8}",
    "imitation.batches=10",
    "environment.options={length: 2, choices: 3, tasks: 4}",
    "evaluation.every=0",
    "checkpoint.every=2",
)
PPO_SHARED = ("algorithm.name=ppo", "entropy.method=epo")
PPO_SEPARATE_KL = (
    "algorithm.name=ppo",
    "algorithm.critic.trunk=separate",
    "algorithm.kl_coefficient=0.1",
    "model.gradient_checkpointing=true",
)
GRPO_KL = ("algorithm.name=grpo", "rollout.tasks_per_step=2", "rollout.group_size=2", "algorithm.kl_coefficient=0.1")


@pytest.fixture
def model_folder(make_policy: Callable[..., Policy], tmp_path: Path) -> Path:
    make_policy().save(tmp_path / "base")
    return tmp_path / "base"


def assert_same(one: Path, other: Path, *, critic: bool) -> None:
    assert [line["step"] for line in metrics_of(one)] == [1, 2, 3, 4]
    assert metrics_of(one) == metrics_of(other)
    assert (one / "eval.jsonl").read_bytes() == (other / "eval.jsonl").read_bytes()
    last = [folder / "checkpoints" / "step_000004" for folder in (one, other)]
    tensors = files_of(last[0], "*.safetensors")
    expected = {"optimizer.safetensors", "policy/adapter_model.safetensors"}
    assert set(tensors) == expected | ({"critic.safetensors"} if critic else set())
    assert tensors == files_of(last[1], "*.safetensors")
    assert files_of(last[0] / "policy", "*.json") == files_of(last[1] / "policy", "*.json")


@pytest.mark.parametrize(
    ("options", "base"),
    [
        pytest.param(PPO_SHARED, "tiny", id="ppo-shared-tiny"),
        pytest.param(PPO_SEPARATE_KL, "tiny", id="ppo-separate-kl-recomputed-tiny"),
        pytest.param(GRPO_KL, "folder", id="grpo-kl"),
        pytest.param((*GRPO_KL, "imitation.demonstrations=0"), "folder", id="grpo-kl-without-warm-start"),
    ],
)
def test_stopped_and_resumed_runs_equal_whole_ones(
    options: tuple[str, ...], base: str, minute_config: Callable[..., Config], tmp_path: Path, model_folder: Path
):
    path = "tiny" if base == "tiny" else str(model_folder)
    config = minute_config(*LORA, *options, f"model.path={path}")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_run(config, whole, QuietObserver(), resume=False)

    def stop(step: int) -> None:
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    stopped = train_run(config, parts, QuietObserver(stop), resume=False)
    assert not stopped["finished"] and stopped["steps"] == 2
    resumed = train_run(config, parts, QuietObserver(), resume=True)
    assert resumed["finished"] and resumed["steps"] == 4
    critic = config.algorithm.name == "ppo"
    assert_same(whole, parts, critic=critic)
    # Training changed what it should: the adapter, of the critic too; the base is not in any file.
    first, last = (whole / "checkpoints" / f"step_00000{n}" for n in (2, 4))
    for name in ("policy/adapter_model.safetensors", *(("critic.safetensors",) if critic else ())):
        before, after = load_file(first / name), load_file(last / name)
        assert before.keys() == after.keys() and all((before[k] != after[k]).any() for k in before)
    trunk = {k for k in load_file(last / "critic.safetensors") if k.startswith("trunk.")} if critic else set()
    assert bool(trunk) == (config.algorithm.critic.trunk == "separate") and all("lora_" in k for k in trunk)
    assert json.loads((last / "policy" / "base.json").read_text())["path"] == path


def test_a_run_is_evaluated_and_its_adapter_trained_on(
    minute_config: Callable[..., Config], tmp_path: Path, model_folder: Path
):
    config = minute_config(*LORA, "steps=2", f"model.path={model_folder}")
    run = tmp_path / "run"
    train_run(config, run, QuietObserver(), resume=False)
    (result,), _ = evaluate_target(run, recipe=None, overrides=[], observer=QuietObserver())
    final = json.loads((run / "eval.jsonl").read_text().splitlines()[-1])["panels"][0]
    assert result.as_dict() == final
    # The adapter is a place to start from, too; what is trained then still names the whole model.
    folder = run / "checkpoints" / "step_000002" / "policy"
    on = minute_config(*LORA, "steps=1", f"model.path={folder}", "imitation.demonstrations=0")
    train_run(on, tmp_path / "on", QuietObserver(), resume=False)
    saved = load_policy(tmp_path / "on" / "checkpoints" / "step_000001" / "policy", on.model)
    assert saved.adapters is not None and saved.adapters.base.path == str(model_folder)
    with pytest.raises(UserError, match="is damaged"):
        damaged = run / "checkpoints" / "step_000002" / "policy" / "adapter_model.safetensors"
        damaged.write_bytes(damaged.read_bytes()[:-4])
        evaluate_target(run, recipe=None, overrides=[], observer=QuietObserver())
