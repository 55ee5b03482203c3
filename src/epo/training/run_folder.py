"""The folder of a run: what was asked, what happened, and where to go on.

config.yaml  provenance.json  vocabulary.json  metrics.jsonl  eval.jsonl  trajectories/  checkpoints/  logging.json
tensorboard/  wandb/
plot.svg  report.html  summary.json

Every line of the logs is strict JSON: a number that is not finite is written as null.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from epo.config import Config
from epo.errors import UserError
from epo.files import write_atomically
from epo.recipe import parse_config
from epo.reporting.trajectories import index_entry, trajectory_record
from epo.types import TrajectoryGroup


class RunFolder:
    """Paths and append-only logs of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics_file = path / "metrics.jsonl"
        self.evaluations_file = path / "eval.jsonl"
        self.trajectories = path / "trajectories"
        self.index_file = self.trajectories / "index.jsonl"

    @classmethod
    def create(cls, path: Path, config: Config, provenance: dict[str, Any]) -> RunFolder:
        """A new run.

        Raises:
            UserError: the folder exists already, or cannot be made.
        """
        if path.exists():
            raise UserError(
                f"the run folder {str(path)!r} already exists: give another --name, add --resume to go on with it, "
                "or delete it"
            )
        try:
            path.mkdir(parents=True)
        except OSError as error:
            raise UserError(
                f"the run folder {str(path)!r} cannot be made ({error.strerror}): give another --runs"
            ) from None
        run = cls(path)
        write_atomically(path / "config.yaml", config.to_yaml())
        write_atomically(path / "provenance.json", json.dumps(provenance, indent=1))
        return run

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run.

        Raises:
            UserError: there is none.
        """
        if not (path / "config.yaml").is_file():
            raise UserError(f"there is no run in {str(path)!r}: check the name, or start one without --resume")
        return cls(path)

    def config(self) -> Config:
        """The resolved configuration the run was started with."""
        file = self.path / "config.yaml"
        try:
            tree = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{str(file)!r} cannot be read ({reason}): restore it, or start a new run") from None
        return parse_config(tree)

    def add_step(self, step: int, metrics: dict[str, float], groups: Sequence[TrajectoryGroup]) -> None:
        """Append a step. The trajectories come first, so a step in the metrics has its trajectories."""
        records = [
            trajectory_record(t, step=step, group=g) for g, group in enumerate(groups) for t in group.trajectories
        ]
        write_atomically(self.trajectories / f"step_{step:06d}.jsonl", "".join(map(_text_line, records)))
        _append(self.index_file, index_entry(records))
        _append(self.metrics_file, {"step": step, **metrics})

    def add_vocabulary(self, pieces: Sequence[str]) -> None:
        """Keep the text of every token, which trajectories name by their ids."""
        write_atomically(self.path / "vocabulary.json", json.dumps(pieces))

    def add_evaluation(self, entry: dict[str, Any]) -> None:
        _append(self.evaluations_file, entry)

    @contextmanager
    def kept_only_with_content(self) -> Iterator[None]:
        """Removes the folder again when the block fails before anything was recorded: the name stays free."""
        try:
            yield
        except BaseException:
            if not any(p.exists() for p in (self.metrics_file, self.evaluations_file, self.checkpoints)):
                shutil.rmtree(self.path)
            raise

    def rewind(self, step: int, *, evaluations: Sequence[dict[str, Any]]) -> None:
        """Forget what a checkpoint of `step` finished steps and these `evaluations` does not know of: a resumed run
        writes it again."""
        _write(self.metrics_file, [line for line in self.metrics() if line["step"] <= step])
        _write(self.evaluations_file, evaluations)
        (self.path / "summary.json").unlink(missing_ok=True)  # it told how the run ended
        if self.index_file.is_file():
            _write(self.index_file, [line for line in read_lines(self.index_file) if line["step"] <= step])
        for file in self.trajectories.glob("step_*.jsonl"):
            if int(file.stem[5:]) > step:
                file.unlink()
        if self.checkpoints.is_dir():
            for draft in self.checkpoints.glob(".step_*"):  # left by a process that was killed while it wrote
                shutil.rmtree(draft)

    def metrics(self) -> list[dict[str, Any]]:
        return read_lines(self.metrics_file)

    def evaluations(self) -> list[dict[str, Any]]:
        return read_lines(self.evaluations_file)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSON-lines file; a last line cut off by a crash is left out."""
    if not file.is_file():
        return []
    return [
        json.loads(line) for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")
    ]


def _text_line(record: dict[str, Any]) -> str:
    """Letters as they are, for people who search the file; escaped where UTF-8 cannot hold them (lone surrogates)."""
    line = json.dumps(record, ensure_ascii=False, allow_nan=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        line = json.dumps(record, allow_nan=False)
    return line + "\n"


def _append(file: Path, entry: dict[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as handle:
        handle.write(_line(entry))


def _write(file: Path, entries: Sequence[dict[str, Any]]) -> None:
    write_atomically(file, "".join(map(_line, entries)))


def _line(entry: dict[str, Any]) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
    return json.dumps(finite, allow_nan=False) + "\n"
