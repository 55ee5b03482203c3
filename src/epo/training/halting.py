"""Stopping a run whose health asks for it, and saying how to go on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epo.reporting.health import Verdict
from epo.reporting.health.alarms import ALARMS


@dataclass(frozen=True, kw_only=True, slots=True)
class Halt:
    """Why and where a run was stopped (`health.halt`)."""

    verdict: Verdict
    alarms: tuple[str, ...]
    """Those that were on, of the ones that stop the run."""
    last_good: Path | None
    """The newest checkpoint that none of them speaks against."""

    def as_dict(self) -> dict[str, Any]:
        """For `summary.json`."""
        last_good = None if self.last_good is None else str(self.last_good)
        return {"step": self.verdict.step, "alarms": list(self.alarms), "last_good": last_good}

    def message(self, run: Path) -> list[str]:
        """What fired, what to try, and how to go on, in lines."""
        lines = [f"halted at step {self.verdict.step}, whose trajectories are in {run / 'trajectories'}"]
        for name in self.alarms:
            lines += [f"  {self.verdict.describe(name)}", f"  try: {ALARMS[name].advice}"]
        lines.append("to go on all the same: the command of this run with --resume health.halt=[]")
        if self.last_good is None:
            return [*lines, "no checkpoint is left that these alarms do not speak against: start anew"]
        start = f"model.path={self.last_good / 'policy'} imitation.demonstrations=0"
        return [*lines, f"to start a new run from the last good weights: another --name, {start}, and what you change"]
