"""A minute policy, and TRL's trainers for it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scripted import Scripted, plain_options

from epo.integrations.trl import EPOConfig
from epo.training.policy import Policy


@pytest.fixture(autouse=True)
def quiet_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    monkeypatch.setenv("CI", "1")  # else TRL reports every trainer that is made to its makers


@pytest.fixture
def base_policy(make_policy: Callable[..., Policy]) -> Policy:
    return make_policy()


@pytest.fixture
def tool_tokenizer(tokenizer: Any) -> Any:
    """A whole response is the argument of the one tool, `act`."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|assistant|>' if m.role == 'assistant' else '<|user|>' }}{{ m.content }}"
        "{{ m.tool_calls | tojson if m.tool_calls }}<|end|>{% endfor %}"
        "{{ '<|assistant|>' if add_generation_prompt }}"
    )
    call = {"type": "function", "function": {"name": "act", "arguments": {"action": "{content}"}}}
    tokenizer.response_template = {
        "defaults": {"role": "assistant"},
        "start_anchor": "<|assistant|>",
        "fields": {"tool_calls": {"content": "text", "repeats": True, "transform": call}},
    }
    return tokenizer


@pytest.fixture
def scripted(base_policy: Policy, tmp_path: Path) -> Scripted:
    return Scripted(base_policy, tmp_path)


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., EPOConfig]:
    return lambda **options: EPOConfig(**plain_options(tmp_path), num_generations=4, **options)
