"""How fast an update of a language model is, and how much memory it takes.

    python benchmarks/update_step.py                  # all parts; writes benchmarks/results/update_step.json
    python benchmarks/update_step.py --parts speed    # one part; the others keep their data
    python benchmarks/update_step.py --table          # the data as tables

speed: a plain matrix product, our update and that of a plain training script take turns in one process on the same rows
    of a random SmolLM2-135M. turns: tokens of a trajectory as transcript and as one row per turn, and what a step takes
    of each. memory: peak of an update with LoRA; how it grows with trained tokens and vocabulary. A process for each
    case.
Figures are medians of CPU time, and of wall-clock time where nothing else runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from _update_cases import PlainTrainer, Shape, configuration, make_groups, make_learner, make_policy

from epo.environments.pool import EnvPool
from epo.packing import pack
from epo.training.hardware import resolve_compute
from epo.training.learner import Learner
from epo.types import TrajectoryGroup

TURNS = (5, 10, 20, 40)
GEMM = 2048
MEMORY_RUNS = 5
MIB = 2**20


def timed(work: Callable[[], Any]) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def medians(times: list[dict[str, float]]) -> dict[str, float]:
    return {kind: statistics.median(t[kind] for t in times) for kind in ("wall", "cpu")}


# ---------------------------------------------------------------- speed


def speed(arguments: argparse.Namespace) -> dict[str, Any]:
    """Rates of matrix products, of our update by size of the micro-batch, and of the plain script's."""
    shape = Shape(layers=arguments.layers)
    compute = arguments.compute
    groups = make_groups(shape, trajectories=arguments.trajectories, tokens=600, trained_share=0.2)
    batch = pack([t for group in groups for t in group.trajectories])
    budgets = [int(x) for x in arguments.microbatch_tokens.split(",")]
    works: dict[str, Callable[[], Any]] = {}
    for name in ("float32", "bfloat16") if compute == "bfloat16" or arguments.both_products else ("float32",):
        a = torch.randn(GEMM, GEMM, dtype=getattr(torch, name))
        works[f"gemm {name}"] = lambda a=a: a @ a
    # One model and one optimiser for all: what is compared is the way to a gradient and a step.
    policy = make_policy(shape, compute=compute)
    learners: list[Learner] = []
    first: dict[str, float] = {}
    for budget in budgets:
        config = configuration("x", compute=compute, microbatch_tokens=budget, groups=len(groups))
        learners.append(make_learner(policy, config))
        learners[-1].optimizer = learners[0].optimizer

        def ours(learner: Learner = learners[-1]) -> None:
            found = learner.update(groups, step=0)
            first.setdefault("ours", found["policy/loss"] + found["entropy/loss"])

        works[f"ours {budget}"] = ours
    for budget in budgets:
        config = configuration("x", compute=compute, microbatch_tokens=budget, groups=len(groups))
        plain = PlainTrainer(policy, config, groups, learners[0].optimizer)

        def theirs(plain: PlainTrainer = plain) -> None:
            loss = plain.update()
            first.setdefault("plain", loss)

        works[f"plain {budget}"] = theirs
    times: dict[str, list[dict[str, float]]] = {name: [] for name in works}
    for number in range(arguments.rounds + 1):
        for name, work in works.items():
            times[name].append(timed(work))
            print(f"round {number}  {name:<16} wall {times[name][-1]['wall']:8.2f}  cpu {times[name][-1]['cpu']:8.2f}")
    if abs(first["ours"] - first["plain"]) > (1e-3 if compute == "float32" else 2e-2):
        raise SystemExit(f"not the same loss: {first}")
    found = {name: medians(t[1:]) for name, t in times.items()}  # the first round warms up
    products = {
        name: {kind: 2 * GEMM**3 / seconds / 1e9 for kind, seconds in found[name].items()}
        for name in found
        if name.startswith("gemm")
    }
    peak = products[f"gemm {compute}"]
    rows: list[dict[str, Any]] = []
    for name, seconds in found.items():
        if name.startswith("gemm"):
            continue
        who, budget = name.split()
        counted = shape.operations(batch, head_tokens=None if who == "ours" else batch.num_tokens)
        rows.append(
            {"who": who, "microbatch_tokens": int(budget), "seconds": seconds}
            | {"tokens_per_second": {k: batch.num_tokens / s for k, s in seconds.items()}}
            | {"share_of_gemm": {k: counted / s / 1e9 / peak[k] for k, s in seconds.items()}}
        )
    return {
        "shape": asdict(shape),
        "compute": compute,
        "rounds": arguments.rounds,
        "tokens": batch.num_tokens,
        "trained": batch.num_trained,
        "rows": len(batch.rows),
        "gflops": products,
        "updates": rows,
    }


# ---------------------------------------------------------------- turns


def turns(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens by number of turns; the time of an update at 20 turns, both contexts in turn in one process."""
    import cost

    shape = Shape(layers=arguments.layers)
    kept: dict[str, list[TrajectoryGroup]] = {}
    table: list[dict[str, Any]] = []
    first = cost.configuration("transcript", turns=1, method="none", algorithm="grpo")
    with EnvPool("corridor", first.environment.options, size=first.environment.workers) as pool:
        for count in TURNS:
            for context in ("transcript", "window"):
                config = cost.configuration(context, turns=count, method="none", algorithm="grpo")
                config.rollout.tasks_per_step, config.rollout.group_size = 2, 2
                groups, *_ = cost.collect(config, cost.tiny_policy(config), pool)
                trajectories = [t for g in groups for t in g.survivors]
                batch = pack(trajectories)
                table.append(
                    {"turns": count, "context": context, "rows": len(batch.rows) / len(trajectories)}
                    | {"processed": batch.num_tokens / len(trajectories)}
                )
                if count == 20:
                    kept[context] = groups[:1]
    policy = make_policy(shape, compute=arguments.compute)
    learner = make_learner(policy, configuration("x", compute=arguments.compute, microbatch_tokens=2048))
    times: dict[str, list[dict[str, float]]] = {context: [] for context in kept}
    for _ in range(arguments.rounds + 1):
        for context, groups in kept.items():
            times[context].append(timed(lambda groups=groups: learner.update(groups, step=0)))
    seconds = {context: medians(t[1:]) for context, t in times.items()}
    return {
        "shape": asdict(shape),
        "compute": arguments.compute,
        "tokens": table,
        "seconds_at_20_turns": seconds,
        "step_ratio_at_20_turns": {k: seconds["window"][k] / seconds["transcript"][k] for k in ("wall", "cpu")},
    }


# ---------------------------------------------------------------- memory


def resident(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def memory_case(arguments: argparse.Namespace) -> dict[str, Any]:
    """Peak resident memory of one update, and what was there before it."""
    shape = Shape(layers=arguments.layers, vocabulary=arguments.vocabulary)
    policy = make_policy(shape, compute=arguments.compute, lora_rank=arguments.lora_rank)
    groups = make_groups(
        shape,
        trajectories=arguments.trajectories,
        tokens=arguments.tokens,
        trained_share=arguments.trained_share,
    )
    config = configuration("x", compute=arguments.compute, microbatch_tokens=4096, groups=len(groups))
    learner = make_learner(policy, config)
    # Weights are read from their file when they are first used, and the optimiser's moments are made by its first step.
    learner.update(make_groups(shape, trajectories=2, tokens=150, trained_share=0.2, seed=1), step=0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    seconds = timed(lambda: learner.update(groups, step=0))
    batch = pack([t for group in groups for t in group.trajectories])
    return {
        "shape": asdict(shape),
        "lora_rank": arguments.lora_rank,
        "tokens": batch.num_tokens,
        "trained": batch.num_trained,
        "before_mib": before / MIB,
        "peak_mib": resident("VmHWM") / MIB,
        "tokens_times_vocabulary_mib": batch.num_trained * shape.vocabulary * 4 / MIB,
        "seconds": seconds,
    }


def memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """The stated case, and a grid over trained tokens and vocabulary with few layers; a process for each.

    What the heap holds differs from run to run by some tenths: of the grid's cases the median of several runs is kept.
    """

    def run(**options: Any) -> dict[str, Any]:
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        command = [sys.executable, __file__, "--case", "memory", f"--compute={arguments.compute}", *flags]
        command += [f"--threads={arguments.threads}"]
        found = json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        )
        print(f"memory {options}: {found['before_mib']:.0f} -> {found['peak_mib']:.0f} MiB")
        return found

    def median(**options: Any) -> dict[str, Any]:
        runs = sorted(
            (run(**options) for _ in range(MEMORY_RUNS)), key=lambda found: found["peak_mib"] - found["before_mib"]
        )
        return runs[MEMORY_RUNS // 2] | {"rises_mib": [found["peak_mib"] - found["before_mib"] for found in runs]}

    grid = [
        median(layers=2, trajectories=8, tokens=600, trained_share=share, vocabulary=vocabulary, lora_rank=16)
        for vocabulary in (16384, 65536)
        for share in (0.1, 0.4)
    ]
    stated = run(layers=arguments.layers, trajectories=arguments.memory_trajectories, tokens=1500, lora_rank=16)
    return {"compute": arguments.compute, "stated": stated, "grid": grid}


# ---------------------------------------------------------------- output


def tables(data: dict[str, Any]) -> str:
    lines: list[str] = []
    for found in (data[name] for name in ("speed", "speed float32") if name in data):
        lines += [f"{found['tokens']:,} tokens in {found['rows']} rows, {found['trained']:,} of them trained; "
                  f"{found['shape']['layers']} layers, {found['compute']}; GEMM "
                  + ", ".join(f"{name[5:]} {rate['cpu']:.1f}" for name, rate in found["gflops"].items())
                  + " GFLOP per CPU second", ""]  # fmt: skip
        lines += [
            "| update | micro-batch, tokens | tokens / CPU s | of the GEMM rate | tokens / s | of the GEMM rate |"
        ]
        lines += ["| --- | --- | --- | --- | --- | --- |"]
        for row in found["updates"]:
            rate, share = row["tokens_per_second"], row["share_of_gemm"]
            lines.append(
                f"| {row['who']} | {row['microbatch_tokens']:,} | {rate['cpu']:.1f} | {share['cpu']:.0%} "
                f"| {rate['wall']:.1f} | {share['wall']:.0%} |"
            )
        best = {who: max(r["tokens_per_second"]["cpu"] for r in found["updates"] if r["who"] == who)
                for who in ("ours", "plain")}  # fmt: skip
        lines += ["", f"Best against best, by CPU time: {best['ours'] / best['plain']:.2f} times.", ""]
    if found := data.get("turns"):
        lines += ["| turns | transcript, tokens | a row per turn, tokens | ratio |", "| --- | --- | --- | --- |"]
        by = {(row["turns"], row["context"]): row["processed"] for row in found["tokens"]}
        for count in TURNS:
            one, many = by[count, "transcript"], by[count, "window"]
            lines.append(f"| {count} | {one:,.0f} | {many:,.0f} | {many / one:.1f} |")
        lines += ["", f"Update at 20 turns, a row per turn over transcript: "
                  f"{found['step_ratio_at_20_turns']['cpu']:.1f} times the CPU time.", ""]  # fmt: skip
    if found := data.get("memory"):
        lines += ["| layers | vocabulary | tokens | trained | before, MiB | peak, MiB | update's own, MiB "
                  "| one fp32 matrix trained x vocabulary, MiB |", "| --- " * 8 + "|"]  # fmt: skip
        for row in (*found["grid"], found["stated"]):
            lines.append(
                f"| {row['shape']['layers']} | {row['shape']['vocabulary']:,} | {row['tokens']:,} | {row['trained']:,} "
                f"| {row['before_mib']:,.0f} | {row['peak_mib']:,.0f} | {row['peak_mib'] - row['before_mib']:,.0f} "
                f"| {row['tokens_times_vocabulary_mib']:,.0f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="speed,turns,memory", help="parts to measure, comma-separated")
    parser.add_argument("--table", action="store_true", help="print the data as tables, measure nothing")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds after one that warms up")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--compute", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--both-products", action="store_true", help="measure the bfloat16 product in any case")
    parser.add_argument("--trajectories", type=int, default=16)
    parser.add_argument("--memory-trajectories", type=int, default=16)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--microbatch-tokens", default="1024,2048,4096", help="sizes to compare, comma-separated")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "update_step.json")
    internal = parser.add_argument_group("one case of `memory`")
    internal.add_argument("--case", choices=["memory"])
    internal.add_argument("--tokens", type=int, default=1500)
    internal.add_argument("--trained-share", type=float, default=0.2)
    internal.add_argument("--vocabulary", type=int, default=49152)
    internal.add_argument("--lora-rank", type=int, default=0)
    arguments = parser.parse_args()
    data: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    if arguments.table:
        print(tables(data))
        return
    torch.set_num_threads(arguments.threads)
    if arguments.compute == "auto":
        config = configuration("x", compute="auto", microbatch_tokens=1).model
        arguments.compute = str(resolve_compute(config, torch.device("cpu"))).removeprefix("torch.")
    if arguments.case == "memory":
        print(json.dumps(memory_case(arguments)))
        return
    for part in arguments.parts.split(","):
        found = {"speed": speed, "turns": turns, "memory": memory}[part](arguments)
        # Speeds of both types are kept beside each other.
        data["speed float32" if (part, arguments.compute) == ("speed", "float32") else part] = found
        found["machine"] = {
            "cores": os.cpu_count(),
            "threads": arguments.threads,
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "load": os.getloadavg()[0],
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        arguments.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(tables(data))


if __name__ == "__main__":
    main()
