"""How the pages of a large run behave: 1,000 steps, 10,000 trajectories, in headless Chromium.

    python benchmarks/live_page.py       # minutes; writes benchmarks/results/live_page.json

The run is made up: 10 turns a trajectory, 20 tokens a turn, three alternatives a token, 90 metrics a step, evaluations
every 10 steps. The server is `epo watch` as a process of its own. Needs the extras `report` and `dev`, and Chromium
(on the path, or named by EPO_CHROMIUM).
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from playwright.sync_api import Browser, CDPSession, Page, sync_playwright

from epo.recipe import load_config
from epo.reporting.health import ALARMS
from epo.reporting.trajectories import index_entry

GROUP = 10
TURNS, TOKENS, VOCABULARY = 10, 20, 50_000
RESULT = Path(__file__).parent / "results" / "live_page.json"
LISTEN = """() => {
  window.measured = {tasks: [], gaps: []};
  new PerformanceObserver((list) => list.getEntries().forEach((e) => window.measured.tasks.push(e.duration)))
    .observe({type: "longtask"});
  let last = performance.now();
  const tick = (now) => { window.measured.gaps.push(now - last); last = now; requestAnimationFrame(tick); };
  requestAnimationFrame(tick);
}"""


class MadeUpRun:
    """A run folder that grows step by step as a training's does."""

    def __init__(self, path: Path, *, steps: int) -> None:
        self.path = path
        self.rng = random.Random(0)
        self.pool = [self._trajectory(k) for k in range(60)]
        (path / "trajectories").mkdir(parents=True)
        config = load_config("base", [f"steps={steps}", "environment.suite=corridor", "entropy.method=epo"])
        (path / "config.yaml").write_text(config.to_yaml())
        (path / "vocabulary.json").write_text(json.dumps([f" word{i}" for i in range(VOCABULARY)]))

    def add(self, step: int) -> None:
        records = [self.rng.choice(self.pool) | {"step": step, "group": k // 5} for k in range(GROUP)]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (self.path / "trajectories" / f"step_{step:06d}.jsonl").write_text(lines)
        self._append("trajectories/index.jsonl", index_entry(records))
        self._append("metrics.jsonl", {"step": step, **self._metrics(step)})
        if step % 10 == 0:
            self._append("eval.jsonl", {"step": step, "panels": [self._panel(split) for split in ("iid", "ood")]})

    def _append(self, name: str, entry: dict[str, Any]) -> None:
        with (self.path / name).open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def _metrics(self, step: int) -> dict[str, float]:
        noise = self.rng.random
        entropy = math.exp(-step / 400) + 0.1 * noise()
        known = {
            "success/train": min(1.0, step / 1000 + 0.1 * noise()),
            "reward/mean": step / 1000 + 0.1 * noise(),
            "entropy/mean": entropy,
            "entropy/turn_early": 0.8 * entropy,
            "entropy/turn_late": 1.3 * entropy + 0.1 * noise(),
            "entropy/reference": math.exp(-step / 500),
            "policy/kl": 0.01 * noise(),
            "policy/grad_norm": 0.3 + noise(),
            **{f"health/{name}": float(noise() < 0.002) for name in ALARMS},
        }
        return known | {f"other/metric_{k}": noise() for k in range(90 - len(known))}

    def _panel(self, split: str) -> dict[str, Any]:
        success = self.rng.random()
        interval = {"success": success, "low": max(0.0, success - 0.1), "high": min(1.0, success + 0.1)}
        rest = {
            "episodes": 64,
            "score": success,
            "turns": 10.0,
            "invalid": 0.01,
            "errors": 0,
            "by_goal": {"find": success},
        }
        return {"split": split, **interval, **rest}

    def _trajectory(self, k: int) -> dict[str, Any]:
        success = self.rng.random() < 0.5
        turns = [self._turn() for _ in range(TURNS)]
        return {
            "step": 0,
            "group": 0,
            "task": f"find-{k % 7}/{k}",
            "goal": f"find-{k % 7}",
            "stop_reason": "success" if success else "max_turns",
            "success": success,
            "score": float(success),
            "reward": float(success),
            "error": None,
            "restarts": 0,
            "trained": True,
            "turns": turns,
        }

    def _turn(self) -> dict[str, Any]:
        draw = self.rng
        ids = [draw.randrange(VOCABULARY) for _ in range(TOKENS)]
        text = "".join(f" word{i}" for i in ids)
        return {
            "observation": "You are in the kitchen. You see a door, a cup and a red apple. " * 4,
            "response": text,
            "action": text[:30],
            "is_valid": draw.random() < 0.95,
            "understood": True,
            "reward": 0.0,
            "score": 0.0,
            "dropped_turns": 0,
            "prompt_tokens": 500,
            "response_ids": ids,
            "logprobs": [round(-3 * draw.random(), 5) for _ in ids],
            "entropy": [round(2 * draw.random(), 5) for _ in ids],
            "advantages": [round(draw.gauss(0, 1), 5) for _ in ids],
            "ratios": [round(math.exp(draw.gauss(0, 0.1)), 5) for _ in ids],
            "alternatives": [
                [x for i in range(3) for x in (draw.randrange(VOCABULARY), round(-1.0 - i * draw.random(), 5))]
                for _ in ids
            ],
        }


def resident_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return math.nan


def renderer_mb() -> float:
    """Resident memory of the largest renderer below this process."""
    found = [0.0]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"--type=renderer" in (process / "cmdline").read_bytes() and _is_ours(int(process.name)):
                found.append(resident_mb(int(process.name)))
        except (OSError, ValueError):
            continue
    return max(found)


def _is_ours(pid: int) -> bool:
    while pid > 1:
        if pid == os.getpid():
            return True
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return False


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def load(browser: Browser, address: str) -> tuple[Page, dict[str, float]]:
    """Open a page and wait until its first tab has drawn its charts."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(120_000)
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    start = time.perf_counter()
    page.goto(address)
    page.wait_for_selector("#panel-overview table, #panel-overview dl")
    readable = time.perf_counter() - start
    # Charts are drawn once they can be seen.
    page.locator("#panel-overview article.card").first.scroll_into_view_if_needed()
    page.wait_for_selector("#panel-overview .main-svg")
    drawn = time.perf_counter() - start
    busy = busy_seconds(session)
    return page, {
        "main_thread_cpu_seconds": round(busy, 2),
        "readable_seconds": round(readable, 2),
        "charts_drawn_seconds": round(drawn, 2),
    }


def busy_seconds(session: CDPSession) -> float:
    """CPU time of the page's main thread, as far as tasks of the renderer used it."""
    metrics = {entry["name"]: entry["value"] for entry in session.send("Performance.getMetrics")["metrics"]}
    return metrics["TaskDuration"]


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory(page: Page) -> dict[str, float]:
    session = page.context.new_cdp_session(page)
    session.send("HeapProfiler.collectGarbage")
    session.send("Performance.enable")
    metrics = {entry["name"]: entry["value"] for entry in session.send("Performance.getMetrics")["metrics"]}
    return {"js_heap_mb": round(metrics["JSHeapUsedSize"] / 2**20, 1), "renderer_mb": round(renderer_mb(), 1)}


def show_tab(page: Page, name: str, waited_for: str) -> dict[str, float]:
    def show() -> None:
        page.click(f"#tab-{name}")
        page.wait_for_selector(f"#panel-{name} {waited_for}")

    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    before = busy_seconds(session)
    seconds = seconds_of(show)
    return {"main_thread_cpu_seconds": round(busy_seconds(session) - before, 2), "seconds": round(seconds, 2)}


def next_trajectory(page: Page) -> float:
    """Seconds from a click on Next until another trajectory is there; every tenth click fetches another step."""
    shown = page.inner_text(".summary .note")
    start = time.perf_counter()
    page.get_by_role("button", name="Next in the list").click()
    page.wait_for_function("before => document.querySelector('.summary .note')?.innerText !== before", arg=shown)
    return time.perf_counter() - start


def ask(port: int, path: str) -> tuple[float, int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    start = time.perf_counter()
    connection.request("GET", path)
    body = connection.getresponse().read()
    seconds = time.perf_counter() - start
    return seconds, len(body), json.loads(body) if path != "/" else None


def measure(run: MadeUpRun, browser: Browser, *, steps: int, updates: int) -> dict[str, Any]:
    start = time.perf_counter()
    command = [sys.executable, "-m", "epo", "watch", str(run.path), "--port", "0", "--json"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = json.loads(server.stdout.readline())["url"]
        result: dict[str, Any] = {
            "server_ready_seconds": round(time.perf_counter() - start, 2),
            "server_ready_cpu_seconds": round(cpu_seconds(server.pid), 2),
        }
        port = int(address.rstrip("/").rpartition(":")[2])
        result["server_mb_before_a_page"] = round(resident_mb(server.pid), 1)
        ask(port, "/")
        before = cpu_seconds(server.pid)
        seconds, size, _ = ask(port, "/")
        result["page_answer"] = {
            "seconds": round(seconds, 2),
            "cpu_seconds": round(cpu_seconds(server.pid) - before, 2),
            "mb": round(size / 1e6, 2),
        }
        page, loaded = load(browser, address)
        result |= {"load": loaded, "memory_overview": memory(page)}
        result["charts_tab"] = show_tab(page, "charts", ".main-svg")
        result["trajectories_tab"] = show_tab(page, "trajectories", ".summary h3")
        result["next_trajectory_seconds"] = round(statistics.median(next_trajectory(page) for _ in range(12)), 3)
        result["memory_all_tabs"] = memory(page)
        result["update"] = measure_updates(run, page, port, server.pid, steps=steps, updates=updates)
        result["memory_after_updates"] = memory(page)
        page.close()
        seconds, size, _ = ask(port, f"/api/runs/0/trajectories/{steps}")
        result["trajectories_of_a_step"] = {"seconds": round(seconds, 3), "kb": round(size / 1e3)}
        before = cpu_seconds(server.pid)
        seconds, _, found = ask(port, f"/api/runs/0/search?q={quote('word4999')}")
        used = cpu_seconds(server.pid) - before
        result["search"] = {
            "seconds": round(seconds, 2),
            "cpu_seconds": round(used, 2),
            "hits": len(found["hits"]),
            "complete": found["complete"],
        }
        result["server_mb_at_the_end"] = round(resident_mb(server.pid), 1)
    finally:
        server.terminate()
        server.wait(10)
    return result


def measure_updates(run: MadeUpRun, page: Page, port: int, server: int, *, steps: int, updates: int) -> dict[str, Any]:
    """A step at a time is added; what the server takes to answer, and how long the page is busy with it."""
    cursor = ask(port, "/api/page")[2]["runs"][0]["cursor"]
    page.click("#tab-overview")
    page.wait_for_timeout(3000)
    page.evaluate(LISTEN)
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    before, served = busy_seconds(session), cpu_seconds(server)
    answers: list[float] = []
    sizes: list[int] = []
    shown: list[float] = []
    for step in range(steps + 1, steps + updates + 1):
        run.add(step)
        start = time.perf_counter()
        seconds, size, answer = ask(port, f"/api/page?after={quote(json.dumps([cursor]))}")
        cursor = answer["runs"][0]["cursor"]
        assert answer["runs"][0]["steps"] == [step]
        answers.append(seconds)
        sizes.append(size)
        page.wait_for_function("step => EPO.page.runs[0].steps.at(-1) === step", arg=step, polling=50)
        shown.append(time.perf_counter() - start)
    page.wait_for_timeout(2000)
    measured = page.evaluate("window.measured")
    busy, served = busy_seconds(session) - before, cpu_seconds(server) - served
    return {
        "updates": updates,
        "main_thread_cpu_seconds_each": round(busy / updates, 3),
        "server_cpu_seconds_each": round(served / updates, 3),
        "server_answer_seconds": round(statistics.median(answers), 3),
        "answer_kb": round(statistics.median(sizes) / 1e3, 1),
        "from_file_to_page_seconds": round(statistics.median(shown), 2),
        "long_tasks": len(measured["tasks"]),
        "longest_task_ms": round(max(measured["tasks"], default=0)),
        "median_task_ms": round(statistics.median(measured["tasks"])) if measured["tasks"] else 0,
        "longest_frame_gap_ms": round(max(measured["gaps"])),
    }


def measure_report(run: MadeUpRun, browser: Browser) -> dict[str, Any]:
    out = run.path / "report.html"
    command = [sys.executable, "-m", "epo", "report", str(run.path), "--json"]
    start = time.perf_counter()
    done = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    result: dict[str, Any] = {
        "write_seconds": round(time.perf_counter() - start, 2),
        "mb": round(done["bytes"] / 1e6, 2),
    }
    (embedded,) = done["embedded_steps"].values()
    result["steps_with_trajectories"] = len(embedded)
    page, loaded = load(browser, out.as_uri())
    result |= {"load": loaded, "memory": memory(page)}
    page.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RESULT)
    asked = parser.parse_args()
    chromium = os.environ.get("EPO_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        run = MadeUpRun(Path(folder) / "run", steps=asked.steps + asked.updates)
        for step in range(1, asked.steps + 1):
            run.add(step)
        size = sum(file.stat().st_size for file in run.path.rglob("*") if file.is_file())
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        result: dict[str, Any] = {
            "run": {"steps": asked.steps, "trajectories": GROUP * asked.steps, "mb": round(size / 1e6)},
            "cores": len(os.sched_getaffinity(0)),
            "load_average": round(os.getloadavg()[0], 1),
            "chromium": browser.version,
            "watch": measure(run, browser, steps=asked.steps, updates=asked.updates),
            "report": measure_report(run, browser),
        }
        browser.close()
    asked.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
