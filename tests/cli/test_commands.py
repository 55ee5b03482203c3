"""What a user types, and what comes back."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from epo.environments import make_suite
from epo.evaluation import panels
from epo.recipe import load_config, recipe_names
from epo.training.run_folder import RunFolder
from epo.types import Trajectory

Epo = Callable[..., Any]


def one_line_error(result: Any) -> str:
    """The single line a user mistake ends with."""
    assert result.code == 2, result
    assert result.out == "" and "Traceback" not in result.err
    last = result.err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert result.err.count("error: ") == 1
    return last


def test_help_loads_nothing_heavy():
    heavy = "{'torch', 'numpy', 'transformers', 'matplotlib', 'plotly', 'starlette', 'uvicorn', 'ray', 'jinja2'}"
    code = f"import sys, epo.cli\ntry: epo.cli.main()\nfinally: sys.stderr.write(' '.join({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "Train an agent" in done.stdout
    assert done.stderr == ""


def test_version(epo: Epo):
    found = epo("--version")
    assert found.code == 0 and found.out == f"epo {version('epo-agents')}\n"


# ---------------------------------------------------------------- train, eval, imitate


def test_train_then_eval(epo: Epo):
    trained = epo("train", "minute.yaml", "--json")
    assert trained.code == 0, trained.err
    summary = json.loads(trained.out)  # nothing but JSON on stdout
    assert summary["finished"] and summary["steps"] == 2 and summary["run"] == "runs/minute"
    assert "step   2/2" in trained.err and "iid: success" in trained.err

    again = epo("eval", "runs/minute", "--json")
    assert again.code == 0, again.err
    panel, facts = json.loads(again.out)["iid"], json.loads(again.out)["provenance"]
    assert facts["checkpoint"] == {"run": "runs/minute", "step": 2}
    assert facts["model"] == "runs/minute/checkpoints/step_000002/policy"
    assert facts["config"] == yaml.safe_load(Path("runs/minute/config.yaml").read_text())
    recorded = json.loads(Path("runs/minute/provenance.json").read_text())
    for key in ("commit", "suite", "packages"):
        assert facts[key] == recorded[key]
    assert "environment: corridor" in trained.err and "environment: corridor" in again.err
    final = summary["eval"]["iid"]["final"]
    assert {key: panel[key] for key in final} == final  # the same panel, the same numbers

    shown = epo("eval", "runs/minute", "--split", "ood", "--episodes", "3", "--temperature", "0")
    assert shown.code == 0 and "ood" in shown.out and "iid" not in shown.out and "95 % interval" in shown.out

    folder = "runs/minute/checkpoints/step_000002/policy"
    as_model = epo("eval", folder, "--recipe", "minute.yaml", "--json")
    assert json.loads(as_model.out)["iid"] == panel
    facts = json.loads(as_model.out)["provenance"]
    assert (facts["model"], facts["checkpoint"]) == (folder, None)
    assert "--recipe" in one_line_error(epo("eval", folder))
    assert "not a run folder" in one_line_error(epo("eval", "nowhere"))


def test_train_prints_a_summary(epo: Epo):
    trained = epo("train", "minute.yaml", "--name", "shown")
    assert trained.code == 0, trained.err
    for expected in ("2 steps, finished", "iid", "report: runs/shown/report.html"):
        assert expected in trained.out
    assert Path("runs/shown/report.html").is_file()


def test_panels_say_what_they_lost_to_the_environment(epo: Epo, monkeypatch: pytest.MonkeyPatch):
    """A broken environment is no bad policy: who reads the numbers reads how many episodes it took."""
    clean = epo("train", "minute.yaml", "--name", "clean")
    assert clean.code == 0 and "lost:" not in clean.out

    played = panels.summarise

    def losing_two(split: str, trajectories: Sequence[Trajectory]) -> panels.PanelResult:
        return dataclasses.replace(played(split, trajectories), errors=2)

    monkeypatch.setattr(panels, "summarise", losing_two)
    trained = epo("train", "minute.yaml", "--name", "lossy")
    assert trained.code == 0, trained.err
    assert "lost: iid before RL 2 of 4, iid at the end 2 of 4 episodes. Errors of the environment" in trained.out
    panel = json.loads(Path("runs/lossy/summary.json").read_text())["eval"]["iid"]
    assert panel["initial"]["errors"] == panel["final"]["errors"] == 2
    shown = epo("eval", "runs/lossy", "--split", "iid", "--split", "ood")
    assert "lost: iid 2 of 4, ood 2 of 4 episodes. Errors of the environment" in shown.out

    # A run of an older version did not count them.
    counted = RunFolder.evaluations

    def without_errors(run: RunFolder) -> list[dict[str, Any]]:
        entries = counted(run)
        for panel in (panel for entry in entries for panel in entry["panels"]):
            del panel["errors"]
        return entries

    monkeypatch.setattr(RunFolder, "evaluations", without_errors)
    again = epo("train", "minute.yaml", "--name", "lossy", "--resume")
    assert again.code == 0 and "2 steps, finished" in again.out and "lost:" not in again.out


def test_imitate(epo: Epo):
    found = epo("imitate", "minute.yaml", "--json")
    assert found.code == 0, found.err
    content = json.loads(found.out)
    assert (Path(content["model"]) / "model.safetensors").is_file()
    assert content["eval"]["iid"]["episodes"] == 4
    shown = epo("imitate", "minute.yaml")
    assert content["model"] in shown.out and f"{content['eval']['iid']['success']:.3f}" in shown.out
    assert "imitation.demonstrations=200" in one_line_error(
        epo("imitate", "minute.yaml", "imitation.demonstrations=0", f"model.path={content['model']}")
    )


@pytest.mark.parametrize("command", ["train", "imitate"])
def test_dry_run_prints_what_would_run(command: str, epo: Epo):
    expected = load_config("minute.yaml", ["seed=7"]).model_dump(mode="json")
    shown = epo(command, "minute.yaml", "seed=7", "--dry-run")
    assert shown.code == 0 and yaml.safe_load(shown.out) == expected
    assert json.loads(epo(command, "minute.yaml", "seed=7", "--dry-run", "--json").out) == expected
    assert not Path("runs").exists()


# ---------------------------------------------------------------- recipes, envs, doctor, play


def test_every_shipped_recipe_is_valid(epo: Epo):
    names = epo("recipes").out.split()
    assert names == recipe_names() == json.loads(epo("recipes", "--json").out)
    for name in names:
        assert epo("train", name, "--dry-run").code == 0


def test_envs(epo: Epo, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    suites = {entry["name"]: entry for entry in json.loads(epo("envs", "--json").out)}
    assert {"corridor", "scienceworld", "alfworld", "household"} <= set(suites)
    assert suites["corridor"]["ready"] and suites["corridor"]["problem"] is None
    assert not suites["alfworld"]["ready"] and "ALFWORLD_DATA" in suites["alfworld"]["problem"]
    assert "corridor" in epo("envs").out
    described = json.loads(epo("envs", "corridor", "--json").out)
    suite = make_suite("corridor")
    assert described["splits"] == {
        split: {"tasks": len(suite.tasks(split)), "goals": len({t.goal for t in suite.tasks(split)})}
        for split in suite.splits
    }
    needy = json.loads(epo("envs", "gymnasium", "--json").out)
    assert (needy["needs"], needy["splits"]) == (["id"], {})
    assert "as for `gymnasium.make`" in epo("envs", "gymnasium").out
    assert suites["gymnasium"]["needs"] == ["id"]
    shown = epo("envs", "corridor")
    assert "length: doors" in shown.out and "train" in shown.out
    assert "did you mean 'corridor'" in one_line_error(epo("envs", "coridor"))


def test_doctor(epo: Epo, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ALFWORLD_DATA", "/nowhere")
    found = epo("doctor", "--json")
    assert found.code == 0
    checks = {check["name"]: check for check in json.loads(found.out)}
    assert checks["torch"]["ok"] and checks["torch"]["required"]
    assert not checks["ALFWORLD_DATA"]["ok"] and "/nowhere" in checks["ALFWORLD_DATA"]["found"]
    shown = epo("doctor").out
    assert "missing" in shown and "alfworld-download" in shown
    assert "install Python" not in shown  # what is there needs no mending


def doors(text: str) -> list[str]:
    words = {"red": "push", "blue": "pull"}
    return [words[colour] for colour in text.split("-")]


def test_play(epo: Epo, monkeypatch: pytest.MonkeyPatch):
    task = make_suite("corridor", {"length": 3, "choices": 2, "tasks": 4}).tasks("ood")[0]
    actions = doors(task.id.rpartition("/")[2])
    arguments = ("play", "corridor", "length=3", "choices=2", "tasks=4", "--split", "ood", "--task", task.id)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(actions) + "\n"))
    won = epo(*arguments)
    assert won.code == 0, won.err
    assert "push red doors" in won.out and f"success after {len(actions)} turns, score 1.00" in won.out
    monkeypatch.setattr(sys, "stdin", io.StringIO("dance\n"))
    left = epo(*arguments)
    assert left.code == 0 and "Nothing happens" in left.out and "left after 1 turns" in left.out
    assert "no task 'x'" in one_line_error(epo("play", "corridor", "--task", "x"))
    assert "no split 'test'" in one_line_error(epo("play", "corridor", "--split", "test"))


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("command", ["train", "eval", "imitate", "play", "envs", "doctor", "recipes"])
def test_help_shows_examples_that_fit_a_terminal(command: str, epo: Epo, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = epo(command, "--help")
    assert shown.code == 0
    _, title, examples = shown.out.partition("Example")
    assert title
    lines = [line.strip() for line in examples.splitlines()[1:] if line.strip()]
    assert lines and all(line.startswith("epo ") for line in lines)  # none is broken over two lines
    assert any(line.startswith(f"epo {command}") for line in lines)
    for line in lines:
        words = line.split()
        if words[1] == "train" and not words[2].endswith(".yaml"):
            assert words[2] in recipe_names()
        if "--recipe" in words:
            assert words[words.index("--recipe") + 1] in recipe_names()


def test_help_of_the_program(epo: Epo):
    shown = epo("--help")
    assert shown.code == 0
    for command in ("train", "eval", "imitate", "play", "envs", "doctor", "recipes"):
        assert command in shown.out
    assert epo("trian").code == 2
    assert epo("train").code == 2
