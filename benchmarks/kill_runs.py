"""Kill runs at random moments, resume them, and compare what they leave with a run that nothing ever stopped.

    python benchmarks/kill_runs.py --kills 60 --seed 0 --out benchmarks/results/kill_runs.json

Every session is the `epo train` command in a process forked after the imports, which would take most of the time. It is
killed in one of four ways, all drawn from the seed:

event    it sends SIGKILL to itself at a random file-system call (open, rename, remove, mkdir) of a phase
timer    SIGKILL a random time after it entered a phase, to it alone or to its process group
random   SIGKILL at any moment since its start
term     SIGTERM at any moment: it ends after the step with a checkpoint, or at once before training began

The phase of a kill is the one it was in when it died. After every kill each checkpoint is verified; at the end of a run
metrics, evaluations, trajectories, checkpoints (weights, optimiser, critic, state) are compared byte by byte, but for
seconds.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from epo import cli
from epo.files import sha256_of
from epo.training import session, trainer
from epo.training.checkpoint import checkpoints, is_whole
from epo.training.checksums import SUMS_FILE
from epo.training.learner import Learner
from epo.training.provenance import commit_of_code
from epo.training.run_folder import RunFolder

COMMON = (
    *("name=killed", "steps=12", "environment.suite=corridor", "environment.workers=2", "environment.max_turns=4"),
    "environment.options={length: 3, choices: 2, tasks: 4}",
    *("agent.format=action", "agent.max_response_tokens=6", "model.max_context=256", "model.device=cpu"),
    *("model.threads=1", "model.tiny={vocabulary_size: 320, hidden_size: 32, layers: 2, heads: 2}"),
    "imitation={demonstrations: 4, batches: 40, batch_size: 4, learning_rate: 0.005}",
    *("optimizer.learning_rate=0.001", "optimizer.minibatches=2", "evaluation.every=3", "evaluation.episodes=4"),
    *("evaluation.splits=[iid]", "checkpoint.every=2", "logging.to=[]"),
)
RECIPES = {
    "ppo-epo": (
        *("algorithm.name=ppo", "algorithm.critic.trunk=separate", "entropy.method=epo"),
        *("rollout.tasks_per_step=4",),
    ),
    # The KL loss needs the starting model again at every resumption.
    "grpo-kl": (
        *("algorithm.name=grpo", "algorithm.kl_coefficient=0.1", "entropy.method=epo"),
        *("rollout.tasks_per_step=2", "rollout.group_size=2"),
    ),
}  # fmt: skip
PHASES = ["start", "warm start", "evaluation", "rollout", "update", "recording", "checkpoint", "rewind", "finish"]
WRAPPED: list[tuple[str, Any, str]] = [
    ("warm start", session, "starting_policy"),
    ("evaluation", trainer.Trainer, "evaluate"),
    ("rollout", trainer.Trainer, "collect"),
    ("update", Learner, "update"),
    ("recording", RunFolder, "add_step"),
    ("checkpoint", trainer, "save_checkpoint"),
    ("rewind", RunFolder, "rewind"),
    ("finish", session, "_finish"),
]
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}
PLAN = [
    *(("timer", "warm start"), ("event", "warm start"), ("timer", "evaluation"), ("event", "checkpoint")),
    *(("timer", "rollout"), ("event", "checkpoint"), ("timer", "update"), ("event", "rewind"), ("event", "recording")),
    *(("random", ""), ("event", "rewind"), ("timer", "checkpoint"), ("term", ""), ("random", ""), ("event", "finish")),
]
"""The kills of one run, in order; its warm start and its finish come once, so they are first and last."""


class Watch:
    """What a session tells its parent, in memory that outlives it: the phase it is in, and per phase how often it
    was entered, how many file events it had in all, and how many seconds."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 4096)

    @property
    def phase(self) -> int:
        return self._memory[0]

    @phase.setter
    def phase(self, value: int) -> None:
        self._memory[0] = value

    def read(self, phase: int) -> tuple[int, int, float]:
        return struct.unpack_from("<IId", self._memory, 64 + 16 * phase)

    def add(self, phase: int, *, entries: int = 0, events: int = 0, seconds: float = 0.0) -> None:
        old = self.read(phase)
        struct.pack_into("<IId", self._memory, 64 + 16 * phase, old[0] + entries, old[1] + events, old[2] + seconds)


def instrument(watch: Watch, *, die_in: int | None, die_at: int) -> None:
    """Make this process report its phases, and kill itself at file event `die_at` of phase `die_in`."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FILE_EVENTS:
            watch.add(watch.phase, events=1)
            if watch.phase == die_in and watch.read(watch.phase)[1] >= die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    def wrap(number: int, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            before, start = watch.phase, time.monotonic()
            watch.phase = number
            watch.add(number, entries=1)
            try:
                return function(*args, **kwargs)
            finally:
                watch.add(number, seconds=time.monotonic() - start)
                watch.phase = before

        return wrapped

    for name, owner, attribute in WRAPPED:
        setattr(owner, attribute, wrap(PHASES.index(name), getattr(owner, attribute)))
    sys.addaudithook(hook)


def start(arguments: list[str], *, cache: Path, log: Path, watch: Watch, die_in: int | None, die_at: int) -> int:
    """Fork a session; returns its process id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.environ["EPO_CACHE"] = str(cache)
        sys.argv = ["epo", *arguments]
        instrument(watch, die_in=die_in, die_at=die_at)
        try:
            cli.main()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def wait(pid: int, *, seconds: float) -> int | None:
    """The exit code (negative: of a signal), or None if the process lives on."""
    deadline = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.001)


class Runs:
    """All runs of one recipe: the uninterrupted one, and those that are killed."""

    def __init__(self, name: str, work: Path, chance: random.Random) -> None:
        self.name = name
        self.work = work / name
        self.work.mkdir(parents=True)
        self.chance = chance
        self.log = self.work / "log.txt"
        watch = Watch()
        began = time.monotonic()
        code = wait(self._start("whole", watch, resume=False), seconds=600)
        if code != 0:
            raise SystemExit(f"the uninterrupted run of {name} failed ({code}): see {self.log}")
        self.seconds = time.monotonic() - began
        self.typical = {phase: watch.read(number) for number, phase in enumerate(PHASES)}
        # The uninterrupted run has none, and a warm start that finds demonstrations in the cache opens fewer files.
        self.typical["rewind"] = (1, 14, 0.05)
        entries, events, seconds = self.typical["warm start"]
        self.typical["warm start"] = (entries, min(events, 12), seconds)

    def _start(self, run: str, watch: Watch, *, resume: bool, die_in: int | None = None, die_at: int = 0) -> int:
        arguments = ["train", "base", *COMMON, *RECIPES[self.name], "--runs", str(self.work), "--name", run]
        return start(
            [*arguments, "--resume"] if resume else arguments,
            cache=self.work / f"cache-{run}",
            log=self.log,
            watch=watch,
            die_in=die_in,
            die_at=die_at,
        )

    def kill(self, run: str, how: str, target: str) -> dict[str, Any] | None:
        """One session that is killed; None if it ended before it came to that."""
        watch, chance = Watch(), self.chance
        resume = (self.work / run / "config.yaml").is_file()
        number = PHASES.index(target) if target else None
        die_at = 0
        if how == "event":
            entries, events, _ = self.typical[target]
            die_at = chance.randint(1, max(1, events // max(1, entries)))
        pid = self._start(run, watch, resume=resume, die_in=number if how == "event" else None, die_at=die_at)
        code: int | None = None
        if how == "event":
            code = wait(pid, seconds=600)
        else:
            if how == "timer":
                assert number is not None
                entries, _, seconds = self.typical[target]
                occurrence = 1 if entries <= 1 else chance.randint(1, 2)
                while watch.read(number)[0] < occurrence and (code := wait(pid, seconds=0.0005)) is None:
                    pass
                delay = chance.random() * seconds / max(1, entries)
            else:
                delay = chance.random() * self.seconds / 2
            if code is None and (code := wait(pid, seconds=delay)) is None:
                kind = signal.SIGTERM if how == "term" else signal.SIGKILL
                os.killpg(pid, kind) if chance.random() < 0.5 and how != "term" else os.kill(pid, kind)
                code = wait(pid, seconds=600)
        phase = PHASES[watch.phase]
        if code == 0:
            return None
        if code not in (-signal.SIGKILL, -signal.SIGTERM, cli.INTERRUPTED):
            raise SystemExit(f"a session of {self.name} failed with {code}: see {self.log}")
        saved = checkpoints(self.work / run / "checkpoints")
        corrupt = [path.name for path in saved if not is_whole(path)]
        ended = {-signal.SIGKILL: "SIGKILL", -signal.SIGTERM: "SIGTERM at once"}.get(code, "SIGTERM after the step")
        return {"how": how, "target": target, "phase": phase, "ended": ended, "corrupt_checkpoints": corrupt}

    def finish(self, run: str) -> list[str]:
        """Let a run go to its end; returns how it differs from the uninterrupted one."""
        resume = (self.work / run / "config.yaml").is_file()
        code = wait(self._start(run, Watch(), resume=resume), seconds=600)
        if code != 0:
            return [f"the last session ended with {code}"]
        return differences(self.work / "whole", self.work / run)


def differences(one: Path, other: Path) -> list[str]:
    """How two runs of one configuration differ, seconds aside.

    Both must have the newest checkpoint; which older one is kept besides, as the last good one, depends on what there
    was to choose from, and SIGTERM adds a checkpoint.
    """
    found: list[str] = []
    steps = [line["step"] for line in json_lines(other / "metrics.jsonl")]
    if steps != list(range(1, len(steps) + 1)):
        found.append(f"steps of metrics.jsonl: {steps}")
    if timeless(one) != timeless(other):
        found.append("metrics.jsonl")
    saved = [{path.name for path in checkpoints(run / "checkpoints")} for run in (one, other)]
    if max(saved[0]) != max(saved[1]):
        found.append(f"newest checkpoints: {max(saved[0])}, {max(saved[1])}")
    aside = {f"checkpoints/{name}" for name in saved[0] ^ saved[1]}
    files = [
        {name for name in names if not any(name.startswith(f"{folder}/") for folder in aside)}
        for names in ({p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file()} for run in (one, other))
    ]
    if files[0] != files[1]:
        found.append(f"files: {sorted(files[0] ^ files[1])}")
    for name in sorted(files[0] & files[1]):
        kind = Path(name).name
        if kind == "state.json":
            states = [json.loads((run / name).read_text()) for run in (one, other)]
            for state in states:
                state["state"].pop("wall_seconds")
            same = states[0] == states[1]
        elif kind in TIMED:
            continue
        else:
            same = sha256_of(one / name) == sha256_of(other / name)
        if not same:
            found.append(name)
    found += [f"{path.name} is damaged" for path in checkpoints(other / "checkpoints") if not is_whole(path)]
    return found


TIMED = {SUMS_FILE, "metrics.jsonl", "provenance.json", "summary.json", "report.html", ".lock"}
"""Files that hold seconds or the command, or checksums of such."""


def json_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def timeless(run: Path) -> list[dict[str, Any]]:
    lines = json_lines(run / "metrics.jsonl")
    return [
        {k: v for k, v in x.items() if not k.startswith(("time/", "memory/", "workers/")) and k != "tokens/per_second"}
        for x in lines
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60, help="at least so many; the last run is finished")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where the result goes as JSON; default: printed only")
    parser.add_argument("--keep", type=Path, help="keep the runs in this new folder, to look at")
    options = parser.parse_args()
    torch.set_num_threads(1)
    session.quiet_libraries()
    chance = random.Random(options.seed)
    work = options.keep or Path(tempfile.mkdtemp(prefix="epo-kills-"))
    began = time.monotonic()
    kills: list[dict[str, Any]] = []
    outcomes: list[dict[str, Any]] = []
    recipes = [Runs(name, work, chance) for name in RECIPES]
    while len(kills) < options.kills:
        runs = recipes[len(outcomes) % len(recipes)]
        name, before = f"run{len(outcomes)}", len(kills)
        for how, target in PLAN:
            killed = runs.kill(name, how, target)
            if killed is None:  # it ran to its end first
                break
            kills.append({"run": name, **killed})
            print(f"{len(kills):3}  {runs.name} {name}  {how:6} {killed['phase']:10}  {killed['ended']}", flush=True)
        differs = runs.finish(name)
        outcomes.append({"run": name, "recipe": runs.name, "kills": len(kills) - before, "differs": differs})
        print(f"     {runs.name} {name} {differs or 'equals the uninterrupted run'}", flush=True)
        if not options.keep and not differs:
            shutil.rmtree(runs.work / name)
    result = {
        "what": __doc__.splitlines()[0] if __doc__ else "",
        "command": f"python benchmarks/kill_runs.py --kills {options.kills} --seed {options.seed} --out FILE",
        "commit": commit_of_code(),
        "kills": len(kills),
        "by_phase": dict(Counter(kill["phase"] for kill in kills)),
        "by_way": dict(Counter(kill["how"] for kill in kills)),
        "by_ending": dict(Counter(kill["ended"] for kill in kills)),
        "runs": len(outcomes),
        "runs_equal_to_uninterrupted": sum(not outcome["differs"] for outcome in outcomes),
        "corrupt_checkpoints": sum(len(kill["corrupt_checkpoints"]) for kill in kills),
        "seconds": round(time.monotonic() - began, 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "outcomes": outcomes,
        "each": kills,
    }
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    good = result["runs_equal_to_uninterrupted"] == result["runs"] and result["corrupt_checkpoints"] == 0
    print(json.dumps({k: v for k, v in result.items() if k not in ("each", "outcomes")}, indent=1))
    if good and not options.keep:
        shutil.rmtree(work)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
