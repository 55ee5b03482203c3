"""The `epo` command.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
Heavy imports happen inside commands, so that `--help` and wrong usage answer at once.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from epo.authoring import command as authoring_command
from epo.config import Config
from epo.errors import EnvironmentFailure, LearnerLost, StorageError, UserError
from epo.exporting import command as export_command
from epo.models.command import models_app
from epo.models.hub import stay_offline_unless_asked
from epo.planning import command as plan_command
from epo.recipe import folder_name, load_config, recipe_names
from epo.reporting.pages import command as reporting_command
from epo.reporting.terminal import command as show_command
from epo.reporting.terminal.text import visible
from epo.sweep import command as sweep_command

if TYPE_CHECKING:
    from epo.evaluation.panels import PanelResult

app = typer.Typer(
    name="epo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
stdout = Console()
stderr = Console(stderr=True)

INTERRUPTED = 130
HALTED = 1

Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides, such as `seed=1`.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
_HOSTED = "A model behind a server"


def _print_version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"epo {version('epo-agents')}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Train language-model agents with reinforcement learning, with their entropy under control."""


@app.command(
    epilog="Examples:\n\n"
    "    epo train scienceworld-ppo-epo\n\n"
    "    epo train scienceworld-ppo-epo seed=1 steps=50 --name try1\n\n"
    "    epo train scienceworld-ppo-epo seed=1 steps=50 --name try1 --resume\n\n"
    "    epo train my-recipe.yaml --dry-run\n\n"
    "    epo train my-recipe.yaml --cluster local cluster.workers=4 cluster.learners=2\n"
)
def train(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe, or path of a .yaml file.")],
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="Name of the run folder; default: the recipe's name.")] = None,
    runs: Annotated[Path, typer.Option(help="Folder that holds the runs.")] = Path("runs"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run of this name.")] = False,
    cluster: Annotated[
        str | None,
        typer.Option(metavar="local|ADDRESS", help="Run on Ray: a cluster of this machine, or that of an address."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train an agent: imitation warm start, RL, evaluation before, during and after.

    Ctrl-C ends the run after the current step with a checkpoint (exit code 130); `--resume` goes on from there.
    An alarm that `health.halt` names ends it without one (exit code 1).
    """
    config = load_config(recipe, overrides or ())
    path = runs / folder_name(name, default=config.name)
    if dry_run:
        _print_config(config, as_json=as_json, plays_here=cluster is None)
        return
    from epo.reporting.terminal.console import ConsoleObserver
    from epo.training.session import train_run

    try:
        with ConsoleObserver(config.steps, stderr) as observer:
            summary = train_run(config, path, observer, resume=resume, cluster=cluster)
    except KeyboardInterrupt:
        rest = "; --resume goes on from the last checkpoint" if path.exists() else " before anything was recorded"
        stderr.print(f"interrupted{rest}", highlight=False)
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        _print_json(summary)
    else:
        _print_summary(summary)
    if summary["halted"]:
        raise typer.Exit(HALTED)
    if not summary["finished"]:
        raise typer.Exit(INTERRUPTED)


@app.command(
    name="eval",
    epilog="Examples:\n\n"
    "    epo eval runs/try1 --split ood --episodes 128\n\n"
    "    epo eval runs/try1 --checkpoint best\n\n"
    "    epo eval path/to/model --recipe scienceworld-ppo --temperature 0\n\n"
    "    epo eval --server http://localhost:8000/v1 --model NAME --recipe quickstart\n",
)
def evaluate_command(
    target: Annotated[
        str | None, typer.Argument(metavar="RUN_OR_MODEL", help="A run folder or a model directory; not with --server.")
    ] = None,
    overrides: Overrides = None,
    recipe: Annotated[
        str | None, typer.Option(help="How a model acts (agent and environment); a run knows it.")
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(metavar="last|best|STEP", help="Which checkpoint of a run; best is that of its best evaluation."),
    ] = None,
    suite: Annotated[str | None, typer.Option(help="Evaluate on another suite, with its default options.")] = None,
    split: Annotated[list[str] | None, typer.Option(help="Splits; default: the recipe's.")] = None,
    episodes: Annotated[int | None, typer.Option(min=1, help="Episodes per split; default: the recipe's.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 is greedy; default: the recipe's.")] = None,
    server: Annotated[
        str | None,
        typer.Option(metavar="URL", help="An OpenAI-compatible server, whose model plays.", rich_help_panel=_HOSTED),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Its name there.", rich_help_panel=_HOSTED)] = None,
    api_key_env: Annotated[
        str | None,
        typer.Option(metavar="VARIABLE", help="Environment variable with the key.", rich_help_panel=_HOSTED),
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(min=1, help="Episodes at once; default: environment.workers.", rich_help_panel=_HOSTED),
    ] = None,
    request: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD=VALUE", help="A field of every request; null omits it.", rich_help_panel=_HOSTED),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(min=0.1, help="Seconds for one answer; default: 300.", rich_help_panel=_HOSTED),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for what was said; default: one in evals/.", rich_help_panel=_HOSTED),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Play the fixed panels with a trained policy and print success with its 95 % interval.

    With `--json`, `provenance` is beside the splits: model and checkpoint, the resolved configuration, the commit, and
    versions and data hashes of packages and suite; of a server's model it is in the folder.
    """
    from epo.reporting.terminal.console import ConsoleObserver

    extra = list(overrides or ())
    extra += [] if suite is None else [f"environment.suite={suite}"]
    extra += [] if split is None else [f"evaluation.splits=[{', '.join(split)}]"]
    extra += [] if episodes is None else [f"evaluation.episodes={episodes}"]
    extra += [] if temperature is None else [f"evaluation.temperature={temperature}"]
    hosted = {"model": model, "api_key_env": api_key_env, "concurrency": concurrency, "request": request}
    hosted |= {"timeout": timeout, "out": out}
    if server is not None:
        _evaluate_hosted(server, target, extra, recipe=recipe, checkpoint=checkpoint, as_json=as_json, **hosted)
        return
    for option, value in hosted.items():
        if value is not None:
            raise UserError(f"--{option.replace('_', '-')} is for the model of a server: add --server URL")
    if target is None:
        raise UserError("give a run folder or a model directory, or --server URL")
    from epo.evaluation.session import evaluate_target

    with ConsoleObserver(0, stderr) as observer:
        results, facts = evaluate_target(
            Path(target), recipe=recipe, overrides=extra, observer=observer, checkpoint=checkpoint
        )
    if as_json:
        found: dict[str, Any] = {result.split: result.as_dict() for result in results}
        _print_json(found | {"provenance": facts})
        return
    _print_panels(results)


def _evaluate_hosted(
    server: str,
    target: str | None,
    overrides: list[str],
    *,
    recipe: str | None,
    checkpoint: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """`epo eval --server`."""
    from epo.hosted.evaluation import evaluate_server
    from epo.reporting.terminal.console import ConsoleObserver

    if checkpoint is not None or (target is not None and "=" not in target):
        raise UserError(
            f"--server plays a model of a server, not {target or 'a checkpoint'}: leave that out; --recipe says which "
            "panels, such as those of a run by --recipe RUN/config.yaml"
        )
    # Without a run or model the first override stands in its place.
    overrides = overrides if target is None else [target, *overrides]
    try:
        with ConsoleObserver(0, stderr) as observer:
            found = evaluate_server(server, recipe=recipe, overrides=overrides, observer=observer, **options)
    except KeyboardInterrupt:
        stderr.print("interrupted", highlight=False)
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        _print_json(found.as_dict())
    else:
        _print_panels(found.panels)
    for line in found.describe():
        (stderr if as_json else stdout).print(visible(line), soft_wrap=True, highlight=False, markup=False)


@app.command(epilog="Example:\n\n    epo imitate scienceworld-ppo imitation.demonstrations=500\n")
def imitate(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe, or path of a .yaml file.")],
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a recipe's imitation warm start, evaluate it, and print where the model lies.

    The result is cached: `epo train` of the same recipe starts from it.
    """
    config = load_config(recipe, overrides or ())
    if config.imitation.demonstrations == 0:
        raise UserError(f"recipe {recipe!r} has no warm start: set imitation.demonstrations=200, for example")
    if dry_run:
        _print_config(config, as_json=as_json)
        return
    from epo.evaluation.session import imitate_and_evaluate
    from epo.reporting.terminal.console import ConsoleObserver

    with ConsoleObserver(0, stderr) as observer:
        folder, results = imitate_and_evaluate(config, observer)
    if as_json:
        _print_json({"model": str(folder), "eval": {result.split: result.as_dict() for result in results}})
        return
    _print_panels(results)
    stdout.print(f"model: {folder}", soft_wrap=True, highlight=False)


@app.command(epilog="Examples:\n\n    epo play corridor\n\n    epo play scienceworld --task find-animal/17\n")
def play(
    suite: Annotated[str, typer.Argument(help="Name of a suite; `epo envs` lists them.")],
    options: Annotated[
        list[str] | None, typer.Argument(metavar="OPTION=VALUE", help="Suite options, such as `length=5`.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split to draw from.")] = "train",
    task: Annotated[str | None, typer.Option(help="Id of the task; default: the first of the split.")] = None,
) -> None:
    """Play an environment yourself: what the agent would read, you read. An empty line or Ctrl-D ends the game."""
    from epo.environments.play import play_episode

    config = load_config("base", [f"environment.suite={suite}", *(f"environment.options.{o}" for o in options or ())])
    play_episode(config.environment.suite, config.environment.options, split=split, task_id=task)


@app.command(epilog="Examples:\n\n    epo envs\n\n    epo envs scienceworld\n")
def envs(
    suite: Annotated[str | None, typer.Argument(help="Show one suite: its options, splits and sizes.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the environment suites, or describe one."""
    from epo.environments.describe import describe_suite, list_suites

    if suite is None:
        found = list_suites()
        if as_json:
            _print_json(found)
            return
        table = Table("suite", "ready", "what it is")
        for entry in found:
            ready = ", ".join(["yes", *(f"with {option}=..." for option in entry["needs"])])
            table.add_row(
                *map(escape, (entry["name"], ready if entry["ready"] else f"no: {entry['problem']}", entry["summary"]))
            )
        stdout.print(table)
        return
    described = describe_suite(suite)
    if as_json:
        _print_json(described)
        return
    stdout.print(escape(described["documentation"]), soft_wrap=True, highlight=False)
    if described["needs"]:
        stdout.print(f"Its splits depend on what must be given: {', '.join(described['needs'])}.", highlight=False)
        return
    table = Table("split", "tasks", "task types")
    for name, size in described["splits"].items():
        table.add_row(name, str(size["tasks"]), str(size["goals"]))
    stdout.print(table)


@app.command(epilog="Example:\n\n    epo doctor\n")
def doctor(as_json: AsJson = False) -> None:
    """Check this machine: what is there, what is missing, and the command that mends it."""
    from epo.doctor import examine

    checks = examine()
    if as_json:
        _print_json([check.as_dict() for check in checks])
    else:
        table = Table("check", "found", "needed for", "mend")
        for check in checks:
            mark = "ok" if check.ok else "missing"
            table.add_row(check.name, f"{mark}: {check.found}", check.needed_for, "" if check.ok else check.mend)
        stdout.print(table)
    if any(check.required and not check.ok for check in checks):
        raise typer.Exit(1)


@app.command(epilog="Examples:\n\n    epo recipes\n\n    epo train household-grpo --dry-run\n")
def recipes(as_json: AsJson = False) -> None:
    """List the recipes that ship with the package."""
    names = recipe_names()
    if as_json:
        _print_json(names)
    else:
        stdout.print("\n".join(names), highlight=False)


@app.command(epilog="Examples:\n\n    epo methods\n\n    epo methods epo_strong\n")
def methods(
    method: Annotated[
        str | None, typer.Argument(help="Show one method: what it does, its source, its options.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the entropy control methods (`entropy.method`), or describe one."""
    from epo.methods import describe_method, list_methods

    if method is None:
        found = list_methods()
        if as_json:
            _print_json(found)
            return
        table = Table("entropy.method", "what it is")
        for entry in found:
            table.add_row(entry["name"], escape(entry["summary"]))
        stdout.print(table)
        return
    described = describe_method(method)
    if as_json:
        _print_json(described)
        return
    stdout.print(
        escape(f"{method}: {described['summary']}\n\n{described['documentation']}"), soft_wrap=True, highlight=False
    )
    if described["options"]:
        table = Table("option", "default", "meaning")
        for option in described["options"]:
            table.add_row(option["name"], escape(str(option["default"])), escape(option["meaning"]))
        stdout.print(table)


app.add_typer(models_app, name="models")
export_command.register(app)
show_command.register(app)
reporting_command.register(app)
sweep_command.register(app)
plan_command.register(app)
authoring_command.register(app)
explain = typer.Typer(help="Show what a setting does before anything is trained.", no_args_is_help=True)
app.add_typer(explain, name="explain")


@explain.command(
    epilog="Examples:\n\n"
    "    epo explain smoothing\n\n"
    "    epo explain smoothing scienceworld-ppo-epo\n\n"
    "    epo explain smoothing base entropy.method=epo entropy.alpha=1.2 entropy.kappa_low=0.5 --plot mine.png\n"
)
def smoothing(
    recipe: Annotated[
        str | None, typer.Argument(help="Explain this recipe's setting; default: compare profiles.")
    ] = None,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=2, help="RL steps of the run, when no recipe says so.")] = 125,
    plot: Annotated[Path, typer.Option(help="Where the plot goes.")] = Path("smoothing.png"),
    as_json: AsJson = False,
) -> None:
    """The weight that the entropy of a token really has, below, inside and above EPO's corridor.

    Measured as a gradient, in multiples of lambda: 1 is the plain bonus, 0 switches it off, less than 0 pushes
    entropy down.
    """
    from epo.reporting.smoothing import compare_profiles, effective_weights, plot_effective_weights

    if recipe is None:
        settings = compare_profiles(total_steps=steps)
    else:
        config = load_config(recipe, overrides or ())
        entropy = config.entropy
        label = f"{entropy.method} of {config.name}"
        settings = [effective_weights(label, entropy.method, entropy.options(), total_steps=max(2, config.steps))]
    if as_json:
        _print_json(
            [
                {
                    "setting": s.label,
                    "verdict": s.verdict(),
                    "weights": {
                        str(step): {
                            "below": None if s.below is None else s.at(step, s.below),
                            "inside": s.at(step, s.inside),
                            "above": s.at(step, s.above),
                        }
                        for step in s.steps
                    },
                }
                for s in settings
            ]
        )
        return
    table = Table(
        "setting", "corridor", "step", "below", "inside", "above", title="weight of a token's entropy / lambda"
    )
    for s in settings:
        for step in s.steps:
            first = step == s.steps[0]
            table.add_row(
                s.label if first else "",
                (f"{s.kappa_low:g} to {s.kappa_high:g}" if s.has_corridor else "none") if first else "",
                str(step),
                "no floor" if s.below is None else f"{s.at(step, s.below):.3f}",
                f"{s.at(step, s.inside):.3f}",
                f"{s.at(step, s.above):.3f}",
                end_section=step == s.steps[-1],
            )
    stdout.print(table)
    for s in settings:
        stdout.print(f"{s.label}: {s.verdict()}", highlight=False)
    plot_effective_weights(settings, plot)
    stdout.print(f"plot: {plot}", soft_wrap=True, highlight=False)


def _print_config(config: Config, *, as_json: bool, plays_here: bool = True) -> None:
    from epo.environments.worker_memory import memory_problem, worker_megabytes

    if as_json:
        _print_json(config.model_dump(mode="json"))
    else:
        sys.stdout.write(config.to_yaml())
    # The configuration may be meant for another machine, so this is no error.
    environment = config.environment
    worker_mb = worker_megabytes(environment.suite, environment.options) if plays_here else None
    if worker_mb and (problem := memory_problem(environment.suite, worker_mb, workers=environment.workers)):
        stderr.print(visible(f"would be refused here: {problem}"), markup=False, highlight=False, soft_wrap=True)


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


def _print_panels(results: Sequence[PanelResult]) -> None:
    table = Table("split", "success", "95 % interval", "episodes", "score", "turns", "invalid turns")
    for r in results:
        numbers = (f"{r.success:.3f}", f"{r.low:.3f} to {r.high:.3f}", str(r.episodes), f"{r.score:.2f}")
        table.add_row(escape(visible(r.split)), *numbers, f"{r.turns:.1f}", f"{r.invalid:.1%}")
    stdout.print(table)
    _print_lost((r.split, r.errors, r.episodes) for r in results)


def _print_lost(panels: Iterable[tuple[str, int, int]]) -> None:
    """A line on the panels, given by name, that lost episodes: how many, of how many."""
    if lost := [f"{name} {errors} of {episodes}" for name, errors, episodes in panels if errors]:
        line = (
            f"lost: {', '.join(lost)} episodes. Errors of the environment, or of the server that answers for the "
            "model, ended them; they count as failures, though the policy may not have failed"
        )
        stdout.print(visible(line), soft_wrap=True, highlight=False, markup=False)


def _print_summary(summary: dict[str, Any]) -> None:
    state = "finished" if summary["finished"] else "stopped; --resume goes on"
    if halted := summary["halted"]:
        state = f"halted by {', '.join(halted['alarms'])}; --resume health.halt=[] goes on all the same"
    stdout.print(f"\n{summary['recipe']}, seed {summary['seed']}: {summary['steps']} steps, {state}", highlight=False)
    end = "at the end" if summary["finished"] else "last"
    table = Table("panel", "before RL", "95 % interval", end, "95 % interval", "episodes")
    for split, panel in summary["eval"].items():
        first, last = panel["initial"], panel["final"]
        table.add_row(
            escape(visible(split)),
            f"{first['success']:.3f}",
            f"{first['low']:.3f} to {first['high']:.3f}",
            f"{last['success']:.3f}",
            f"{last['low']:.3f} to {last['high']:.3f}",
            str(last["episodes"]),
        )
    stdout.print(table)
    _print_lost(
        (f"{split} {when}", panel[name].get("errors", 0), panel[name]["episodes"])
        for split, panel in summary["eval"].items()
        for name, when in (("initial", "before RL"), ("final", end))
    )
    if (best := summary["best"]) and best["checkpoint"]:
        where = f"step {best['step']}, success {best['success']:.3f} over its panels ({best['checkpoint']})"
        stdout.print(f"best: {where}", soft_wrap=True, highlight=False)
    for key in ("run", "plot", "report"):
        if summary[key] is None:
            continue
        stdout.print(f"{key}: {summary[key]}", soft_wrap=True, highlight=False)


def main() -> None:
    """Entry point: user mistakes become one line and exit code 2, other errors of `epo.errors` one and exit code 1."""
    stay_offline_unless_asked()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        app()
    except UserError as error:
        _print_error(str(error))
        sys.exit(2)
    except (EnvironmentFailure, LearnerLost, StorageError) as error:
        _print_error(" ".join(str(error).splitlines()))  # what an environment says may have many lines
        sys.exit(1)


def _print_error(text: str) -> None:
    stderr.print(visible(f"error: {text}", keep="\n"), markup=False, highlight=False, soft_wrap=True)
