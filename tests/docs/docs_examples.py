"""The examples of pages, carried out: Python blocks in a folder of their own, YAML and TOML read as what they are for.

A block is often a fragment. Names that it uses and does not make are filled from `STAND_INS`, and a file that it reads
is there. Suffixes: _N tokens, _D hidden size, _V vocabulary.
"""

from __future__ import annotations

import builtins
import os
import symtable
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from docs_pages import Block, Page
from safetensors.torch import save_file

from epo.bounded_yaml import load_yaml
from epo.environments.base import TaskSuite, TextEnv
from epo.environments.pool import EnvPool
from epo.environments.registry import make_suite
from epo.objectives import make_control
from epo.recipe import load_config
from epo.sweep.plan import load_sweep
from epo.types import Task

N, D, V = 6, 4, 7
SKIPPED = "runs/try1/skipped/step_000012_minibatch_1/batch.safetensors"


def _corridor() -> TaskSuite:
    return make_suite("corridor", {"length": 3, "tasks": 4})


STAND_INS: dict[str, Callable[[], Any]] = {
    "step": lambda: 1,
    "steps": lambda: 4,
    "total_steps": lambda: 2,
    "hidden": lambda: torch.randn(N, D, requires_grad=True),
    "hidden_N_D": lambda: torch.randn(N, D, requires_grad=True),
    "head_weight": lambda: torch.randn(V, D, requires_grad=True),
    "head_weight_V_D": lambda: torch.randn(V, D, requires_grad=True),
    "targets": lambda: torch.arange(N) % V,
    "targets_N": lambda: torch.arange(N) % V,
    "trajectory_ids_N": lambda: torch.tensor([0, 0, 0, 1, 1, 1]),
    "turn_ids_N": lambda: torch.tensor([0, 0, 1, 0, 1, 1]),
    "advantages": lambda: torch.randn(N),
    "advantages_N": lambda: torch.randn(N),
    "old_logprobs": lambda: torch.full((N,), -2.0),
    "old_logprobs_N": lambda: torch.full((N,), -2.0),
    "old_entropy_N": lambda: torch.full((N,), 1.5),
    "sampling_entropy_N": lambda: torch.full((N,), 1.5),
    "policy_loss": lambda: torch.zeros((), requires_grad=True),
    "micro_batches": lambda: [slice(0, 2), slice(2, N)],
    "control": lambda: make_control("epo_strong", coefficient=0.001),
    "make_suite": lambda: make_suite,
    "EnvPool": lambda: EnvPool,
    "TaskSuite": lambda: TaskSuite,
    "TextEnv": lambda: TextEnv,
    "Task": lambda: Task,
    "Sequence": lambda: Sequence,
    "suite": _corridor,
    "task": lambda: _corridor().tasks("train")[0],
    "other": lambda: _corridor().tasks("train")[1],
}


def runnable(pages: Sequence[Page]) -> Iterator[tuple[Page, Block]]:
    for page in pages:
        for block in page.fenced():
            if block.language in ("python", "yaml", "toml") and block.not_run is None:
                yield page, block


def carry_out(block: Block, folder: Path) -> dict[str, Any]:
    """Run or read a block inside `folder`; whatever it raises is what is wrong with it. Returns what it defined."""
    if block.language == "toml":
        return tomllib.loads(block.code)
    if block.language == "yaml":
        _read_yaml(block.code, folder)
        return {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        _lay_out()
        names = {name: STAND_INS[name]() for name in _free_names(block.code) if name in STAND_INS}
        code = "\n" * (block.line - 1) + block.code
        exec(compile(code, "<page>", "exec"), names)
    return names


def _lay_out() -> None:
    os.makedirs(os.path.dirname(SKIPPED))
    save_file({"advantages_N": torch.tensor([0.0, float("nan")])}, SKIPPED)


def _free_names(code: str) -> set[str]:
    """Global names that the code reads."""
    found: set[str] = set()

    def walk(table: symtable.SymbolTable) -> None:
        for symbol in table.get_symbols():
            is_global = symbol.is_global() or table.get_type() == "module"
            if is_global and symbol.is_referenced() and not hasattr(builtins, symbol.get_name()):
                found.add(symbol.get_name())
        for child in table.get_children():
            walk(child)

    walk(symtable.symtable(code, "<page>", "exec"))
    return found


def _read_yaml(code: str, folder: Path) -> None:
    file = folder / "example.yaml"
    file.write_text(code, encoding="utf-8")
    tree = load_yaml(code)
    if isinstance(tree, dict) and "arms" in tree:
        load_sweep(file)
    elif isinstance(tree, dict) and "apiVersion" not in tree:
        load_config(str(file))
