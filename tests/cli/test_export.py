"""`epo export`: what other tools load is the policy of the checkpoint, and the card says what the run says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from test_commands import one_line_error
from transformers import AutoModelForCausalLM, AutoTokenizer

from epo.exporting import folder as exporting
from epo.recipe import load_config
from epo.training.policy import load_policy

Epo = Callable[..., Any]
IDS = torch.tensor([[5, 17, 99, 250, 31, 8, 140, 3]])


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def policy_of(run: Path, step: int) -> Any:
    return load_policy(run / f"checkpoints/step_{step:06d}/policy", load_config(str(run / "config.yaml")).model)


def trained(epo: Epo, *overrides: str, name: str) -> Path:
    done = epo("train", "minute.yaml", *overrides, "--name", name)
    assert done.code == 0, done.err
    return Path("runs") / name


def test_a_whole_model_is_what_transformers_loads(epo: Epo):
    run = trained(epo, "checkpoint.every=1", "evaluation.every=1", name="whole")
    done = epo("export", str(run), "--checkpoint", "1", "--out", "out", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out) == {"folder": "out", "kind": "model", "step": 1}
    policy = policy_of(run, 1)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained("out")), logits_of(policy.model))
    assert not torch.equal(logits_of(policy.model), logits_of(policy_of(run, 2).model))
    tokenizer = AutoTokenizer.from_pretrained("out")
    assert tokenizer("go left").input_ids == policy.tokenizer("go left").input_ids
    assert tokenizer.chat_template == policy.tokenizer.chat_template

    card = ModelCard.load("out/README.md")
    panels = {e["step"]: e["panels"] for e in map(json.loads, (run / "eval.jsonl").read_text().splitlines())}
    found = card.data.eval_results or []
    assert [(r.dataset_split, r.metric_value) for r in found] == [(p["split"], p["success"]) for p in panels[1]]
    assert card.data.to_dict()["library_name"] == "transformers"
    row = next(line for line in card.text.splitlines() if line.startswith("| `iid` |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:3] == [f"{panels[0][0]['success']:.3f}", f"{panels[1][0]['success']:.3f}"]
    for name in ("config.yaml", "metrics.jsonl", "eval.jsonl", "plot.svg"):
        assert (Path("out/training") / name).read_bytes() == (run / name).read_bytes()

    played = epo("eval", "out", "--recipe", "out/training/config.yaml", "--json")
    assert played.code == 0, played.err
    assert json.loads(played.out)["iid"]["success"] == panels[1][0]["success"]


def test_an_adapter_stays_one_or_is_merged(epo: Epo, tmp_path: Path):
    whole = trained(epo, name="whole")
    assert epo("export", str(whole), "--out", "base").code == 0
    run = trained(
        epo, "model.path=base", "imitation.demonstrations=0", "model.lora.rank=4", "optimizer.learning_rate=0.05",
        name="lora",
    )  # fmt: skip
    expected = logits_of(policy_of(run, 2).model)
    base = AutoModelForCausalLM.from_pretrained("base")
    assert not torch.allclose(logits_of(base), expected, atol=1e-3)

    assert "--base ORG/NAME" in one_line_error(epo("export", str(run)))
    assert "--merge" in one_line_error(epo("export", str(run), "--merge", "--base", "who/what"))
    assert "ORG/NAME" in one_line_error(epo("export", str(run), "--base", "../base"))
    assert not Path("exports").exists()

    assert epo("export", str(run), "--base", "who/what").code == 0
    out = Path("exports/lora")
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "who/what"
    for file in out.iterdir():  # nothing of this machine is in what is published
        assert not file.is_file() or str(tmp_path).encode() not in file.read_bytes(), file
    assert ModelCard.load(out / "README.md").data.to_dict()["base_model"] == "who/what"
    torch.testing.assert_close(logits_of(PeftModel.from_pretrained(base, str(out))), expected)

    assert epo("export", str(run), "--merge", "--out", "merged").code == 0
    assert not list(Path("merged").glob("adapter*")) and not Path("merged/base.json").exists()
    merged = AutoModelForCausalLM.from_pretrained("merged")
    torch.testing.assert_close(logits_of(merged), expected, atol=1e-5, rtol=1e-5)
    assert set(merged.state_dict()) == set(AutoModelForCausalLM.from_pretrained("base").state_dict())
    played, again = (
        epo("eval", "merged", "--recipe", "merged/training/config.yaml", "--json"),
        epo("eval", str(run), "--json"),
    )
    found, expected = json.loads(played.out), json.loads(again.out)
    assert found.pop("provenance")["checkpoint"] is None
    assert expected.pop("provenance")["checkpoint"] == {"run": str(run), "step": 2}
    assert found and found == expected


def test_what_cannot_be_exported_leaves_nothing(epo: Epo, monkeypatch: pytest.MonkeyPatch):
    run = trained(epo, "model.lora.rank=2", name="tiny-lora")
    assert "embedded model" in one_line_error(epo("export", str(run), "--base", "who/what"))
    whole = trained(epo, name="whole")
    assert "--merge is for adapters" in one_line_error(epo("export", str(whole), "--merge"))
    assert "choose from" in one_line_error(epo("export", str(whole), "--checkpoint", "7"))
    assert "there is no run" in one_line_error(epo("export", "nowhere"))
    assert "already" in one_line_error(epo("export", str(whole), "--out", "runs"))
    model = whole / "checkpoints/step_000002/policy/model.safetensors"
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(content)
    assert "damaged" in one_line_error(epo("export", str(whole)))

    def unplugged(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(exporting, "write_card", unplugged)
    assert "Input/output error" in one_line_error(epo("export", str(run), "--merge", "--out", "here/there"))
    assert [path.name for path in Path("here").iterdir()] == []
    assert not Path("exports").exists()
