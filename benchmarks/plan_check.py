"""How far `epo plan`'s figures are from what is measured on this CPU.

    python benchmarks/plan_check.py            # measures; writes benchmarks/results/plan_check.json
    python benchmarks/plan_check.py --table    # the data as tables

memory: how much the resident set rises during an update, against the plan's update parts; a process for each case, once
    with glibc's heap told to give memory back (what is alive), once with its defaults. kept: the same for the cases of
    benchmarks/results/update_step.json. time: CPU seconds of updates of several sizes and row lengths, the rate from a
    matrix product in the same process. tokens: processed tokens of kept runs; prompt and observation come from the
    shorter ones, the longer ones are predicted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _update_cases import Shape, configuration, make_groups, make_learner, make_policy
from update_step import MIB, resident

from epo.config import Config
from epo.packing import pack
from epo.planning.hardware import parse_hardware
from epo.planning.memory import memory_parts, total
from epo.planning.shapes import ModelShape
from epo.planning.timing import CPU_UTILISATION, update_operations
from epo.planning.workload import Workload, workload_of
from epo.recipe import load_config
from epo.training.recomputation import enable_recomputation
from epo.types import PackedBatch

RESULTS = Path(__file__).parent / "results"
HARDWARE = parse_hardware("cpu:1x24G")
CASES: list[dict[str, Any]] = [
    {"layers": 2, "lora_rank": 16},
    {"layers": 8, "lora_rank": 16},
    {"layers": 4, "lora_rank": 0},
    {"layers": 8, "lora_rank": 0, "checkpointing": True},
]
TIMES: list[dict[str, Any]] = [
    {"layers": 2, "tokens": 250},
    {"layers": 4, "tokens": 250},
    {"layers": 4, "tokens": 1000},
    {"layers": 4, "tokens": 250, "lora_rank": 16},
]


def shape_in_plan(shape: Shape) -> ModelShape:
    return ModelShape(
        vocabulary=shape.vocabulary,
        hidden=shape.hidden,
        layers=shape.layers,
        heads=shape.heads,
        key_value_heads=shape.key_value_heads,
        head_size=shape.hidden // shape.heads,
        intermediate=shape.intermediate,
        is_tied=True,
        source="made up",
    )


def work_of(batch: PackedBatch) -> Workload:
    """The plan's record of rows that exist."""
    lengths = [len(row) for row in batch.rows]
    return Workload(
        episodes=len(lengths), turns=1, prefilled=0, decoded=batch.num_trained, processed=batch.num_tokens,
        rows=len(lengths), context=0, pairs=sum(n * (n + 1) / 2 for n in lengths), live=1, assumptions={},
    )  # fmt: skip


def configured(options: dict[str, Any], *, microbatch_tokens: int, groups: int) -> Config:
    config = configuration("x", compute="float32", microbatch_tokens=microbatch_tokens, groups=groups)
    tree = config.model_dump()
    tree["model"]["gradient_checkpointing"] = options.get("checkpointing", False)
    if rank := options.get("lora_rank", 0):
        tree["model"]["lora"]["rank"] = rank
    return Config.model_validate(tree)


def memory_case(options: dict[str, Any]) -> dict[str, Any]:
    shape = Shape(layers=options["layers"], vocabulary=16384)
    policy = make_policy(shape, compute="float32", lora_rank=options.get("lora_rank", 0))
    if options.get("checkpointing"):
        enable_recomputation(policy.model, policy.adapters)
    groups = make_groups(shape, trajectories=6, tokens=430, trained_share=0.2)
    config = configured(options, microbatch_tokens=1024, groups=len(groups))
    learner = make_learner(policy, config)
    learner.update(make_groups(shape, trajectories=2, tokens=150, trained_share=0.2, seed=1), step=0)
    learner.optimizer.zero_grad(set_to_none=True)  # the update does that first, and then makes gradients anew
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    learner.update(groups, step=0)
    rise = (resident("VmHWM") - before) / MIB
    work = work_of(pack([t for group in groups for t in group.trajectories]))
    return {"measured_mib": rise, **predicted_rise(config, shape, work)}


def predicted_rise(config: Config, shape: Shape, work: Workload) -> dict[str, float]:
    always, _, parts = memory_parts(config, shape_in_plan(shape), HARDWARE, work)
    rise = total(parts) + always["gradients"]
    return {"alive_mib": (rise - parts["kept by the heap"]) / MIB, "with_heap_mib": rise / MIB}


def memory() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for options in CASES:
        for heap in ("gives back", "default"):
            environment = dict(os.environ) | ({"MALLOC_MMAP_THRESHOLD_": "65536"} if heap == "gives back" else {})
            command = [sys.executable, __file__, "--case", json.dumps(options)]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
            found = json.loads(out.splitlines()[-1])
            predicted = found.pop("alive_mib"), found.pop("with_heap_mib")
            rows.append({**options, "heap": heap, **found, "predicted_mib": predicted[heap == "default"]})
            print(rows[-1], flush=True)
    return rows


def kept_memory() -> list[dict[str, Any]]:
    """The cases of update_step.json, which were measured with the heap's defaults."""
    data = json.loads((RESULTS / "update_step.json").read_text())["memory"]
    rows: list[dict[str, Any]] = []
    for case, trajectories in [*((case, 8) for case in data["grid"]), (data["stated"], 16)]:
        shape = Shape(**case["shape"])
        share = 0.2 if trajectories == 16 else 0.1 if case["trained"] / case["tokens"] < 0.2 else 0.4
        tokens = 1500 if trajectories == 16 else 600
        groups = make_groups(shape, trajectories=trajectories, tokens=tokens, trained_share=share)
        batch = pack([t for group in groups for t in group.trajectories])
        assert batch.num_tokens == case["tokens"], "not the rows that were measured"
        config = configured({"lora_rank": case["lora_rank"]}, microbatch_tokens=4096, groups=len(groups))
        predicted = predicted_rise(config, shape, work_of(batch))["with_heap_mib"]
        row = {"layers": shape.layers, "vocabulary": shape.vocabulary, "trained": case["trained"]}
        rows.append({**row, "measured_mib": case["peak_mib"] - case["before_mib"], "predicted_mib": predicted})
    return rows


def times(rounds: int) -> dict[str, Any]:
    """Interleaved; medians of CPU time."""
    from epo.objectives.products import product

    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    works: list[tuple[dict[str, Any], Any, float]] = []
    for options in TIMES:
        shape = Shape(layers=options["layers"], vocabulary=16384)
        policy = make_policy(shape, compute="float32", lora_rank=options.get("lora_rank", 0))
        groups = make_groups(shape, trajectories=2, tokens=options["tokens"], trained_share=0.2)
        config = configured(options, microbatch_tokens=1024, groups=len(groups))
        learner = make_learner(policy, config)
        work = work_of(pack([t for group in groups for t in group.trajectories]))
        operations = sum(update_operations(config, shape_in_plan(shape), work).values())
        works.append((options, lambda learner=learner, groups=groups: learner.update(groups, step=0), operations))
    gemm: list[float] = []
    spent: list[list[float]] = [[] for _ in works]
    for number in range(rounds + 1):
        gemm.append(cpu_seconds(lambda: [product(left, right) for _ in range(8)]) / 8)
        for times_of, (_, update, _) in zip(spent, works, strict=True):
            times_of.append(cpu_seconds(update))
        print("round", number, gemm[-1], [t[-1] for t in spent], flush=True)
    rate = 2 * 1024**3 / statistics.median(gemm[1:])
    rows = [
        {
            **options,
            "measured_seconds": statistics.median(t[1:]),
            "predicted_seconds": operations / rate / CPU_UTILISATION,
        }
        for (options, _, operations), t in zip(works, spent, strict=True)
    ]
    return {"gflops": rate / 1e9, "utilisation": CPU_UTILISATION, "rounds": rounds, "updates": rows}


def cpu_seconds(work: Any) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def tokens() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for run, recipe in (("quickstart", "quickstart"), ("smollm2-scienceworld", "smollm2-scienceworld-ppo-epo")):
        steps = [json.loads(line) for line in (RESULTS / run / "metrics.jsonl").read_text().splitlines()]
        steps = sorted(steps, key=lambda step: step["turns/mean"])
        half = len(steps) // 2
        episodes = np.array([step["episodes"] for step in steps])
        t = np.array([step["turns/mean"] for step in steps])
        r = np.array([step["tokens/trained"] for step in steps]) / episodes / t
        read = np.array([step["tokens/processed"] for step in steps]) / episodes - t * r
        design = np.stack([np.ones(half), t[:half] - 1], axis=1)
        (p, o), *_ = np.linalg.lstsq(design, read[:half], rcond=None)
        config = load_config(recipe, [])
        last = slice(half, None)
        made = [workload_of(config, turns=a, response=b, observation=o, prompt=p) for a, b in zip(t[last], r[last])]  # noqa: B905
        per_episode = statistics.fmean(w.processed / w.episodes for w in made)
        measured = float(np.mean((read + t * r)[last]))
        rows.append({"run": run, "turns": float(t[last].mean()), "measured": measured, "predicted": per_episode})
    growth = json.loads((RESULTS / "cost.json").read_text())["growth"]
    by = {(row["context"], row["turns"]): row for row in growth}
    for context in ("transcript", "window"):
        short, longer = by[context, 5.0], by[context, 10.0]
        r = short["tokens_sampled"] / 5
        read = [row["tokens_processed"] - row["tokens_sampled"] for row in (short, longer)]
        if context == "transcript":
            o = (read[1] - read[0]) / 5
            p = read[0] - 4 * o
        else:  # whole prompts: the first is p, the second a pair longer, all others two pairs
            slope = (read[1] - read[0]) / 5
            pair = (5 * slope - read[0]) / 3
            p, o = slope - 2 * pair, pair - r
        for turns in (20, 40):
            overrides = ["environment.suite=corridor", f"environment.max_turns={turns}", f"agent.context={context}"]
            config = load_config("base", [*overrides, "agent.format=action", "model.max_context=8192"])
            work = workload_of(config, turns=turns, response=r, observation=o, prompt=p)
            measured = by[context, float(turns)]["tokens_processed"]
            row = {"run": f"corridor, {context}", "turns": turns, "measured": measured}
            rows.append(row | {"predicted": work.processed / work.episodes})
    return rows


def tables(data: dict[str, Any]) -> str:
    lines: list[str] = []

    def table(title: str, rows: list[dict[str, Any]], unit: str) -> None:
        lines.extend(
            [title, "", f"| case | measured{unit} | predicted{unit} | predicted / measured |", "| --- " * 4 + "|"]
        )
        for row in rows:
            (measured,) = (v for k, v in row.items() if k.startswith("measured"))
            (predicted,) = (v for k, v in row.items() if k.startswith("predicted"))
            case = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in row.items() if not k.startswith(("meas", "pred")))
            mark = "" if abs(predicted / measured - 1) <= 0.25 else " (off)"
            lines.append(f"| {case} | {measured:,.4g} | {predicted:,.4g} | {predicted / measured:.2f}{mark} |")
        lines.append("")

    table("Memory of an update", data["memory"], ", MiB")
    table("Kept cases of update_step.json, heap by default", data["kept"], ", MiB")
    table(f"Time; the product reaches {data['time']['gflops']:.0f} GFLOP/s", data["time"]["updates"], ", CPU s")
    table("Processed tokens of an episode", data["tokens"], "")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="memory,kept,time,tokens", help="parts to measure, comma-separated")
    parser.add_argument("--table", action="store_true", help="print the data as tables, measure nothing")
    parser.add_argument("--rounds", type=int, default=3, help="of the updates that are timed, after one that warms up")
    parser.add_argument("--out", type=Path, default=RESULTS / "plan_check.json")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.case:
        print(json.dumps(memory_case(json.loads(arguments.case))))
        return
    data: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    if not arguments.table:
        parts = {"tokens": tokens, "kept": kept_memory, "time": lambda: times(arguments.rounds), "memory": memory}
        for name, measure in parts.items():
            if name in arguments.parts.split(","):
                data[name] = measure()
                arguments.out.write_text(json.dumps(data, indent=1) + "\n")
    print(tables(data))


if __name__ == "__main__":
    main()
