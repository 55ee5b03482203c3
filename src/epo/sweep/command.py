"""`epo sweep` and `epo compare`."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from epo.recipe import folder_name
from epo.reporting.terminal.text import visible

if TYPE_CHECKING:
    from epo.evaluation.comparison import Comparison
    from epo.sweep.folder import SweepFolder
    from epo.sweep.plan import Sweep

stdout = Console()
stderr = Console(stderr=True)

FAILED = 1
INTERRUPTED = 130

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


def register(app: typer.Typer) -> None:
    """Add both commands to the `epo` command."""
    app.command(
        name="sweep",
        epilog="Examples:\n\n"
        "    epo sweep cascade.yaml\n\n"
        "    epo sweep cascade.yaml --dry-run\n\n"
        "    epo sweep cascade.yaml --parallel 1 --retry\n",
    )(sweep_command)
    app.command(
        name="compare",
        epilog="Examples:\n\n"
        "    epo compare sweeps/cascade\n\n"
        "    epo compare runs/ppo-0 runs/ppo-1 runs/epo-0 runs/epo-1 --csv > table.csv\n",
    )(compare_command)


def sweep_command(
    file: Annotated[Path, typer.Argument(metavar="SWEEP.yaml", help="Recipe, arms and seeds; see docs/sweep.md.")],
    name: Annotated[str | None, typer.Option(help="Name of the sweep's folder; default: the sweep's name.")] = None,
    sweeps: Annotated[Path, typer.Option(help="Folder that holds the sweeps.")] = Path("sweeps"),
    parallel: Annotated[int | None, typer.Option(min=1, help="Runs at once; default: one per core.")] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Also run again what failed before.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs and where each stands, and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train every arm of a comparison with every seed, each run as a process of its own.

    The same command goes on where an earlier one ended: finished runs are left alone, unfinished ones resume.
    Ctrl-C ends the runs after their current step with a checkpoint (exit code 130).
    """
    from epo.sweep.folder import SweepFolder
    from epo.sweep.plan import load_sweep
    from epo.sweep.progress import SweepProgress, state_table
    from epo.sweep.runner import SweepRunner, check_parallel

    sweep = load_sweep(file)
    folder = SweepFolder(sweeps / folder_name(name, default=sweep.plan.name))
    at_once = check_parallel(parallel, threads=max(config.model.threads or 1 for config in sweep.configs.values()))
    if dry_run:
        if as_json:
            _print_json(_as_dict(sweep, folder))
        else:
            stdout.print(state_table(sweep, folder))
            stdout.print(f"{len(sweep.runs())} runs, {at_once} at once, in {folder.path}", soft_wrap=True)
        return
    with folder.locked() as lock:
        folder.prepare(sweep)
        with SweepProgress(sweep, folder, stderr) as progress:
            runner = SweepRunner(
                folder=folder, runs=sweep.runs(), observer=progress, parallel=at_once, retry=retry, lock=lock
            )
            completed = runner.work()
    if as_json:
        _print_json(_as_dict(sweep, folder))
    else:
        stdout.print(state_table(sweep, folder))
        stdout.print(f"sweep: {folder.path}", soft_wrap=True, highlight=False)
    planned = {run.name for run in sweep.runs()}
    failures = {run: visible(reason) for run, reason in folder.failures().items() if run in planned}
    for run, reason in failures.items():
        stderr.print(f"failed: {run}: {reason}", markup=False, highlight=False, soft_wrap=True)
    if not completed:
        stderr.print("interrupted; the same command goes on from here", highlight=False)
        raise typer.Exit(INTERRUPTED)
    if failures:
        stderr.print("--retry runs these again", highlight=False)
        raise typer.Exit(FAILED)


def compare_command(
    targets: Annotated[list[Path], typer.Argument(metavar="RUN_OR_SWEEP...", help="Run folders and sweep folders.")],
    window: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of the steps, at the end, that the window holds.")
    ] = 0.2,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print the table as CSV on stdout.")] = False,
) -> None:
    """Compare the arms of a sweep, or runs of your own: success in the last part of training, over the seeds.

    Intervals are 95 % bootstrap intervals over seeds. best-of-run, which papers report, is shown beside it: it is
    biased upward, the more so the more often and on the fewer episodes one evaluates.
    """
    from epo.evaluation.comparison import compare
    from epo.reporting.reading.run_reader import find_runs, read_run

    comparison = compare([read_run(run) for run in find_runs(targets)], window=window)
    if as_json:
        _print_json(comparison.page())
    elif as_csv:
        _print_csv(comparison.page()["table"])
    else:
        _print_comparison(comparison)


def _as_dict(sweep: Sweep, folder: SweepFolder) -> dict[str, Any]:
    failures = folder.failures()
    runs = [
        {
            "name": run.name,
            "arm": run.arm,
            "seed": run.seed,
            "state": folder.state(run).value,
            "run": str(folder.run(run)),
            **({"failure": failures[run.name]} if run.name in failures else {}),
        }
        for run in sweep.runs()
    ]
    return {"sweep": str(folder.path), "runs": runs}


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


def _print_csv(rows: list[dict[str, Any]]) -> None:
    if rows:
        writer = csv.DictWriter(sys.stdout, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _print_comparison(comparison: Comparison) -> None:
    page = comparison.page()
    mean = f"last {page['window']:.0%} (95 % interval)"
    table = _table("arm", "split", "seeds", mean, "IQM", "relative", "P(better)", "best (biased)")
    for row in page["table"]:
        interval = "" if row["low"] is None else f" ({row['low']:.3f} to {row['high']:.3f})"
        table.add_row(
            escape(row["arm"]),
            row["split"],
            str(row["seeds"]),
            f"{row['window_mean']:.3f}{interval}",
            f"{row['iqm']:.3f}",
            "" if row["relative"] is None else f"{row['relative']:+.1%}",
            "" if row["improvement_probability"] is None else f"{row['improvement_probability']:.2f}",
            f"{row['best_mean']:.3f}",
        )
    stdout.print(table)
    budget = _table("arm", "environment steps", "sampled tokens", "entropy at the end", "its oscillation")
    for arm in page["arms"]:
        budget.add_row(
            escape(arm["name"]),
            _number(arm["environment_steps"], ",.0f"),
            _number(arm["tokens"], ",.0f"),
            _number(arm["entropy"], ".3f"),
            _number(arm["entropy_oscillation"], ".4f"),
        )
    stdout.print(budget)
    for note in page["notes"]:
        stdout.print(escape(visible(note)), highlight=False, soft_wrap=True)


def _table(*columns: str) -> Table:
    """A table that folds long names where the terminal is narrow, and loses no figure."""
    return Table(*(Column(name, overflow="fold") for name in columns))


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
