"""Time and memory of `token_logprobs_and_entropy` against the ways TRL and verl compute the same two numbers.

    python benchmarks/token_head.py              # the whole grid; writes benchmarks/results/token_head.{json,png}
    python benchmarks/token_head.py --quick      # one small cell, a minute: does everything run?
    python benchmarks/token_head.py --table      # the tables of docs/token-head.md from the JSON file

Environment, in a virtual environment of its own because of the peers:

    pip install torch==2.13.0        # the CPU build, for the figures of docs/token-head.md
    pip install --no-deps -r requirements/token_head.txt
    pip install --no-deps -e .

Every case is a process of its own that maps the same inputs from one file. Its first call is measured for memory: the
peak of the resident set (VmHWM, reset by /proc/self/clear_refs) over the resident set with inputs in place. Then the
cases take turns, one call each per round, and medians over rounds are compared: wall time, and CPU time of the process
next to it, which other programs on the machine disturb least. The processes wait side by side with their inputs and
gradients; at V = 151,936, N = 4,096 they do not fit into 24 GiB, so `--apart` ends each before the next one starts. The
loss is -mean(log-prob) - 0.01 mean(entropy), with gradients to hidden states and head weight. Results of every case are
compared with the definition in float64.

Dimension suffixes: _N tokens, _V vocabulary, _D hidden size. Linux only.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HIDDEN = 896  # Qwen2.5-0.5B
VOCABULARIES = (49152, 151936)
TOKENS = (512, 1024, 4096)
DTYPES = ("float32", "bfloat16")
LOGIT_DEVIATION = 3.0
SMALL = {"vocab": 1024, "tokens": 5000, "hidden": 128, "dtype": "float32"}
QUICK = {"vocab": 8192, "tokens": 256, "hidden": 128, "dtype": "float32"}
RESULTS = Path(__file__).parent / "results" / "token_head.json"

Head = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def by_definition(logits_N_V: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    logs_N_V = torch.log_softmax(logits_N_V, dim=-1)
    return logs_N_V.gather(1, targets_N[:, None])[:, 0], -(logs_N_V.exp() * logs_N_V).sum(dim=-1)


def naive() -> Head:
    return lambda hidden_N_D, weight_V_D, targets_N: by_definition((hidden_N_D @ weight_V_D.T).float(), targets_N)


def epo() -> Head:
    from epo.objectives import token_logprobs_and_entropy

    return token_logprobs_and_entropy


def epo_bfloat16_logits() -> Head:
    from epo.objectives import token_logprobs_and_entropy

    return partial(token_logprobs_and_entropy, float32_logits=False)


def trl_two_calls() -> Head:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    def run(hidden_N_D: Tensor, weight_V_D: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        logits_N_V = hidden_N_D @ weight_V_D.T
        return selective_log_softmax(logits_N_V, targets_N), entropy_from_logits(logits_N_V)

    return run


def trl_one_call() -> Head:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    return lambda hidden_N_D, weight_V_D, targets_N: selective_log_softmax_and_entropy(
        hidden_N_D @ weight_V_D.T, targets_N
    )


def trl_chunked() -> Head:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as chunk  # what TRL's trainers pass

    return lambda hidden_N_D, weight_V_D, targets_N: ChunkedLogProbFunction.apply(
        hidden_N_D, weight_V_D, None, targets_N, 1.0, chunk, None, 1.0, ("entropy",)
    )[:2]


def verl_two_calls() -> Head:
    from verl.utils.torch_functional import entropy_from_logits, logprobs_from_logits

    def run(hidden_N_D: Tensor, weight_V_D: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        logits_N_V = hidden_N_D @ weight_V_D.T
        return logprobs_from_logits(logits_N_V, targets_N), entropy_from_logits(logits_N_V)

    return run


def verl_chunked_entropy() -> Head:
    from verl.utils.torch_functional import entropy_from_logits_with_chunking, logprobs_from_logits

    def run(hidden_N_D: Tensor, weight_V_D: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        logits_N_V = hidden_N_D @ weight_V_D.T
        return logprobs_from_logits(logits_N_V, targets_N), entropy_from_logits_with_chunking(logits_N_V)

    return run


def verl_fused() -> Head:
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    return FusedLinearForPPO()


CASES: dict[str, tuple[Callable[[], Head], str]] = {
    "naive": (naive, "naive: `log_softmax`, `gather`, `exp`"),
    "trl_two_calls": (trl_two_calls, "TRL `selective_log_softmax` + `entropy_from_logits`"),
    "trl_one_call": (trl_one_call, "TRL `selective_log_softmax_and_entropy`"),
    "trl_chunked": (trl_chunked, "TRL `ChunkedLogProbFunction`"),
    "verl_two_calls": (verl_two_calls, "verl `logprobs_from_logits` + `entropy_from_logits`"),
    "verl_chunked_entropy": (verl_chunked_entropy, "verl, `entropy_from_logits_with_chunking`"),
    "verl_fused": (verl_fused, "verl `FusedLinearForPPO`"),
    "epo": (epo, "epo `token_logprobs_and_entropy`"),
    "epo_bfloat16_logits": (epo_bfloat16_logits, "the same, `float32_logits=False`"),
}


# In the process of one case.


def memory(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def loss_of(logprobs_N: Tensor, entropy_N: Tensor, total: int) -> Tensor:
    return -logprobs_N.sum() / total - 0.01 * entropy_N.sum() / total


def call(head: Head, inputs: dict[str, Tensor]) -> tuple[dict[str, list[float]], Tensor, Tensor]:
    """One forward and backward: seconds of both in wall and CPU time, and the results."""
    inputs["hidden"].grad = inputs["weight"].grad = None
    clocks = [(time.perf_counter(), time.process_time())]
    logprobs_N, entropy_N = head(inputs["hidden"], inputs["weight"], inputs["targets"])
    clocks.append((time.perf_counter(), time.process_time()))
    loss_of(logprobs_N, entropy_N, len(logprobs_N)).backward()
    clocks.append((time.perf_counter(), time.process_time()))
    spent = {
        name: [after[kind] - before[kind] for before, after in pairwise(clocks)]
        for kind, name in enumerate(("wall", "cpu"))
    }
    return spent, logprobs_N.detach(), entropy_N.detach()


def reference(inputs: dict[str, Tensor], step: int = 256) -> dict[str, Tensor]:
    """By definition in float64, a few tokens at a time."""
    weight_V_D = inputs["weight"].detach().double().requires_grad_()
    results: dict[str, list[Tensor]] = {"logprobs": [], "entropy": [], "grad_hidden": []}
    for start in range(0, len(inputs["targets"]), step):
        part = slice(start, start + step)
        hidden_n_D = inputs["hidden"].detach()[part].double().requires_grad_()
        logprobs_n, entropy_n = by_definition(hidden_n_D @ weight_V_D.T, inputs["targets"][part])
        loss_of(logprobs_n, entropy_n, len(inputs["targets"])).backward()
        assert hidden_n_D.grad is not None
        for name, value in zip(results, (logprobs_n.detach(), entropy_n.detach(), hidden_n_D.grad), strict=True):
            results[name].append(value)
    assert weight_V_D.grad is not None
    # The gradient of the weight is as large as the weight: its norms by vocabulary entry stand for it.
    return {name: torch.cat(values) for name, values in results.items()} | {"grad_weight": weight_V_D.grad.norm(dim=1)}


def work(case: str, folder: Path) -> None:
    """Serve one case: a line on stdin asks for a call, a line of JSON on stdout answers."""
    inputs: dict[str, Tensor] = torch.load(folder / "inputs.pt", mmap=True)
    if case == "reference":
        torch.save(reference(inputs), folder / "reference.pt")
        return answer({})
    head = CASES[case][0]()
    warm = {name: tensor[:64].clone().detach() for name, tensor in inputs.items()}
    warm["targets"] = warm["targets"] % 64
    for name in ("hidden", "weight"):
        warm[name].requires_grad_()
        inputs[name].requires_grad_()
    call(head, warm)  # libraries start their threads and pick their kernels
    assert all(bool(tensor.detach().sum().isfinite()) for tensor in inputs.values())  # every page is resident
    Path("/proc/self/clear_refs").write_text("5")
    start = memory("VmRSS")
    _, logprobs_N, entropy_N = call(head, inputs)
    peak = memory("VmHWM") - start
    hidden, weight = inputs["hidden"].grad, inputs["weight"].grad
    assert hidden is not None and weight is not None
    exact: dict[str, Tensor] = torch.load(folder / "reference.pt")
    got = {"grad_hidden": hidden, "grad_weight": weight.norm(dim=1, dtype=torch.float32)}
    report = {
        "peak_bytes": peak,
        "above_weight_gradient_bytes": peak - weight.nbytes,
        "logprob_error": float((logprobs_N - exact["logprobs"]).abs().max()),
        "entropy_error": float((entropy_N - exact["entropy"]).abs().max()),
        **{f"{name}_error": float((got[name] - exact[name]).norm() / exact[name].norm()) for name in got},
        **{f"{name}_norm": float(value.norm()) for name, value in got.items()},
    }
    del got, exact, hidden, weight
    answer(report)
    for _ in sys.stdin:
        spent, *_ = call(head, inputs)
        inputs["hidden"].grad = inputs["weight"].grad = None
        answer(spent)


def answer(value: dict[str, Any]) -> None:
    sys.stdout.write("result " + json.dumps(value) + "\n")  # the peers may print, too
    sys.stdout.flush()


# In the process that compares.


class Worker:
    """The process of one case."""

    def __init__(self, case: str, folder: Path, stack: ExitStack) -> None:
        command = [sys.executable, __file__, "--worker", case, "--folder", str(folder)]
        log = stack.enter_context((folder / f"{case}.log").open("w+"))
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ
        )
        stack.callback(self.process.wait)
        stack.callback(self.process.kill)
        self.case, self.log = case, log

    def result(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("result "):
                return json.loads(line.removeprefix("result "))
        self.log.seek(0)
        raise RuntimeError(f"case {self.case} ended early:\n{self.log.read()[-2000:]}")

    def call(self) -> dict[str, list[float]]:
        assert self.process.stdin is not None
        self.process.stdin.write("call\n")
        self.process.stdin.flush()
        return self.result()


def measure(cell: dict[str, Any], cases: list[str], rounds: int, *, apart: bool) -> dict[str, Any]:
    """All cases on one shape. The first call of a case runs alone on the machine, before the next process starts."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_inputs(cell, folder / "inputs.pt")
        with ExitStack() as stack:
            Worker("reference", folder, stack).result()
        results = (take_turns_apart if apart else take_turns)(cases, rounds, folder)
    for result in results.values():
        for kind in ("wall", "cpu"):
            result[f"{kind}_seconds"] = statistics.median(sum(spent[kind]) for spent in result["rounds"])
    for result in results.values():
        for kind in ("wall", "cpu"):
            result[f"{kind}_ratio"] = result[f"{kind}_seconds"] / results["naive"][f"{kind}_seconds"]
    return cell | {"apart": apart, "cases": results}


def take_turns(cases: list[str], rounds: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Every process lives until all rounds are over."""
    results: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for case in cases:
            workers[case] = Worker(case, folder, stack)
            results[case] = workers[case].result() | {"rounds": []}
        for _ in range(rounds):
            for case, worker in workers.items():
                results[case]["rounds"].append(worker.call())
    return results


def take_turns_apart(cases: list[str], rounds: int, folder: Path) -> dict[str, dict[str, Any]]:
    """A process ends before the next one starts, so that the machine holds one case at a time."""
    results: dict[str, dict[str, Any]] = {}
    for _ in range(rounds):
        for case in cases:
            with ExitStack() as stack:
                worker = Worker(case, folder, stack)
                first = worker.result()
                results.setdefault(case, first | {"rounds": []})["rounds"].append(worker.call())
    return results


def save_inputs(cell: dict[str, Any], path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, cell["dtype"])
    hidden_N_D = torch.randn(cell["tokens"], cell["hidden"], generator=generator)
    weight_V_D = (
        torch.randn(cell["vocab"], cell["hidden"], generator=generator) * LOGIT_DEVIATION / cell["hidden"] ** 0.5
    )
    targets_N = torch.randint(cell["vocab"], (cell["tokens"],), generator=generator)
    torch.save({"hidden": hidden_N_D.to(dtype), "weight": weight_V_D.to(dtype), "targets": targets_N}, path)


def environment() -> dict[str, Any]:
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    tiles = epo().__kwdefaults__
    return {
        "python": platform.python_version(),
        "cpu": models[0].split(":", 1)[1].strip() if models else platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "trl", "verl", "epo-agents")},
        "tiles": {name: tiles[name] for name in ("tile_tokens", "tile_vocab")},
    }


def grid(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    if arguments.quick:
        return [QUICK]
    cells = [
        {"vocab": vocab, "tokens": tokens, "hidden": arguments.hidden, "dtype": dtype}
        for dtype in arguments.dtype or DTYPES
        for vocab in arguments.vocab or VOCABULARIES
        for tokens in arguments.tokens or TOKENS
    ]
    is_whole = not (arguments.vocab or arguments.tokens or arguments.dtype)
    return [SMALL, *cells] if is_whole else cells


def key(cell: dict[str, Any]) -> tuple[str, int, int, int]:
    return cell["dtype"], cell["hidden"], cell["vocab"], cell["tokens"]


def save(result: dict[str, Any], cells: list[dict[str, Any]], path: Path) -> None:
    """Write the file after every cell; cells of an earlier run stay if they were measured in the same environment."""
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if earlier["environment"] != result["environment"]:
            raise SystemExit(f"{path} was measured in another environment; move it away or give --out")
        new = {key(cell) for cell in cells}
        cells = cells + [cell for cell in earlier["cells"] if key(cell) not in new]
    cells = sorted(cells, key=key)
    path.write_text(json.dumps(result | {"cells": cells}, indent=1) + "\n", encoding="utf-8")


# Presentation.


def groups(cells: list[dict[str, Any]]) -> Iterator[tuple[tuple[str, int, int], list[dict[str, Any]]]]:
    """Cells that differ in the number of tokens only."""
    for shape in dict.fromkeys(key(cell)[:3] for cell in cells):
        yield shape, [cell for cell in cells if key(cell)[:3] == shape]


def tables(result: dict[str, Any]) -> str:
    """Markdown. Time is the median wall time over the naive one's (CPU time in brackets)."""
    lines = []
    for (dtype, hidden, vocab), cells in groups(result["cells"]):
        lines += [f"### {dtype}, vocabulary {vocab:,}, hidden size {hidden:,}", ""]
        names = [f"N = {cell['tokens']:,}" for cell in cells]
        heads = [f"time, {name}" for name in names] + [f"MiB, {name}" for name in names] + ["errors"]
        lines += ["| | " + " | ".join(heads) + " |", "| --- " * (len(heads) + 1) + "|"]
        for case, (_, title) in CASES.items():
            found = [cell["cases"].get(case) for cell in cells]  # None where the case was not measured
            measured = [one for one in found if one is not None]
            if not measured:
                continue
            entries = ["-" if one is None else f"{one['wall_ratio']:.2f} ({one['cpu_ratio']:.2f})" for one in found]
            entries += ["-" if one is None else f"{one['above_weight_gradient_bytes'] / 2**20:,.0f}" for one in found]
            value = max(max(one["logprob_error"], one["entropy_error"]) for one in measured)
            gradient = max(max(one["grad_hidden_error"], one["grad_weight_error"]) for one in measured)
            lines.append(f"| {title} | " + " | ".join([*entries, f"{value:.0e}, {gradient:.0e}"]) + " |")
        seconds = ", ".join(f"{cell['cases']['naive']['wall_seconds']:.2f} s" for cell in cells)
        rounds = ", ".join(str(len(cell["cases"]["naive"]["rounds"])) for cell in cells)
        lines += [
            "",
            f"The naive way took {seconds}; medians of {rounds} rounds.",
            "",
        ]
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars of time over naive and of memory, for the largest vocabulary."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    vocab = max(cell["vocab"] for cell in result["cells"])
    rows = [(shape, cells) for shape, cells in groups(result["cells"]) if shape[2] == vocab]
    figure, axes = plt.subplots(len(rows), 2, figsize=(12, 3.6 * len(rows)), squeeze=False, layout="constrained")
    for row, ((dtype, hidden, _), cells) in zip(axes, rows, strict=True):
        cases = [case for case in CASES if any(case in cell["cases"] for cell in cells)]
        height = 0.8 / len(cells)
        for axis, field, scale, title in (
            (row[0], "wall_ratio", 1.0, "time relative to naive"),
            (row[1], "above_weight_gradient_bytes", 2.0**-20, "peak above the weight gradient, MiB"),
        ):
            for number, cell in enumerate(cells):
                there = [(place, case) for place, case in enumerate(cases) if case in cell["cases"]]
                values = [cell["cases"][case][field] * scale for _, case in there]
                places = [place + number * height for place, _ in there]
                bars = axis.barh(places, values, height, label=f"N = {cell['tokens']:,}")
                axis.bar_label(bars, fmt="%.2f" if scale == 1.0 else "%.0f", fontsize=7, padding=2)
            axis.set_yticks([place + 0.4 - height / 2 for place in range(len(cases))], cases)
            axis.set_title(f"{title} ({dtype}, V = {vocab:,}, D = {hidden:,})", fontsize=9)
            axis.invert_yaxis()
            axis.spines[["top", "right"]].set_visible(False)
        row[0].axvline(1.0, color="grey", linewidth=0.8)
        row[1].set_xscale("log")
        row[1].set_xlim(left=1.0)
        row[1].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", help=f"default {VOCABULARIES}")
    parser.add_argument("--tokens", type=int, nargs="+", help=f"default {TOKENS}")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help=f"default {DTYPES}")
    parser.add_argument("--hidden", type=int, default=HIDDEN)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds after the call measured for memory")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="naive always runs")
    parser.add_argument("--apart", action="store_true", help="one process at a time, where all do not fit into memory")
    parser.add_argument("--quick", action="store_true", help=f"only {QUICK}, written to a temporary file")
    parser.add_argument("--table", action="store_true", help="print the tables of --out and draw it; measure nothing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--worker", choices=["reference", *CASES], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.folder)
        return
    if arguments.quick and arguments.out == RESULTS:
        arguments.out = Path(tempfile.mkdtemp()) / "token_head.json"
    if not arguments.table:
        cases = ["naive", *(case for case in CASES if case in arguments.cases and case != "naive")]
        done = []
        for cell in grid(arguments):
            start = time.perf_counter()
            done.append(measure(cell, cases, arguments.rounds, apart=arguments.apart))
            save({"environment": environment()}, done, arguments.out)
            print(*key(cell), f"{time.perf_counter() - start:.0f} s", flush=True)
    result = json.loads(arguments.out.read_text(encoding="utf-8"))
    print(tables(result))
    plot(result, arguments.out.with_suffix(".png"))
    print(f"Data in {arguments.out}, drawn beside it.")


if __name__ == "__main__":
    main()
