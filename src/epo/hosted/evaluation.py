"""What `epo eval --server` does: the panels of a recipe with the model of a server, and a folder with what was said."""

from __future__ import annotations

import itertools
import json
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epo.bounded_yaml import load_yaml
from epo.config import Config
from epo.errors import StorageError, UserError
from epo.evaluation.panels import PanelResult, evaluate
from epo.files import new_folder, remove_folder, write_atomically
from epo.hosted.chat_server import ChatServer
from epo.hosted.collector import HostedCollector
from epo.recipe import load_config
from epo.tasks import panel
from epo.training.preparation import prepare_suite
from epo.training.provenance import provenance
from epo.training.run_folder import RunFolder
from epo.training.session import open_pool
from epo.training.trainer import Observer, count_episodes
from epo.types import Trajectory, TrajectoryGroup

RECIPE_FILE = "recipe.yaml"
TIMEOUT_SECONDS = 300.0
_TOKENS = ("prompt_tokens", "response_tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class HostedResults:
    panels: list[PanelResult]
    usage: dict[str, dict[str, int]]
    """By split: responses, prompt and response tokens as the server counts them, and responses it did not count."""
    folder: Path

    def as_dict(self) -> dict[str, Any]:
        """By split."""
        return {result.split: result.as_dict() | {"usage": self.usage[result.split]} for result in self.panels}

    def describe(self) -> list[str]:
        """Lines for people."""
        total = {key: sum(usage[key] for usage in self.usage.values()) for key in ("responses", *_TOKENS, "uncounted")}
        counted = " and ".join(f"{total[key]:,} {key.replace('_', ' ')}" for key in _TOKENS)
        missing = f"; {total['uncounted']:,} responses uncounted" if total["uncounted"] else ""
        return [f"{total['responses']:,} responses, {counted}{missing}", f"episodes: epo show {self.folder}"]


def evaluate_server(
    url: str,
    *,
    model: str | None,
    recipe: str | None,
    overrides: Sequence[str],
    observer: Observer,
    api_key_env: str | None = None,
    concurrency: int | None = None,
    request: Sequence[str] | None = None,
    timeout: float | None = None,
    out: Path | None = None,
) -> HostedResults:
    """Play the panels of a recipe with a model of the server at `url` (`ChatServer`, `evaluate_hosted`).

    Args:
        api_key_env: the environment variable that holds the key.
        concurrency: episodes at once, each with an environment of its own; by default `environment.workers`.
        request: `FIELD=VALUE`, fields of every request.
        timeout: seconds for one answer.

    Raises:
        UserError: something is missing or wrong; names it.
    """
    if model is None:
        raise UserError("--server needs --model NAME, as the server calls it (most list theirs under /models)")
    if recipe is None:
        raise UserError("--server needs --recipe, which says how the model acts and in which environment")
    workers = [] if concurrency is None else [f"environment.workers={concurrency}"]
    server = ChatServer(
        url,
        model,
        key_variable=api_key_env,
        fields=parse_fields(request or ()),
        timeout_seconds=timeout or TIMEOUT_SECONDS,
    )
    return evaluate_hosted(server, load_config(recipe, [*overrides, *workers]), out=out, observer=observer)


def parse_fields(fields: Sequence[str]) -> dict[str, Any]:
    """`--request FIELD=VALUE ...`; values are YAML.

    Raises:
        UserError: not of that form.
    """
    parsed: dict[str, Any] = {}
    for field in fields:
        name, separator, text = field.partition("=")
        try:
            parsed[name] = load_yaml(text)
            json.dumps(parsed[name], allow_nan=False)
        except (ValueError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"--request {field!r}: the value cannot be sent ({reason}); quote it") from None
        if not separator or not name:
            raise UserError(f"--request {field!r} is not of the form FIELD=VALUE, for example top_p=0.9")
    return parsed


def evaluate_hosted(
    server: ChatServer,
    config: Config,
    *,
    out: Path | None,
    observer: Observer,
) -> HostedResults:
    """Play the panels of `config` with the model of `server`.

    What was finished is kept in the folder also when an error, Ctrl-C or SIGTERM ends the evaluation; with nothing to
    keep there is none.

    Args:
        out: the folder, which must not exist; by default one in `evals/`, named after the model and the time.

    Raises:
        UserError: something the user can mend.
        StorageError: the disk is full.
    """
    start = time.monotonic()
    if config.agent.overflow != "end":
        raise UserError(
            f"agent.overflow={config.agent.overflow} counts tokens, which a server does not do before it answers: "
            "set agent.overflow=end"
        )
    suite = prepare_suite(config, observer)
    folder = _create(out or _default_folder(server.model), config, provenance(suite) | _server_of(server))
    kept: list[TrajectoryGroup] = []
    panels: list[PanelResult] = []
    usage: dict[str, dict[str, int]] = {}
    try:
        if server.shows_key:
            observer.note("the key goes over the network unencrypted: https:// would hide it")
        observer.note(f"model: {server.model} of {server.url}, at most {config.environment.workers} requests at once")
        with _stopped_like_ctrl_c(), server, open_pool(config) as pool:
            collector = HostedCollector(
                pool,
                server,
                config.agent,
                max_turns=config.environment.max_turns,
                max_context=config.model.max_context,
            )
            for split in config.evaluation.splits:
                tasks = panel(suite.tasks(split), episodes=config.evaluation.episodes, split=split)
                observer.begin(f"evaluate {split}", len(tasks))
                played: list[Trajectory] = []
                counted = count_episodes(observer)

                def on_done(trajectory: Trajectory) -> None:
                    played.append(trajectory)  # noqa: B023  called within this turn of the loop
                    counted(trajectory)  # noqa: B023

                try:
                    temperature = config.evaluation.temperature
                    result = evaluate(collector, tasks, split=split, temperature=temperature, on_done=on_done)
                finally:
                    usage[split] = _usage(played)
                    played.sort(key=lambda t: tasks.index(t.task))
                    groups = [*kept, *(TrajectoryGroup(task=t.task, trajectories=[t]) for t in played)]
                    folder.write_trajectories(0, groups)
                    kept = groups
                panels.append(result)
        folder.add_evaluation({"step": 0, "panels": [result.as_dict() for result in panels]})
        results = HostedResults(panels=panels, usage=usage, folder=folder.path)
        summary = {"recipe": config.name, "model": server.model, "server": server.url, "eval": results.as_dict()}
        summary |= {"retries": server.retries, "wall_seconds": round(time.monotonic() - start, 1)}
        write_atomically(folder.path / "summary.json", json.dumps(summary, indent=1))
        return results
    except BaseException:
        if kept:
            observer.note(f"{len(kept)} finished episodes are kept: epo show {folder.path}")
        else:
            remove_folder(folder.path)
        raise


@contextmanager
def _stopped_like_ctrl_c() -> Iterator[None]:
    """SIGTERM, by which batch systems end what takes too long, keeps what was finished as well."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _default_folder(model: str) -> Path:
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in model).strip("-.")[:100] or "model"
    path = Path("evals") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    others = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(p for p in itertools.chain([path], others) if not p.exists())


def _create(path: Path, config: Config, facts: Mapping[str, Any]) -> RunFolder:
    """Not a run: nothing in it can be resumed, and its configuration is a recipe."""
    if path.exists():
        raise UserError(f"{str(path)!r} already exists: give another --out, or delete it")
    try:
        with new_folder(path) as draft:
            write_atomically(draft / RECIPE_FILE, config.to_yaml())
            write_atomically(draft / "provenance.json", json.dumps(facts, indent=1))
    except StorageError:
        raise
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be made ({error.strerror}): give another --out") from None
    return RunFolder(path)


def _server_of(server: ChatServer) -> dict[str, Any]:
    return {"server": {"url": server.url, "model": server.model, "request": server.fields}}


def _usage(trajectories: Sequence[Trajectory]) -> dict[str, int]:
    turns = [turn for t in trajectories for turn in t.turns]
    counts = [turn.counts for turn in turns if turn.counts is not None]
    return {
        "responses": len(turns),
        "prompt_tokens": sum(count.prompt for count in counts),
        "response_tokens": sum(count.response for count in counts),
        "uncounted": len(turns) - len(counts),
    }
