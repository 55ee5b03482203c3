"""One self-contained page for one run or several: opens offline, carries the trajectories of some steps."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epo.errors import StorageError, UserError
from epo.evaluation.comparison import compare
from epo.files import write_atomically
from epo.reporting.pages.builder import make_title, page_object, render_page, require_plotly
from epo.reporting.reading.run_reader import RunData
from epo.reporting.reading.trajectory_files import TrajectoryFiles

TRAJECTORY_MB = 6.0
"""Default room for trajectories in a report, compressed, in MB."""
_MISSES = 3
"""Steps that are tried in vain before a run's share counts as used up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenReport:
    """What became of a report."""

    path: Path
    bytes: int
    runs: int
    embedded: dict[str, list[int]]
    """By the run's name: steps whose trajectories can be opened in it."""


def write_report(
    path: Path,
    runs: Sequence[RunData],
    *,
    steps: Sequence[int] | None = None,
    trajectory_mb: float = TRAJECTORY_MB,
) -> WrittenReport:
    """Write the page of `runs`.

    Args:
        steps: whose trajectories it shall carry; default: the first, the last, and as many evenly between them as fit.
        trajectory_mb: room for trajectories, shared evenly by the runs.

    Raises:
        UserError: plotly is missing, a step of `steps` has no trajectories or no room, `path` cannot be written.
    """
    require_plotly()
    pages: list[dict[str, Any]] = []
    blobs: dict[str, str] = {}
    embedded: dict[str, list[int]] = {}
    for i, run in enumerate(runs):
        room = int(trajectory_mb * 1e6 / len(runs))
        chosen = _pack(run, steps, room)
        blobs |= {f"trajectories-{i}-{step}": data for step, data in chosen.items()}
        recorded = TrajectoryFiles(run.path).steps()
        pages.append(run.page() | {"embedded_steps": sorted(chosen), "embedded_note": _note(run, chosen, recorded)})
        embedded[run.name] = sorted(chosen)
    comparison = compare(runs).page() if len(runs) > 1 else None
    page = page_object(pages, mode="report", title=make_title(runs), comparison=comparison)
    html, _ = render_page(page, blobs=blobs)
    try:
        write_atomically(path, html)
    except StorageError:
        raise
    except OSError as error:
        raise UserError(f"--out {str(path)!r} cannot be written ({error.strerror}): give another file") from None
    return WrittenReport(path=path, bytes=len(html.encode()), runs=len(runs), embedded=embedded)


def _pack(run: RunData, steps: Sequence[int] | None, room: int) -> dict[int, str]:
    """Compressed trajectories by step, as many as `room` bytes hold."""
    files = TrajectoryFiles(run.path)
    packed: dict[int, str] = {}
    misses = 0
    for step in spread(files.steps()) if steps is None else steps:
        data = base64.b64encode(gzip.compress(files.payload(step).encode("ascii"), 9, mtime=0)).decode()
        if len(data) <= room:
            packed[step] = data
            room -= len(data)
            misses = 0
        elif steps is not None:
            raise UserError(
                f"the trajectories of step {step} of {run.name!r} do not fit any more ({len(data) / 1e6:.1f} MB): "
                "raise --trajectory-mb, or give fewer --steps"
            )
        else:
            misses += 1
            if misses == _MISSES:
                break
    return packed


def spread(steps: Sequence[int]) -> Iterator[int]:
    """First, last, middle, quarters, ...: wherever this ends, what came is spread evenly."""
    ends = [0, len(steps) - 1] if len(steps) > 1 else [0] * len(steps)
    seen = set(ends)
    yield from (steps[i] for i in ends)
    gaps = [(0, len(steps) - 1)]
    while gaps:
        halves: list[tuple[int, int]] = []
        for low, high in gaps:
            middle = (low + high) // 2
            if middle not in seen and low < middle < high:
                seen.add(middle)
                yield steps[middle]
                halves += [(low, middle), (middle, high)]
        gaps = halves


def _note(run: RunData, chosen: Sequence[int] | dict[int, str], recorded: Sequence[int]) -> str | None:
    left_out = len(recorded) - len(chosen)
    if not left_out:
        return None
    text = (
        f"This file carries the trajectories of {len(chosen)} of {len(recorded)} steps; the others were left out to "
        f"keep it small. `epo watch {run.path}` shows all of them, `epo report --steps` chooses others."
    )
    return text.encode("utf-8", "replace").decode()
