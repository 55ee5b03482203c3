"""`epo plan`: a table or JSON, and exit code 2 with one line for what cannot fit or cannot be read."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

Epo = Callable[..., Any]


def test_a_plan_is_a_table_or_json(epo: Epo) -> None:
    shown = epo("plan", "minute.yaml", "--hardware", "cpu:2x24G")
    assert shown.code == 0
    assert "peak" in shown.out
    found = json.loads(epo("plan", "minute.yaml", "--hardware", "cpu:2x24G", "--turns", "3", "--json").out)
    assert found["fits"]
    assert found["step"]["assumptions"]["turns"] == {"value": 3.0, "source": "given"}
    parts = [sum(found["memory_gib"][phase].values()) for phase in ("always", "rollout", "update")]
    assert found["peak_gib"] == pytest.approx(parts[0] + max(parts[1:]))


def test_what_cannot_fit_is_refused_in_one_line(epo: Epo) -> None:
    refused = epo("plan", "paper/scienceworld-qwen2.5-7b", "--hardware", "L4", "--json")
    assert refused.code == 2
    assert not json.loads(refused.out)["fits"]
    assert refused.err.count("\n") == 1
    assert "GiB missing" in refused.err


def test_environments_share_the_memory_of_a_cpu(epo: Epo) -> None:
    workers = "environment.workers=512"
    refused = epo("plan", "minute.yaml", workers, "--hardware", "cpu:2x4G")
    assert refused.code == 2 and "512 environment workers" in refused.out
    assert "largest part: environment workers, 5.0 GiB" in refused.err
    advice = re.search(r"fits with (environment\.workers=\d+)", refused.err)
    assert advice is not None
    assert epo("plan", "minute.yaml", advice[1], "--hardware", "cpu:2x4G").code == 0
    beside_gpus = json.loads(epo("plan", "minute.yaml", workers, "--hardware", "L4", "--json").out)
    assert beside_gpus["fits"] and beside_gpus["environments_gib"] == 5.0
    unknown = epo("plan", "minute.yaml", "environment.suite=mcp", "environment.options={}", "--hardware", "L4")
    assert unknown.code == 0 and "workers of suite mcp" in unknown.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["minute.yaml", "--hardware", "8xH10O"], "did you mean 'H100'"),
        (["minute.yaml", "--turns", "50"], "environment.max_turns 4"),
        (["minute.yaml", "--response-tokens", "7"], "agent.max_response_tokens 6"),
        (["base", "model.path=who/knows", "imitation.demonstrations=0"], "model.path='who/knows'"),
    ],
)
def test_mistakes_are_one_line(epo: Epo, arguments: list[str], said: str) -> None:
    refused = epo("plan", *arguments)
    assert refused.code == 2
    assert said in refused.err
    assert refused.err.count("\n") == 1


def test_the_arithmetic_needs_no_torch() -> None:
    code = "import sys, epo.planning.plan, epo.planning.command; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
