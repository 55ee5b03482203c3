"""Fixtures for every test: a minute policy made from nothing."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from epo.config import ModelConfig
from epo.training.policy import Policy
from epo.training.tiny import build_model, build_tokenizer

# A folder of the tests' own: trackio reads this when it is imported, and TRL imports it long before its tests run.
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio-")

if find_spec("hypothesis"):  # make test-vllm has none of its tests, nor it
    from hypothesis import settings

    # The same examples every time, so that a change is judged by what it changes; `pytest --hypothesis-profile=default`
    # looks for new ones.
    settings.register_profile("repeatable", derandomize=True)
    settings.load_profile("repeatable")

TEXTS = [
    "You are in the kitchen. You see a door, a cup and a red apple.",
    "open the door to the hallway",
    "<think>the door is closed</think><action>open door</action>",
    "The door is now open. You move to the living room.",
] * 4


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    """Two layers, hidden size 32, about 300 entries, 256 tokens of context, fp32 on the CPU."""
    tiny = {"vocabulary_size": 320, "hidden_size": 32, "layers": 2, "heads": 2, "intermediate_size": 64}
    return ModelConfig.model_validate({"max_context": 256, "device": "cpu", "tiny": tiny})


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The embedded model's tokenizer. Shared: do not change it."""
    return build_tokenizer(TEXTS, vocabulary_size=320)


@pytest.fixture
def make_policy(tiny_config: ModelConfig, tokenizer: Any) -> Callable[..., Policy]:
    """`make_policy(seed=0, lively=True)`: a new policy each time, to train or perturb as a test likes.

    A model made from nothing is almost uniform over its vocabulary, whatever it reads. A lively one has larger weights:
    its predictions depend on the whole prompt (mean entropy about 4.2 nats) and some responses end by themselves.
    """

    def make(*, seed: int = 0, lively: bool = True) -> Policy:
        model = build_model(tokenizer, tiny_config, seed=seed)
        if lively:
            embedding = model.get_output_embeddings().weight
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.data.mul_(15 if parameter is embedding else 20)
            generator = torch.Generator().manual_seed(seed)
            end = torch.randn(embedding.shape[1], generator=generator)
            embedding.data[tokenizer.eos_token_id] = 0.8 * end
        return Policy(model.eval(), tokenizer, max_context=tiny_config.max_context)

    return make


@pytest.fixture
def policy(make_policy: Callable[..., Policy]) -> Policy:
    """A fresh, lively policy."""
    return make_policy()


@pytest.fixture
def make_sharp_policy(make_policy: Callable[..., Policy]) -> Callable[..., Policy]:
    """`make_sharp_policy(seed=0)`: gentle weights, for tight tolerances, yet visible preferences."""

    def make(*, seed: int = 0) -> Policy:
        policy = make_policy(seed=seed, lively=False)
        policy.head_weight_V_D.data.mul_(20.0)
        return policy

    return make


def pytest_sessionfinish() -> None:
    shutil.rmtree(os.environ["TRACKIO_DIR"], ignore_errors=True)
