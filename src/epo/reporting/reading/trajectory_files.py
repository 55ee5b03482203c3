"""The trajectories of a run as pages get them: one step at a time, with the text of the tokens that occur in it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from epo.errors import UserError
from epo.reporting.reading.json_lines import parse_object

MAX_QUERY = 200
"""Characters of a search text."""
_SEARCHED = ("observation", "response", "action")


class TrajectoryFiles:
    """The files below `trajectories/` of the run in `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._vocabulary: tuple[tuple[int, ...] | None, Sequence[Any]] = (None, ())

    def steps(self) -> list[int]:
        """Steps that have a file, in order."""
        found = [file.stem[5:] for file in (self.path / "trajectories").glob("step_*.jsonl")]
        return sorted(int(number) for number in found if number.isascii() and number.isdigit())

    def lines(self, step: int) -> list[bytes]:
        """The lines of a step's file, without those that a crash cut off; empty if there is none."""
        file = self._file(step)
        try:
            return file.read_bytes().split(b"\n")[:-1] if file.is_file() else []
        except FileNotFoundError:  # the run was rewound in between
            return []

    def records(self, step: int) -> list[dict[str, Any]]:
        """The records of a step. A damaged line is None's place: an empty record, so that rows stay line numbers."""
        return [_record(line) or _EMPTY for line in self.lines(step)]

    def payload(self, step: int) -> str:
        """JSON of `{"vocabulary": {id: text}, "trajectories": [record, ...]}`.

        Raises:
            UserError: there is no such file.
        """
        records = self.records(step)
        if not records:
            raise UserError(f"step {step} has no trajectories in {str(self.path)!r}")
        pieces = self._pieces()
        texts = {
            str(token): pieces[token]
            for token in sorted(_tokens(records))
            if token < len(pieces) and isinstance(pieces[token], str)
        }
        return json.dumps({"vocabulary": texts, "trajectories": records})

    def search(self, text: str, *, steps: Sequence[int], limit: int = 2000) -> tuple[list[dict[str, int]], bool]:
        """Where `text` occurs, upper and lower case alike; and whether these are all places.

        Looks at the task, its goal, the error, and every turn's observation, response and action.
        """
        needle = text.casefold()
        hits: list[dict[str, int]] = []
        for step in steps:
            for row, line in enumerate(self.lines(step)):
                record = _record(line) if _may_have(line, needle) else None
                if record is not None and any(needle in part.casefold() for part in _texts(record)):
                    if len(hits) == limit:
                        return hits, False
                    hits.append({"step": step, "row": row})
        return hits, True

    def _file(self, step: int) -> Path:
        return inside(self.path, f"trajectories/step_{step:06d}.jsonl")

    def _pieces(self) -> Sequence[Any]:
        """Texts of the tokens by id; empty for a run without them."""
        file = inside(self.path, "vocabulary.json")
        try:
            stat = file.stat()
            identity = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if identity != self._vocabulary[0]:
                tree = json.loads(file.read_bytes())
                self._vocabulary = (identity, cast("list[Any]", tree) if isinstance(tree, list) else ())
        except (OSError, ValueError, RecursionError):
            return ()
        return self._vocabulary[1]


_EMPTY: dict[str, Any] = {"error": "this line of the file is damaged", "turns": []}


def inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`.

    Raises:
        UserError: a symbolic link leads out of the folder.
    """
    file = folder / name
    if not file.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{str(file)!r} is a link out of the run folder, and is not followed")
    return file


def _may_have(line: bytes, needle: str) -> bool:
    """Whether it is worth parsing `line` to look for `needle`: parsing takes ten times as long as this."""
    if not needle.isascii() and b"\\u" in line:  # escaped, perhaps, and then in either case
        return True
    return json.dumps(needle, ensure_ascii=False)[1:-1] in line.decode("utf-8", "replace").casefold()


def _texts(record: Mapping[str, Any]) -> Iterator[str]:
    values = [record.get(name) for name in ("task", "goal", "error")]
    values += [turn.get(name) for turn in record["turns"] for name in _SEARCHED]
    return (value for value in values if isinstance(value, str))


def _record(line: bytes) -> dict[str, Any] | None:
    """The record on a line, with a list of turns; None for anything else."""
    record = parse_object(line)
    turns = None if record is None else record.get("turns")
    return (
        record if isinstance(turns, list) and all(isinstance(turn, dict) for turn in cast("list[Any]", turns)) else None
    )


def _tokens(records: Sequence[Mapping[str, Any]]) -> set[int]:
    """Ids that were drawn or might have been."""
    lists: list[Any] = []
    for record in records:
        for turn in record["turns"]:
            lists.append(turn.get("response_ids"))
            alternatives = turn.get("alternatives")
            if isinstance(alternatives, list):
                lists += [pairs[::2] for pairs in cast("list[Any]", alternatives) if isinstance(pairs, list)]
    found = {token for ids in lists if isinstance(ids, list) for token in cast("list[Any]", ids) if type(token) is int}
    return {token for token in found if token >= 0}
