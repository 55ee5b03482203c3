"""`epo show`: the right tokens, marked as they were trained, and nothing of a payload obeyed."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from payloads import LONG, PAYLOADS, is_active, printable
from rich.console import Console

from epo import cli
from epo.reporting.reading.stored import Filter, StoredTrajectories
from epo.reporting.terminal.scales import SCALES, Scale
from epo.reporting.terminal.show import FOLD_AT, FOLD_LINES, TrajectoryView, has_colours, loss_mask, trajectory_table
from epo.reporting.trajectories import index_entry

VOCABULARY = ["<end>", "open", " the", " door", "\n", "⟨E2 80⟩", "look"]


def turn(ids: Sequence[int], *, trained: bool = True, **changes: Any) -> dict[str, Any]:
    count = len(ids)
    response = "".join(VOCABULARY[i] for i in ids if 0 < i < len(VOCABULARY))
    return {
        "observation": "a room", "response": response, "action": response, "is_valid": True, "understood": True,
        "reward": 0.0, "score": 0.0, "dropped_turns": 0, "prompt_tokens": 5, "response_ids": list(ids),
        "logprobs": [-0.5] * count, "entropy": [0.1] * count,
        "advantages": [1.0] * count if trained else None, "ratios": [1.0] * count if trained else None,
        "alternatives": [[i, -0.5, 6, -1.5] for i in ids],
        **changes,
    }  # fmt: skip


def record(*turns: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "step": 1, "group": 0, "task": "doors/1", "goal": "doors", "instruction": "Find the door.",
        "stop_reason": "failure", "success": False, "score": 0.0, "reward": 0.0, "error": None, "restarts": 0,
        "trained": True, "turns": list(turns), **changes,
    }  # fmt: skip


OLD_KEYS = ("reward", "trained", "instruction"), ("advantages", "ratios", "alternatives", "dropped_turns")


def old(new: dict[str, Any]) -> dict[str, Any]:
    """As runs before `epo show` wrote it."""
    turns = [{k: v for k, v in each.items() if k not in OLD_KEYS[1]} for each in new["turns"]]
    return {k: v for k, v in new.items() if k not in OLD_KEYS[0]} | {"turns": turns}


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """`write_run({step: records})` makes a run folder."""

    def write(steps: dict[int, list[dict[str, Any]]], *, vocabulary: bool = True, index: bool = True) -> Path:
        run = tmp_path / "runs" / "try1"
        (run / "trajectories").mkdir(parents=True)
        (run / "config.yaml").write_text("name: try1\n")
        if vocabulary:
            (run / "vocabulary.json").write_text(json.dumps(VOCABULARY))
        for step, records in steps.items():
            lines = [json.dumps({**each, "step": step}) for each in records]
            (run / "trajectories" / f"step_{step:06d}.jsonl").write_text("\n".join(lines) + "\n")
            if index:
                with (run / "trajectories" / "index.jsonl").open("a") as file:
                    file.write(json.dumps(index_entry([{**each, "step": step} for each in records])) + "\n")
        return run

    return write


@pytest.fixture
def epo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["epo", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
            sys.exit(0)
        captured = capsys.readouterr()
        code = exit_info.value.code
        return (0 if code is None else int(code)), captured.out, captured.err

    return run


def printed(view: TrajectoryView, *, coloured: bool, width: int = 100) -> str:
    out = io.StringIO()
    console = Console(
        file=out, width=width, force_terminal=coloured, color_system="truecolor" if coloured else None, highlight=False
    )
    for part in view.render():
        console.print(part)
    return out.getvalue()


def view(content: dict[str, Any], **options: Any) -> TrajectoryView:
    return TrajectoryView(content, **{"vocabulary": VOCABULARY, "scale": SCALES["entropy"], **options})


# ---------------------------------------------------------------- mask and marks


TWO_TURNS = record(
    turn([1, 2, 3, 0], entropy=[0.0, 0.31, 2.9, 7.0]),
    turn([6, 0], trained=False, is_valid=False, entropy=[1.5, None]),
)


def test_the_loss_mask_of_literal_tokens():
    # open the door <end>     look <end>
    assert loss_mask(TWO_TURNS) == [[True, True, True, True], [False, False]]
    assert loss_mask(record(turn([1], trained=False))) == [[False]]
    assert loss_mask(record(turn([]))) == [[]]
    assert loss_mask(old(TWO_TURNS)) is None


def test_marks_without_colour():
    plain = printed(view(TWO_TURNS, coloured=False), coloured=False)
    assert "writes ‹open›0‹ the›1‹ door›9‹<end>›9" in plain  # tenths of 3 nats, and beyond
    assert "writes ‹look›5‹<end>›-" in plain  # not known
    assert "\x1b" not in plain and "INVALID" in plain
    masked = printed(view(TWO_TURNS, coloured=False, mask=True), coloured=False)
    assert "writes ‹open›0‹ the›1‹ door›9‹<end>›9" in masked
    assert "writes look<end>" in masked  # not trained on: no mark
    assert "trained on" in masked


def cells(text: str) -> list[tuple[str, frozenset[str]]]:
    """Printed pieces with their SGR parameters."""
    found = re.findall(r"\x1b\[([\d;]*)m([^\x1b]*)", text)
    return [(piece.rstrip(), frozenset(codes.split(";"))) for codes, piece in found if piece.strip()]


def test_colours_and_underlines():
    def styles(**options: Any) -> dict[str, frozenset[str]]:
        body = printed(view(TWO_TURNS, **options), coloured=True).partition("turn 1:")[2]
        return dict(cells(body))

    plain, masked = styles(), styles(mask=True)
    for piece in ("open", " the", " door"):
        assert "48" in plain[piece] and "4" not in plain[piece]
        assert masked[piece] == plain[piece] | {"4"}
    assert plain["open"] != plain[" the"] != plain[" door"]
    assert masked["look"] == {"2"} and masked["a room"] == {"2"}  # dim, no colour


def test_tokens_of_lines_and_bytes():
    text = printed(view(record(turn([1, 4, 5, 99])), coloured=False), coloured=False)
    assert re.search(r"‹open›0‹␊›0 *\n", text) and "‹⟨E2 80⟩›0‹⟨#99⟩›0" in text


def test_old_runs_show_text_and_ids():
    text = printed(view(old(TWO_TURNS), vocabulary=None, mask=True, coloured=False), coloured=False)
    assert "loss mask: not recorded" in text and "‹⟨#1⟩›0‹⟨#2⟩›1" in text and "open the door" in text
    for by in ("advantage", "ratio"):
        assert "not recorded" in printed(view(old(TWO_TURNS), scale=SCALES[by]), coloured=True)


def test_alternatives_of_the_most_uncertain():
    text = printed(view(TWO_TURNS, top=2, coloured=False), coloured=False).partition("most uncertain")[2]
    first, second = [line.split() for line in text.splitlines()[2:] if line.strip()]
    assert first[:5] == ["1", "4", "<end>", "7.000", f"{100 * math.exp(-0.5):.1f}"]
    assert second[:3] == ["1", "3", "door"]
    assert f"‹look› {100 * math.exp(-1.5):.1f} %" in text
    assert "not recorded" in printed(view(old(TWO_TURNS), top=1), coloured=True)


# ---------------------------------------------------------------- scales


@pytest.mark.parametrize(
    ("name", "value", "level"),
    [
        ("entropy", 0.0, 0), ("entropy", 0.299, 0), ("entropy", 0.301, 1), ("entropy", 3.0, 9), ("entropy", 99.0, 9),
        ("logprob", -0.0, 0), ("logprob", -2.6, 5), ("logprob", -50.0, 9),
        ("advantage", 0.0, 4), ("advantage", 3.0, 8), ("advantage", -3.0, 0), ("advantage", -99.0, 0),
        ("ratio", 1.0, 4), ("ratio", 2.0, 8), ("ratio", 0.5, 0), ("ratio", 0.0, 0), ("ratio", 1.001, 4),
    ],
)  # fmt: skip
def test_levels(name: str, value: float, level: int):
    assert SCALES[name].level(value) == level


def luminance(rgb: Sequence[float]) -> float:
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


# Machado, Oliveira and Fernandes (2009), severity 1: protanopia, deuteranopia, tritanopia; on linear RGB.
BLINDNESS = (
    ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
)


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_colours_are_readable_and_distinct_for_every_kind_of_colour_vision(scale: Scale):
    levels = range(len(scale.colours))
    for level in levels:
        style = scale.style(level)
        assert style.color is not None and style.color.triplet is not None
        ink, paper = (luminance([c / 255 for c in rgb]) for rgb in (style.color.triplet, scale.colours[level]))
        low, high = sorted((ink, paper))
        assert (high + 0.05) / (low + 0.05) >= 4.5  # WCAG AA

    def seen(rgb: Sequence[int], matrix: Sequence[Sequence[float]]) -> list[float]:
        linear = [(c / 255) ** 2.2 for c in rgb]
        return [max(0.0, sum(m * c for m, c in zip(row, linear, strict=True))) ** (1 / 2.2) for row in matrix]

    for matrix in BLINDNESS:
        colours = [seen(scale.colours[level], matrix) for level in levels]
        for one in levels:
            for other in levels[one + 1 :]:
                assert math.dist(colours[one], colours[other]) > 0.05, (one, other)


def test_marks_where_there_are_too_few_colours():
    def console(**options: Any) -> Console:
        return Console(file=io.StringIO(), force_terminal=True, **options)

    assert has_colours(console(color_system="truecolor", no_color=False))
    assert has_colours(console(color_system="256", no_color=False))
    assert not has_colours(console(color_system="standard", no_color=False))
    assert not has_colours(console(color_system="256", no_color=True))
    assert not has_colours(Console(file=io.StringIO()))


# ---------------------------------------------------------------- lists and addresses


LISTED = [
    record(turn([1, 0]), success=True, stop_reason="success", reward=1.0),
    record(turn([1, 0], is_valid=False), turn([6, 0], observation="a Dark cellar"), stop_reason="max_turns"),
    record(turn([6, 0]), goal="cellars", task="cellars/9"),
]


@pytest.mark.parametrize("index", [True, False])
def test_filters_find_what_a_plain_search_finds(write_run: Callable[..., Path], index: bool):
    stored = StoredTrajectories(write_run({1: LISTED, 12: LISTED[::-1]}, index=index))

    def found(**wanted: Any) -> list[tuple[int, int]]:
        return [(row["step"], row["row"]) for row in stored.matching(Filter(**wanted))]

    assert found() == [(1, 0), (1, 1), (1, 2), (12, 0), (12, 1), (12, 2)]
    assert found(success=True) == [(1, 0), (12, 2)]
    assert found(success=False, invalid=True) == [(1, 1), (12, 1)]
    assert found(stop="max_turns") == [(1, 1), (12, 1)]
    assert found(goal="CELLAR") == [(1, 2), (12, 0)]
    assert found(search="dark") == [(1, 1), (12, 1)]
    assert found(search="dark", success=True) == []
    assert [r["row"] for r in stored.matching(Filter(), step=12)] == [0, 1, 2]


def test_the_command(write_run: Callable[..., Path], epo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    run = write_run({1: LISTED, 12: LISTED[::-1]})
    monkeypatch.chdir(run.parent.parent)
    code, out, _ = epo("show", "runs/try1")
    assert code == 0 and "epo show runs/try1 --step 12 --row 0" in out
    code, out, _ = epo("show", "runs/try1", "--step", "1", "--failure", "--json")
    assert [(row["step"], row["row"]) for row in json.loads(out)] == [(1, 1), (1, 2)]
    by_options = epo("show", "runs/try1", "--step", "12", "--row", "1")
    assert by_options == epo("show", "runs/try1/trajectories/step_000012.jsonl:1")
    assert "a Dark cellar" in by_options[1] and "‹look›0‹<end>›0" in by_options[1]
    _, out, _ = epo("show", "runs/try1/trajectories/step_000012.jsonl", "--row", "1", "--json")
    assert json.loads(out) == {**LISTED[1], "step": 12}
    _, out, _ = epo("show", "runs/try1", "--success", "--limit", "1")
    assert out.count("doors/1") == 1 and "and more" in out
    assert "no trajectory is like that" in epo("show", "runs/try1", "--search", "unicorn")[1]
    assert epo("show", "runs/try1", "--by", "colour")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("runs/try2",), "in 'runs' there are try1"),
        (("nowhere/at/all",), "give a run folder"),
        (("runs",), "holds no run"),
        (("runs/try1", "--step", "7"), "the nearest are 1, 12"),
        (("runs/try1", "--step", "7", "--row", "0"), "the nearest are 1, 12"),
        (("runs/try1", "--step", "1", "--row", "9"), "rows 0 to 2"),
        (("runs/try1", "--row", "0"), "--step 12"),
        (("runs/try1", "--step", "1", "--row", "0", "--success"), "leave the filters out"),
        (("runs/try1:3",), "add --step and --row 3"),
        (("runs/try1/config.yaml",), "is no file of trajectories"),
        (("runs/try1/trajectories/step_000012.jsonl:3",), "rows 0 to 2"),
        (("runs/try1/trajectories/step_000011.jsonl:3",), "the nearest are step_000001.jsonl, step_000012.jsonl"),
        (("runs/try1/trajectories/step_000012.jsonl:1", "--row", "2"), "contradict"),
        (("runs/try1/trajectories/step_000012.jsonl:1", "--step", "2"), "contradict"),
    ],
)
def test_bad_addresses_are_one_line_that_names_what_there_is(
    arguments: tuple[str, ...],
    expected: str,
    write_run: Callable[..., Path],
    epo: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(write_run({1: LISTED, 12: LISTED}).parent.parent)
    code, out, err = epo("show", *arguments)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert expected in err


def test_a_damaged_file_is_named(write_run: Callable[..., Path], epo: Callable[..., Any]):
    run = write_run({1: LISTED})
    file = run / "trajectories" / "step_000001.jsonl"
    file.write_text(file.read_text() + '{"turns": 3}\n')
    code, _, err = epo("show", str(run), "--step", "1", "--row", "0")
    assert code == 2 and "row 3 is no trajectory" in err


# ---------------------------------------------------------------- payloads


def hostile(payload: str) -> dict[str, Any]:
    """A record that carries `payload` wherever a model or an environment writes."""
    bad = turn([1, 7, 0], observation=payload, response=payload, action=payload + "!", is_valid=False)
    return record(bad, task=payload, goal=payload, instruction=payload, stop_reason=payload, error=payload)


CONTROL = re.compile(r"\x1b\[[\d;]*m")
"""What our own colours are made of."""


@pytest.mark.parametrize("name", PAYLOADS)
def test_no_payload_reaches_the_terminal(
    name: str, write_run: Callable[..., Path], epo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    payload = PAYLOADS[name]
    # What a payload contains may look like a colour of ours; so what it is printed with has none.
    outputs = [
        printed(view(hostile(payload), vocabulary=[*VOCABULARY, payload], coloured=False, top=3), coloured=False),
        printed(view(hostile(payload), vocabulary=None, coloured=False, mask=True), coloured=False),
    ]
    run = write_run({1: [hostile(payload)]})
    monkeypatch.setenv("COLUMNS", "400")
    one = ("--step", "1", "--row", "0")
    for arguments in ((), ("--search", ""), ("--json",), one, (*one, "--json")):
        code, out, err = epo("show", str(run), *arguments)
        assert code == 0, err
        outputs += [out, err]
    # No lone surrogates and no NUL in a command line: the system does not let them in.
    outputs.append(epo("show", re.sub("[/\0\ud800-\udfff]", "", payload)[:60])[2])
    for output in outputs:
        assert not any(map(is_active, output.replace("\n", ""))), output
    shown = iter(outputs[0].replace("\n", ""))
    assert all(character in shown for character in printable(payload))
    assert json.loads(outputs[-3])["task"] == payload

    # In colour, with the payload as text and as a token: no sequence that a harmless text would not bring.
    coloured = printed(view(hostile(payload), vocabulary=[*VOCABULARY, payload], mask=True), coloured=True)
    harmless = printed(view(hostile("x"), vocabulary=[*VOCABULARY, "x"], mask=True), coloured=True)
    assert set(CONTROL.findall(coloured)) <= set(CONTROL.findall(harmless))
    assert not any(map(is_active, CONTROL.sub("", coloured).replace("\n", "")))


def test_markup_is_text_in_tables():
    out = io.StringIO()
    rows = [
        {**dict.fromkeys(("step", "row", "group", "turns", "invalid"), 1), "task": "[bold]t[/]", "success": True,
         "reward": 1.0, "stop_reason": "[red]s[/nothing]", "entropy": None}
    ]  # fmt: skip
    Console(file=out, width=120).print(trajectory_table(rows))
    assert "[bold]t[/]" in out.getvalue() and "[red]s[/nothing]" in out.getvalue()


@pytest.mark.parametrize("name", LONG)
def test_long_texts_are_folded_unless_the_whole_is_asked_for(name: str):
    content = record(turn([1, 0], observation=LONG[name]))
    folded = printed(view(content, coloured=False), coloured=False)
    text = LONG[name]
    kept = FOLD_LINES - 1 if text.startswith("\n") else FOLD_AT
    assert f"{len(text) - kept} more characters" in folded
    assert len(folded) < 10 * FOLD_AT
    assert "more characters" not in printed(
        view(record(turn([1, 0], observation=text[: FOLD_LINES - 1]))), coloured=True
    )
