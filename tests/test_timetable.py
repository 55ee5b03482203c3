"""Times of a step add up, in numbers and in what is printed."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from epo.reporting.terminal.console import ConsoleObserver
from epo.reporting.timetable import PHASES, UPDATE_PARTS, time_metrics, time_table

SECONDS = {"environment": 2.0, "prefill": 1.0, "decode": 3.0, "values": 0.5, "forward": 1.0, "backward": 2.0}


def metrics() -> dict[str, float]:
    return time_metrics(SECONDS, step_seconds=12.0, rollout_seconds=7.0, sampling_seconds=4.5)


def test_phases_add_up_to_the_step():
    found = metrics()
    assert sum(found[f"time/{name}"] for name in PHASES) == pytest.approx(found["time/step"])
    assert sum(found[f"time/{name}"] for name in UPDATE_PARTS) == pytest.approx(found["time/update"]) == 3.0
    assert found["time/sampling_rest"] == 0.5 and found["time/other"] == 2.0
    assert found["time/reference"] == found["time/old_logprobs"] == 0.0


def test_table_shows_means_and_shares_of_what_took_time():
    lines = time_table({name: 2 * value for name, value in metrics().items()}, steps=2)
    cells = {line[:18].strip(): line[18:].split() for line in lines}
    assert cells["environment"] == ["2.00", "16.7%"]
    assert cells["update"] == ["3.00", "25.0%"] and cells["backward"] == ["2.00", "16.7%"]
    assert cells["step"] == ["12.00", "100.0%"]
    assert "reference" not in cells


def test_console_prints_the_table_once_at_the_end():
    out = io.StringIO()
    with ConsoleObserver(2, Console(file=out, width=200)) as observer:
        for step in (1, 2):
            observer.step(
                step, metrics() | {"episodes": 4, "success/train": 0, "reward/mean": 0, "tokens/per_second": 1}
            )
        assert "backward" not in out.getvalue()
    assert out.getvalue().count("backward") == 1 and "100.0%" in out.getvalue()
    quiet = io.StringIO()
    with ConsoleObserver(0, Console(file=quiet, width=200)):
        pass
    assert quiet.getvalue() == ""
