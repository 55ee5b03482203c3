"""`epo plan`."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from epo.errors import UserError

if TYPE_CHECKING:
    from epo.planning.plan import Plan

stdout = Console()

Count = typer.Option(min=1)


def register(app: typer.Typer) -> None:
    """Add the command to `epo`."""
    app.command(
        name="plan",
        epilog="Examples:\n\n"
        "    epo plan quickstart --hardware cpu:2x24G\n\n"
        "    epo plan paper/alfworld-qwen2.5-3b --hardware 8xH100-80G --price 24\n\n"
        "    epo plan my-recipe.yaml model.lora.rank=16 --hardware 2x8xA100-80G --turns 20 --json\n",
    )(plan_command)


def plan_command(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe, or path of a .yaml file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides, such as `model.lora.rank=16`.")
    ] = None,
    hardware: Annotated[
        str, typer.Option(help="8xH100-80G, 4x8xH100-80G (nodes x GPUs), cpu:2x24G (cores x memory); cpu: this one.")
    ] = "cpu",
    turns: Annotated[float | None, typer.Option(min=1, help="Turns of an episode.")] = None,
    response_tokens: Annotated[float | None, typer.Option(min=1, help="Tokens of a response.")] = None,
    observation_tokens: Annotated[float | None, typer.Option(min=1, help="Tokens read after each turn.")] = None,
    prompt_tokens: Annotated[float | None, typer.Option(min=1, help="Tokens of an episode's first prompt.")] = None,
    utilisation: Annotated[
        float | None, typer.Option(min=0.01, max=1, help="Share of the matrix rate that training reaches.")
    ] = None,
    environment_seconds: Annotated[float | None, typer.Option(min=0, help="Of one environment step.")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Of one node for one hour.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Say whether a run fits into memory and what it will cost, before anything is spent.

    Nothing is loaded or downloaded: a model counts by its config.json or its name. Exit code 2 if it does not fit.
    The formulas, and how far they were from what was measured, are in docs/plan.md.
    """
    from epo.environments.worker_memory import worker_megabytes
    from epo.planning.hardware import parse_hardware
    from epo.planning.plan import Answers, make_plan, refusal
    from epo.recipe import load_config

    config = load_config(recipe, overrides or ())
    for option, value, limit, key in (
        ("--turns", turns, config.environment.max_turns, "environment.max_turns"),
        ("--response-tokens", response_tokens, config.agent.max_response_tokens, "agent.max_response_tokens"),
        ("--prompt-tokens", prompt_tokens, config.model.max_context, "model.max_context"),
    ):
        if value is not None and value > limit:
            raise UserError(f"{option} {value:g} is above {key} {limit}: lower the first or raise the second")
    answers = Answers(
        turns=turns,
        response=response_tokens,
        observation=observation_tokens,
        prompt=prompt_tokens,
        utilisation=utilisation,
        environment_seconds=environment_seconds,
        worker_mb=worker_megabytes(config.environment.suite, config.environment.options),
    )
    plan = make_plan(config, parse_hardware(hardware), of=answers)
    if as_json:
        sys.stdout.write(json.dumps(plan.as_dict(price), indent=1) + "\n")
    else:
        _print_plan(plan, price)
    if not plan.fits:
        raise UserError(refusal(plan))


def _print_plan(plan: Plan, price: float | None) -> None:
    shape, work, gib = plan.shape, plan.work, 2**30
    stdout.print(
        f"{escape(plan.config.name)} on {plan.hardware}: {shape.parameters:,} parameters ({escape(shape.source)})",
        highlight=False,
        soft_wrap=True,
    )
    table = _table("memory of a device", "GiB", "when")
    for when, parts in (("always", plan.always), ("rollout", plan.rollout), ("update", plan.update)):
        for name, size in parts.items():
            table.add_row(name, f"{size / gib:.3f}", when)
    table.add_section()
    table.add_row("peak", f"{plan.peak / gib:.3f}", f"of {plan.usable / gib:.1f} usable")
    is_counted = plan.answers.worker_mb is not None
    if is_counted:
        where = "on top" if plan.hardware.accelerator.is_cpu else "the host's memory"
        table.add_row(f"{plan.config.environment.workers} environment workers", f"{plan.environments / gib:.3f}", where)
    stdout.print(table)
    table = _table("assumed", "value", "why")
    for name, found in work.assumptions.items():
        table.add_row(f"--{name.replace('_', '-')}", f"{found.value:g}", escape(found.source))
    stdout.print(table)
    table = _table("an RL step", "tokens", "seconds")
    table.add_row(f"prefill, {work.episodes} episodes", f"{work.prefilled:,.0f}", _seconds(plan.time.prefill))
    table.add_row("decode", f"{work.decoded:,.0f}", _seconds(plan.time.decode))
    table.add_row("environment", "", _seconds(plan.time.environment))
    update = f"update, {sum(plan.operations.values()):.2e} operations"
    table.add_row(update, f"{work.processed:,.0f}", _seconds(plan.time.update))
    table.add_section()
    table.add_row("step", "", _seconds(plan.time.total))
    table.add_row(f"{plan.config.steps} steps", "", f"{plan.hours:.2f} h")
    stdout.print(table)
    if not plan.hardware.accelerator.is_cpu:
        curve = _table("nodes", "fits", "step, s", "hours", "node hours", *(["price"] if price else []), "limit")
        for row in plan.node_curve(price):
            cost = [f"{row['price']:,.0f}"] if price else []
            figures = (_seconds(row["step_seconds"]), f"{row['hours']:.2f}", f"{row['node_hours']:.1f}")
            curve.add_row(str(row["nodes"]), "yes" if row["fits"] else "no", *figures, *cost, row["limit"])
        stdout.print(curve)
    suite = "" if is_counted else f", workers of suite {plan.config.environment.suite} (it cannot be built here)"
    stdout.print(f"Not counted: warm start, evaluations, checkpoints{escape(suite)}.", highlight=False)


def _seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _table(*columns: str) -> Table:
    return Table(*(Column(name, overflow="fold") for name in columns))
