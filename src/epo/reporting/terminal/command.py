"""`epo show`."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.text import Text

from epo.errors import UserError
from epo.reporting.reading.stored import Filter, StoredTrajectories, pick_row, read_vocabulary
from epo.reporting.terminal.scales import SCALES
from epo.reporting.terminal.show import TrajectoryView, has_colours, step_table, trajectory_table
from epo.reporting.terminal.text import visible
from epo.types import StopReason


class By(StrEnum):
    """The names of `epo.reporting.terminal.scales.SCALES`."""

    ENTROPY = "entropy"
    LOGPROB = "logprob"
    ADVANTAGE = "advantage"
    RATIO = "ratio"


class Pager(StrEnum):
    AUTO = "auto"
    OFF = "off"


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(
        epilog="Examples:\n\n"
        "    epo show runs/try1\n\n"
        "    epo show runs/try1 --failure --search door\n\n"
        "    epo show runs/try1 --step 12 --row 3 --by advantage --mask\n\n"
        "    epo show runs/try1/trajectories/step_000012.jsonl:3 --top 10\n",
    )(show)


def show(
    target: Annotated[
        str, typer.Argument(metavar="RUN|FILE[:ROW]", help="A run folder, or a file of its trajectories.")
    ],
    step: Annotated[int | None, typer.Option(help="RL step; default: all of them.")] = None,
    row: Annotated[int | None, typer.Option(min=0, help="Print this trajectory of the step; counted from 0.")] = None,
    success: Annotated[bool | None, typer.Option("--success/--failure", help="Only these.")] = None,
    stop: Annotated[StopReason | None, typer.Option(help="Only what ended so.")] = None,
    invalid: Annotated[bool, typer.Option("--invalid", help="Only those with an invalid response.")] = False,
    goal: Annotated[str | None, typer.Option(help="Only task types with this in their name.")] = None,
    search: Annotated[str | None, typer.Option(help="Only those in which this was read or written.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Trajectories listed at most.")] = 100,
    by: Annotated[By, typer.Option(help="What tokens are coloured by.")] = By.ENTROPY,
    mask: Annotated[bool, typer.Option("--mask", help="Mark the tokens that were trained on.")] = False,
    top: Annotated[int, typer.Option(min=0, help="List alternatives of the most uncertain tokens.")] = 0,
    whole: Annotated[bool, typer.Option("--whole", help="Long texts too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print records, or rows of the list, as JSON.")] = False,
    pager: Annotated[Pager, typer.Option(help="Scroll what is longer than the terminal.")] = Pager.AUTO,
) -> None:
    """List the trajectories of a run, or print one as a chat with its tokens coloured.

    Colours follow the same scales as the page of `epo report`. With NO_COLOR, or into a file, marks take their place.
    """
    wanted = Filter(success=success, stop=stop, invalid=invalid, goal=goal, search=search)
    path, step, row = _address(target, step=step, row=row)
    if row is None:
        _list(path, wanted, step=step, limit=limit, as_json=as_json, pager=pager)
        return
    if not wanted.is_empty:
        raise UserError(f"--row {row} names one trajectory already: leave the filters out, or --row")
    if path.is_file():
        record, vocabulary = pick_row(path, row), read_vocabulary(path.resolve().parent.parent)
        where = str(path)
    else:
        if step is None:
            raise UserError(f"--row {row} needs --step as well, such as --step {StoredTrajectories(path).steps[-1]}")
        stored = StoredTrajectories(path)
        record, vocabulary = stored.record(step, row), stored.vocabulary()
        where = str(stored.file(step))
    if as_json:
        _print_json(record)
        return
    console = _console()
    view = TrajectoryView(
        record,
        vocabulary=vocabulary,
        scale=SCALES[by],
        mask=mask,
        coloured=has_colours(console),
        top=top,
        whole=whole,
    )
    _print(console, [Text(visible(f"{where}:{row}")), *view.render()], pager=pager)


def _address(target: str, *, step: int | None, row: int | None) -> tuple[Path, int | None, int | None]:
    """Run folder or file, step and row, from `RUN` or `FILE[:ROW]` and the options."""
    path, given = Path(target), None
    if not path.exists() and (found := re.fullmatch(r"(.+):(\d{1,9})", target, re.DOTALL)):
        path, given = Path(found[1]), int(found[2])
    if not path.exists():
        raise UserError(f"there is no {str(path)!r}{_near(path)}")
    if path.is_dir():
        if given is not None:
            raise UserError(f"{str(path)!r} is a folder: add --step and --row {given}, or name one of its step files")
        return path, step, row
    if not re.fullmatch(r"step_\d+\.jsonl", path.name):
        raise UserError(
            f"{str(path)!r} is no file of trajectories: give a run folder, or its trajectories/step_*.jsonl"
        )
    if step is not None and step != int(path.stem[5:]):
        raise UserError(f"--step {step} and the file of step {int(path.stem[5:])} contradict each other: leave one out")
    if given is not None and row is not None and given != row:
        raise UserError(f"--row {row} and row {given} of {target!r} contradict each other: leave one out")
    return path, int(path.stem[5:]), given if row is None else row


def _near(path: Path) -> str:
    """What could have been meant by a path that does not exist."""
    if re.fullmatch(r"step_\d+\.jsonl", path.name):
        there = sorted(path.parent.glob("step_*.jsonl"))
        if there:
            wanted = int(path.stem[5:])
            near = sorted(there, key=lambda file: abs(int(file.stem[5:]) - wanted))[:3]
            return f": the nearest are {', '.join(sorted(file.name for file in near))}"
    folder = path.parent
    there = sorted(p.parent.name for p in folder.glob("*/config.yaml")) if folder.is_dir() else []
    if there:
        shown = ", ".join(there[:5]) + (f" and {len(there) - 5} more" if len(there) > 5 else "")
        return f": in {str(folder)!r} there are {shown}"
    return ": give a run folder, such as runs/NAME"


def _list(path: Path, wanted: Filter, *, step: int | None, limit: int, as_json: bool, pager: Pager) -> None:
    stored = StoredTrajectories(path if path.is_dir() else path.resolve().parent.parent)
    is_overview = step is None and wanted.is_empty
    if as_json:
        _print_json(list(stored.matching(wanted, step=step)))
        return
    parts: list[RenderableType] = []
    if is_overview:
        step = stored.steps[-1]
        parts.append(step_table(stored))
        parts.append(Text(f"the newest step ({step}):"))
    rows = list(islice(stored.matching(wanted, step=step), limit + 1))
    parts.append(trajectory_table(rows[:limit]) if rows else Text("no trajectory is like that"))
    if len(rows) > limit:
        parts.append(Text(f"and more: raise --limit {limit}, or choose with --step, --failure, --goal, --search"))
    if rows:
        first = rows[0]
        parts.append(Text(f"read one: epo show {visible(str(stored.run))} --step {first['step']} --row {first['row']}"))
    _print(_console(), parts, pager=pager)


def _console() -> Console:
    """What is no terminal has no width: lines for `grep` are wide, unless COLUMNS says otherwise."""
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 160
    return console


def _print(console: Console, parts: Iterable[RenderableType], *, pager: Pager) -> None:
    # A stream that cannot encode what a model wrote shows escapes, and does not fail.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    if pager != Pager.AUTO or not console.is_terminal:
        for part in parts:
            console.print(part, soft_wrap=isinstance(part, Text))
        return
    os.environ.setdefault("LESS", "FRX")  # F: what fits is printed as without a pager; R: colours
    with console.pager(styles=True):
        for part in parts:
            console.print(part, soft_wrap=isinstance(part, Text))


def _print_json(value: Any) -> None:
    # `ensure_ascii` escapes every control character but one.
    sys.stdout.write(json.dumps(value, indent=1).replace("\x7f", "\\u007f") + "\n")
