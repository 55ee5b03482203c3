"""`epo models`: list the models that are known by name, and make one ready."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from epo.models.catalogue import KNOWN, pull

models_app = typer.Typer()
stdout = Console()
stderr = Console(stderr=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


@models_app.callback(
    invoke_without_command=True,
    epilog="Examples:\n\n    epo models\n\n    epo models pull smollm2-135m\n",
)
def list_models(context: typer.Context, as_json: AsJson = False) -> None:
    """List the pretrained models that `model.path` knows by name, or make one ready.

    `model.path` also takes `tiny` (made from nothing), a model directory, or org/name of the Hugging Face hub.
    """
    if context.invoked_subcommand is not None:
        return
    found = [model.as_dict() for model in KNOWN.values()]
    if as_json:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
        return
    table = Table("model.path", "what it is", "parameters", "licence", "ready", "on disk")
    for entry in found:
        ready = "yes" if entry["ready"] else f"no: epo models pull {entry['name']}"
        parameters = f"{entry['parameters'] / 1e6:.1f} M"
        table.add_row(entry["name"], entry["summary"], parameters, entry["licence"], ready, f"{entry['disk_mb']} MB")
    stdout.print(table)
    for entry in found:
        if entry["ready"]:
            stdout.print(f"{entry['name']}: {entry['folder']}", soft_wrap=True, markup=False, highlight=False)


@models_app.command(
    name="pull",
    epilog="Examples:\n\n    epo models pull smollm2-135m\n\n    epo models pull Qwen/Qwen2.5-0.5B-Instruct\n",
)
def pull_command(
    name: Annotated[str, typer.Argument(help="A name that `epo models` lists, or org/name of the Hugging Face hub.")],
    as_json: AsJson = False,
) -> None:
    """Make a model ready to be used as `model.path`. A second time finds it there."""
    pulled = pull(name, say=lambda text: stderr.print(text, markup=False, highlight=False, soft_wrap=True))
    if as_json:
        sys.stdout.write(json.dumps(pulled.as_dict(), indent=1) + "\n")
        return
    state = "was ready" if pulled.was_ready else "is ready"
    stdout.print(f"{name} {state}: {pulled.folder}", soft_wrap=True, markup=False, highlight=False)
