"""`epo env new` and `epo env check`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from epo.reporting.terminal.text import visible

stdout = Console()
stderr = Console(stderr=True)

FAILED = 1

env_app = typer.Typer(
    help="Write an environment of your own, and check that it keeps the contract.", no_args_is_help=True
)


def register(app: typer.Typer) -> None:
    """Add `epo env` to the `epo` command."""
    app.add_typer(env_app, name="env")


@env_app.command(epilog="Examples:\n\n    epo env new maze\n\n    epo env new maze --path ~/environments/maze\n")
def new(
    name: Annotated[str, typer.Argument(help="Name of the package and of its suite: letters, digits, underscores.")],
    path: Annotated[Path | None, typer.Option(help="Folder to write; default: ./NAME.")] = None,
) -> None:
    """Write a small package that works: a game, its splits, an expert, tests, a recipe."""
    from epo.authoring.scaffold import write_package

    folder = write_package(name, path)
    stdout.print(
        f"wrote {visible(str(folder))}; next:\n"
        f"  pip install --no-deps -e {visible(str(folder))}\n"
        f"  epo env check {name}\n"
        f"  epo train {visible(str(folder / 'recipe.yaml'))}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


@env_app.command(
    epilog="Examples:\n\n    epo env check corridor\n\n    epo env check scienceworld tasks=[find-animal] --resets 40\n"
)
def check(
    suite: Annotated[str, typer.Argument(help="Name of a suite; `epo envs` lists them.")],
    options: Annotated[
        list[str] | None, typer.Argument(metavar="OPTION=VALUE", help="Suite options, such as `length=5`.")
    ] = None,
    tasks: Annotated[int, typer.Option(min=1, help="Tasks of each split to play.")] = 3,
    turns: Annotated[int, typer.Option(min=1, help="Turns of each episode.")] = 15,
    resets: Annotated[int, typer.Option(min=2, help="Resets over which leaks are measured.")] = 200,
    seconds: Annotated[float, typer.Option(min=0.1, help="Deadline of one call.")] = 120.0,
    slowest_ms: Annotated[
        float, typer.Option(min=0, help="Too slow: a median step above it, a reset ten-fold.")
    ] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Check that a suite keeps the contract: what training relies on, tried out.

    Exit code 0: all right; 1: something failed; 2: no such suite or option.
    """
    from epo.authoring.checks import Finding, Thoroughness, Verdict, examine_suite
    from epo.recipe import load_config

    config = load_config("base", [f"environment.suite={suite}", *(f"environment.options.{o}" for o in options or ())])
    with stderr.status("checking ...") as status:

        def on_done(finding: Finding) -> None:
            status.update(f"{escape(finding.check)}: {finding.verdict}")

        findings = examine_suite(
            config.environment.suite,
            config.environment.options,
            thoroughness=Thoroughness(tasks=tasks, turns=turns, resets=resets, seconds=seconds, slowest_ms=slowest_ms),
            on_done=on_done,
        )
    if as_json:
        sys.stdout.write(json.dumps([finding.as_dict() for finding in findings], indent=1) + "\n")
    else:
        table = Table("check", "result", Column("what was seen", overflow="fold"))
        for finding in findings:
            table.add_row(finding.check, str(finding.verdict), escape(visible(finding.detail)))
        stdout.print(table)
    if any(finding.verdict is Verdict.FAILED for finding in findings):
        raise typer.Exit(FAILED)
