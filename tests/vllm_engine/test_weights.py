"""The engine has the learner's weights, all of them, or refuses to draw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import disturb, draw, largest_difference, lively_policy, prompts, untie
from safetensors.torch import load_file, save_file

from epo.errors import UserError
from epo.sampling import vllm as module
from epo.sampling.vllm import VllmSampler
from epo.training.policy import Policy

Shared = tuple[Policy, VllmSampler]


def goes_there_and_back(policy: Policy, sampler: VllmSampler) -> None:
    asked = prompts(4)
    start = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    first = draw(sampler, asked)
    assert largest_difference(policy, asked, first) < 1e-3
    disturb(policy, seed=1)
    second = draw(sampler, asked)
    assert largest_difference(policy, asked, second) < 1e-3
    assert sampler.weight_error < 1e-3
    policy.model.load_state_dict(start)
    assert largest_difference(policy, asked, second) > 0.1  # the weights are so different that it can be seen
    policy.version += 1
    third = draw(sampler, asked)
    assert [c.policy_version for c in third] == [first[0].policy_version + 2] * 4
    for a, b in zip(first, third, strict=True):
        np.testing.assert_array_equal(a.response_ids, b.response_ids)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


def test_updates_of_a_tied_model_arrive(shared: Shared):
    goes_there_and_back(*shared)


def test_updates_of_an_untied_model_arrive(tokenizer: Any, open_sampler: Callable[..., Any]):
    policy = untie(lively_policy(tokenizer, seed=3))
    goes_there_and_back(policy, open_sampler(policy))


def test_weights_travel_once_per_update(shared: Shared):
    policy, sampler = shared
    draw(sampler, prompts(1))
    loads: list[str] = []
    call = sampler.engine.call
    sampler.engine.call = lambda do, **fields: (loads.append(do), call(do, **fields))[1]  # type: ignore[method-assign]
    try:
        draw(sampler, prompts(2))
        assert loads == ["generate"]
        policy.version += 1
        draw(sampler, prompts(2))
        assert loads == ["generate", "load", "forget", "score", "generate"]
    finally:
        sampler.engine.call = call  # type: ignore[method-assign]


def test_a_tied_head_goes_stale_and_is_found_out(
    tokenizer: Any, open_sampler: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    """Reloading weights as Hugging Face saves a tied model leaves the head what it was, and vLLM says nothing."""
    untied, export = module.engine_model_config, module.export_weights

    def export_tied(policy: Policy, file: Path, *, temperature: float) -> None:
        export(policy, file, temperature=temperature)
        save_file({name: t for name, t in load_file(file).items() if not name.startswith("lm_head.")}, file)

    monkeypatch.setattr(module, "engine_model_config", lambda policy: untied(policy) | {"tie_word_embeddings": True})
    monkeypatch.setattr(module, "export_weights", export_tied)
    sampler = open_sampler(lively_policy(tokenizer))
    for _ in range(2):  # it does not go on at the second attempt either
        with pytest.raises(UserError, match=r"differ from the learner's by .* sampler\.max_weight_error=0\.001"):
            draw(sampler, prompts(1))


def test_a_head_that_an_update_left_out_is_found_out(shared: Shared, monkeypatch: pytest.MonkeyPatch):
    policy, sampler = shared
    draw(sampler, prompts(1))
    old = policy.head_weight_V_D.detach().clone()
    export = module.export_weights

    def with_old_head(policy: Policy, file: Path, *, temperature: float) -> None:
        head = policy.head_weight_V_D.detach()
        new = head.clone()
        head.copy_(old)
        export(policy, file, temperature=temperature)
        head.copy_(new)

    # As little as a gentle optimiser step changes it.
    policy.head_weight_V_D.data.mul_(1 + 1e-3)
    policy.version += 1
    with monkeypatch.context() as patch, pytest.raises(UserError, match="does not take over all weights"):
        patch.setattr(module, "export_weights", with_old_head)
        draw(sampler, prompts(1))
    asked = prompts(3)
    assert largest_difference(policy, asked, draw(sampler, asked)) < 1e-3


def test_keys_and_values_of_old_weights_are_dropped(shared: Shared):
    policy, sampler = shared
    asked = prompts(3, length=100, seed=4)
    draw(sampler, asked)
    disturb(policy, seed=2)
    before = sampler.cached_tokens
    assert largest_difference(policy, asked, draw(sampler, asked)) < 1e-3
    assert sampler.cached_tokens == before
    # Were they not dropped, the new weights would go on from what the old ones read.
    call = sampler.engine.call
    try:
        sampler.engine.call = (  # type: ignore[method-assign]
            lambda do, **fields: {} if do == "forget" else call(do, **fields)
        )
        disturb(policy, seed=3)
        drawn = draw(sampler, asked)
    finally:
        sampler.engine.call = call  # type: ignore[method-assign]
    assert sampler.cached_tokens > before
    assert largest_difference(policy, asked, drawn) > 0.1
    policy.version += 1
    assert largest_difference(policy, asked, draw(sampler, asked)) < 1e-3
