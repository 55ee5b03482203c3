"""The folder of a run: what was asked, what happened, and where to go on.

config.yaml  provenance.json  vocabulary.json  metrics.jsonl  eval.jsonl  trajectories/  checkpoints/  skipped/
logging.json  tensorboard/  wandb/
plot.svg  report.html  summary.json

Every line of the logs is strict JSON: a number that is not finite is written as null.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from epo.bounded_yaml import load_yaml
from epo.config import Config
from epo.errors import StorageError, UserError
from epo.files import append_whole, explaining_full_disk, new_folder, remove_drafts, write_atomically
from epo.recipe import parse_config
from epo.reporting.reading.record_schema import problem_of_evaluation
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
        self.skipped = path / "skipped"

    @classmethod
    def create(cls, path: Path, config: Config, provenance: dict[str, Any]) -> RunFolder:
        """A new run.

        Raises:
            UserError: the folder exists already, or cannot be made.
            StorageError: the disk is full; there is no folder then.
        """
        if path.exists():
            raise UserError(
                f"the run folder {str(path)!r} already exists: give another --name, add --resume to go on with it, "
                "or delete it"
            )
        text = config.to_yaml()
        provenance = {"run": hashlib.sha256(text.encode()).hexdigest()[:16], **provenance}
        try:
            with new_folder(path) as draft:
                write_atomically(draft / "config.yaml", text)
                write_atomically(draft / "provenance.json", json.dumps(provenance, indent=1))
        except StorageError:
            raise
        except OSError as error:
            raise UserError(
                f"the run folder {str(path)!r} cannot be made ({error.strerror}): give another --runs"
            ) from None
        return cls(path)

    def add_provenance(self, more: dict[str, Any]) -> None:
        """Add to what decides the outcome, as far as it was not known when the run was made."""
        if more:
            write_atomically(self.path / "provenance.json", json.dumps(self.provenance() | more, indent=1))

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run.

        Raises:
            UserError: there is none.
        """
        if not (path / "config.yaml").is_file():
            raise UserError(f"there is no run in {str(path)!r}: check the name, or start one without --resume")
        return cls(path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from training in this folder. The system frees the lock of a dead one.

        Raises:
            UserError: another one does already, or the folder cannot be written.
        """
        try:
            with explaining_full_disk(self.path):
                lock = (self.path / ".lock").open("a")
        except StorageError:
            raise
        except OSError as error:
            raise UserError(f"the run folder {str(self.path)!r} cannot be written ({error.strerror})") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    f"another process is training in {str(self.path)!r}: wait for it, or end it, then --resume"
                ) from None
            yield

    @property
    def id(self) -> str | None:
        """Names the run: a digest of the configuration it was started with. None for one of an older version."""
        value = self.provenance().get("run")
        return value if isinstance(value, str) else None

    def config(self) -> Config:
        """The resolved configuration the run was started with; what a newer version added has its default.

        Raises:
            UserError: it cannot be read, or has keys that this version does not know.
        """
        file = self.path / "config.yaml"
        try:
            tree = load_yaml(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{str(file)!r} cannot be read ({reason}): restore it, or start a new run") from None
        try:
            return parse_config(tree)
        except UserError as error:
            packages = self.provenance().get("packages")
            version = packages.get("epo-agents") if isinstance(packages, dict) else None
            raise UserError(
                f"{str(file)!r} is not a configuration of this version of epo ({error}): use the version that wrote it"
                f"{f', {version}' if version else ''}, or mend the file"
            ) from None

    def provenance(self) -> dict[str, Any]:
        """Versions, commit, data and machine behind the run; empty where the file is not to be read."""
        try:
            content = json.loads((self.path / "provenance.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def add_step(self, step: int, metrics: dict[str, float], groups: Sequence[TrajectoryGroup]) -> None:
        """Append a step. The trajectories come first, so a step in the metrics has its trajectories."""
        _append(self.index_file, index_entry(self._write_records(step, groups)))
        _append(self.metrics_file, {"step": step, **metrics})

    def write_trajectories(self, step: int, groups: Sequence[TrajectoryGroup]) -> None:
        """Write a step's trajectories, and its metrics nowhere; in place of any that are there."""
        others = [line for line in read_lines(self.index_file) if line["step"] != step]
        _write(self.index_file, [*others, index_entry(self._write_records(step, groups))])

    def _write_records(self, step: int, groups: Sequence[TrajectoryGroup]) -> list[dict[str, Any]]:
        records = [
            trajectory_record(t, step=step, group=g) for g, group in enumerate(groups) for t in group.trajectories
        ]
        write_atomically(self.trajectories / f"step_{step:06d}.jsonl", "".join(map(_text_line, records)))
        return records

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
        for folder in (self.path, self.trajectories, self.checkpoints, self.skipped):
            remove_drafts(folder)
        _write(self.metrics_file, [line for line in self.metrics() if line["step"] <= step])
        _write(self.evaluations_file, evaluations)
        (self.path / "summary.json").unlink(missing_ok=True)  # it told how the run ended
        if self.index_file.is_file():
            _write(self.index_file, [line for line in read_lines(self.index_file) if line["step"] <= step])
        for folder in (self.trajectories, self.skipped):
            for path in folder.glob("step_*"):
                number = _STEP.match(path.name)
                if number is not None and int(number[1]) > step:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def require_steps(self, step: int) -> None:
        """Refuse to go on after `step` finished steps when the record of one of them is lost.

        Raises:
            UserError: names the first that is missing, and where to go on from.
        """
        recorded = [line["step"] for line in self.metrics() if line["step"] <= step]
        # The count first: the name of a foreign checkpoint may say any number of steps.
        if len(recorded) == step and recorded == list(range(1, step + 1)):
            return
        counts = Counter(recorded)
        missing = next((k for k in range(1, step + 1) if counts[k] != 1), 1)
        raise UserError(
            f"{str(self.metrics_file)!r} lacks step {missing} or has it twice, which the checkpoint of step {step} has "
            f"behind it: restore the file, or delete the checkpoints after step {missing - 1}, and --resume plays "
            "these steps again"
        )

    def metrics(self) -> list[dict[str, Any]]:
        return read_lines(self.metrics_file)

    def evaluations(self) -> list[dict[str, Any]]:
        """The lines of `eval.jsonl` that are evaluations."""
        return [entry for entry in read_lines(self.evaluations_file) if problem_of_evaluation(entry) is None]


_STEP = re.compile(r"step_(\d+)")


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The entries of a JSON-lines file. A last line cut off by a crash and lines without a step are left out."""
    if not file.is_file():
        return []
    entries: list[dict[str, Any]] = []
    for line in file.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and type(entry.get("step")) is int:
            entries.append(entry)
    return entries


def _text_line(record: dict[str, Any]) -> str:
    """Letters as they are, for people who search the file; escaped where UTF-8 cannot hold them (lone surrogates)."""
    line = json.dumps(record, ensure_ascii=False, allow_nan=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        line = json.dumps(record, allow_nan=False)
    return line + "\n"


def _append(file: Path, entry: dict[str, Any]) -> None:
    append_whole(file, _line(entry))


def _write(file: Path, entries: Sequence[dict[str, Any]]) -> None:
    write_atomically(file, "".join(map(_line, entries)))


def _line(entry: dict[str, Any]) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
    return json.dumps(finite, allow_nan=False) + "\n"
