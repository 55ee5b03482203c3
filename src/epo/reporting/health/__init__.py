"""Health of a run: alarms that follow from its metrics, and from nothing else.

Example::

    health = Health(config.health)
    for metrics in history:                  # one mapping per step, oldest first
        verdict = health.observe(metrics)
    verdict.metrics()                        # {"health/length": 0.0, ...}
    verdict.notes()                          # a line for every alarm that began or ended at this step

A run that is resumed shows its recorded steps to a new `Health`, and is judged on as if it had never stopped.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from epo.config import HealthConfig
from epo.reporting.health.alarms import ALARMS, Alarm, catalogue
from epo.reporting.health.rules import Reading, Series

__all__ = ["ALARMS", "Alarm", "Firing", "Health", "Verdict", "catalogue", "judge"]

RELEASE = 3
"""An alarm ends after this many steps in a row at which its rule did not fire."""


@dataclass(slots=True)
class Firing:
    """One time that an alarm was on."""

    alarm: str
    since: int
    """The first step whose metrics were bad."""
    until: int | None = None
    """The last such step; None while it is on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What the alarms say of one step."""

    step: int
    active: dict[str, Reading]
    """Alarms that are on, with the reading of this step, or the last one there was."""
    began: tuple[str, ...]
    ended: tuple[str, ...]

    def metrics(self) -> dict[str, float]:
        """`health/<alarm>`: 1 while on, else 0."""
        return {f"health/{name}": float(name in self.active) for name in ALARMS}

    def describe(self, name: str) -> str:
        """An active alarm in half a line: what, and the number against its threshold."""
        reading = self.active[name]
        return f"{ALARMS[name].title}: {reading.metric} {reading.value:.3g} is {reading.side} {reading.limit:.3g}"

    def notes(self) -> list[str]:
        """A line for every alarm that began at this step, and for every one that ended."""
        began = [f"alarm at step {self.step}: {self.describe(name)}. Try: {ALARMS[name].advice}" for name in self.began]
        return began + [f"alarm over at step {self.step}: {ALARMS[name].title}" for name in self.ended]


@dataclass(slots=True)
class _Watch:
    """Where one alarm stands."""

    bad: int = 0
    """Steps in a row, up to the last, at which the rule fired."""
    calm: int = 0
    """The same for not firing."""
    reading: Reading | None = None
    """The last that fired."""
    firing: Firing | None = None


@dataclass(slots=True)
class Health:
    """Judges a run step by step."""

    config: HealthConfig
    firings: list[Firing] = field(default_factory=list[Firing])
    """All so far, in the order they began."""
    step: int = 0
    _series: Series = field(default_factory=Series)
    _watches: dict[str, _Watch] = field(default_factory=lambda: {name: _Watch() for name in ALARMS})

    def observe(self, metrics: Mapping[str, object]) -> Verdict:
        """Judge the next step from its metrics, as recorded or about to be."""
        self._series.append(metrics)
        self.step += 1
        began: list[str] = []
        ended: list[str] = []
        for name, watch in self._watches.items():
            reading = ALARMS[name].rule(self._series, self.config)
            if reading is not None and reading.fires:
                watch.bad, watch.calm, watch.reading = watch.bad + 1, 0, reading
                if watch.firing is None and watch.bad >= ALARMS[name].persistence:
                    watch.firing = Firing(name, since=self.step - watch.bad + 1)
                    self.firings.append(watch.firing)
                    began.append(name)
            else:
                watch.bad, watch.calm = 0, watch.calm + 1
                if watch.firing is not None and watch.calm >= RELEASE:
                    watch.firing.until = self.step - watch.calm
                    watch.firing = None
                    ended.append(name)
        active = {n: w.reading for n, w in self._watches.items() if w.firing is not None and w.reading is not None}
        return Verdict(step=self.step, active=active, began=tuple(began), ended=tuple(ended))

    def last_good(
        self, checkpoints: Iterable[int], *, alarms: Collection[str] = (), suspecting: bool = False
    ) -> int | None:
        """The newest of the `checkpoints` (numbers of finished steps) that no alarm speaks against; None without one.

        A step plays with the weights before it and ends with those after it. So a bad step speaks against the
        checkpoint of the step before it and against its own.

        Args:
            alarms: those that count; all by default.
            suspecting: count alarms too whose rule fires now and that may begin at a later step.
        """
        firings = list(self.firings)
        if suspecting:
            begun = self._watches.items()
            firings += [Firing(n, since=self.step - w.bad + 1) for n, w in begun if w.bad and w.firing is None]
        counting = [f for f in firings if not alarms or f.alarm in alarms]

        def is_good(step: int) -> bool:
            return not any(f.since - 1 <= step and (f.until is None or step <= f.until) for f in counting)

        return max(filter(is_good, checkpoints), default=None)


def judge(history: Sequence[Mapping[str, object]], config: HealthConfig | None = None) -> list[Verdict]:
    """The verdict of every step of a run, from the lines of its `metrics.jsonl`."""
    health = Health(config or HealthConfig())
    return [health.observe(metrics) for metrics in history]
