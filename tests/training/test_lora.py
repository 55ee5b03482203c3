"""Adapters: one base serves policy, critic and reference, each of them exactly as a model of its own would.

Independent computations: dense models whose weights are base + alpha / rank * B A, added up here.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from epo.config import CriticConfig, ModelConfig
from epo.errors import UserError
from epo.training.adapters import Adapters, Base, effective_weight
from epo.training.policy import Critic, Policy, load_policy, resumed_policy

RANK, ALPHA = 4, 8.0
IDS = torch.randint(3, 300, (3, 17), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def lora_config(tiny_config: ModelConfig) -> ModelConfig:
    return ModelConfig.model_validate(
        tiny_config.model_dump() | {"path": "", "lora": {"rank": RANK, "alpha": ALPHA}, "compute": "float32"}
    )


@pytest.fixture
def base_folder(make_policy: Callable[..., Policy], tmp_path: Path) -> Path:
    make_policy(lively=False).save(tmp_path / "base")
    return tmp_path / "base"


def perturb(policy: Policy, name: str, *, seed: int, scale: float = 0.3) -> None:
    assert policy.adapters is not None
    generator = torch.Generator().manual_seed(seed)
    for tensor in policy.adapters.tensors(name).values():
        tensor.data.add_(scale * torch.randn(tensor.shape, generator=generator))


@pytest.fixture
def adapted(base_folder: Path, lora_config: ModelConfig) -> Policy:
    """A policy whose adapter has an effect."""
    policy = load_policy(base_folder, lora_config)
    perturb(policy, "policy", seed=1)
    return policy


def dense(policy: Policy, base_folder: Path, name: str | None) -> Any:
    """A model of its own with the weights that base and adapter add up to."""
    model: Any = AutoModelForCausalLM.from_pretrained(base_folder)
    model.to(policy.head_weight_V_D.dtype)
    if name is not None:
        assert policy.adapters is not None
        tensors = policy.adapters.tensors(name)
        for layer in {key.rsplit(".", 2)[0] for key in tensors}:
            a, b = (tensors[f"{layer}.lora_{part}.weight"].detach() for part in "AB")
            model.get_submodule(layer).weight.data += ALPHA / RANK * b @ a
    return model.eval()


def hidden_of(model: Any) -> Tensor:
    return model.base_model(input_ids=IDS, use_cache=False).last_hidden_state


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def storages(tensors: Any) -> dict[int, int]:
    """Bytes by storage."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


# ---------------------------------------------------------------- roles


def test_a_new_adapter_has_no_effect_and_depends_on_the_seed_alone(base_folder: Path, lora_config: ModelConfig) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (load_policy(base_folder, lora_config, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.hidden(IDS), hidden_of(dense(one, base_folder, None)))
    assert one.adapters is not None and same.adapters is not None and other.adapters is not None
    key = "model.layers.1.mlp.down_proj.lora_A.weight"
    assert torch.equal(one.adapters.tensors("policy")[key], same.adapters.tensors("policy")[key])
    assert not torch.equal(one.adapters.tensors("policy")[key], other.adapters.tensors("policy")[key])


def test_three_roles_equal_three_models_and_leak_nothing(adapted: Policy, base_folder: Path) -> None:
    critic = Critic(adapted, CriticConfig(trunk="separate"))
    reference = adapted.frozen_copy()
    assert reference.adapter == "reference" and list(reference.parameters()) == []
    start = dense(adapted, base_folder, "policy")
    perturb(adapted, "policy", seed=2)
    perturb(adapted, "critic", seed=3)
    critic.head.weight.data.normal_()
    policy_model, critic_model = (dense(adapted, base_folder, name) for name in ("policy", "critic"))
    nothing = torch.empty(0)
    for _ in range(2):  # whatever came before
        assert_equal(adapted.hidden(IDS), hidden_of(policy_model))
        expected_values = critic.head(hidden_of(critic_model)).squeeze(-1)
        assert_equal(critic(nothing, IDS), expected_values)
        assert_equal(reference.hidden(IDS), hidden_of(start))
        assert_equal(critic(nothing, IDS), expected_values)
    assert adapted.model.base_model is adapted.trunk
    assert_equal(adapted.trunk(input_ids=IDS).last_hidden_state, hidden_of(policy_model))  # as samplers call it
    distances = [(hidden_of(a) - hidden_of(b)).abs().max() for a, b in ((start, policy_model), (start, critic_model))]
    assert min(distances) > 0.1  # the comparison can tell them apart
    with pytest.raises(ZeroDivisionError), adapted.adapters.using("critic"):  # type: ignore[union-attr]
        _ = 1 / 0
    assert_equal(adapted.hidden(IDS), hidden_of(policy_model))


def test_the_reference_of_an_untrained_adapter_is_the_base(base_folder: Path, lora_config: ModelConfig) -> None:
    policy = load_policy(base_folder, lora_config)
    reference = policy.frozen_copy()
    perturb(policy, "policy", seed=1)
    assert reference.adapter is None and list(reference.parameters()) == []
    assert torch.equal(reference.hidden(IDS), hidden_of(dense(policy, base_folder, None)))


def test_peft_merges_to_the_same_weights(adapted: Policy, base_folder: Path, tmp_path: Path) -> None:
    adapted.save(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    merged = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).merge_and_unload()
    assert_equal(adapted.hidden(IDS), hidden_of(merged.eval()))
    for name, module in adapted.model.named_modules():
        if name.endswith("_proj"):
            assert_equal(effective_weight(module), merged.get_submodule(name).weight)
    embedding = adapted.model.get_output_embeddings()
    assert torch.equal(effective_weight(embedding), embedding.weight)


@pytest.mark.parametrize("targets", ["all-linear", "attention"])
def test_which_layers_are_adapted(base_folder: Path, lora_config: ModelConfig, targets: str) -> None:
    lora = lora_config.lora.model_copy(update={"targets": targets})
    policy = load_policy(base_folder, lora_config.model_copy(update={"lora": lora}))
    assert policy.adapters is not None
    names = {key.split(".")[-3] for key in policy.adapters.tensors("policy")}
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert names == (attention if targets == "attention" else attention | {"gate_proj", "up_proj", "down_proj"})


# ---------------------------------------------------------------- memory


def test_roles_share_one_base(adapted: Policy, base_folder: Path, lora_config: ModelConfig) -> None:
    plain = AutoModelForCausalLM.from_pretrained(base_folder)
    base_bytes = sum(storages(plain.parameters()).values())
    adapter_bytes = sum(storages(adapted.parameters()).values())
    # 4 (inputs + outputs) numbers for each of 7 layers in 2 blocks of width 32 and 64
    assert adapter_bytes == 4 * RANK * 2 * (4 * (32 + 32) + 3 * (32 + 64))
    critic, reference = Critic(adapted, CriticConfig(trunk="separate")), adapted.frozen_copy()
    held = storages([*adapted.model.parameters(), *reference.model.parameters(), *critic.parameters()])
    head_bytes = sum(storages(critic.head.parameters()).values())
    assert sum(held.values()) == base_bytes + 3 * adapter_bytes + head_bytes
    assert {id(m) for m in (adapted.model, reference.model)} == {id(adapted.model)}
    # Nothing of the base is in what the optimiser, or the critic's file, gets.
    assert sum(storages(critic.parameters()).values()) == adapter_bytes + head_bytes
    assert sum(t.nbytes for t in critic.state_dict().values()) == adapter_bytes + head_bytes
    assert all(p.requires_grad for p in [*adapted.parameters(), *critic.parameters()])
    shared = Critic(adapted, CriticConfig(trunk="shared"))
    assert {name for name, _ in shared.named_parameters()} == {"head.weight", "head.bias"}


def test_a_full_model_trains_everything(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy()
    assert len(list(policy.parameters())) == len(list(policy.model.parameters()))
    assert list(policy.frozen_copy().parameters()) == []


def test_bfloat16_base_under_float32_adapters(base_folder: Path, lora_config: ModelConfig) -> None:
    policy = load_policy(base_folder, lora_config.model_copy(update={"dtype": "bfloat16", "compute": "auto"}))
    Critic(policy, CriticConfig(trunk="separate"))
    assert policy.adapters is not None
    assert {t.dtype for name in ("policy", "critic") for t in policy.adapters.tensors(name).values()} == {torch.float32}
    assert policy.head_weight_V_D.dtype == torch.bfloat16


# ---------------------------------------------------------------- gradients


def gradients(policy: Policy, name: str) -> dict[str, Tensor]:
    assert policy.adapters is not None
    return {k: t.grad.clone() for k, t in policy.adapters.tensors(name).items() if t.grad is not None}


def dense_gradients(
    policy: Policy, base_folder: Path, name: str, loss: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """By the chain rule from the gradient G of the summed weight: dA = s B^T G, dB = s G A^T."""
    assert policy.adapters is not None
    model, tensors, scale, found = dense(policy, base_folder, name), policy.adapters.tensors(name), ALPHA / RANK, {}
    loss(hidden_of(model)).backward()
    for layer in {key.rsplit(".", 2)[0] for key in tensors}:
        a, b = (tensors[f"{layer}.lora_{part}.weight"].detach() for part in "AB")
        gradient = model.get_submodule(layer).weight.grad
        found[f"{layer}.lora_A.weight"] = scale * b.T @ gradient
        found[f"{layer}.lora_B.weight"] = scale * gradient @ a.T
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_adapter_that_computed_and_no_other(
    base_folder: Path, lora_config: ModelConfig, checkpointing: bool
) -> None:
    """Backward runs after all three forwards, when another adapter is active than in any of them but one."""
    policy = load_policy(base_folder, lora_config.model_copy(update={"gradient_checkpointing": checkpointing}))
    perturb(policy, "policy", seed=1)
    critic, reference = Critic(policy, CriticConfig(trunk="separate")).double(), policy.frozen_copy()
    policy.model.double()
    perturb(policy, "policy", seed=2)
    perturb(policy, "critic", seed=3)
    critic.head.weight.data.normal_()
    weights = torch.randn(3, 17, 32, generator=torch.Generator().manual_seed(4)).double()
    target = reference.hidden(IDS).detach()

    def policy_loss(hidden: Tensor) -> Tensor:
        return (weights * (hidden - target)).square().mean()

    def critic_loss(hidden: Tensor) -> Tensor:
        return critic.head(hidden).square().mean()

    hidden = policy.hidden(IDS)
    values = critic(torch.empty(0), IDS)
    with torch.no_grad():
        reference.hidden(IDS)
    (policy_loss(hidden) + values.square().mean()).backward()
    for name, loss in (("policy", policy_loss), ("critic", critic_loss)):
        found, expected = gradients(policy, name), dense_gradients(policy, base_folder, name, loss)
        assert found.keys() == expected.keys()
        for key in found:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-5)
            assert found[key].abs().max() > 0
    assert gradients(policy, "reference") == {}
    trained = {id(p) for p in [*policy.parameters(), *critic.parameters()]}
    assert all(p.grad is None for p in policy.model.parameters() if id(p) not in trained)
    # Each alone: nothing of the other's loss.
    for p in policy.model.parameters():
        p.grad = None
    policy_loss(policy.hidden(IDS)).backward()
    assert gradients(policy, "critic") == {}


def test_training_the_critic_leaves_the_policy_as_it_is(adapted: Policy) -> None:
    critic = Critic(adapted, CriticConfig(trunk="separate"))
    before, values = adapted.hidden(IDS).detach(), critic(torch.empty(0), IDS).detach()
    optimizer = torch.optim.AdamW(critic.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (critic(torch.empty(0), IDS) - 1).square().mean().backward()
        optimizer.step()
    assert torch.equal(adapted.hidden(IDS), before)
    assert not torch.equal(critic(torch.empty(0), IDS), values)


def test_a_second_backward_recomputes_again(base_folder: Path, lora_config: ModelConfig) -> None:
    policy = load_policy(base_folder, lora_config.model_copy(update={"gradient_checkpointing": True}))
    perturb(policy, "policy", seed=1)
    loss = policy.hidden(IDS).square().mean()
    found = []
    for _ in range(2):
        with policy.adapters.using(None):  # type: ignore[union-attr]
            grads = torch.autograd.grad(loss, list(policy.parameters()), retain_graph=True)
        found.append(torch.cat([g.flatten() for g in grads]))
    assert torch.equal(*found) and found[0].abs().max() > 0


# ---------------------------------------------------------------- files


def test_what_was_saved_comes_back(adapted: Policy, base_folder: Path, lora_config: ModelConfig, tmp_path: Path):
    folder = tmp_path / "adapter"
    adapted.save(folder)
    assert not (folder / "model.safetensors").exists()
    assert json.loads((folder / "base.json").read_text()) == {
        "path": str(base_folder), "sha256": adapted.adapters.base.sha256, "seed": None,  # type: ignore[union-attr]
    }  # fmt: skip
    loaded = load_policy(folder, lora_config)
    assert torch.equal(loaded.hidden(IDS), adapted.hidden(IDS))
    assert loaded.digest() == adapted.digest() != loaded.adapters.base.sha256  # type: ignore[union-attr]
    assert loaded.folder == folder
    # A run that starts from an adapter refers to that adapter.
    reference = loaded.frozen_copy()
    assert reference.adapter == "reference" and reference.digest() == adapted.digest()


def test_resuming_takes_one_base(adapted: Policy, lora_config: ModelConfig, tmp_path: Path) -> None:
    adapted.save(tmp_path / "start")
    perturb(adapted, "policy", seed=6)
    adapted.save(tmp_path / "later")
    start = load_policy(tmp_path / "start", lora_config)
    digest = start.digest()
    policy, frozen = resumed_policy(tmp_path / "later", lora_config, start=start)
    assert policy.model is frozen.model
    assert (policy.digest(), frozen.digest()) == (adapted.digest(), digest)
    assert frozen.frozen_copy().adapter == frozen.adapter  # the learner asks for a copy once more


def test_a_base_is_known_by_its_weights(adapted: Policy, base_folder: Path, lora_config: ModelConfig, tmp_path: Path):
    folder = tmp_path / "adapter"
    adapted.save(folder)
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    (base_folder / "model.safetensors").unlink()
    model.save_pretrained(base_folder, max_shard_size="40KB")
    assert len(list(base_folder.glob("*.safetensors"))) > 1
    for dtype in ("float32", "bfloat16"):  # neither how it is cut into files nor how it is read matters
        load_policy(folder, lora_config.model_copy(update={"dtype": dtype, "compute": "auto"}))
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1e-3
    for file in base_folder.glob("model*"):
        file.unlink()
    model.save_pretrained(base_folder)
    message = refusal(folder, lora_config)
    assert "is not the model that the adapter" in message and str(base_folder) in message and str(folder) in message
    base_folder.rename(tmp_path / "elsewhere")
    assert "is not there: put it back, or set 'path'" in refusal(folder, lora_config)


def refusal(folder: Path, config: ModelConfig) -> str:
    with pytest.raises(UserError) as caught:
        load_policy(folder, config)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and caught.value.__cause__ is None
    return message


def test_adapters_that_do_not_fit(adapted: Policy, lora_config: ModelConfig, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    adapted.save(folder)

    def configured(**lora: Any) -> ModelConfig:
        return lora_config.model_copy(update={"lora": lora_config.lora.model_copy(update=lora)})

    assert "set model.lora.rank to that of the adapter" in refusal(folder, configured(rank=0))
    assert "has rank 4 and alpha 8, not model.lora.rank=8" in refusal(folder, configured(rank=8))
    assert "not model.lora.rank=4 and model.lora.alpha=16" in refusal(folder, configured(alpha=16.0))
    assert "set model.lora.targets as it was trained" in refusal(folder, configured(targets="attention"))
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    tensors = load_file(weights)
    name = min(tensors)
    save_file({k: t[:1].clone() if k == name else t for k, t in tensors.items()}, weights)
    assert "does not fit" in refusal(folder, lora_config)
    for damage in (b"", whole[:50], whole[:-10]):
        weights.write_bytes(damage)
        assert "cannot be read" in refusal(folder, lora_config)
    weights.unlink()
    assert "cannot be read" in refusal(folder, lora_config)
    (folder / "base.json").write_text("{")
    assert "'base.json' is damaged" in refusal(folder, lora_config).replace(str(folder) + "/", "")


def test_without_peft(base_folder: Path, lora_config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "model.lora.rank=4 needs the package peft" in refusal(base_folder, lora_config)
    no_lora = lora_config.model_copy(update={"lora": lora_config.lora.model_copy(update={"rank": 0})})
    load_policy(base_folder, no_lora)


def test_peft_is_not_imported_without_adapters(base_folder: Path) -> None:
    code = (
        "import sys; from epo.config import ModelConfig; from epo.training.policy import load_policy;"
        f"p = load_policy({str(base_folder)!r}, ModelConfig(device='cpu', max_context=256)); p.frozen_copy();"
        "sys.exit('peft' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_a_model_without_linear_layers(adapted: Policy, lora_config: ModelConfig) -> None:
    bare = copy.deepcopy(adapted.model.get_output_embeddings())

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm_head, self.config = bare, adapted.model.config

        def get_output_embeddings(self) -> Any:
            return self.lm_head

    with pytest.raises(UserError, match="finds no linear layers in a model of type 'llama'"):
        Adapters(Model(), lora_config.lora, Base(path="", sha256=""), seed=0)
