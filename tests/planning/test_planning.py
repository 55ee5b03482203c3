"""The plan's arithmetic against literal numbers, what autograd keeps, and properties that any plan must have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from epo.config import Config, LoraConfig
from epo.errors import UserError
from epo.planning.hardware import parse_hardware
from epo.planning.memory import Precision, micro_batch_tokens, saved_per_layer
from epo.planning.plan import Answers, make_plan, refusal, what_would_fit
from epo.planning.shapes import SHAPES, ModelShape, read_shape
from epo.planning.timing import forward_operations
from epo.planning.workload import workload_of
from epo.recipe import load_config, recipe_names

GIB = 2**30
PAPER = "paper/alfworld-qwen2.5-3b"


def test_parameters_are_those_of_the_published_checkpoints() -> None:
    """Totals that the models' pages on the hub state for their safetensors."""
    assert {name: shape.parameters for name, shape in SHAPES.items()} == {
        "SmolLM2-135M": 134_515_008,
        "Qwen2.5-0.5B": 494_032_768,
        "Qwen2.5-1.5B": 1_543_714_304,
        "Qwen2.5-3B": 3_085_938_688,
        "Qwen2.5-7B": 7_615_616_512,
    }


def test_keys_and_values_are_the_known_sizes() -> None:
    """Qwen2.5-7B: 28 layers x 4 heads x 128 x 2 x 2 bytes = 56 KiB a token. SmolLM2: docs/sampling.md."""
    assert SHAPES["Qwen2.5-7B"].key_value_bytes(size=2) == 57_344
    assert SHAPES["SmolLM2-135M"].key_value_bytes(size=4) == 46_080
    assert SHAPES["SmolLM2-135M"].key_value_bytes(size=2) == 23_040


def test_a_worked_example_by_hand() -> None:
    """SmolLM2-135M, all weights in float32, GRPO without reference, on a CPU; every number below is multiplied out."""
    config = _config({"optimizer": {"microbatch_tokens": 1024, "minibatches": 1}})
    plan = make_plan(config, parse_hardware("cpu:2x24G"), of=Answers(turns=4, response=8, observation=50, prompt=200))
    # 200 + 4 x 8 + 3 x 50 = 382 tokens a row, 16 rows.
    assert plan.work.processed == 16 * 382
    assert plan.work.prefilled == 16 * 350
    assert plan.work.decoded == 16 * 32
    assert plan.always["weights"] == 134_515_008 * 4
    assert plan.always["gradients"] == 538_060_032
    assert plan.always["moments"] == 1_076_120_064
    # Packed: 106,168,320 parameters of matrices and the head of 28,311,552, in float32.
    assert plan.always["sampler's packed weights"] == 537_919_488
    # Of a token in a layer: 4 x (6 x 576 + 2 x 576 + 2 x 192 + 4 x 1536) + 9 x 4 + 2 x 4 = 44,588 bytes.
    kept = 30 * 44_588
    working = 3 * 1536 * 4 + 3 * 576 * 4
    assert plan.update["activations of a micro-batch"] == 1024 * (kept + working + 576 * 8)
    # 8 live episodes of 1,024 positions.
    assert plan.rollout["keys and values"] == 8 * 1024 * 46_080
    # Forward 2 per parameter and token, backward twice that, and 4 x 576 x 30 a pair of positions.
    pairs = 16 * 382 * 383 // 2
    layers = 3 * (2 * 106_168_320 * 6112 + 4 * 576 * 30 * pairs)
    assert plan.operations["layers, forward and backward"] == layers
    assert plan.operations["token head"] == 8 * 49_152 * 576 * 512
    rate = 2 * 100e9 * 0.6
    assert plan.time.update == pytest.approx((layers + 8 * 49_152 * 576 * 512) / rate, rel=1e-12)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize(("weights", "compute"), [(4, 4), (4, 2), (2, 2)])
@pytest.mark.parametrize("targets", ["all-linear", "attention"])
@pytest.mark.parametrize("own_attention", [False, True])
def test_a_layer_keeps_what_autograd_keeps(
    rank: int, weights: int, compute: int, targets: Any, own_attention: bool
) -> None:
    """Bytes of saved tensors that grow with the tokens, of a model with one layer more."""
    if rank == 0 and targets == "attention":
        targets = "all-linear"
    own_attention = own_attention and compute == 2
    shape = ModelShape(
        vocabulary=50, hidden=48, layers=1, heads=6, key_value_heads=2, head_size=8, intermediate=80, is_tied=True,
        source="test",
    )  # fmt: skip

    def saved(layers: int, tokens: int) -> int:
        return _saved_bytes(
            shape,
            layers,
            tokens,
            rank=rank,
            targets=targets,
            weights=weights,
            compute=compute,
            own_attention=own_attention,
        )

    measured = (saved(2, 64) - saved(1, 64)) - (saved(2, 32) - saved(1, 32))
    precision = Precision(weights=weights, compute=compute)
    expected = saved_per_layer(shape, precision, rank=rank, targets=targets, own_attention=own_attention)
    assert measured / 64 == pytest.approx(expected, abs=0.5)


def _saved_bytes(
    shape: ModelShape,
    layers: int,
    tokens: int,
    *,
    rank: int,
    targets: Any,
    weights: int,
    compute: int,
    own_attention: bool,
) -> int:
    """Of two rows of `tokens` each, through the model as the learner would run it."""
    from epo.training import causal_attention
    from epo.training.adapters import Adapters, Base
    from epo.training.fused_layers import fuse_layers
    from epo.training.linear import through_onednn

    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            num_hidden_layers=layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.key_value_heads,
            intermediate_size=shape.intermediate,
            tie_word_embeddings=True,
        )
    ).to(torch.float32 if weights == 4 else torch.bfloat16)
    if rank:
        Adapters(model, LoraConfig(rank=rank, targets=targets), Base(path="x", sha256="x"), seed=0)
    through_onednn(model)
    if own_attention:
        causal_attention.register()
        model.set_attn_implementation(causal_attention.NAME)
        fuse_layers(model)
    found: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor  # holding it keeps its address from being used again
        return tensor

    ids_B_T = torch.zeros(2, tokens, dtype=torch.long)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=compute == 2),
    ):
        hidden = model.base_model(input_ids=ids_B_T, use_cache=False).last_hidden_state
    assert hidden.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def test_the_window_has_a_row_for_each_turn() -> None:
    """prompts 100, 100 + 58, then 100 + 2 x 58; a pair is an observation and an action of 8 tokens."""
    config = load_config("base", ["agent.context=window", "environment.max_turns=5", "environment.suite=corridor"])
    work = workload_of(config, turns=5, response=20, observation=50, prompt=100)
    prompts = [100, 158, 216, 216, 216]
    assert work.rows == 5 * work.episodes
    assert work.prefilled == work.episodes * sum(prompts)
    assert work.processed == work.episodes * (sum(prompts) + 100)
    assert work.pairs == work.episodes * sum((x + 20) * (x + 21) / 2 for x in prompts)


def test_the_head_never_holds_tokens_times_vocabulary() -> None:
    """8,192 trained tokens x 151,936 in float32 are 4.6 GiB, the matrix of TRL #7244; the plan holds tiles."""
    for tokens in (8192, 16384):
        overrides = [f"optimizer.microbatch_tokens={tokens}", "model.lora.rank=8", f"model.max_context={tokens}"]
        plan = make_plan(load_config(PAPER, overrides), parse_hardware("H200-141G"))
        own = plan.update["token head"] - 151_936 * 2048 * 2  # the head itself, rounded for the products
        assert own < 0.2 * tokens * 151_936 * 4


def test_every_recipe_can_be_planned() -> None:
    names = recipe_names()
    assert PAPER in names
    for name in names:
        config = load_config(name, ["model.path=SmolLM2-135M"] if name.startswith("smollm2") else [])
        for hardware in ("cpu:2x24G", "8xH100-80G"):
            plan = make_plan(config, parse_hardware(hardware))
            assert plan.peak > 0
            assert plan.time.total > 0
            json.dumps(plan.as_dict(price=1.0), allow_nan=False)


KNOBS = {
    "layers": st.integers(1, 6),
    "hidden": st.integers(1, 8).map(lambda n: 32 * n),
    "tokens": st.integers(256, 8192),
    "rank": st.sampled_from([0, 4, 16]),
    "kind": st.sampled_from(["grpo", "shared", "separate"]),
    "hardware": st.sampled_from(["cpu:2x24G", "L4", "8xH100-80G", "2x8xA100-40G"]),
}


@given(**KNOBS)
@settings(max_examples=12, deadline=None)
def test_more_of_anything_never_takes_less(
    layers: int, hidden: int, tokens: int, rank: int, kind: str, hardware: str
) -> None:
    def plan(**change: int) -> Any:
        values = {"layers": layers, "hidden": hidden, "tokens": tokens, "rank": rank} | change
        config = _tiny(kind=kind, **values)
        return make_plan(config, parse_hardware(hardware), of=Answers(turns=change.get("turns", 5)))

    base = plan()
    for change in ({"layers": layers + 1}, {"hidden": hidden + 32}, {"tokens": 2 * tokens}, {"turns": 9}):
        assert plan(**change).peak >= base.peak, change
    assert plan(layers=layers + 1).time.total > base.time.total
    assert plan(turns=9).time.total > base.time.total


@given(**KNOBS)
@settings(max_examples=15, deadline=None)
def test_what_saves_memory_saves_memory(
    layers: int, hidden: int, tokens: int, rank: int, kind: str, hardware: str
) -> None:
    config = _tiny(kind=kind, layers=layers + 1, hidden=hidden, tokens=tokens, rank=rank)
    on = parse_hardware(hardware)
    plan = make_plan(config, on)
    recomputed = _with(config, {"model": {"gradient_checkpointing": True}})
    # One layer is worked on in full beside what all keep, so two layers of a small share may come out even.
    if layers >= 2:
        assert (
            make_plan(recomputed, on).update["activations of a micro-batch"]
            < plan.update["activations of a micro-batch"]
        )
    assert sum(make_plan(recomputed, on).operations.values()) > sum(plan.operations.values())
    if not on.accelerator.is_cpu:
        more = make_plan(config, on.with_nodes(2 * on.nodes))
        assert more.always["moments"] == pytest.approx(plan.always["moments"] / 2)
        assert more.work == plan.work


def test_what_is_said_to_fit_fits() -> None:
    """The refusal's advice, taken literally."""
    hardware = parse_hardware("8xH100-80G")
    plan = make_plan(load_config(PAPER, []), hardware)
    assert not plan.fits
    advice = what_would_fit(plan)
    assert any("gradient_checkpointing" in change for change in advice)
    for change in advice:
        if change.startswith("--hardware "):
            changed = make_plan(load_config(PAPER, []), parse_hardware(change.removeprefix("--hardware ")))
        else:
            changed = make_plan(load_config(PAPER, change.split()), hardware)
        assert changed.fits, change
    line = refusal(plan)
    assert "\n" not in line
    assert "activations" in line
    assert f"{(plan.peak - plan.usable) / GIB:.1f} GiB missing" in line


def test_hardware_is_read_as_it_is_written() -> None:
    for text, nodes, per_node, name in (
        ("H100-80G", 1, 1, "H100-80G"),
        ("8xh100-80g", 1, 8, "H100-80G"),
        ("4x8xA100-40G", 4, 8, "A100-40G"),
        ("2xRTX 4090", 1, 2, "RTX4090"),
        ("8xH100-80GB", 1, 8, "H100-80G"),
    ):
        found = parse_hardware(text)
        assert (found.nodes, found.per_node, found.accelerator.name) == (nodes, per_node, name), text
    cpu = parse_hardware("cpu:2x24G")
    assert (cpu.cores, cpu.accelerator.memory_gib, cpu.devices) == (2, 24, 1)


@pytest.mark.parametrize(
    ("text", "said"),
    [("8xH200-140G", "H200-141G"), ("B300", "B200"), ("0xL4", "for example"), ("cpu:0x1G", "no cores"), ("", "for ex")],
)
def test_other_hardware_is_refused(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_hardware(text)


def test_a_config_json_is_read_and_others_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    shape = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 64}
    file.write_text(json.dumps({"model_type": "llama", "num_attention_heads": 4, **shape}))
    found = read_shape(file)
    assert (found.key_value_heads, found.head_size, found.is_tied) == (4, 8, False)
    assert found.parameters == 2 * 100 * 32 + 3 * (4 * 32 * 32 + 3 * 32 * 64 + 64) + 32
    for content, said in (({"model_type": "mamba"}, "mamba"), ({"model_type": "llama"}, "KeyError")):
        file.write_text(json.dumps(content))
        with pytest.raises(UserError, match=said):
            read_shape(file)
    file.write_text("{")
    with pytest.raises(UserError, match="does not say"):
        read_shape(file)


def test_the_micro_batch_holds_at_least_one_row_and_no_more_than_there_is() -> None:
    config = _config({"optimizer": {"microbatch_tokens": 100, "minibatches": 1}})
    work = workload_of(config, turns=4, response=8, observation=50, prompt=200)
    assert micro_batch_tokens(config, work) == 382
    big = _config({"optimizer": {"microbatch_tokens": 10**6, "minibatches": 1}})
    assert micro_batch_tokens(big, work) == work.processed


def test_forward_operations_by_hand() -> None:
    """2 x 106,168,320 a token in SmolLM2's matrices; 10 tokens see 55 pairs."""
    found = forward_operations(SHAPES["SmolLM2-135M"], tokens=10, pairs=55)
    assert found == 2 * 106_168_320 * 10 + 4 * 55 * 576 * 30


def _config(change: dict[str, Any]) -> Config:
    """SmolLM2 with GRPO: 16 episodes, 8 of them live."""
    base: dict[str, Any] = {
        "environment": {"suite": "scienceworld", "workers": 8},
        "agent": {"format": "action", "max_response_tokens": 20},
        "model": {"path": "SmolLM2-135M", "max_context": 1024},
        "imitation": {"demonstrations": 0},
        "rollout": {"tasks_per_step": 4, "group_size": 4},
        "algorithm": {"name": "grpo"},
    }
    return Config.model_validate(base | change)


def _tiny(*, kind: str, layers: int, hidden: int, tokens: int, rank: int, turns: int = 5) -> Config:
    trunk = {"critic": {"trunk": kind}} if kind != "grpo" else {}
    return Config.model_validate(
        {
            "environment": {"workers": 16, "max_turns": 20},
            "agent": {"format": "action", "max_response_tokens": 20},
            "model": {
                "max_context": 2048,
                "tiny": {"hidden_size": hidden, "layers": layers, "intermediate_size": 2 * hidden},
                "lora": {"rank": rank},
            },
            "rollout": {"tasks_per_step": 8, "group_size": 4},
            "algorithm": {"name": "grpo" if kind == "grpo" else "ppo", **trunk},
            "optimizer": {"microbatch_tokens": tokens, "minibatches": 2},
        }
    )


def _with(config: Config, change: dict[str, dict[str, Any]]) -> Config:
    tree = config.model_dump()
    for section, values in change.items():
        tree[section].update(values)
    return Config.model_validate(tree)
