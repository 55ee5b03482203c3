"""Updates by verl's real `TrainingWorker` and FSDP2 engine, on one rank and on two, against float64 by hand.

The workers run in processes of their own (worker_run.py), in float32 with SGD and learning rate 1. By hand: the same
model in float64, row by row without padding, the objective in plain loops over turns written out (literal.py).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from literal import STRONG, Row, agent_loop_rows, beta_of, epo_term, fill, token_mean_surrogate, trained, turn_rows
from torch import Tensor
from torch.testing import assert_close
from transformers import LlamaForCausalLM

HERE = Path(__file__).parent
pytestmark = pytest.mark.timeout(900)
"""A hang still ends; processes that import verl on a busy machine take minutes."""

LAYOUTS = {layout.__name__: layout for layout in (agent_loop_rows, turn_rows)}


def run_workers(folder: Path, ranks: int) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "VERL_PLATFORM": "cpu",
        "VERL_USE_EXTERNAL_MODULES": "without_trl,cpu_platform,epo.integrations.verl",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1] / "src")]),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "worker_run.py"), str(folder)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        said = [process.communicate(timeout=800)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(said)
    results = torch.load(folder / "results.pt", weights_only=True)
    return results | {"said": said, "folder": folder}


@pytest.fixture(scope="session", params=[1, 2], ids=["one_rank", "two_ranks"])
def workers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_workers(tmp_path_factory.mktemp(f"ranks{request.param}"), request.param)


def by_hand(folder: Path, layout: Any) -> list[dict[str, Tensor]]:
    """Parameters before and after each of two updates, in float64."""
    model = LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float64, attn_implementation="eager")
    found = [_copy(model)]
    means: list[float] = []
    for step in range(2):
        rows = fill(layout(), step, dtype=torch.float32)
        logprobs_N, entropy_N = _statistics(model, rows)
        reference = sum(means) / len(means) if means else None
        term = epo_term(entropy_N, rows, reference=reference, beta=beta_of(step, 10), **STRONG)
        model.zero_grad()
        (token_mean_surrogate(logprobs_N, rows) + term).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= parameter.grad
        means.append(float(trained(rows, "entropy").double().mean()))
        found.append(_copy(model))
    return found


def _copy(model: LlamaForCausalLM) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _statistics(model: LlamaForCausalLM, rows: list[Row]) -> tuple[Tensor, Tensor]:
    logprobs, entropies = [], []
    for row in rows:
        prompt = len(row.fields["prompts"])
        logits = model(row.fields["input_ids"][None]).logits[0, prompt - 1 : -1].log_softmax(-1)
        mask = torch.tensor(row.mask).bool()
        logprobs.append(logits.gather(-1, row.fields["responses"][:, None]).squeeze(-1)[mask])
        entropies.append(-(logits.exp() * logits).sum(-1)[mask])
    return torch.cat(logprobs), torch.cat(entropies)


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert found.keys() >= wanted.keys()
    return max(float((found[name].double() - wanted[name].double()).abs().max()) for name in wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("split", ["one", "three", "dynamic"])
def test_updates_are_those_of_the_equations(workers: dict[str, Any], layout: str, split: str) -> None:
    """Two updates, the second with the first's history, however verl splits the mini-batch and over whatever ranks."""
    wanted = by_hand(workers["folder"], LAYOUTS[layout])
    for step in range(3):
        assert distance(workers[f"{layout}/{split}/{step}"], wanted[step]) < 2e-5, step
    assert min(distance(wanted[0], wanted[1]), distance(wanted[1], wanted[2])) > 0.05


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_logged_is_of_the_whole_mini_batch(workers: dict[str, Any], layout: str) -> None:
    """The same numbers whatever the split, and beta and the reference by hand."""
    logged = {split: workers[f"{layout}/{split}/metrics"] for split in ("one", "three", "dynamic")}
    reference = float(trained(fill(LAYOUTS[layout](), 0, dtype=torch.float32), "entropy").double().mean())
    for metrics in logged.values():
        assert metrics["epo/beta"] == pytest.approx([beta_of(1, 10)], rel=1e-6)
        assert metrics["entropy/reference"] == pytest.approx([reference], rel=1e-5)
        for name in ("epo/effective_weight", "epo/smoothing", "entropy/above", "entropy/below"):
            assert metrics[name] == pytest.approx(logged["one"][name], rel=1e-4, abs=1e-6), name


def test_a_resumed_worker_goes_on_as_if_nothing_had_happened(workers: dict[str, Any]) -> None:
    """History and step come back from the file beside verl's checkpoint."""
    assert distance(workers["resumed"], workers["agent_loop_rows/three/2"]) < 1e-6
    state = json.loads((workers["folder"] / "checkpoint/epo_state.json").read_text())
    assert state["step"] == 1
    mean = float(trained(fill(agent_loop_rows(), 0, dtype=torch.float32), "entropy").double().mean())
    assert state["control"]["history"]["steps"] == [[[-1, pytest.approx(mean, rel=1e-6)]]]


def test_all_ranks_know_the_same(workers: dict[str, Any]) -> None:
    assert len(set(workers["states"])) == 1
    assert json.loads(workers["states"][0])[0] == 2


def test_coefficient_zero_is_verls_engine_and_loss(workers: dict[str, Any]) -> None:
    """Three mini-batches by `vanilla` in verl's own engine: the same parameters, bit for bit."""
    assert workers["plain_engine"] == "FSDPEngineWithLMHead"
    for name, parameter in workers["plain"].items():
        assert_close(workers["zero"][name], parameter, rtol=0.0, atol=0.0)


def test_warnings_come_from_the_first_rank_alone(workers: dict[str, Any]) -> None:
    says = ["the corridor has no floor" in said for said in workers["said"]]
    assert says == [True] + [False] * (len(says) - 1)
