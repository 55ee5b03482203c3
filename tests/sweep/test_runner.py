"""The runner with a stand-in for `epo train` that takes no time: what is run, resumed, retried and stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from epo.errors import UserError
from epo.recipe import load_config
from epo.sweep.folder import State, SweepFolder
from epo.sweep.plan import PlannedRun, load_sweep
from epo.sweep.progress import state_table
from epo.sweep.runner import SweepRunner, check_parallel

STAND_IN = """
import json, signal, sys, time
from pathlib import Path
command, config, seed, _, name, _, runs, *resume = sys.argv[1:]
behaviour = Path("behaviour").read_text()
run = Path(runs) / name
with open("calls", "a") as calls:
    calls.write(" ".join([name, *resume]) + "\\n")
assert command == "train" and Path(config).is_file() and run.is_dir() == bool(resume)
run.mkdir(exist_ok=True)
(run / "config.yaml").touch()
if name in behaviour:
    print("reading the model")
    print("error: it is not there")
    sys.exit(2)
if "stubborn" in behaviour:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
if "slow" in behaviour or "stubborn" in behaviour:
    stop = []
    if "slow" in behaviour:
        signal.signal(signal.SIGINT, lambda *_: stop.append(1))
    (run / "at work").touch()
    while not stop:
        time.sleep(0.01)
    (run / "summary.json").write_text(json.dumps({"finished": False}))
    sys.exit(130)
(run / "summary.json").write_text(json.dumps({"finished": True}))
"""

FIRST, SECOND, THIRD, LAST = "plain--seed0", "bonus--seed0", "plain--seed1", "bonus--seed1"


@dataclass
class Heard:
    """Keeps what a sweep says."""

    said: list[str] = field(default_factory=list[str])
    most_at_once: int = 0

    def changed(self, run: PlannedRun, what: str) -> None:
        self.said.append(f"{run.name}: {what}")

    def tick(self, active: list[PlannedRun]) -> None:
        self.most_at_once = max(self.most_at_once, len(active))

    def note(self, text: str) -> None:
        self.said.append(text)


@dataclass
class Stage:
    """A prepared sweep of four runs, and what its stand-ins were called with."""

    folder: SweepFolder
    runs: list[PlannedRun]

    def work(self, behaviour: str = "", *, parallel: int = 2, retry: bool = False) -> tuple[bool, Heard]:
        Path("behaviour").write_text(behaviour)
        Path("calls").write_text("")
        heard = Heard()
        with self.folder.locked() as lock:
            runner = SweepRunner(
                folder=self.folder,
                runs=self.runs,
                observer=heard,
                parallel=parallel,
                retry=retry,
                lock=lock,
                program=(sys.executable, "-c", STAND_IN),
            )
            return runner.work(), heard

    def calls(self) -> list[str]:
        return Path("calls").read_text().splitlines()

    def states(self) -> dict[str, State]:
        return {run.name: self.folder.state(run) for run in self.runs}


@pytest.fixture
def stage() -> Stage:
    sweep, folder = load_sweep(Path("two.yaml")), SweepFolder(Path("sweeps/two"))
    with folder.locked():
        folder.prepare(sweep)
    return Stage(folder, sweep.runs())


def when(what: Callable[[], bool], do: Callable[[], None]) -> threading.Thread:
    def wait() -> None:
        while not what():
            time.sleep(0.01)
        do()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_every_run_once_and_no_more_at_once_than_allowed(stage: Stage) -> None:
    completed, heard = stage.work()
    assert completed and sorted(stage.calls()) == sorted([FIRST, SECOND, THIRD, LAST])
    assert set(stage.states().values()) == {State.FINISHED}
    assert heard.most_at_once <= 2
    completed, heard = stage.work()
    assert completed and stage.calls() == []
    assert heard.said == [f"{run.name}: was finished before" for run in stage.runs]


def test_what_fails_is_named_left_alone_and_run_again_on_request(stage: Stage) -> None:
    completed, heard = stage.work(SECOND)
    assert completed  # the others went on
    assert [name for name, state in stage.states().items() if state is State.FAILED] == [SECOND]
    assert stage.folder.failures() == {SECOND: "exit code 2: error: it is not there"}
    assert any(SECOND in line and "logs" in line for line in heard.said)
    _, heard = stage.work()
    assert stage.calls() == [] and any("failed before" in line and "--retry" in line for line in heard.said)
    completed, heard = stage.work(retry=True)
    assert completed and stage.calls() == [f"{SECOND} --resume"]
    assert stage.folder.failures() == {} and set(stage.states().values()) == {State.FINISHED}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_runs_and_starts_no_more(stage: Stage, number: int) -> None:
    at_work = [stage.folder.run(run) / "at work" for run in stage.runs[:2]]
    thread = when(lambda: all(file.exists() for file in at_work), lambda: os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    completed, heard = stage.work("slow")
    thread.join()
    assert not completed and sorted(stage.calls()) == sorted([FIRST, SECOND])
    assert {f"{FIRST}: stopped", f"{SECOND}: stopped"} <= set(heard.said)
    assert stage.folder.failures() == {}
    assert list(stage.states().values()) == [State.STOPPED, State.STOPPED, State.WAITING, State.WAITING]
    assert signal.getsignal(number) is before
    for file in at_work:
        file.unlink()
    completed, _ = stage.work()
    assert completed and sorted(stage.calls()) == sorted([f"{FIRST} --resume", f"{SECOND} --resume", THIRD, LAST])


def test_the_third_signal_kills_what_does_not_stop(stage: Stage) -> None:
    def three_times() -> None:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)

    thread = when((stage.folder.run(stage.runs[0]) / "at work").exists, three_times)
    completed, _ = stage.work("stubborn", parallel=1)
    thread.join()
    assert not completed and stage.states()[FIRST] is State.STOPPED


def test_a_run_that_was_killed_before_its_first_file_starts_anew(stage: Stage) -> None:
    (stage.folder.run(stage.runs[0])).mkdir()
    completed, _ = stage.work()
    assert completed and FIRST in stage.calls()


def test_a_summary_that_was_cut_off_is_no_finished_run(stage: Stage) -> None:
    run = stage.folder.run(stage.runs[0])
    run.mkdir()
    (run / "config.yaml").touch()
    (run / "summary.json").write_text(json.dumps({"finished": True})[:-3])
    assert stage.states()[FIRST] is State.STOPPED


def test_no_more_runs_than_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    assert check_parallel(None, threads=1) == cores
    assert check_parallel(None, threads=1000) == 1
    assert check_parallel(1, threads=1) == 1
    with pytest.raises(UserError, match="--parallel"):
        check_parallel(cores + 1, threads=1)


def test_what_is_kept_and_shown_may_change_and_reaches_the_runs(stage: Stage) -> None:
    sweep = load_sweep(Path("two.yaml"))
    for arm, config in list(sweep.configs.items()):
        config.health.halt = ["entropy_eruption"]
        stage.folder.prepare(sweep)
        assert load_config(str(stage.folder.path / "arms" / f"{arm}.yaml")).health.halt == ["entropy_eruption"]


def test_a_sweep_that_was_killed_as_it_began_may_begin_again(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path / "new")
    folder.path.mkdir()
    (folder.path / ".lock").touch()
    with folder.locked():
        pass
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is no sweep"), SweepFolder(tmp_path / "file").locked():
        pass


def test_a_halted_run_is_named_with_its_alarms(stage: Stage) -> None:
    planned = stage.runs[0]
    stage.folder.run(planned).mkdir(parents=True)
    summary = {"finished": False, "halted": {"step": 7, "alarms": ["length"], "last_good": None}}
    (stage.folder.run(planned) / "summary.json").write_text(json.dumps(summary))
    assert stage.folder.halted(planned) == "halted at step 7 by length"
    assert stage.folder.halted(stage.runs[1]) is None


def test_a_damaged_record_of_failures_is_named_with_the_mend(stage: Stage) -> None:
    stage.work(SECOND)
    file = stage.folder.path / "failures.json"
    whole = file.read_text()
    for damaged in (whole[:-5], "[]", "null", '{"a": 1}', "[" * 100_000, "\udcff"):
        file.write_bytes(damaged.encode("utf-8", "surrogateescape"))
        with pytest.raises(UserError, match=r"failures\.json' is damaged.*: delete it") as refused:
            stage.work()
        assert len(str(refused.value).splitlines()) == 1 and stage.calls() == []
    # What it says helps.
    file.unlink()
    completed, _ = stage.work()
    assert completed and stage.calls() == [f"{SECOND} --resume"]


@pytest.mark.timeout(60)  # what opens a pipe never ends
@pytest.mark.parametrize("content", ["[]", "null", '"x"', '{"finished": false, "halted": [1]}', "[" * 100_000, None])
def test_a_summary_of_another_kind_is_no_finished_run(content: str | None, stage: Stage) -> None:
    run = stage.folder.run(stage.runs[0])
    run.mkdir()
    (run / "config.yaml").touch()
    os.mkfifo(run / "summary.json") if content is None else (run / "summary.json").write_text(content)
    assert stage.states()[FIRST] is State.STOPPED and stage.folder.halted(stage.runs[0]) is None


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["folder", "pipe"])
@pytest.mark.parametrize(
    "name", ["failures.json", f"logs/{FIRST}.log", "logs", "arms", "arms/plain.yaml", "sweep.yaml"]
)
def test_what_stands_in_the_place_of_a_file_of_the_sweep_is_named(name: str, kind: str, stage: Stage) -> None:
    if name == "logs" and kind == "folder":
        return
    file = stage.folder.path / name
    file.parent.mkdir(exist_ok=True)
    if file.is_dir():
        shutil.rmtree(file)
    file.unlink(missing_ok=True)
    if name == "arms" and kind == "folder":
        return
    file.mkdir() if kind == "folder" else os.mkfifo(file)
    with pytest.raises(UserError) as refused:
        stage.folder.prepare(load_sweep(Path("two.yaml")))
        stage.work()
    assert str(file) in str(refused.value) and len(str(refused.value).splitlines()) == 1


def test_a_log_that_is_deleted_while_its_run_fails_costs_the_reason_only(stage: Stage) -> None:
    log = stage.folder.log(stage.runs[1])
    thread = when(log.exists, log.unlink)
    completed, _ = stage.work(SECOND)
    thread.join()
    assert completed and stage.folder.failures() == {SECOND: "exit code 2: no output"}


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "line", ["[]", "{}", '{"step": "1"}', '{"step": 1, "success/train": "x"}', "[" * 100_000, None]
)
def test_progress_shows_what_the_newest_line_of_a_run_has(line: str | None, stage: Stage) -> None:
    sweep = load_sweep(Path("two.yaml"))
    run = stage.folder.run(stage.runs[0])
    run.mkdir()
    file = run / "metrics.jsonl"
    os.mkfifo(file) if line is None else file.write_text(line + "\n")
    assert state_table(sweep, stage.folder).row_count == 4
    if line is not None:
        file.write_text('{"step": 1, "success/train": 0.5, "entropy/mean": null}\n')
        assert "success 0.500" in list(state_table(sweep, stage.folder).columns[3].cells)
