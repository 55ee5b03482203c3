"""The folder of a sweep: what was asked, one run folder for each arm and seed, and what became of them.

sweep.yaml  arms/<arm>.yaml  <arm>--seed<k>/  logs/<arm>--seed<k>.log  failures.json
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO, cast

import yaml

from epo.config import Config
from epo.errors import StorageError, UserError
from epo.files import write_atomically
from epo.recipe import load_config
from epo.reporting.reading.json_lines import parse_object
from epo.sweep.plan import PlannedRun, Sweep


class State(StrEnum):
    """Where a run of a sweep stands, as its files tell."""

    WAITING = "waiting"
    STOPPED = "unfinished"
    FAILED = "failed"
    FINISHED = "finished"


class SweepFolder:
    """Paths and states of a sweep."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._failures = path / "failures.json"

    def prepare(self, sweep: Sweep) -> None:
        """Write down what was asked. A sweep that is there already may gain arms and seeds, nothing else.

        Raises:
            UserError: the folder belongs to something else, or an arm would change.
        """
        for arm, config in sweep.configs.items():
            file = self._config_file(arm)
            if file.is_file() and (different := _differences(_comparable(load_config(str(file))), _comparable(config))):
                raise UserError(
                    f"the sweep in {str(self.path)!r} was started with other settings of arm {arm!r}: "
                    f"{', '.join(different)}. Give the arm another name, or the sweep another --name"
                )
        with self._writing(self.path / "sweep.yaml") as file:
            write_atomically(file, yaml.safe_dump(sweep.plan.model_dump(mode="json"), sort_keys=False))
        for arm, config in sweep.configs.items():  # what is kept and shown may have changed
            with self._writing(self._config_file(arm)) as file:
                write_atomically(file, config.to_yaml())

    @contextmanager
    def locked(self) -> Iterator[int]:
        """Keep other sweeps out; yields a file descriptor that holds the lock as long as any process has it open.

        The runs get it too: those of a sweep that was killed keep the folder until they end.

        Raises:
            UserError: another sweep, or what one left behind, is at work in this folder.
        """
        if self.path.exists() and not self._is_ours():
            raise UserError(f"{str(self.path)!r} is there and is no sweep: give another --name")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = (self.path / ".lock").open("a")
        except OSError as error:
            raise UserError(f"the folder {str(self.path)!r} cannot be made ({error.strerror})") from None
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    f"another `epo sweep`, or a run that one left behind, is at work in {str(self.path)!r}: wait for it"
                ) from None
            yield handle.fileno()

    def _is_ours(self) -> bool:
        """A sweep, or a folder that is empty but for the lock and drafts of one that was killed as it began."""
        if not self.path.is_dir():
            return False
        return (self.path / "sweep.yaml").is_file() or all(file.name.startswith(".") for file in self.path.iterdir())

    def run(self, planned: PlannedRun) -> Path:
        return self.path / planned.name

    def log(self, planned: PlannedRun) -> Path:
        return self.path / "logs" / f"{planned.name}.log"

    def open_log(self, planned: PlannedRun) -> BinaryIO:
        """The run's log, to be added to.

        Raises:
            UserError: something else stands there, or it cannot be written.
        """
        with self._writing(self.log(planned)) as log:
            log.parent.mkdir(exist_ok=True)
            return log.open("ab")

    def last_line(self, planned: PlannedRun) -> str:
        """What the run's log ends with."""
        try:
            lines = self.log(planned).read_text(encoding="utf-8", errors="replace").split("\n")
        except OSError:  # deleted while the run was at work
            lines = []
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "no output")

    @contextmanager
    def _writing(self, file: Path) -> Iterator[Path]:
        """Says in one line what stands in the way of writing `file`."""
        try:
            if file.exists() and not file.is_file():  # to open a pipe may never end
                raise OSError(0, "no regular file")
            yield file
        except StorageError:
            raise
        except OSError as error:
            raise UserError(
                f"{str(file)!r} cannot be written ({error.strerror}): move away what is there, or give the sweep "
                "another --name"
            ) from None

    def state(self, planned: PlannedRun) -> State:
        if self._summary(planned).get("finished"):
            return State.FINISHED
        if planned.name in self.failures():
            return State.FAILED
        return State.STOPPED if (self.run(planned) / "config.yaml").is_file() else State.WAITING

    def halted(self, planned: PlannedRun) -> str | None:
        """Why alarms ended the run; None if they did not."""
        halted = self._summary(planned).get("halted")
        try:
            return f"halted at step {halted['step']} by {', '.join(halted['alarms'])}" if halted else None
        except (KeyError, TypeError):
            return None

    def _summary(self, planned: PlannedRun) -> dict[str, Any]:
        """The run's summary.json; empty where there is none that can be read."""
        return _object(self.run(planned) / "summary.json") or {}

    def command(self, planned: PlannedRun) -> list[str]:
        """Arguments of `epo` that start this run, or go on with it."""
        run = self.run(planned)
        goes_on = (run / "config.yaml").is_file()
        if run.is_dir() and not goes_on:  # killed before it wrote its first file
            shutil.rmtree(run)
        arguments = ["train", str(self._config_file(planned.arm)), f"seed={planned.seed}"]
        arguments += ["--name", planned.name, "--runs", str(self.path)]
        return [*arguments, "--resume"] if goes_on else arguments

    def failures(self) -> dict[str, str]:
        """Runs that failed, and how.

        Raises:
            UserError: the file is damaged.
        """
        if not os.path.lexists(self._failures):
            return {}
        found = _object(self._failures)
        if found is None or not all(isinstance(reason, str) for reason in found.values()):
            raise UserError(
                f"{str(self._failures)!r} is damaged, it is no object of runs and reasons: delete it, and what failed "
                "is run again"
            )
        return found

    def set_failure(self, planned: PlannedRun, reason: str | None) -> None:
        """Remember how a run failed, or (None) that it has not."""
        failures = self.failures()
        if failures.pop(planned.name, None) is None and reason is None:
            return
        if reason is not None:
            failures[planned.name] = reason
        write_atomically(self._failures, json.dumps(failures, indent=1))

    def _config_file(self, arm: str) -> Path:
        return self.path / "arms" / f"{arm}.yaml"


def _object(file: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is none that can be read."""
    try:
        return parse_object(file.read_bytes()) if file.is_file() else None
    except OSError:
        return None


def _comparable(config: Config) -> dict[str, Any]:
    """Without the seed, and without what only says what is kept and shown."""
    tree: dict[str, Any] = yaml.safe_load(config.to_yaml())
    return {key: value for key, value in tree.items() if key not in ("seed", "record", "health", "logging")}


def _differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key in {**a, **b}:
        left, right = a.get(key), b.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            found += _differences(cast("dict[str, Any]", left), cast("dict[str, Any]", right), f"{prefix}{key}.")
        elif left != right:
            found.append(f"{prefix}{key} ({left!r} then, {right!r} now)")
    return found
