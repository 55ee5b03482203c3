"""The table of a run at work, in a real terminal of every size, and plain lines where there is none."""

from __future__ import annotations

import dataclasses
import io
import logging
import math
import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from payloads import PAYLOADS, is_active, printable
from rich.console import Console
from terminal import Terminal, resize, run_in_terminal

from epo.evaluation.panels import PanelResult
from epo.reporting.health.alarms import ALARMS
from epo.reporting.terminal import console as console_module
from epo.reporting.terminal.console import ConsoleObserver
from epo.reporting.terminal.live_table import MAX_HEIGHT, RunState, duration, evaluation_lines, sparkline

PANEL = {"score": 0.5, "turns": 5.0, "invalid": 0.0, "errors": 0, "by_goal": {}}
RESULTS = [
    PanelResult(split="iid", success=0.625, low=0.541, high=0.704, episodes=128, **PANEL),
    PanelResult(split="ood", success=0.25, low=0.182, high=0.332, episodes=128, **PANEL),
]


def metrics(step: int) -> dict[str, float]:
    return {
        "episodes": 8.0, "success/train": 0.01 * step, "reward/mean": -0.5 + 0.03 * step,
        "entropy/mean": 1.0 + 0.001 * step,
        "entropy/turn_early": 1.25, "entropy/turn_late": 1.75, "entropy/reference": 1.52,
        "entropy/below": 0.03, "entropy/above": 0.04, "policy/kl": 0.0123, "policy/clip_fraction": 0.045,
        "policy/grad_norm": 0.67, "value/explained_variance": -0.21, "turns/invalid": 0.089, "tokens/per_second": 431.0,
        "time/step": 1.0, "time/decode": 1.0,
        **{f"health/{name}": 0.0 for name in ALARMS}, "health/entropy_eruption": 1.0,
    }  # fmt: skip


def play(observer: ConsoleObserver, *, steps: range, note: str = "model: tiny") -> None:
    observer.note(note)
    for step in steps:
        observer.begin(f"step {step}/40", 8)
        observer.advance(5, "success 2/5")
        observer.step(step, metrics(step))
        if step % 5 == 0:
            observer.begin("evaluate iid", 128)
            observer.evaluated(step, RESULTS)
    observer.begin(f"step {steps.stop}/40", 8)
    observer.advance(5, "success 2/5")


def show(pause: Callable[[], None], **options: Any) -> None:
    with ConsoleObserver(40, Console(stderr=True)) as observer:
        play(observer, steps=range(1, 13), **options)
        observer.note("so far so good")  # draws what `advance` left
        pause()


# ---------------------------------------------------------------- in a terminal


@pytest.mark.parametrize(
    ("columns", "titles"),
    [
        (80, "step succ reward H early→late H_ref out KL clip grad e.v. inv tok/s"),
        (
            120,
            "step success reward entropy early→late reference outside KL clipped gradient explained invalid tokens/s",
        ),
        (40, "step succ reward early→late KL inv"),
    ],
)
def test_the_table(columns: int, titles: str):
    terminal = run_in_terminal(show, columns=columns)
    (shown,) = terminal.snapshots
    assert terminal.code == 0
    header = shown.index(next(line for line in shown if line.startswith("step ") and "reward" in line))
    assert shown[header].split() == titles.split()
    rows = [line.split() for line in shown[header + 1 : header + 9]]
    assert [row[0] for row in rows] == [str(step) for step in range(5, 13)]
    cells = {
        "succ": "0.12", "success": "0.12", "reward": "-0.14", "H": "1.012", "entropy": "1.012",
        "early→late": "1.25↗1.75",
        "H_ref": "1.52", "reference": "1.52", "out": "7%", "outside": "7%", "KL": "0.0123", "clip": "4.5%",
        "clipped": "4.5%", "grad": "0.67", "gradient": "0.67", "e.v.": "-0.21", "explained": "-0.21", "inv": "8.9%",
        "invalid": "8.9%", "tok/s": "431", "tokens/s": "431", "step": "12",
    }  # fmt: skip
    assert rows[-1] == [cells[name] for name in titles.split()]
    text = "\n".join(shown)
    assert "iid 0.625 [0.541, 0.704]" in text and "ood 0.250 [0.182, 0.332]" in text
    assert f"! {ALARMS['entropy_eruption'].title}" in text
    assert "step 13/40" in text and "5/8" in text and "left " in text and "━" in text
    assert re.search(r"success 0 to 1\.00 ▁+", text) and re.search(r"entropy 0 to 1\.01 █+", text)
    # Notes above it, once; no plain lines; the cursor back; the block gone but for its table.
    assert text.count("model: tiny") == 1 and "so far so good" in text
    everything = "\n".join(terminal.everything())
    assert "episodes 8" not in everything and "95 % interval" not in everything
    assert everything.count("model: tiny") == 1
    assert not terminal.screen.cursor.hidden
    end = "\n".join(terminal.lines())
    assert "time of a step" in end and "step 13/40" not in end
    assert sum(line.startswith("step ") and "reward" in line for line in terminal.lines()) == 1


def test_a_changed_size_leaves_no_remains():
    def program(pause: Callable[[], None]) -> None:
        with ConsoleObserver(40, Console(stderr=True)) as observer:
            play(observer, steps=range(1, 10))
            pause()
            for text in ("narrow now", "wide now", "low now", "back again"):
                observer.note(text)
                pause()

    def to(columns: int, rows: int) -> Callable[[Terminal, int], None]:
        return lambda terminal, keyboard: resize(terminal, keyboard, columns=columns, rows=rows)

    sizes = [(50, 24), (130, 24), (80, 10), (80, 24)]
    terminal = run_in_terminal(program, columns=100, at_pause=[to(*size) for size in sizes])
    assert terminal.code == 0 and len(terminal.snapshots) == 5
    for (columns, rows), shown in zip([(100, 24), *sizes], terminal.snapshots, strict=True):
        assert len(shown) == rows and all(len(line) <= columns for line in shown)
        assert sum("early→late" in line for line in shown) == 1, shown
        assert sum(line.startswith("step 10/40") for line in shown) == 1, shown
    assert "back again" in "\n".join(terminal.snapshots[-1])
    # The emulator cuts lines where other terminals wrap them, so remains would not show: the screen is cleared.
    assert terminal.raw.count(b"\x1b[2J") == len(sizes)
    assert all("model: tiny" in shown for shown in terminal.snapshots[:3])
    assert not terminal.screen.cursor.hidden


def test_without_colours():
    with_colours = run_in_terminal(show)
    without = run_in_terminal(show, environment={"NO_COLOR": "1"})
    assert with_colours.snapshots[0][:-8] == without.snapshots[0][:-8]  # but for the times in the last line

    def colours(terminal: Terminal) -> set[str]:
        codes = {code for found in re.findall(rb"\x1b\[([\d;]*)m", terminal.raw) for code in found.decode().split(";")}
        return {code for code in codes if code and 30 <= int(code) <= 107}

    assert colours(with_colours) and not colours(without)


def test_a_terminal_without_cursor_control_gets_lines():
    terminal = run_in_terminal(show, columns=200, environment={"TERM": "dumb"})
    assert b"\x1b" not in terminal.raw
    assert "step  12/40  episodes 8" in "\n".join(terminal.everything())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_the_terminal_clean(error: type[BaseException]):
    def program(pause: Callable[[], None]) -> None:
        try:
            with ConsoleObserver(40, Console(stderr=True)) as observer:
                play(observer, steps=range(1, 4))
                raise error
        except error:
            sys.stderr.write("the shell's prompt\n")

    terminal = run_in_terminal(program)
    assert terminal.code == 0 and not terminal.screen.cursor.hidden
    end = [line for line in terminal.lines() if line]
    assert end[-1] == "the shell's prompt"
    assert not any(line.startswith("step 4/40") or "iid" in line for line in end)


def test_what_libraries_print_appears_above_the_table():
    def program(pause: Callable[[], None]) -> None:
        logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
        with ConsoleObserver(40, Console(stderr=True)) as observer:
            play(observer, steps=range(1, 4))
            logging.getLogger("library").warning("a library warns")
            sys.stdout.write("somebody prints\n")
            observer.note("the end")
            pause()
        logging.getLogger("library").warning("afterwards")

    terminal = run_in_terminal(program)
    (shown,) = terminal.snapshots
    for text in ("a library warns", "somebody prints"):
        assert sum(text in line for line in shown) == 1, shown
    assert sum("early→late" in line for line in shown) == 1
    assert "afterwards" in "\n".join(terminal.lines())


MINUTE = """
name: minute
steps: 500
environment: {suite: corridor, options: {length: 3, choices: 2, tasks: 4}, workers: 1, max_turns: 4}
agent: {format: action, max_response_tokens: 6}
model:
  max_context: 256
  device: cpu
  threads: 1
  tiny: {vocabulary_size: 320, hidden_size: 32, layers: 2, heads: 2, intermediate_size: 64}
imitation: {demonstrations: 4, batches: 20, batch_size: 4}
rollout: {tasks_per_step: 4}
optimizer: {minibatches: 2}
evaluation: {every: 0, episodes: 4, splits: [iid]}
logging: {to: []}
"""


def test_control_c_in_a_real_run(tmp_path: Path):
    (tmp_path / "minute.yaml").write_text(MINUTE)
    pressed: list[bool] = []

    def press(terminal: Terminal, keyboard: int) -> None:
        if not pressed and any("reward" in line for line in terminal.lines()):
            pressed.append(True)
            os.write(keyboard, b"\x03")

    command = f"import os; os.chdir({str(tmp_path)!r}); from epo.cli import main; main()"
    terminal = run_in_terminal(
        [sys.executable, "-c", command, "train", "minute.yaml"],
        environment={"EPO_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
        watch=press,
        seconds=240,
    )
    everything = "\n".join(terminal.everything())
    assert terminal.code == 130, everything
    assert pressed and "stopping after this step" in everything and "--resume goes on" in everything
    assert "Traceback" not in everything and not terminal.screen.cursor.hidden


# ---------------------------------------------------------------- what has room


def random_state(seed: int) -> RunState:
    rng = random.Random(seed)
    state = RunState(total=1000, alarm_titles={name: alarm.title for name, alarm in ALARMS.items()})
    state.stage, state.stage_total, state.stage_done = rng.choice(
        [("starting", 0, 0), ("step 999/1000", 128, 64), ("evaluate a-split-with-quite-a-long-name", 4, 9)]
    )
    state.stage_note, state.left = rng.choice([("", None), ("success 12/64", 86399.0)])
    for step in range(1, rng.choice([1, 2, 30, 500])):
        values = metrics(step)
        for name in rng.sample(sorted(values), 5):
            values[name] = rng.choice([math.nan, math.inf, -1e9, 1e-9, 12345.678, 1.0])
        for name in rng.sample(sorted(values), rng.choice([0, 10])):
            del values[name]
        state.history.append((step, values))
    if rng.random() < 0.5:
        state.evaluation = (5, RESULTS * rng.choice([1, 4]))
    return state


@pytest.mark.parametrize("seed", range(6))
def test_a_frame_fits_every_size(seed: int):
    state = random_state(seed)
    for width in (12, 20, 33, 40, 60, 79, 80, 81, 100, 120, 200):
        for height in (2, 3, 4, 6, 9, 15, 24, 60):
            out = io.StringIO()
            console = Console(file=out, width=width, height=height)
            console.print(state.frame())
            lines = out.getvalue().splitlines()
            assert 1 <= len(lines) <= min(MAX_HEIGHT, height - 1), (width, height, lines)
            assert all(len(line.rstrip()) < width for line in lines), (width, height, lines)
            assert state.stage[:6] in lines[-1]


def test_episodes_that_a_panel_lost_are_shown():
    state = RunState(total=10, evaluation=(5, [RESULTS[0], dataclasses.replace(RESULTS[1], errors=7)]))
    iid, ood = (line.plain for line in evaluation_lines(state, width=100))
    assert "lost" not in iid and "128 episodes, 7 lost" in ood


def test_characters_for_terminals_that_know_only_ascii():
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii"), width=100, height=30)
    console.print(random_state(3).frame())
    console.file.flush()
    assert b"early-late" in raw.getvalue()


@pytest.mark.parametrize(
    ("values", "width", "expected"),
    [
        ([0.0, 0.5, 1.0], 10, "▁▅█"),
        ([0.0, None, math.nan, 1.0], 10, "▁  █"),
        ([0.0, 0.0, 1.0, 1.0], 2, "▁█"),
        ([0.0, 1.0, None, None], 2, "▅ "),
        ([-5.0, 5.0], 9, "▁█"),
        ([], 5, ""),
    ],
)
def test_sparklines(values: list[float | None], width: int, expected: str):
    assert sparkline(values, 0.0, 1.0, width) == expected


def test_a_sparkline_of_equal_values():
    assert sparkline([2.0, 2.0], 2.0, 2.0, 5) == "▁▁"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (200, "3m20s"), (3900, "1h05m")])
def test_durations(seconds: float, text: str):
    assert duration(seconds) == text


# ---------------------------------------------------------------- without a terminal, and payloads


@pytest.mark.parametrize("forced", [False, True])
def test_plain_lines_where_there_is_no_terminal(forced: bool, monkeypatch: pytest.MonkeyPatch):
    if forced:
        monkeypatch.setenv("FORCE_COLOR", "1")
    out = io.StringIO()
    with ConsoleObserver(40, Console(file=out, width=80)) as observer:
        play(observer, steps=range(1, 6))
    lines = out.getvalue().splitlines()
    assert "\x1b[?25" not in out.getvalue() and "\x1b[1A" not in out.getvalue()
    assert sum(line.startswith("step ") and "episodes 8" in line for line in lines) == 5
    assert any(
        line.startswith("step   5/40  iid: success 0.625 (95 % interval 0.541 to 0.704, 128 ep") for line in lines
    )
    assert "model: tiny" in lines and "evaluate iid (128)" in lines
    assert not any("early→late" in line for line in lines)


@pytest.mark.parametrize("name", PAYLOADS)
def test_no_payload_is_obeyed_without_a_terminal(name: str):
    out, payload = io.StringIO(), PAYLOADS[name]
    with ConsoleObserver(40, Console(file=out)) as observer:
        observer.note(payload)
        observer.begin(payload, 3)
        observer.evaluated(1, [PanelResult(split=payload, success=0.5, low=0.1, high=0.9, episodes=4, **PANEL)])
    assert not any(map(is_active, out.getvalue().replace("\n", "")))
    shown = iter(out.getvalue())
    assert all(character in shown for character in printable(payload))


def test_no_payload_is_obeyed_in_a_terminal():
    def program(payloads: list[str]) -> Callable[[Callable[[], None]], None]:
        def run(pause: Callable[[], None]) -> None:
            with ConsoleObserver(40, Console(stderr=True)) as observer:
                observer.step(1, metrics(1))
                for payload in payloads:
                    observer.note(payload)
                    observer.begin(payload, 3)
                    observer.advance(1, payload)
                    observer.evaluated(1, [PanelResult(split=payload, success=0, low=0, high=1, episodes=4, **PANEL)])

        return run

    sequence = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r\n?|\n")
    harmless, hostile = (
        run_in_terminal(program(payloads)).raw.decode() for payloads in (["x", "y\nz"] * 9, list(PAYLOADS.values()))
    )
    assert set(sequence.findall(hostile)) <= set(sequence.findall(harmless))
    assert not any(map(is_active, sequence.sub("", hostile)))


def test_a_note_within_a_note_is_not_lost(monkeypatch: pytest.MonkeyPatch):
    """A signal handler writes a note while the display is being drawn."""

    def program(pause: Callable[[], None]) -> None:
        console = Console(stderr=True)
        with ConsoleObserver(40, console) as observer:
            original, again = console.print, [True]

            def interrupted(*arguments: Any, **options: Any) -> None:
                if again.pop() if again else False:
                    observer.note("from a signal handler")
                original(*arguments, **options)

            console.print = interrupted  # type: ignore[method-assign]
            observer.note("interrupted")
            pause()

    (shown,) = run_in_terminal(program).snapshots
    assert [line for line in shown if line][:2] == ["interrupted", "from a signal handler"]


# ---------------------------------------------------------------- nothing happens


def lines_of(program: Callable[[ConsoleObserver], None], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said without a terminal, with a heartbeat of 0.2 s instead of a minute."""
    monkeypatch.setattr(console_module, "HEARTBEAT_SECONDS", 0.2)
    out = io.StringIO()
    with ConsoleObserver(40, Console(file=out, width=200)) as observer:
        program(observer)
    assert not any(thread.name == "heartbeat" for thread in threading.enumerate())
    return out.getvalue().splitlines()


def test_a_stage_in_which_nothing_comes_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch):
    def program(observer: ConsoleObserver) -> None:
        observer.begin("step 3/40", 8)
        time.sleep(0.7)  # as in a call that hangs
        observer.advance(5, "success 2/5")
        time.sleep(0.7)
        observer.advance(8, "success 4/8")
        time.sleep(0.7)

    lines = lines_of(program, monkeypatch)
    forms = [
        r"step 3/40: 0 of 8, \d+s in it; 8 to go",
        r"step 3/40: 5 of 8, success 2/5, \d+s in it; 3 to go, the last came \d+s ago",
        r"step 3/40: 8 of 8, success 4/8, \d+s in it",
    ]
    for form in forms:
        assert any(re.fullmatch(form, line) for line in lines), (form, lines)
    assert all(any(re.fullmatch(form, line) for form in forms) for line in lines)
    assert len(lines) <= 10


def test_what_is_not_counted_has_no_count(monkeypatch: pytest.MonkeyPatch):
    def program(observer: ConsoleObserver) -> None:
        observer.begin("prepare corridor", 0)
        time.sleep(0.5)

    first, *rest = lines_of(program, monkeypatch)
    assert first == "prepare corridor" and rest
    assert all(re.fullmatch(r"prepare corridor, \d+s in it", line) for line in rest)


def test_where_lines_come_there_is_no_heartbeat(monkeypatch: pytest.MonkeyPatch):
    def program(observer: ConsoleObserver) -> None:
        monkeypatch.setattr(console_module, "HEARTBEAT_SECONDS", 60.0)
        for step in range(1, 6):
            observer.begin(f"step {step}/40", 8)
            observer.advance(8)
            observer.step(step, metrics(step))

    assert not any("in it" in line for line in lines_of(program, monkeypatch))
