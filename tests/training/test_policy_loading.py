"""Loading a model directory: what is saved comes back; whatever is wrong is one message that names path and fix."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    VaultGemmaConfig,
    VaultGemmaForCausalLM,
)

from epo.config import ModelConfig
from epo.errors import UserError
from epo.training.policy import Policy, load_policy

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folder(policy: Policy, tmp_path: Path) -> Path:
    policy.save(tmp_path / "model")
    return tmp_path / "model"


def refusal(folder: Path | str, config: ModelConfig) -> str:
    with pytest.raises(UserError) as caught:
        load_policy(folder, config)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    # Nothing of a library's traceback hangs on the one error that users see.
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    return message


def change_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def truncate(file: Path, length: int) -> None:
    file.write_bytes(file.read_bytes()[:length])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_saved_comes_back(policy: Policy, folder: Path, tiny_config: ModelConfig, dtype: str) -> None:
    loaded = load_policy(folder, tiny_config.model_copy(update={"dtype": dtype}))
    saved = policy.model.state_dict()
    assert loaded.model.state_dict().keys() == saved.keys()
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, saved[name].to(getattr(torch, dtype)))
    assert loaded.chat.first_prompt("open the door") == policy.chat.first_prompt("open the door")
    assert loaded.chat.stop_id == policy.chat.stop_id
    assert not loaded.model.training
    assert (loaded.version, loaded.max_context) == (0, tiny_config.max_context)


def test_weights_in_shards_come_back(policy: Policy, folder: Path, tiny_config: ModelConfig) -> None:
    (folder / WEIGHTS).unlink()
    policy.model.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    for name, tensor in load_policy(folder, tiny_config).model.state_dict().items():
        assert torch.equal(tensor, policy.model.state_dict()[name])
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    message = refusal(folder, tiny_config)
    assert str(folder) in message and shard.name in message and "copy it again, completely" in message


@pytest.mark.parametrize("name", ["nope", "file", "a\0b", "x" * 5000])
def test_paths_that_are_no_directories(tmp_path: Path, tiny_config: ModelConfig, name: str) -> None:
    (tmp_path / "file").write_text("")
    message = refusal(tmp_path / name, tiny_config)
    assert repr(str(tmp_path / name)) in message
    assert "is not a directory: give the path of a Hugging Face model directory, or 'tiny'" in message


Damage = Callable[[Path], Any]


def pickled_weights(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def drop_a_layer(folder: Path) -> None:
    tensors = {name: t for name, t in load_file(folder / WEIGHTS).items() if "layers.1." not in name}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


DAMAGES: dict[str, tuple[Damage, str]] = {
    "no configuration": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "cut configuration": (lambda f: truncate(f / "config.json", 40), "copy the directory again, completely"),
    "configuration is a list": (lambda f: (f / "config.json").write_text("[]"), "copy the directory again, completely"),
    "unknown architecture": (
        lambda f: change_json(f / "config.json", model_type="foo"),
        "choose a model that this version of transformers knows",
    ),
    "other sizes": (lambda f: change_json(f / "config.json", hidden_size=64), "copy the directory again, completely"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "lacks model.safetensors: copy it again, completely"),
    "pickled weights": (pickled_weights, "convert its weights to safetensors (pickled weights are not read)"),
    "empty weights": (lambda f: truncate(f / WEIGHTS, 0), "copy the directory again, completely"),
    "cut header": (lambda f: truncate(f / WEIGHTS, 100), "copy the directory again, completely"),
    "cut weights": (lambda f: truncate(f / WEIGHTS, 50_000), "copy the directory again, completely"),
    "a layer is missing": (drop_a_layer, "has no weights for model.layers.1.input_layernorm.weight"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "copy the directory again, completely"),
    "cut tokenizer": (lambda f: truncate(f / "tokenizer.json", 400), "copy the directory again, completely"),
    "empty tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "copy the directory again, completely"),
    "nonsense in the tokenizer": (
        lambda f: change_json(f / "tokenizer.json", model={"type": "Nonsense"}),
        "copy the directory again, completely",
    ),
    "no chat template": (lambda f: (f / "chat_template.jinja").unlink(), "has no chat template"),
    "broken chat template": (lambda f: (f / "chat_template.jinja").write_text("{% for"), "does not render"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_directories(folder: Path, tiny_config: ModelConfig, damage: str) -> None:
    apply, expected = DAMAGES[damage]
    apply(folder)
    message = refusal(folder, tiny_config)
    assert expected in message
    assert str(folder) in message


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"weight_map', '{"weight_map": []}', '{"weight_map": {"a": ["b"]}}', '{"weight_map": {"a": 1}}'],
)
@pytest.mark.parametrize("alone", [True, False])
def test_damaged_indexes(folder: Path, tiny_config: ModelConfig, text: str, alone: bool) -> None:
    (folder / INDEX).write_text(text)
    if alone:
        (folder / WEIGHTS).unlink()
    message = refusal(folder, tiny_config)
    assert str(folder) in message
    assert "completely" in message


def test_a_tokenizer_of_another_model(folder: Path, tiny_config: ModelConfig, policy: Policy) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:200].clone()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    change_json(folder / "config.json", vocab_size=200)
    message = refusal(folder, tiny_config)
    assert f"the tokenizer has {policy.tokenizer.vocab_size} entries, the model 200" in message


def test_more_context_than_the_model_can_read(folder: Path, tiny_config: ModelConfig) -> None:
    message = refusal(folder, tiny_config.model_copy(update={"max_context": 257}))
    assert message == f"model.max_context=257 exceeds what {str(folder)!r} can read: at most 256"


def test_cuda_without_a_gpu(folder: Path, tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    truncate(folder / WEIGHTS, 100)  # said before minutes of loading
    message = refusal(folder, tiny_config.model_copy(update={"device": "cuda"}))
    assert message.startswith("model.device='cuda' but PyTorch sees no GPU: set model.device=cpu")


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
ARCHITECTURES: dict[str, tuple[Any, Any, dict[str, Any], str | None]] = {
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}, None),
    "mistral, wide window": (MistralConfig, MistralForCausalLM, {"sliding_window": 256}, None),
    "mistral, window": (MistralConfig, MistralForCausalLM, {"sliding_window": 16}, None),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"use_sliding_window": False, "sliding_window": 16}, None),
    "qwen2, window in some layers": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
        None,
    ),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {"head_dim": 16}, None),
    "vaultgemma": (
        VaultGemmaConfig,
        VaultGemmaForCausalLM,
        {"head_dim": 16},
        "whose head applies final_logit_softcapping in a way that was not tested",
    ),
    "llama, positions by length": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": DYNAMIC | {"original_max_position_embeddings": 128}},
        "set model.max_context to 128 or less",
    ),
    "llama, positions by length, beyond reach": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": DYNAMIC},
        None,
    ),
    "cohere": (CohereConfig, CohereForCausalLM, {}, "whose head applies logit_scale"),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_that_would_be_computed_wrongly_are_refused(
    folder: Path, tiny_config: ModelConfig, policy: Policy, name: str
) -> None:
    make_config, make_model, options, expected = ARCHITECTURES[name]
    sizes = {
        "vocab_size": len(policy.tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 0,
    }
    make_model(make_config(**(sizes | options))).save_pretrained(folder)
    if expected is None:
        assert load_policy(folder, tiny_config).model.config.model_type == make_config.model_type
    else:
        message = refusal(folder, tiny_config)
        assert expected in message
        assert str(folder) in message


def test_models_that_read_images_too_are_refused(folder: Path, tiny_config: ModelConfig, policy: Policy) -> None:
    count = len(policy.tokenizer)
    text = {"vocab_size": count + 3, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}  # fmt: skip
    image = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "image_size": 28, "patch_size": 14}  # fmt: skip
    ids = {"image_token_id": count, "boi_token_id": count + 1, "eoi_token_id": count + 2}
    config = Gemma3Config(text_config=text, vision_config=image, mm_tokens_per_image=1, **ids)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    assert "reads more than text: choose one that reads text only" in refusal(folder, tiny_config)


def test_capped_attention_scores_need_kernels_that_cap(folder: Path, tiny_config: ModelConfig, policy: Policy) -> None:
    sizes = {"vocab_size": len(policy.tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "eos_token_id": 0}
    Gemma2ForCausalLM(Gemma2Config(**sizes, **heads)).save_pretrained(folder)
    for attention in ("auto", "eager"):
        chosen = load_policy(folder, tiny_config.model_copy(update={"attention": attention}))
        assert "attention eager" in chosen.describe()
    message = refusal(folder, tiny_config.model_copy(update={"attention": "sdpa"}))
    assert "caps attention scores, which model.attention=sdpa does not: set model.attention to auto or eager" in message


def test_a_models_own_code_is_neither_run_nor_offered(
    folder: Path, tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers asks at the terminal whether to run it, unless it is told not to."""
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "y")
    ran = folder / "RAN"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    auto = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    change_json(folder / "config.json", auto_map=auto, model_type="evil")
    assert "cannot be loaded" in refusal(folder, tiny_config)
    change_json(folder / "config.json", model_type="llama")
    change_json(folder / "tokenizer_config.json", auto_map=auto, tokenizer_class="Evil")
    try:
        load_policy(folder, tiny_config)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
    assert asked == [] and not ran.exists() and "y/N" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", WEIGHTS, "README.md"])
def test_pipes_and_devices_are_not_waited_for(folder: Path, tiny_config: ModelConfig, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert repr(name) in refusal(folder, tiny_config)
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    assert repr(name) in refusal(folder, tiny_config)


@pytest.mark.parametrize("shard", ["../elsewhere.safetensors", "/etc/hostname", "..", "a/b.safetensors"])
def test_shards_lie_in_the_directory(folder: Path, tiny_config: ModelConfig, shard: str) -> None:
    (folder.parent / "elsewhere.safetensors").write_bytes((folder / WEIGHTS).read_bytes())
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))
    assert "is damaged" in refusal(folder, tiny_config)


@pytest.mark.parametrize(
    "template", ["{{ 1/0 }}", "{{ messages[0].content + 1 }}", "{% for i in range(10**9) %}x{% endfor %}"]
)
def test_templates_that_fail_are_named(folder: Path, tiny_config: ModelConfig, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    assert "use another chat_template.jinja" in refusal(folder, tiny_config)


@pytest.mark.parametrize("claim", [{"num_hidden_layers": 10**9}, {"hidden_size": 10**9}, {"vocab_size": 10**12}])
def test_a_model_larger_than_its_weights_is_not_built(
    folder: Path, tiny_config: ModelConfig, claim: dict[str, int]
) -> None:
    change_json(folder / "config.json", **claim)
    ((name, value),) = claim.items()
    assert f"config.json says {name}={value}" in refusal(folder, tiny_config)
