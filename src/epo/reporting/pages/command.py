"""`epo report` and `epo watch`: runs to look at, as a file and live."""

from __future__ import annotations

import json
import math
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console

from epo.errors import UserError

stdout = Console()

Runs = Annotated[
    list[Path],
    typer.Argument(metavar="RUN|SWEEP...", help="Run folders, or folders that hold runs, such as a sweep's."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command(
        name="report",
        epilog="Examples:\n\n"
        "    epo report runs/try1\n\n"
        "    epo report runs/ppo runs/ppo-epo --out comparison.html\n\n"
        "    epo report sweeps/methods\n\n"
        "    epo report runs/try1 --steps 1,50,100 --trajectory-mb 20\n",
    )(report)
    app.command(
        name="watch",
        epilog="Examples:\n\n"
        "    epo watch runs/try1\n\n"
        "    epo watch sweeps/methods --port 9000\n\n"
        "    epo watch runs/try1 --host 0.0.0.0 --allow-remote\n",
    )(watch)


def report(
    runs: Runs,
    out: Annotated[
        Path | None, typer.Option(help="The file; default: report.html in the folder of the run or sweep.")
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(help="Steps whose trajectories it carries, such as `1,50,100`; default: as many as fit, spread."),
    ] = None,
    trajectory_mb: Annotated[float, typer.Option(min=0, help="Room for trajectories, compressed, in MB.")] = 6.0,
    as_json: AsJson = False,
) -> None:
    """Write one HTML page for a run, several runs, or a sweep. It opens offline, in any browser.

    Works at any time: for a run that is at work, was stopped, or is finished.
    """
    from epo.reporting.pages.report import write_report
    from epo.reporting.reading.run_reader import find_runs, read_run

    if out is None and len(runs) > 1:
        raise UserError(
            "a report of several runs belongs to none of them: say where it goes, such as --out comparison.html"
        )
    if not math.isfinite(trajectory_mb):
        raise UserError(f"--trajectory-mb {trajectory_mb} is no size: give a number such as 20")
    path = out or runs[0] / "report.html"
    found = [read_run(run) for run in find_runs(runs)]
    written = write_report(path, found, steps=_parse_steps(steps), trajectory_mb=trajectory_mb)
    if as_json:
        result = {"report": str(path), "bytes": written.bytes, "embedded_steps": written.embedded}
        sys.stdout.write(json.dumps({**result, "runs": [str(run.path) for run in found]}, indent=1) + "\n")
        return
    for run in found:
        for note in run.notes:
            stdout.print(f"{run.name}: {note}", soft_wrap=True, markup=False, highlight=False)
    count = "1 run" if written.runs == 1 else f"{written.runs} runs"
    text = f"report: {path} ({count}, {written.bytes / 1e6:.1f} MB)"
    stdout.print(text, soft_wrap=True, markup=False, highlight=False)


def watch(
    runs: Runs,
    host: Annotated[str, typer.Option(help="Where to listen. Others reach only what needs --allow-remote.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8765,
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Let others reach the page, who then need a token.")
    ] = False,
    token: Annotated[
        str | None,
        typer.Option(envvar="EPO_WATCH_TOKEN", help="What visitors must know; default: made up with --allow-remote."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show runs in the browser while they train, and afterwards. Ctrl-C ends it.

    Only this machine can open the page, unless --host and --allow-remote say otherwise. The connection is not
    encrypted: over a network, come by `ssh -L 8765:localhost:8765 machine`.
    """
    try:
        from epo.reporting.pages.watch import serve
    except ModuleNotFoundError as error:
        if error.name != "starlette":
            raise
        raise UserError("epo watch needs starlette and uvicorn. In a checkout: pip install -e '.[report]'") from None

    def on_start(address: str, count: int) -> None:
        if as_json:
            sys.stdout.write(json.dumps({"url": address, "runs": count}) + "\n")
        else:
            shown = "1 run" if count == 1 else f"{count} runs"
            stdout.print(f"{shown} at {address} (Ctrl-C ends)", soft_wrap=True, markup=False, highlight=False)
        sys.stdout.flush()

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    with suppress(KeyboardInterrupt):
        serve(runs, host=host, port=port, allow_remote=allow_remote, token=token, on_start=on_start)


def _parse_steps(text: str | None) -> list[int] | None:
    if text is None:
        return None
    numbers = [part.strip() for part in text.split(",") if part.strip()]
    if not all(number.isascii() and number.isdigit() for number in numbers):
        raise UserError(f"--steps {text!r} is no list of steps: give numbers with commas, such as 1,50,100")
    return sorted({int(number) for number in numbers})
