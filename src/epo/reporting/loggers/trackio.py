"""The metrics of a run for trackio, in its database on this machine (`$TRACKIO_DIR`, or where trackio keeps it).

`trackio show` opens its dashboard; `trackio sync` sends a project to a Space of the Hugging Face hub, if you want that.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator, Mapping

from epo.reporting.loggers import LoggedRun

_REMOTE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_BUCKET_ID", "TRACKIO_DATASET_ID", "TRACKIO_WEBHOOK_URL")
"""Variables by which trackio would send numbers elsewhere of its own accord."""


class TrackioLogger:
    """Logs into one trackio run. Its name carries the run's id, by which a resumed run finds it again."""

    repeats = False

    def __init__(self, run: LoggedRun) -> None:
        # trackio swallows its failures and warns; `_check` makes one note of them.
        warnings.filterwarnings("ignore", module=r"trackio\b")
        with _kept_here(), _quiet():
            import trackio

            self._run = trackio.init(
                project=run.project,
                name=f"{run.name}-{run.id}",
                config=run.config,
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)
        self._check()

    def close(self) -> None:
        import trackio

        with _quiet():
            trackio.finish()  # not the run's own: this one also keeps trackio from finishing it again at exit
        self._check()

    def _check(self) -> None:
        if failures := getattr(self._run, "_warned_failures", None):
            raise RuntimeError(f"trackio reports {', '.join(sorted(failures))}")


@contextlib.contextmanager
def _kept_here() -> Iterator[None]:
    """Inside, trackio looks up no account on the hub and sees no variable that names a server."""
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    hidden = {name: os.environ.pop(name) for name in _REMOTE if name in os.environ}
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        os.environ.update(hidden)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What trackio prints belongs neither on stdout, which may carry JSON, nor between our lines."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
