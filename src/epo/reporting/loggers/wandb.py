"""The metrics of a run for Weights & Biases: on this machine, or sent to its server where the user asks for it.

Offline, every session of a run leaves a folder `wandb/offline-run-*` below the run folder (or `$WANDB_DIR`), all with
the same run id; `wandb sync` sends them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from epo.errors import UserError
from epo.reporting.loggers import LoggedRun

_FINISH_SECONDS = 120.0
"""How long the end of a run waits for an upload; without a network it would wait for ever."""


def require_account() -> None:
    """Raises UserError if nobody is logged in. Asks nothing and connects to nothing."""
    import wandb

    if not wandb.login(prompt=False, verify=False):
        raise UserError(
            "logging.mode=online needs a Weights & Biases account: run `wandb login`, or set WANDB_API_KEY, or set "
            "logging.mode to offline"
        )


class WandbLogger:
    """Logs into one W&B run; W&B's step is the RL step."""

    repeats = False

    def __init__(self, run: LoggedRun) -> None:
        if not run.is_online:
            # Read at import: W&B's reports of its own errors go over the network in every mode.
            os.environ["WANDB_ERROR_REPORTING"] = "false"
        # It prints advice on Weave, silent or not, where packages such as mcp are loaded.
        os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")
        import wandb

        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=run.id,
            resume="allow" if run.is_online else None,
            config=run.config,
            mode="online" if run.is_online else "offline",
            dir=os.environ.get("WANDB_DIR", str(run.folder)),
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                disable_code=True,
                save_code=False,
                x_disable_stats=True,
                x_disable_machine_info=True,
                init_timeout=60.0,
                finish_timeout=_FINISH_SECONDS,
            ),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()
