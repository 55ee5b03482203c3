"""A real model: SmolLM2-135M, where `epo models pull smollm2-135m` has put it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engines import disturb, draw, largest_difference

from epo.config import ModelConfig
from epo.models.catalogue import SMOLLM2
from epo.training.policy import Policy, load_policy

pytestmark = pytest.mark.skipif(not SMOLLM2.is_ready(), reason="epo models pull smollm2-135m")

QUESTIONS = ("What is the capital of France?", "You are in a kitchen. What do you do?", "Name a living thing.")


def load(compute: str) -> Policy:
    config = ModelConfig.model_validate({"path": str(SMOLLM2.folder), "device": "cpu", "compute": compute})
    return load_policy(SMOLLM2.folder, config)


def test_log_probabilities_and_an_update_in_float32(open_sampler: Callable[..., Any]):
    policy = load("float32")
    sampler = open_sampler(policy)
    asked = [policy.chat.first_prompt(question) for question in QUESTIONS]
    assert largest_difference(policy, asked, draw(sampler, asked, tokens=24)) < 1e-3
    drawn = draw(sampler, asked[:1], temperature=0, tokens=24)
    assert "Paris" in policy.chat.decode(drawn[0].response_ids.tolist()) and drawn[0].finished
    disturb(policy, seed=0)
    assert largest_difference(policy, asked, draw(sampler, asked, tokens=24)) < 1e-3


def test_an_update_in_bfloat16(open_sampler: Callable[..., Any]):
    policy = load("bfloat16")
    sampler = open_sampler(policy)
    asked = [policy.chat.first_prompt(question) for question in QUESTIONS]
    assert largest_difference(policy, asked, draw(sampler, asked, tokens=24)) < 1.0
    with torch.no_grad():
        policy.head_weight_V_D.mul_(1.01)
    policy.version += 1
    assert largest_difference(policy, asked, draw(sampler, asked, tokens=24)) < 1.0
