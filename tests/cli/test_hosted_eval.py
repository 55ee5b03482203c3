"""`epo eval --server`: the panels of a recipe with a model behind a server on loopback."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chat_stub import Answer, ChatStub, Silence, refuses, says
from epo.recipe import load_config

Epo = Callable[..., Any]
WORDS = {"red": "push", "blue": "pull"}
USAGE = {"prompt_tokens": 11, "completion_tokens": 3}


def expert(body: dict[str, Any], number: int) -> Answer:
    return says(WORDS[body["messages"][-1]["content"].rpartition("before a ")[2].split()[0]], usage=USAGE)


@pytest.fixture
def stub() -> Iterator[ChatStub]:
    with ChatStub(expert) as stub:
        yield stub


def arguments(stub: ChatStub, *more: str) -> tuple[str, ...]:
    return ("eval", "--server", stub.url, "--model", "org/a b", "--recipe", "minute.yaml", *more)


def refusal(result: Any) -> str:
    assert result.code == 2 and result.out == "" and "Traceback" not in result.err, result
    return result.err.strip().splitlines()[-1]


def test_panels_and_what_is_kept(epo: Epo, stub: ChatStub):
    done = epo(*arguments(stub, "--split", "iid", "--split", "ood", "--episodes", "3", "--out", "kept", "--json"))
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert list(found) == ["iid", "ood"]
    for split, turns in (("iid", 3.0), ("ood", 4.0)):  # four turns at most, and six doors
        panel = found[split]
        assert (panel["episodes"], panel["turns"], panel["errors"], panel["invalid"]) == (3, turns, 0, 0.0)
        assert panel["success"] == (split == "iid") and panel["low"] <= panel["success"] <= panel["high"]
        count = int(3 * turns)
        assert panel["usage"] == {
            "responses": count, "prompt_tokens": 11 * count, "response_tokens": 3 * count, "uncounted": 0
        }  # fmt: skip
    assert "evaluate ood (3)" in done.err and "org/a b" in done.err
    folder = Path("kept")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["eval"] == found and (summary["model"], summary["server"]) == ("org/a b", stub.url)
    assert json.loads((folder / "eval.jsonl").read_text())["panels"][0]["success"] == 1.0
    assert json.loads((folder / "provenance.json").read_text())["suite"]["name"] == "corridor"
    again = load_config(str(folder / "recipe.yaml"))
    assert again.evaluation.splits == ["iid", "ood"] and again.evaluation.episodes == 3
    records = [json.loads(line) for line in (folder / "trajectories/step_000000.jsonl").read_text().splitlines()]
    assert [r["split"] for r in records] == ["iid"] * 3 + ["ood"] * 3
    turns = [turn for record in records for turn in record["turns"]]
    assert all(t["response_ids"] == [] and t["entropy"] == [] and t["prompt_tokens"] == 11 for t in turns)
    # The same panel in the same order as with a model of one's own, and a folder of its own every time.
    assert epo(*arguments(stub)).code == epo(*arguments(stub)).code == 0
    folders = sorted(Path("evals").iterdir())
    assert len(folders) == 2 and all(f.name.startswith("org-a-b-") for f in folders)
    lines = [(f / "trajectories/step_000000.jsonl").read_text().splitlines() for f in folders]
    first, second = ([json.loads(line)["task"] for line in each] for each in lines)
    assert first == second and len(first) == 4 and first[:3] == [record["task"] for record in records[:3]]


def test_it_can_be_read(epo: Epo, stub: ChatStub):
    shown = epo(*arguments(stub, "--out", "kept"))
    assert shown.code == 0 and "95 % interval" in shown.out and "iid" in shown.out
    assert "12 responses, 132 prompt tokens and 36 response tokens" in shown.out and "epo show kept" in shown.out
    listed = epo("show", "kept")
    assert (listed.code == 0 and "corridor" in listed.out) or "iid/" in listed.out
    one = epo("show", "kept", "--step", "0", "--row", "0", "--top", "3", "--mask")
    assert one.code == 0, one.err
    assert "the server that answered tells no token ids, log-probabilities and entropies" in one.out
    assert "split iid" in one.out and "prompt 11 tokens, response 3 tokens" in one.out
    assert "push" in one.out and "You stand before a" in one.out and "⟨#" not in one.out
    assert "most uncertain" not in one.out


def test_what_is_asked_for_reaches_the_server(epo: Epo, stub: ChatStub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_KEY", "sk-secret-1")
    done = epo(*arguments(
        stub, "agent.max_response_tokens=9", "--temperature", "0.7", "--api-key-env", "MY_KEY", "--concurrency", "3",
        "--request", "top_p=0.9", "--request", "seed=null", "--request", "stop=[x, y]", "--out", "kept",
    ))  # fmt: skip
    assert done.code == 0, done.err
    for body, headers in zip(stub.bodies, stub.headers, strict=True):
        assert body["temperature"] == 0.7 and body["max_tokens"] == 9 and body["top_p"] == 0.9
        assert body["stop"] == ["x", "y"] and "seed" not in body and body["model"] == "org/a b"
        assert headers["authorization"] == "Bearer sk-secret-1"
    assert load_config("kept/recipe.yaml").environment.workers == 3
    for file in Path("kept").rglob("*"):
        assert not file.is_file() or b"sk-secret" not in file.read_bytes(), file
    assert "sk-secret" not in done.err + done.out


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("eval", "--server", "http://127.0.0.1:9/v1", "--recipe", "minute.yaml"), "--model NAME"),
        (("eval", "--server", "http://127.0.0.1:9/v1", "--model", "m"), "needs --recipe"),
        (("eval", "--server", "127.0.0.1", "--model", "m", "--recipe", "minute.yaml"), "no address of a server"),
        (("eval", "--server", "http://127.0.0.1:9/v1", "--model", "m", "--recipe", "minute.yaml"), "cannot be reached"),
        (("eval", "runs/x", "--server", "http://127.0.0.1:9/v1", "--model", "m"), "not runs/x"),
        (("eval", "--checkpoint", "best", "--server", "http://127.0.0.1:9/v1", "--model", "m"), "not a checkpoint"),
        (("eval", "runs/x", "--model", "m"), "--model is for the model of a server: add --server URL"),
        (("eval", "runs/x", "--api-key-env", "K"), "--api-key-env is for the model of a server"),
        (("eval",), "or --server URL"),
    ],
)
def test_wrong_usage(given: tuple[str, ...], expected: str, epo: Epo):
    assert expected in refusal(epo(*given))
    assert not Path("evals").exists() or not any(Path("evals").iterdir()), "nothing is left behind"


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--request", "stream=true"), "--request stream=...: this field is not free"),
        (("--request", "top_p"), "is not of the form FIELD=VALUE"),
        (("--request", "a=[1"), "the value cannot be sent"),
        (("--request", "a=.nan"), "the value cannot be sent"),
        (("--api-key-env", "NO_SUCH_KEY"), "there is no key in $NO_SUCH_KEY"),
        (("agent.overflow=drop_oldest",), "set agent.overflow=end"),
        (("agent.nonsense=1",), "unknown key 'agent.nonsense'"),
        (("--split", "nowhere"), "which suite 'corridor' does not have"),
        (("--out", "minute.yaml"), "already exists"),
    ],
)
def test_wrong_options(more: tuple[str, ...], expected: str, epo: Epo, stub: ChatStub):
    assert expected in refusal(epo(*arguments(stub, *more)))
    assert not stub.bodies and not Path("evals").exists()


def test_what_was_played_before_an_error_is_kept(epo: Epo, stub: ChatStub):
    stub.answer = lambda body, number: refuses(401) if number >= 8 else expert(body, number)
    failed = epo(*arguments(stub, "--out", "kept", "--concurrency", "1"))
    assert "answers 401" in refusal(failed) and "finished episodes are kept: epo show kept" in failed.err
    assert "iid" in epo("show", "kept", "--step", "0", "--row", "0").out
    assert not Path("kept/summary.json").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_evaluation_keeps_what_was_played(number: int, start_epo: Callable[..., Any]):
    asked = threading.Event()

    def answer(body: dict[str, Any], number: int) -> Answer:
        if number < 7:
            return expert(body, number)
        asked.set()
        return Silence()

    with ChatStub(answer) as stub:
        process = start_epo(*arguments(stub, "--out", "kept", "--concurrency", "1"))
        assert asked.wait(120)
        # Ctrl-C reaches every process of the terminal's foreground group; SIGTERM comes to the one that is named.
        os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == "" and "Traceback" not in err, err
    assert "2 finished episodes are kept: epo show kept" in err and err.endswith("interrupted\n")
    assert len(Path("kept/trajectories/step_000000.jsonl").read_text().splitlines()) == 2
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_greedy_through_a_server_is_greedy_here(epo: Epo):
    """The server renders the template itself and decodes with transformers' own `generate`, in float32."""
    made = epo("imitate", "minute.yaml", "imitation.batches=250", "--json")
    assert made.code == 0, made.err
    folder = json.loads(made.out)["model"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    lock = threading.Lock()

    def generate(body: dict[str, Any], number: int) -> Answer:
        assert body["temperature"] == 0
        text = tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with lock, torch.inference_mode():
            out = model.generate(
                ids, max_new_tokens=body["max_tokens"], do_sample=False, pad_token_id=tokenizer.eos_token_id
            )[0, ids.shape[1] :].tolist()
        said = tokenizer.decode(out, skip_special_tokens=True)
        usage = {"prompt_tokens": ids.shape[1], "completion_tokens": len(out)}
        return says(said, finish="stop" if tokenizer.eos_token_id in out else "length", usage=usage)

    panels = ("--split", "iid", "--split", "ood", "--split", "train", "--temperature", "0", "--json")
    here = epo("eval", folder, "--recipe", "minute.yaml", *panels)
    with ChatStub(generate) as stub:
        there = epo(*arguments(stub, *panels, "--out", "kept"))
    assert here.code == there.code == 0, there.err
    expected, found = json.loads(here.out), json.loads(there.out)
    assert expected.pop("provenance")["model"] == str(folder)
    assert {split: {key: found[split][key] for key in expected[split]} for split in expected} == expected
    assert len({panel["score"] for panel in expected.values()}) > 1
    records = [json.loads(line) for line in Path("kept/trajectories/step_000000.jsonl").read_text().splitlines()]
    assert len({turn["action"] for record in records for turn in record["turns"]}) > 1
