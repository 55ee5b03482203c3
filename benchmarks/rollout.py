"""Agent turns per second of the local sampler, of Hugging Face `generate`, and of vLLM.

    python benchmarks/rollout.py                              # writes benchmarks/results/rollout.json, prints tables
    python benchmarks/rollout.py --vllm-python VENV/bin/python    # vLLM too, from an environment of its own
    python benchmarks/rollout.py --quick                      # the tiny model, few turns: does everything run?
    python benchmarks/rollout.py --table                      # the tables of docs/sampling.md from the JSON file

Models: SmolLM2-135M-Instruct (`epo models pull smollm2-135m` first) and the embedded tiny model. 16 episodes; the first
prompt has 200 tokens, every later turn 40 new ones (the lengths of ScienceWorld's texts), and every response exactly 12
(the end token is suppressed), all of random ids, at temperature 1.

Every case is a process of its own: `epo`, the local sampler, with log-probabilities and entropies; `hf`, `generate` of
transformers on the left-padded conversation, encoded again each turn, without either; `vllm`, `LLM.generate` in-process
with prefix caching (block size 32) and log-probabilities. The cases take turns turn by turn, so that whatever else the
machine does disturbs all alike. Compared are wall times, next to them CPU times of the process.

Linux only. The imports are where a case needs them: vLLM's environment does not hold this package.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

FIRST_PROMPT, OBSERVATION, RESPONSE = 200, 40, 12
MAX_CONTEXT = 2048
RESULTS = Path(__file__).parent / "results" / "rollout.json"
CASES = {"epo": "local sampler", "hf": "Hugging Face generate", "vllm": "vLLM, prefix caching"}
MODELS = ("smollm2-135m", "tiny")

Ids = list[list[int]]
Generate = Callable[[Ids], tuple[Ids, dict[str, float]]]
"""Prompts of all episodes to their responses, and whatever else was measured."""


def random_ids(what: str, count: int, vocabulary: int) -> list[int]:
    return random.Random(what).choices(range(vocabulary), k=count)


# In the process of a case.


def epo(folder: str, dtype: str, episodes: int) -> Generate:
    import numpy as np

    from epo.config import ModelConfig
    from epo.sampling.base import Request
    from epo.sampling.lean import LeanForward
    from epo.sampling.local import LocalSampler
    from epo.training.policy import load_policy

    attention = Stopwatch(LeanForward, "_attend_decode", "_attend_prefill")
    config = ModelConfig.model_validate({"device": "cpu", "compute": dtype, "max_context": MAX_CONTEXT})
    policy = load_policy(folder, config)
    policy.chat.stop_id = -1  # never drawn: every response has the same length
    sampler = LocalSampler(policy, max_episodes=episodes)
    streams = [np.random.default_rng(episode) for episode in range(episodes)]

    def generate(prompts: Ids) -> tuple[Ids, dict[str, float]]:
        if len(prompts[0]) == FIRST_PROMPT:
            for episode in range(episodes):
                sampler.release(episode)
        names = ("prefill_seconds", "decode_seconds", "prefilled_tokens", "decoded_tokens")
        before = {name: getattr(sampler, name) for name in names}
        attention.seconds = 0.0
        requests = [
            Request(episode=episode, prompt_ids=prompt, random=streams[episode])
            for episode, prompt in enumerate(prompts)
        ]
        drawn = sampler.generate(requests, temperature=1.0, train_temperature=1.0, max_tokens=RESPONSE)
        more = {name: getattr(sampler, name) - value for name, value in before.items()}
        more |= {"attention_seconds": attention.seconds, "is_lean": sampler.path == "lean"}
        return [completion.response_ids.tolist() for completion in drawn], more

    return generate


class Stopwatch:
    """Adds up the CPU time that this process spends in some methods of a class."""

    def __init__(self, owner: type, *methods: str) -> None:
        self.seconds = 0.0
        for name in methods:
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            start = time.process_time()
            found = method(*arguments)
            self.seconds += time.process_time() - start
            return found

        return timed


def hf(folder: str, dtype: str, episodes: int) -> Generate:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, dtype=getattr(torch, dtype)).eval()

    @torch.inference_mode()
    def generate(prompts: Ids) -> tuple[Ids, dict[str, float]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=RESPONSE,
            max_new_tokens=RESPONSE,
            pad_token_id=0,
        )
        return out[:, width:].tolist(), {}

    return generate


def vllm(folder: str, dtype: str, episodes: int) -> Generate:
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=folder,
        dtype=dtype,
        skip_tokenizer_init=True,
        enable_prefix_caching=True,
        block_size=32,
        enforce_eager=True,
        max_model_len=MAX_CONTEXT,
        max_num_seqs=episodes,
    )
    sampling = SamplingParams(
        temperature=1.0, max_tokens=RESPONSE, min_tokens=RESPONSE, ignore_eos=True, logprobs=0, detokenize=False
    )

    def generate(prompts: Ids) -> tuple[Ids, dict[str, float]]:
        if len(prompts[0]) == FIRST_PROMPT:
            llm.reset_prefix_cache()
        out = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        cached = sum(one.num_cached_tokens or 0 for one in out)
        return [list(one.outputs[0].token_ids) for one in out], {"cached_tokens": cached}

    return generate


def work(case: str, folder: str, dtype: str, episodes: int) -> None:
    """Serve one case: a line on stdin asks for a turn, a line of JSON on stdout answers."""
    generate = {"epo": epo, "hf": hf, "vllm": vllm}[case](folder, dtype, episodes)
    vocabulary = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]
    prompts: Ids = []
    generate([random_ids(f"warm {e}", 8, vocabulary) for e in range(episodes)])  # threads start, kernels are picked
    answer({})
    for line in sys.stdin:
        request = json.loads(line)
        if request["turn"] == 0:
            prompts = [random_ids(f"{request['round']} {e}", FIRST_PROMPT, vocabulary) for e in range(episodes)]
        wall, cpu = time.perf_counter(), time.process_time()
        responses, more = generate(prompts)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        assert all(len(response) == RESPONSE for response in responses), "a response ended early"
        for e, response in enumerate(responses):
            prompts[e] = prompts[e] + response + random_ids(f"{request} {e}", OBSERVATION, vocabulary)
        answer({"wall": wall, "cpu": cpu, "peak_bytes": peak_memory()} | more)


def peak_memory() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def answer(value: dict[str, Any]) -> None:
    sys.stdout.write("result " + json.dumps(value) + "\n")  # the peers may print, too
    sys.stdout.flush()


# In the process that compares.


class Worker:
    """The process of one case."""

    def __init__(
        self, case: str, folder: str, options: argparse.Namespace, *, dtype: str, scratch: Path, stack: ExitStack
    ) -> None:
        python = options.vllm_python if case == "vllm" else sys.executable
        command = [str(python), __file__, "--worker", case, "--folder", folder, "--dtype", dtype]
        command += ["--episodes", str(options.episodes)]
        environment = dict(os.environ) | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if options.threads:
            environment["OMP_NUM_THREADS"] = str(options.threads)
        if case == "vllm":
            environment |= {
                "VLLM_CPU_KVCACHE_SPACE": "2",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_NO_USAGE_STATS": "1",
                "DO_NOT_TRACK": "1",
            }
        log = stack.enter_context((scratch / f"{case}.log").open("w+"))
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )
        stack.callback(self.process.wait)
        stack.callback(self.process.kill)
        self.case, self.log = case, log
        self.result()

    def result(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("result "):
                return json.loads(line.removeprefix("result "))
        self.log.seek(0)
        raise RuntimeError(f"case {self.case} ended early:\n{self.log.read()[-3000:]}")

    def turn(self, *, turn: int, round_: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"turn": turn, "round": round_}) + "\n")
        self.process.stdin.flush()
        return self.result()


def measure(model: str, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        scratch = Path(temporary)
        folder = model_folder(model, scratch)
        workers = {
            case: Worker(case, folder, options, dtype=dtype, scratch=scratch, stack=stack) for case in options.cases
        }
        rounds: dict[str, list[list[dict[str, Any]]]] = {case: [] for case in workers}
        for round_ in range(options.rounds):
            for played in rounds.values():
                played.append([])
            for turn in range(options.turns):
                for case, worker in workers.items():
                    rounds[case][-1].append(worker.turn(turn=turn, round_=round_))
                spent = ", ".join(f"{case} {played[-1][-1]['wall']:.2f} s" for case, played in rounds.items())
                print(f"{model} {dtype} round {round_ + 1} turn {turn + 1}: {spent}", flush=True)
    shape = {"model": model, "dtype": dtype, "episodes": options.episodes, "threads": options.threads}
    return shape | {"turns": options.turns, "cases": rounds}


def model_folder(model: str, temporary: Path) -> str:
    if model != "tiny":
        from epo.models import resolve_model

        return str(resolve_model(model))
    from epo.config import ModelConfig
    from epo.training.tiny import build_model, build_tokenizer

    config = ModelConfig.model_validate({"max_context": MAX_CONTEXT})
    tokenizer = build_tokenizer([__doc__ or ""] * 4, vocabulary_size=config.tiny.vocabulary_size)
    build_model(tokenizer, config, seed=0).save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    return str(temporary)


def environment(options: argparse.Namespace) -> dict[str, Any]:
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    import torch

    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "epo-agents")}
    if options.vllm_python:
        code = "import importlib.metadata as m; d = {x.name: x.version for x in m.distributions()};"
        code += "print(d.get('vllm') or 'cpu build ' + d['vllm-cpu'])"
        found = subprocess.run([options.vllm_python, "-c", code], capture_output=True, text=True, check=True)
        versions["vllm"] = found.stdout.strip()
    return {
        "python": platform.python_version(),
        "cpu": models[0].split(":", 1)[1].strip() if models else platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "load_at_start": os.getloadavg()[0],
        "versions": versions,
    }


# Presentation.


def seconds(rounds: list[list[dict[str, Any]]], turns: int, kind: str) -> list[float]:
    """Of the first `turns` turns, for each round."""
    return [sum(turn[kind] for turn in played[:turns]) for played in rounds]


def tables(result: dict[str, Any]) -> str:
    """Markdown. Ratios are medians over rounds of one round's times; CPU time in brackets."""
    lines: list[str] = []
    for cell in result["cells"]:
        cases, episodes = cell["cases"], cell["episodes"]
        depths = sorted({min(10, cell["turns"]), cell["turns"]})
        lines += [f"### {cell['model']}, {cell['dtype']}, {episodes} episodes, {len(cases['epo'])} rounds", ""]
        heads = [f"turns/s, {depth} turns" for depth in depths] + [
            f"epo is faster by, {depth} turns" for depth in depths
        ]
        lines += ["| | " + " | ".join([*heads, "peak MiB"]) + " |", "| --- " * (len(heads) + 2) + "|"]
        for case, rounds in cases.items():
            entries = [f"{episodes * d / statistics.median(seconds(rounds, d, 'wall')):.2f}" for d in depths]
            for depth in depths:
                ratios = []
                for kind in ("wall", "cpu"):
                    pairs = zip(seconds(rounds, depth, kind), seconds(cases["epo"], depth, kind), strict=True)
                    ratios.append(statistics.median(other / own for other, own in pairs))
                entries.append(f"{ratios[0]:.2f} ({ratios[1]:.2f})")
            peak = max(turn["peak_bytes"] for played in rounds for turn in played) / 2**20
            lines.append(f"| {CASES[case]} | " + " | ".join([*entries, f"{peak:,.0f}"]) + " |")
        marks = [turn for turn in (2, 10, 20) if turn <= cell["turns"]]
        lines += ["", "| milliseconds, CPU time in brackets | " + " | ".join(f"turn {turn}" for turn in marks) + " |"]
        lines.append("| --- " * (len(marks) + 1) + "|")
        new = episodes * (OBSERVATION + RESPONSE)
        for case, rounds in cases.items():
            entries = []
            for mark in marks:
                wall, cpu = (statistics.median(played[mark - 1][kind] for played in rounds) for kind in ("wall", "cpu"))
                entries.append(f"{1e3 * wall / new:.2f} ({1e3 * cpu / new:.2f})")
            lines.append(f"| {CASES[case]}, per new token | " + " | ".join(entries) + " |")
        aside = [
            statistics.median(turns[mark - 1]["cpu"] - turns[mark - 1]["attention_seconds"] for turns in cases["epo"])
            for mark in marks
        ]
        entries = [f"({1e3 * cpu / new:.2f})" for cpu in aside]
        lines.append("| local sampler, per new token, attention aside | " + " | ".join(entries) + " |")
        for kind, tokens in (("prefill", "prefilled"), ("decode", "decoded")):
            entries = []
            for mark in marks:
                spent = (
                    turns[mark - 1][f"{kind}_seconds"] / turns[mark - 1][f"{tokens}_tokens"] for turns in cases["epo"]
                )
                entries.append(f"{1e3 * statistics.median(spent):.2f}")
            lines.append(f"| local sampler, {kind} per token | " + " | ".join(entries) + " |")
        lines.append("")
    return "\n".join(lines)


def save(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), help="default what this CPU is fast at")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=16)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="epo always runs")
    parser.add_argument("--vllm-python", help="of an environment with vLLM; without it that case is left out")
    parser.add_argument("--quick", action="store_true", help="the tiny model, 3 turns, to a temporary file")
    parser.add_argument("--table", action="store_true", help="print the tables of --out; measure nothing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--worker", choices=list(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.folder, options.dtype[0], options.episodes)
        return
    if not options.table:
        if options.quick:
            options.models, options.turns, options.rounds = ["tiny"], 3, 1
            options.out = Path(tempfile.mkdtemp()) / "rollout.json"
        options.cases = [
            case
            for case in CASES
            if case == "epo" or (case in options.cases and (case != "vllm" or options.vllm_python))
        ]
        result: dict[str, Any] = {"environment": environment(options), "cells": []}
        for model in options.models:
            for dtype in options.dtype or dtypes(model):
                result["cells"].append(measure(model, dtype, options))
                save(result, options.out)
    print(tables(json.loads(options.out.read_text(encoding="utf-8"))))
    print(f"Data in {options.out}.")


def dtypes(model: str) -> list[str]:
    """As `model.compute=auto` chooses."""
    import torch

    from epo.config import ModelConfig
    from epo.training.hardware import resolve_compute

    chosen = resolve_compute(ModelConfig.model_validate({"path": model}), torch.device("cpu"))
    return [str(chosen).removeprefix("torch.")]


if __name__ == "__main__":
    main()
