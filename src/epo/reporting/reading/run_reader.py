"""A run folder as data, for those who look at it: finished, at work, crashed, or of an older version.

`RunReader` reads it again and again, each time only what is new. A run that was rewound by `--resume`, or deleted and
started anew, is noticed: its `generation` changes.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from epo.errors import UserError
from epo.evaluation.comparison import arm_name
from epo.reporting.reading.json_lines import JsonLines, parse_object
from epo.reporting.reading.run_config import finite, plain, read_config
from epo.reporting.reading.trajectory_files import TrajectoryFiles, inside
from epo.reporting.trajectories import INDEX_COLUMNS, index_entry

_DIGITS = 6
"""Significant digits of the numbers in a page."""


@dataclass(slots=True)
class RunData:
    """What is known of a run."""

    path: Path
    name: str
    config: dict[str, Any]
    """As in config.yaml; of an older version, so keys may be missing."""
    config_yaml: str
    provenance: dict[str, Any] | None = None
    summary: dict[str, Any] = field(default_factory=dict[str, Any])
    """summary.json, which a run leaves when it ends."""
    steps: list[int] = field(default_factory=list[int])
    metrics: dict[str, list[float | None]] = field(default_factory=dict[str, "list[float | None]"])
    """Columns as long as `steps`; None where a metric is absent or not finite."""
    evaluations: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """Lines of eval.jsonl: `step` and `panels`."""
    entries: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """Lines of the index of trajectories, one for each step that has them."""
    notes: list[str] = field(default_factory=list[str])
    """What a reader should know about the files."""
    generation: str = ""
    """Changes whenever what was read before does not hold any more."""

    @property
    def seed(self) -> int:
        return int(self.config["seed"])

    @property
    def label(self) -> str:
        """How the run is called beside others: its arm and its seed."""
        return f"{arm_name(self.config)}, seed {self.seed}"

    @property
    def total_steps(self) -> int:
        return int(self.config["steps"])

    @property
    def finished(self) -> bool:
        return bool(self.summary.get("finished"))

    @property
    def wall_seconds(self) -> float | None:
        seconds = self.summary.get("wall_seconds")
        return float(seconds) if isinstance(seconds, int | float) else None

    @property
    def index(self) -> dict[str, list[Any]]:
        """Columns of all trajectories; `row` is the line in the file of its `step`."""
        return _index_columns(self.entries)

    @property
    def turn_entropy(self) -> dict[str, list[Any]]:
        """Mean entropy of every turn, by step."""
        return _turn_entropy(self.entries)

    @property
    def cursor(self) -> str:
        """How much of the run a page made now has."""
        return f"{self.generation}.{len(self.steps)}.{len(self.evaluations)}.{len(self.entries)}"

    def page(self) -> dict[str, Any]:
        """Everything, as plain JSON for a page."""
        start = self._since(0, 0, 0)
        return start | {
            "reset": True,
            "name": _text(self.name),
            "path": _text(str(self.path)),
            "seed": self.seed,
            "config": plain(self.config),
            "config_yaml": _text(self.config_yaml),
            "provenance": plain(self.provenance),
            "embedded_steps": None,
            "embedded_note": None,
        }

    def page_after(self, cursor: str) -> dict[str, Any]:
        """What a page that is at `cursor` lacks, with `reset` False; the whole run if the cursor does not hold."""
        generation, *counts = cursor.split(".")
        have = [int(count) for count in counts if count.isascii() and count.isdigit() and len(count) < 10]
        now = (len(self.steps), len(self.evaluations), len(self.entries))
        if generation != self.generation or len(have) != 3 or any(a > b for a, b in zip(have, now, strict=True)):
            return self.page()
        return self._since(*have) | {"reset": False}

    def _since(self, steps: int, evaluations: int, entries: int) -> dict[str, Any]:
        is_new = steps < len(self.steps)
        columns = {name: [_rounded(x) for x in values[steps:]] for name, values in self.metrics.items() if is_new}
        return {
            "label": _text(self.label),
            "finished": self.finished,
            "total_steps": self.total_steps,
            "wall_seconds": self.wall_seconds,
            "halted": plain(self.summary.get("halted")),
            "notes": [_text(note) for note in self.notes],
            "cursor": self.cursor,
            "steps": self.steps[steps:],
            "metrics": columns,
            "evaluations": plain(self.evaluations[evaluations:]),
            "turn_entropy": _turn_entropy(self.entries[entries:]),
            "index": _index_columns(self.entries[entries:]),
        }


class RunReader:
    """Reads the run in `path` as often as `update` is called.

    Raises:
        UserError: `path` is no run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = self._load()

    def update(self) -> bool:
        """Take in what is new; says whether anything is. Never raises for what a running training does.

        While the run's folder is away, as between deleting it and starting again, the data stays as it was.
        """
        try:
            if self._identity(("config.yaml",)) != self._config_identity:
                self.data = self._load()
                return True
            before = (self.data.cursor, self._small_identity)
            if self._is_behind:
                self._restart()
            else:
                self._follow()
            return (self.data.cursor, self._small_identity) != before
        except (OSError, UserError):
            return False

    def _load(self) -> RunData:
        identity = self._identity(("config.yaml",))
        config, text = read_config(self.path)
        self._config_identity = identity
        self.data = RunData(path=self.path, name=self.path.resolve().name, config=config, config_yaml=text)
        self._restart()
        return self.data

    def _restart(self) -> None:
        data = self.data
        data.steps, data.metrics, data.evaluations, data.entries = [], {}, [], []
        data.generation = secrets.token_hex(6)
        self._is_behind = False
        self._files = TrajectoryFiles(self.path)
        self._metrics = JsonLines(inside(self.path, "metrics.jsonl"))
        self._evaluations = JsonLines(inside(self.path, "eval.jsonl"))
        self._index = JsonLines(inside(self.path, "trajectories/index.jsonl"))
        self._malformed: dict[str, int] = {}
        self._small_identity: tuple[Any, ...] | None = None
        self._follow()

    def _follow(self) -> None:
        # The order in which a run writes is trajectories, index, metrics, evaluation: read backwards, whatever a line
        # refers to is there.
        try:
            evaluations, evaluations_replaced = self._evaluations.read()
            metrics, metrics_replaced = self._metrics.read()
            index, index_replaced = self._index.read()
        except OSError:
            self._is_behind = True  # what was read before the error is lost: the next time starts anew
            raise
        if metrics_replaced or evaluations_replaced or index_replaced:
            self._restart()
            return
        for line in metrics:
            self._add_metrics(line)
        for line in evaluations:
            self._add_evaluation(line)
        known = self._indexed(index)
        for entry in known:
            self._add_entry(entry)
        self._read_small_files()
        self.data.notes = self._make_notes()

    def _add_metrics(self, line: dict[str, Any]) -> None:
        data, step = self.data, _step(line)
        if step is None:
            self._count_malformed("metrics.jsonl")
            return
        if data.steps and step <= data.steps[-1]:  # played again without the file being rewritten
            keep = sum(s < step for s in data.steps)
            data.steps = data.steps[:keep]
            data.metrics = {name: values[:keep] for name, values in data.metrics.items()}
            data.generation = secrets.token_hex(6)
        count = len(data.steps)
        data.steps.append(step)
        for name, value in line.items():
            if name != "step" and (value is None or isinstance(value, int | float)):
                data.metrics.setdefault(name, [None] * count).append(finite(value))
        for values in data.metrics.values():
            if len(values) == count:
                values.append(None)

    def _add_evaluation(self, line: dict[str, Any]) -> None:
        data, step = self.data, _step(line)
        panels = line.get("panels")
        if step is None or not isinstance(panels, list) or not all(map(_is_panel, cast("list[Any]", panels))):
            self._count_malformed("eval.jsonl")
            return
        if data.evaluations and step <= data.evaluations[-1]["step"]:
            data.evaluations = [entry for entry in data.evaluations if entry["step"] < step]
            data.generation = secrets.token_hex(6)
        data.evaluations.append(plain(line))

    def _indexed(self, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Index entries of `lines`, and of steps that an older version recorded without an index."""
        data = self.data
        entries: dict[int, dict[str, Any]] = {}
        for line in lines:
            if (step := _step(line)) is None or not _is_entry(line):
                self._count_malformed("trajectories/index.jsonl")
                continue
            # A step that comes again was played again: what was after it is void.
            entries = {s: entry for s, entry in entries.items() if s < step} | {step: plain(line)}
        last = max((entry["step"] for entry in data.entries), default=-1)
        for step in data.steps:
            if step > last and step not in entries:
                records = self._files.records(step)
                try:
                    entry = index_entry(records) if records else None
                except (KeyError, TypeError, ValueError):
                    self._count_malformed(f"trajectories/step_{step:06d}.jsonl")
                    entry = None
                # Also when there is nothing to index: the file is not looked at again.
                entries[step] = plain(entry) or {"step": step, "turn_entropy": [], "turn_count": [], "columns": {}}
        return [entries[step] for step in sorted(entries)]

    def _add_entry(self, entry: dict[str, Any]) -> None:
        data = self.data
        if data.entries and entry["step"] <= data.entries[-1]["step"]:
            data.entries = [known for known in data.entries if known["step"] < entry["step"]]
            data.generation = secrets.token_hex(6)
        data.entries.append(entry)

    def _read_small_files(self) -> None:
        identity = self._identity(("provenance.json", "summary.json"))
        if identity == self._small_identity:
            return
        self._small_identity = identity
        self.data.provenance = self._object("provenance.json")
        self.data.summary = self._object("summary.json") or {}

    def _object(self, name: str) -> dict[str, Any] | None:
        file = inside(self.path, name)
        return parse_object(file.read_bytes()) if file.is_file() else None

    def _identity(self, names: Sequence[str]) -> tuple[Any, ...]:
        found: list[Any] = []
        for name in names:
            try:
                stat = (self.path / name).stat()
                found.append((stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns))
            except OSError:
                found.append(None)
        return tuple(found)

    def _count_malformed(self, file: str) -> None:
        self._malformed[file] = self._malformed.get(file, 0) + 1

    def _make_notes(self) -> list[str]:
        damaged = dict(self._malformed)
        for lines in (self._metrics, self._evaluations, self._index):
            name = lines.file.name if lines is not self._index else "trajectories/index.jsonl"
            damaged[name] = damaged.get(name, 0) + lines.damaged
        return [
            f"{name}: {count} line{'s are' if count > 1 else ' is'} damaged and left out"
            for name, count in damaged.items()
            if count
        ]


def read_run(path: Path) -> RunData:
    """What is known of the run in `path` now.

    Raises:
        UserError: `path` is no run.
    """
    return RunReader(path).data


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """Run folders among `paths`, and those in folders that hold runs (sweeps), by name, each once.

    Raises:
        UserError: a path is neither.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if (path / "config.yaml").is_file():
            runs = [path]
        elif path.is_dir():
            children = (child for child in path.iterdir() if not child.name.startswith("."))  # drafts are hidden
            runs = sorted(child for child in children if (child / "config.yaml").is_file())
        else:
            raise UserError(f"there is no run in {str(path)!r}: give a run folder, or a folder that holds runs")
        if not runs:
            raise UserError(
                f"{str(path)!r} is no run (it has no config.yaml) and holds none: give a run folder, such as "
                "runs/quickstart, or a folder of runs"
            )
        for run in runs:
            read_config(run)
            found.setdefault(run.resolve(), run)
    return list(found.values())


def _index_columns(entries: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {name: [] for name in ("step", "row", *INDEX_COLUMNS)}
    for entry in entries:
        count = max(map(len, entry["columns"].values()), default=0)
        columns["step"] += [entry["step"]] * count
        columns["row"] += range(count)
        for name in INDEX_COLUMNS:
            columns[name] += entry["columns"].get(name, [None] * count)
    return columns


def _turn_entropy(entries: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    played = [entry for entry in entries if entry["turn_entropy"]]
    return {
        "steps": [entry["step"] for entry in played],
        "values": [entry["turn_entropy"] for entry in played],
        "counts": [entry["turn_count"] for entry in played],
    }


def _step(line: Mapping[str, Any]) -> int | None:
    step = line.get("step")
    return step if type(step) is int and 0 <= step < 10**9 else None


def _is_panel(panel: Any) -> bool:
    return isinstance(panel, dict) and isinstance(panel.get("split"), str)  # pyright: ignore[reportUnknownMemberType]


def _is_entry(line: Mapping[str, Any]) -> bool:
    columns, entropy, count = line.get("columns"), line.get("turn_entropy"), line.get("turn_count")
    if not isinstance(columns, dict) or not isinstance(entropy, list) or not isinstance(count, list):
        return False
    values = list(cast("dict[str, Any]", columns).values())
    same = all(isinstance(column, list) for column in values) and len({len(column) for column in values}) <= 1
    return same and len(cast("list[Any]", entropy)) == len(cast("list[Any]", count))


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{_DIGITS}g}")


def _text(text: str) -> str:
    """Without the halves of surrogate pairs that stand for undecodable bytes in file names."""
    return text.encode("utf-8", "replace").decode()
