"""Finding trajectories in a run folder: which steps and rows there are, and the record of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epo.errors import UserError
from epo.reporting.reading.json_lines import parse_object
from epo.reporting.reading.record_schema import is_entry, is_vocabulary, problem_of_record
from epo.reporting.terminal.text import visible
from epo.reporting.trajectories import INDEX_COLUMNS, index_entry

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Filter:
    """Which trajectories are meant; what is None does not matter."""

    success: bool | None = None
    stop: str | None = None
    invalid: bool = False
    """Only those with a response that lacked the required format."""
    goal: str | None = None
    """Part of the task type, in any case."""
    search: str | None = None
    """Part of an observation, response or action, in any case."""

    @property
    def is_empty(self) -> bool:
        return self == Filter()

    def admits(self, row: Record) -> bool:
        """Decides by a row of the index, so without `search`."""
        return (
            (self.success is None or row["success"] == self.success)
            and (self.stop is None or row["stop_reason"] == self.stop)
            and (not self.invalid or row["invalid"] > 0)
            and (self.goal is None or self.goal.casefold() in row["goal"].casefold())
        )

    def finds(self, record: Record) -> bool:
        """Decides `search` by the whole record."""
        wanted = (self.search or "").casefold()
        texts = (turn[key] for turn in record["turns"] for key in ("observation", "response", "action"))
        return any(wanted in text.casefold() for text in texts)


class StoredTrajectories:
    """The trajectories of a run, by step and by row: the place in the step's file, from 0.

    Raises:
        UserError: there are none in `run`.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.folder = run / "trajectories"
        self.steps = sorted(int(f.stem[5:]) for f in self.folder.glob("step_*.jsonl") if f.stem[5:].isdecimal())
        if not self.steps:
            known = (run / "config.yaml").is_file()
            raise UserError(
                f"the run {str(run)!r} has no trajectories yet: wait for its first step"
                if known
                else f"{str(run)!r} holds no run: give a run folder, such as runs/NAME, or one of its "
                "trajectories/step_*.jsonl"
            )
        self._index: dict[int, Record] = {}
        if (index := self.folder / "index.jsonl").is_file():
            entries = (parse_object(line) for line in index.read_bytes().split(b"\n"))
            # What is damaged is made anew from the step's own file.
            self._index = {e["step"]: e["columns"] for e in entries if e is not None and is_entry(e)}

    def file(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}.jsonl"

    def rows(self, step: int) -> list[Record]:
        """What lists need of the trajectories of a step: a row of the index each, with `step` and `row`."""
        if step not in self.steps:
            raise UserError(f"the run {str(self.run)!r} has no step {step}: {self._near(step)}")
        columns = self._index.get(step)
        if columns is None:
            columns = index_entry(self.records(step))["columns"]
        return [
            {"step": step, "row": row, **dict(zip(INDEX_COLUMNS, values, strict=True))}
            for row, values in enumerate(zip(*(columns[name] for name in INDEX_COLUMNS), strict=True))
        ]

    def matching(self, wanted: Filter, *, step: int | None = None) -> Iterator[Record]:
        """The rows that `wanted` admits, of one step or of all."""
        for each in self.steps if step is None else [step]:
            rows = [row for row in self.rows(each) if wanted.admits(row)]
            if rows and wanted.search is not None:
                records = self.records(each)
                # An index of another file may list rows that this one has not.
                rows = [row for row in rows if row["row"] < len(records) and wanted.finds(records[row["row"]])]
            yield from rows

    def records(self, step: int) -> list[Record]:
        return read_records(self.file(step))

    def record(self, step: int, row: int) -> Record:
        """The whole trajectory.

        Raises:
            UserError: no such step or row; names those that exist.
        """
        if step not in self.steps:
            raise UserError(f"the run {str(self.run)!r} has no step {step}: {self._near(step)}")
        return pick_row(self.file(step), row)

    def vocabulary(self) -> list[str] | None:
        return read_vocabulary(self.run)

    def _near(self, step: int) -> str:
        near = sorted(sorted(self.steps, key=lambda other: abs(other - step))[:4])
        return f"the nearest are {', '.join(map(str, near))}; there are {self.steps[0]} to {self.steps[-1]}"


def pick_row(file: Path, row: int) -> Record:
    """The record in `row` of a step's file.

    Raises:
        UserError: the file has no such row, or cannot be read.
    """
    records = read_records(file)
    if not 0 <= row < len(records):
        raise UserError(f"{str(file)!r} has no row {row}: it has rows 0 to {len(records) - 1}")
    return records[row]


def read_records(file: Path) -> list[Record]:
    """All records of a step's file.

    Raises:
        UserError: it cannot be read, or a line is no record.
    """
    try:
        lines = file.read_bytes().rstrip(b"\n").split(b"\n")
    except OSError as error:
        raise UserError(f"{str(file)!r} cannot be read ({error.strerror}): restore it, or choose another") from None
    records: list[Record] = []
    for number, line in enumerate(lines):
        record = parse_object(line)
        problem = "no JSON object" if record is None else problem_of_record(record)
        if record is None or problem is not None:
            raise UserError(
                f"{str(file)!r}: row {number} is no trajectory ({problem}): restore the file, or choose another step"
            )
        records.append(record)
    return records


def read_vocabulary(run: Path) -> list[str] | None:
    """The text of every token; None for a run that did not keep it."""
    file = run / "vocabulary.json"
    entry = parse_object(b'{"pieces": ' + file.read_bytes() + b"}") if file.is_file() else None
    pieces = None if entry is None else entry["pieces"]
    return pieces if is_vocabulary(pieces) else None


def piece_reader(vocabulary: list[str] | None) -> Callable[[int], str]:
    """What shows the text of a token by its id, or the id where the text is not known."""

    def piece(token: int) -> str:
        if vocabulary is None or not 0 <= token < len(vocabulary):
            return f"⟨#{token}⟩"
        return visible(vocabulary[token])

    return piece
