"""`epo export`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

stdout = Console()


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(
        epilog="Examples:\n\n"
        "    epo export runs/try1\n\n"
        "    epo export runs/try1 --checkpoint best --out my-agent\n\n"
        "    epo export runs/lora --merge\n\n"
        "    epo export runs/lora --base Qwen/Qwen2.5-0.5B-Instruct\n",
    )(export)


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write; default: exports/NAME.")] = None,
    checkpoint: Annotated[
        str, typer.Option(metavar="last|best|STEP", help="Which checkpoint; best is that of the best evaluation.")
    ] = "last",
    merge: Annotated[
        bool, typer.Option("--merge", help="Of an adapter: write the whole model, with the adapter merged into it.")
    ] = False,
    base: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="Of an adapter: the name under which others find its base.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Write a checkpoint's policy in the Hugging Face layout, with a model card filled from the run.

    transformers loads the folder (peft, where it is an adapter), and `epo eval` plays it. Nothing is uploaded.
    """
    from epo.exporting.folder import export_run

    exported = export_run(run, out=out, checkpoint=checkpoint, merge=merge, base=base)
    if as_json:
        sys.stdout.write(json.dumps(exported.as_dict(), indent=1) + "\n")
        return
    lines = (
        f"{exported.kind} of step {exported.step}: {exported.folder}",
        f"read its README.md; then, to publish it: hf upload ORG/NAME {exported.folder}",
    )
    for line in lines:
        stdout.print(line, soft_wrap=True, markup=False, highlight=False)
