"""Gradient checkpointing: less is kept, nothing else changes, and only the learner's forward passes know of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from epo.config import ModelConfig
from epo.errors import UserError
from epo.sampling.base import Request
from epo.sampling.local import LocalSampler
from epo.training.policy import Policy, load_policy

IDS = torch.randint(3, 300, (3, 17), generator=torch.Generator().manual_seed(7))
FULL, LORA = {"rank": 0}, {"rank": 4}


@pytest.fixture
def pair(make_policy: Callable[..., Policy], tiny_config: ModelConfig, tmp_path: Path) -> Callable[..., list[Policy]]:
    """The same policy without and with checkpointing."""

    def make(lora: dict[str, Any], *, lively: bool = False) -> list[Policy]:
        make_policy(lively=lively).save(tmp_path / "model")
        given = tiny_config.model_dump() | {"path": "", "compute": "float32", "lora": lora}
        configs = [ModelConfig.model_validate(given | {"gradient_checkpointing": flag}) for flag in (False, True)]
        return [load_policy(tmp_path / "model", config) for config in configs]

    return make


def note(seen: list[Any], *_: Any) -> None:
    seen.append(None)


@pytest.mark.parametrize("lora", [FULL, LORA])
def test_gradients_are_equal_and_layers_run_twice(lora: dict[str, Any], pair: Callable[..., list[Policy]]) -> None:
    found, runs = [], []
    for policy in pair(lora):
        seen: list[Any] = []
        for layer in policy.trunk.layers:  # type: ignore[union-attr]
            # Before, not after: a recomputation ends as soon as it has what backward needs.
            layer.mlp.register_forward_pre_hook(partial(note, seen))
        policy.hidden(IDS).sin().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
        runs.append(len(seen))
    assert torch.equal(*found) and found[0].abs().max() > 0
    assert runs == [2, 4]


def test_evaluation_mode_stays(pair: Callable[..., list[Policy]], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = pair(FULL)[1]
    inside: list[set[bool]] = []
    policy.trunk.layers[0].mlp.register_forward_pre_hook(  # type: ignore[union-attr]
        lambda *_: inside.append({m.training for m in policy.model.modules() if not isinstance(m, LlamaDecoderLayer)})
    )
    hidden = policy.hidden(IDS)
    assert not any(m.training for m in policy.model.modules())
    hidden.sum().backward()
    assert inside == [{False}, {False}]  # forward and recomputation
    monkeypatch.setattr(policy.trunk.layers[1], "forward", lambda *a, **k: 1 / 0)  # type: ignore[union-attr]
    with pytest.raises(ZeroDivisionError):
        policy.hidden(IDS)
    assert not any(m.training for m in policy.model.modules())


def test_the_sampler_draws_the_same(pair: Callable[..., list[Policy]]) -> None:
    drawn = []
    for policy in pair(FULL, lively=True):
        sampler = LocalSampler(policy, max_episodes=1)
        request = Request(episode=0, prompt_ids=list(range(5, 25)), random=np.random.default_rng(0))
        (done,) = sampler.generate([request], temperature=1.0, train_temperature=1.0, max_tokens=8)
        drawn.append((done.response_ids.tolist(), done.logprobs.tolist()))
    assert drawn[0] == drawn[1]


def test_dropout_is_refused(pair: Callable[..., list[Policy]], tiny_config: ModelConfig, tmp_path: Path) -> None:
    policy = pair(FULL)[0]
    values = policy.model.config.to_dict() | {"attention_dropout": 0.1}
    LlamaForCausalLM(LlamaConfig(**values)).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"attention_dropout above 0: set it to 0 in the model's config\.json"):
        load_policy(tmp_path / "model", tiny_config.model_copy(update={"gradient_checkpointing": True}))
    load_policy(tmp_path / "model", tiny_config)
