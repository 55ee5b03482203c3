"""Where the numbers of a run go besides its folder: TensorBoard, Weights & Biases, trackio; same names everywhere.

A logger never ends a run: what goes wrong in one is said once, and the run goes on without it.
"""

from __future__ import annotations

import importlib.util
import json
import math
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from epo.config import Config, LoggingConfig
from epo.errors import UserError
from epo.evaluation.panels import PanelResult
from epo.files import write_atomically


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggedRun:
    """What a logger is told of the run."""

    folder: Path
    id: str
    """Kept in the run folder: a resumed run goes on under the same."""
    project: str
    name: str
    config: dict[str, Any]
    is_online: bool
    first_step: int
    """The first step that this session trains."""


class MetricsLogger(Protocol):
    """One destination. Any exception means that it is lost."""

    repeats: bool
    """A step that is logged again replaces the earlier one, so steps that a resumed run repeats are logged again."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of `step`; steps never go back, and one may come in parts."""

    def close(self) -> None: ...


def require_loggers(config: LoggingConfig) -> None:
    """Finds out early that a logger cannot work.

    Raises:
        UserError: a package is missing, or an account that `mode: online` needs. TensorBoard, the default, may be
            missing: a note says so later.
    """
    for name in ("wandb", "trackio"):
        if name in config.to and not _is_installed(name):
            raise UserError(
                f"logging.to names {name!r}, which is not installed: pip install -e '.[{name}]', or leave it out"
            )
    if "wandb" in config.to and config.mode == "online":
        from epo.reporting.loggers.wandb import require_account

        require_account()


@contextmanager
def open_loggers(
    config: Config,
    folder: Path,
    *,
    step: int,
    metrics: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
    note: Callable[[str], None],
) -> Iterator[Loggers]:
    """The loggers that `config.logging.to` names, brought up to what the run folder already has.

    Args:
        folder: of the run.
        step: finished steps.
        metrics, evaluations: lines of the run's files.
    """
    # Before the first evaluation of a run nothing of it counts, not even what was logged of step 0.
    loggers = Loggers(config, folder, step=step, first_step=step + 1 if evaluations else 0, note=note)
    try:
        loggers.catch_up(metrics, evaluations)
        yield loggers
    finally:
        loggers.close()


class Loggers:
    """All loggers of a run as one `MetricsLog`.

    `logging.json` in the run folder keeps the id under which they know the run, and how far each of them is. It is
    written before a step is logged: a crash in between costs a logger that step, and never gives it one twice.
    """

    def __init__(
        self, config: Config, folder: Path, *, step: int, first_step: int, note: Callable[[str], None]
    ) -> None:
        self._note = note
        self._file = folder / "logging.json"
        self._kept = _read(self._file)
        self._loggers: dict[str, MetricsLogger] = {}
        run = LoggedRun(
            folder=folder,
            id=self._kept["id"],
            project=config.logging.project,
            name=config.logging.run_name or folder.resolve().name,
            config=config.model_dump(mode="json"),
            is_online=config.logging.mode == "online",
            first_step=first_step,
        )
        if (folder / "tensorboard").is_dir():  # a run from before this file was kept
            self._kept["logged"].setdefault("tensorboard", {"step": step, "evaluation": step})
        for name in config.logging.to:
            if name == "tensorboard" and not _is_installed("tensorboard"):
                note("no TensorBoard log: pip install -e '.[report]' to have one")
                continue
            with self._guarded(name):
                self._loggers[name] = _OPENERS[name](run)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._log(step, metrics, kind="step")

    def evaluated(self, step: int, results: Sequence[PanelResult]) -> None:
        self._log(step, evaluation_metrics([result.as_dict() for result in results]), kind="evaluation")

    def catch_up(self, metrics: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> None:
        """Give every logger what the run folder has and it has not: of sessions before it was asked for."""
        lines = [(line["step"], "step", {k: v for k, v in line.items() if k != "step"}) for line in metrics]
        lines += [(entry["step"], "evaluation", evaluation_metrics(entry["panels"])) for entry in evaluations]
        for step, kind, values in sorted(lines, key=lambda line: (line[0], line[1] == "evaluation")):
            self._log(step, values, kind=kind, is_old=True)

    def close(self) -> None:
        for name in list(self._loggers):
            with self._guarded(name):
                self._loggers.pop(name).close()

    def _log(self, step: int, values: Mapping[str, Any], *, kind: str, is_old: bool = False) -> None:
        numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
        for name, logger in list(self._loggers.items()):
            known = self._kept["logged"].setdefault(name, {"step": -1, "evaluation": -1})
            if step <= known[kind] and (is_old or not logger.repeats):
                continue
            known[kind] = max(step, known[kind])
            with self._guarded(name):
                self._save()
                logger.log(step, numbers)

    def _save(self) -> None:
        write_atomically(self._file, json.dumps(self._kept))

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # dozens of kinds, of three libraries, the disk and the network
            if (lost := self._loggers.pop(name, None)) is not None:
                with suppress(Exception):
                    lost.close()
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self._note(f"no more numbers go to {name} ({reason}); the run goes on, and --resume takes it up again")


def evaluation_metrics(panels: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`eval/<split>/<number>` of the panels of an evaluation."""
    return {
        f"eval/{panel['split']}/{name}": float(panel[name])
        for panel in panels
        for name in ("success", "low", "high", "score", "turns", "invalid", "errors")
        if panel.get(name) is not None and math.isfinite(panel[name])
    }


def _read(file: Path) -> dict[str, Any]:
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        return {"id": str(kept["id"]), "logged": dict(kept["logged"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {"id": secrets.token_hex(4), "logged": {}}


def _is_installed(package: str) -> bool:
    # A folder of that name in the working directory, such as wandb makes, is found too, but without a file.
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def _open_tensorboard(run: LoggedRun) -> MetricsLogger:
    from epo.reporting.loggers.tensorboard import TensorBoardLogger

    return TensorBoardLogger(run)


def _open_wandb(run: LoggedRun) -> MetricsLogger:
    from epo.reporting.loggers.wandb import WandbLogger

    return WandbLogger(run)


def _open_trackio(run: LoggedRun) -> MetricsLogger:
    from epo.reporting.loggers.trackio import TrackioLogger

    return TrackioLogger(run)


_OPENERS: dict[str, Callable[[LoggedRun], MetricsLogger]] = {
    "tensorboard": _open_tensorboard,
    "wandb": _open_wandb,
    "trackio": _open_trackio,
}
