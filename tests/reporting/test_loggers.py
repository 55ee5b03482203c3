"""Loggers: what was given is what is read back from their own files, also after a resume; and none can end a run."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import wandb_file

from epo.config import Config, LoggingConfig
from epo.errors import UserError
from epo.evaluation.panels import PanelResult
from epo.recipe import load_config
from epo.reporting import loggers as loggers_module
from epo.reporting.loggers import Loggers, open_loggers, require_loggers

Rows = dict[int, dict[str, float]]
ALL = "logging.to=[tensorboard, wandb, trackio]"


@pytest.fixture(scope="module", autouse=True)
def _stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Everything of these packages in folders of the tests' own; trackio's is in `tests/conftest.py`."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("NETRC", str(home / "netrc"))
        patch.setenv("WANDB_CONFIG_DIR", str(home / "wandb-config"))
        patch.setenv("WANDB_CACHE_DIR", str(home / "wandb-cache"))
        patch.setenv("WANDB_DATA_DIR", str(home / "wandb-data"))
        for name in ("WANDB_API_KEY", "WANDB_DIR", "WANDB_MODE", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
            patch.delenv(name, raising=False)
        yield
        import wandb

        wandb.teardown()


@pytest.fixture(autouse=True)
def connections(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Addresses this process tried to reach over a network; there are none."""
    tried: list[Any] = []
    original = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            tried.append(address)
            raise OSError("no network in tests")
        original(self, address)

    def resolve(host: Any, *arguments: Any, **options: Any) -> Any:
        tried.append(host)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    yield tried
    assert tried == []


def config(*overrides: str) -> Config:
    return load_config("base", ["environment.suite=corridor", *overrides])


def metrics(step: int) -> dict[str, float]:
    return {"entropy/mean": 1.0 / (1 + step), "reward/mean": -0.25 * step, "health/length": 0.0, "episodes": 8.0}


def panels(step: int) -> list[PanelResult]:
    return [
        PanelResult(
            split=split, success=success, low=0.1, high=0.9, episodes=128, score=0.5, turns=3.0 + step, invalid=0.25,
            errors=0, by_goal={},
        )
        for split, success in (("iid", 0.5 + 0.01 * step), ("ood", 0.25))
    ]  # fmt: skip


EVALUATED = (0, 2, 4)


def expected(steps: range) -> Rows:
    """Computed without the code under test."""
    rows: Rows = {step: metrics(step) for step in steps if step}
    for step in EVALUATED:
        if step in steps:
            for split, success in (("iid", 0.5 + 0.01 * step), ("ood", 0.25)):
                rows.setdefault(step, {})
                rows[step] |= {
                    f"eval/{split}/success": success, f"eval/{split}/low": 0.1, f"eval/{split}/high": 0.9,
                    f"eval/{split}/score": 0.5, f"eval/{split}/turns": 3.0 + step, f"eval/{split}/invalid": 0.25,
                    f"eval/{split}/errors": 0.0,
                }  # fmt: skip
    return rows


def log(to: Loggers, steps: range) -> None:
    for step in steps:
        if step:
            to.step(step, metrics(step))
        if step in EVALUATED:
            to.evaluated(step, panels(step))


def lines(until: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What `metrics.jsonl` and `eval.jsonl` hold after a rewind to step `until`."""
    return (
        [{"step": step, **metrics(step), "not/finite": None} for step in range(1, until + 1)],
        [
            {"step": step, "panels": [panel.as_dict() for panel in panels(step)]}
            for step in EVALUATED
            if step <= until
        ],
    )  # fmt: skip


def session(given: Config, run: Path, steps: range, notes: list[str] | None = None) -> None:
    """Train `steps`, resumed from the step before."""
    done = max(0, steps.start - 1)
    old, evaluations = lines(done) if steps.start else ([], [])
    note = (notes if notes is not None else []).append
    with open_loggers(given, run, step=done, metrics=old, evaluations=evaluations, note=note) as opened:
        log(opened, steps)


# ---------------------------------------------------------------- reading back


def from_tensorboard(run: Path) -> list[tuple[int, dict[str, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    rows: dict[int, dict[str, float]] = {}
    counts: dict[tuple[str, int], int] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            counts[tag, event.step] = counts.get((tag, event.step), 0) + 1
            rows.setdefault(event.step, {})[tag] = event.value
    assert set(counts.values()) == {1}
    return sorted(rows.items())


def wandb_files(run: Path) -> list[Path]:
    return sorted((run / "wandb").glob("offline-run-*/run-*.wandb"))


def from_wandb(run: Path) -> list[tuple[int, dict[str, float]]]:
    rows = [row for file in wandb_files(run) for row in wandb_file.history(file)]
    return [(row["_step"], {k: v for k, v in row.items() if not k.startswith("_")}) for row in rows]


def from_trackio(run: Path, project: str = "epo") -> list[tuple[int, dict[str, float]]]:
    name = f"{run.name}-{run_id(run)}"
    with sqlite3.connect(Path(os.environ["TRACKIO_DIR"]) / f"{project}.db") as database:
        found = database.execute("select step, metrics from metrics where run_name = ? order by id", (name,)).fetchall()
        ids = database.execute("select distinct run_id from metrics where run_name = ?", (name,)).fetchall()
    assert len(ids) == 1
    rows: list[tuple[int, dict[str, float]]] = []
    for step, content in found:  # an evaluation is an entry of its own
        if rows and rows[-1][0] == step:
            assert not rows[-1][1].keys() & json.loads(content).keys()
            rows[-1][1].update(json.loads(content))
        else:
            rows.append((step, json.loads(content)))
    return rows


def run_id(run: Path) -> str:
    return json.loads((run / "logging.json").read_text())["id"]


READERS = {"tensorboard": from_tensorboard, "wandb": from_wandb, "trackio": from_trackio}


def assert_logged(run: Path, steps: range, *, names: tuple[str, ...] = tuple(READERS)) -> None:
    """Every step once and in order, with the same names and numbers, in each of them."""
    for name in names:
        rows = READERS[name](run)
        assert [step for step, _ in rows] == list(steps), name
        for step, values in rows:
            wanted = expected(steps)[step]
            assert values.keys() == wanted.keys(), name
            assert all(math.isclose(values[k], v, rel_tol=1e-6) for k, v in wanted.items()), (name, step)


def test_a_resumed_run_goes_on_under_its_id_without_a_step_twice(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    run = tmp_path / "try1"
    run.mkdir()
    session(config(ALL), run, range(0, 4))
    assert_logged(run, range(0, 4))
    first = run_id(run)
    session(config(ALL), run, range(3, 6))  # from the checkpoint of step 2: step 3 comes again
    assert run_id(run) == first
    assert_logged(run, range(0, 6))
    files = wandb_files(run)
    assert len(files) == 2 and {wandb_file.run_id(file) for file in files} == {first}
    captured = capfd.readouterr()
    assert captured.out == "" and "wandb" not in captured.err and "rackio" not in captured.err


def test_a_logger_that_joins_late_gets_what_it_missed(tmp_path: Path):
    run = tmp_path / "late"
    run.mkdir()
    session(config("logging.to=[]"), run, range(0, 3))
    session(config("logging.to=[tensorboard, trackio]"), run, range(3, 5))
    assert_logged(run, range(0, 5), names=("tensorboard", "trackio"))


def test_a_run_from_before_logging_json_goes_on_in_tensorboard(tmp_path: Path):
    run = tmp_path / "old"
    run.mkdir()
    session(config(), run, range(0, 4))
    (run / "logging.json").unlink()
    session(config(), run, range(3, 6))
    assert_logged(run, range(0, 6), names=("tensorboard",))


def test_nobody_is_asked_who_we_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Not even with credentials and servers in the environment; the fixture watches the network."""
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("TRACKIO_SPACE_ID", "somebody/somewhere")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_MODE", "online")
    run = tmp_path / "quiet"
    run.mkdir()
    session(config(ALL, "logging.project=elsewhere", "logging.run_name=named"), run, range(0, 2))
    assert os.environ["TRACKIO_SPACE_ID"] == "somebody/somewhere"
    with sqlite3.connect(Path(os.environ["TRACKIO_DIR"]) / "elsewhere.db") as database:
        assert database.execute("select distinct run_name from metrics").fetchall() == [(f"named-{run_id(run)}",)]
    assert len(wandb_files(run)) == 1


# ---------------------------------------------------------------- failures


class Failing:
    repeats = False

    def __init__(self, at: int) -> None:
        self.at, self.logged, self.is_closed = at, list[int](), False

    def log(self, step: int, values: Any) -> None:
        if step == self.at:
            raise OSError(28, "No space left on device")
        self.logged.append(step)

    def close(self) -> None:
        self.is_closed = True


def opened(to: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    openers: dict[str, Callable[[Any], Any]] = {name: (lambda _, made=made: made) for name, made in to.items()}
    monkeypatch.setattr(loggers_module, "_OPENERS", openers)


def test_a_failure_is_one_note_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bad, good, notes = Failing(at=2), Failing(at=99), list[str]()
    opened({"wandb": bad, "trackio": good}, monkeypatch)
    session(config("logging.to=[wandb, trackio]"), tmp_path, range(0, 6), notes)
    assert len(notes) == 1 and "wandb" in notes[0] and "No space left" in notes[0]
    assert sorted(set(good.logged)) == list(range(6)) and good.is_closed
    assert max(bad.logged) == 1


def test_a_crash_between_two_steps_gives_no_step_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first, again = Failing(at=99), Failing(at=99)
    opened({"wandb": first}, monkeypatch)
    killed = Loggers(config("logging.to=[wandb]"), tmp_path, step=0, first_step=1, note=pytest.fail)
    log(killed, range(0, 5))  # and no `close`
    opened({"wandb": again}, monkeypatch)
    session(config("logging.to=[wandb]"), tmp_path, range(3, 8))
    assert first.logged == [0, 1, 2, 2, 3, 4, 4] and again.logged == [5, 6, 7]


def test_failing_to_open_or_close_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(_: Any) -> Any:
        raise ConnectionError("no route to host")

    class Sticky(Failing):
        def close(self) -> None:
            raise TimeoutError("still sending")

    monkeypatch.setattr(loggers_module, "_OPENERS", {"wandb": refuse, "trackio": lambda _: Sticky(at=99)})
    notes: list[str] = []
    session(config("logging.to=[wandb, trackio]"), tmp_path, range(0, 3), notes)
    assert len(notes) == 2 and "no route" in notes[0] and "still sending" in notes[1]


def test_the_real_wandb_dies(tmp_path: Path):
    """Its service is a process of its own, which may be killed."""
    run, notes = tmp_path / "dies", list[str]()
    run.mkdir()
    given = config("logging.to=[tensorboard, wandb]")
    with open_loggers(given, run, step=0, metrics=[], evaluations=[], note=notes.append) as loggers:
        log(loggers, range(0, 2))
        children = subprocess.run(
            ["ps", "--ppid", str(os.getpid()), "-o", "pid=,comm="], capture_output=True, text=True, check=True
        ).stdout
        (service,) = [int(line.split()[0]) for line in children.splitlines() if "wandb-core" in line]
        os.kill(service, signal.SIGKILL)
        log(loggers, range(2, 6))
    import wandb

    with suppress(ConnectionError):  # the service is gone
        wandb.teardown()
    assert len(notes) == 1 and "wandb" in notes[0]
    assert_logged(run, range(0, 6), names=("tensorboard",))


def test_the_real_trackio_loses_its_disk(tmp_path: Path):
    run, notes = tmp_path / "lost", list[str]()
    run.mkdir()
    (Path(os.environ["TRACKIO_DIR"]) / "broken.db").mkdir(parents=True)  # a folder where its database should be
    session(config("logging.to=[tensorboard, trackio]", "logging.project=broken"), run, range(0, 4), notes)
    assert len(notes) == 1 and "trackio" in notes[0]
    assert_logged(run, range(0, 4), names=("tensorboard",))


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loggers_module, "_is_installed", lambda _: False)
    for name in ("wandb", "trackio"):
        with pytest.raises(UserError, match=rf"logging\.to names '{name}'.*pip install -e '\.\[{name}\]'"):
            require_loggers(LoggingConfig.model_validate({"to": [name]}))
    require_loggers(LoggingConfig())
    notes: list[str] = []
    session(config(), tmp_path, range(0, 2), notes)
    assert len(notes) == 1 and "no TensorBoard log: pip install -e '.[report]'" in notes[0]


def test_a_folder_called_like_a_package_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a_folder_of_logs").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not loggers_module._is_installed("a_folder_of_logs")
    assert loggers_module._is_installed("tensorboard")


def test_online_needs_an_account():
    with pytest.raises(UserError, match=r"logging\.mode=online needs .*`wandb login`"):
        require_loggers(config("logging.to=[wandb]", "logging.mode=online").logging)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("logging.to=[wandb, wandb]", "names a logger twice"),
        ("logging.to=[mlflow]", "'tensorboard', 'wandb' or 'trackio'"),
        ("logging.mode=online", "mode=online does nothing"),
        ("logging.project=a/b", "logging.project='a/b'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(override: str, reason: str):
    with pytest.raises(UserError) as caught:
        config(override)
    assert reason in str(caught.value)
