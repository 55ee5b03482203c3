"""Run folders as others see them: growing, cut off, rewound, old, damaged, and no runs at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import viewer_run

from epo.errors import UserError
from epo.recipe import load_config
from epo.reporting.reading.json_lines import JsonLines
from epo.reporting.reading.run_reader import RunReader, find_runs, read_run
from epo.reporting.reading.trajectory_files import TrajectoryFiles
from epo.reporting.trajectories import index_entry

RECORDED = Path(__file__).parents[2] / "benchmarks" / "results" / "quickstart"


def append(file: Path, *entries: Any) -> None:
    with file.open("a", encoding="utf-8") as handle:
        for entry in entries:
            handle.write(entry if isinstance(entry, str) else json.dumps(entry) + "\n")


def panel(step: int, success: float = 0.5) -> dict[str, Any]:
    return {"step": step, "panels": [{"split": "iid", "success": success, "low": 0.1, "high": 0.9, "episodes": 4}]}


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """`make_run("a", steps=3)`: a run whose trajectories are small."""

    def make(name: str, *, steps: int = 3, with_index: bool = True) -> Path:
        vocabulary = viewer_run.Vocabulary()
        records = {
            step: viewer_run.make_records(vocabulary, step=step, groups=1, members=2) for step in range(1, steps + 1)
        }
        return viewer_run.write_run(tmp_path / name, records, vocabulary.pieces, with_index=with_index)

    return make


def merged(run: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """What a page makes of an answer, by the rules that it follows."""
    if part["reset"]:
        return part
    before, new = len(run["steps"]), len(part["steps"])
    names = {*run["metrics"], *part["metrics"]}
    metrics = {
        name: run["metrics"].get(name, [None] * before) + part["metrics"].get(name, [None] * new) for name in names
    }
    columns = {
        key: {name: run[key].get(name, []) + part[key][name] for name in part[key]} for key in ("turn_entropy", "index")
    }
    lists = {key: run[key] + part[key] for key in ("steps", "evaluations")}
    return run | part | columns | lists | {"metrics": metrics, "reset": True}


# -- lines of a growing file


def test_lines_come_once_and_whole(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    lines = JsonLines(file)
    assert lines.read() == ([], False)
    append(file, {"a": 1}, '{"a": ')
    assert lines.read() == ([{"a": 1}], False)
    assert lines.read() == ([], False)
    append(file, '2}\n{"a":3}\n\n')
    assert lines.read() == ([{"a": 2}, {"a": 3}], False)


def test_a_line_may_be_cut_within_a_character(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    text = '{"a": "ü"}\n'.encode()
    cut = text.index("ü".encode()) + 1
    lines = JsonLines(file)
    file.write_bytes(text[:cut])
    assert lines.read() == ([], False)
    file.write_bytes(text)
    assert lines.read()[0] == [{"a": "ü"}]


@pytest.mark.parametrize("line", ["{", "[1]", "1", '"x"', "\x00\x00", "[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_what_is_no_object_is_counted_and_left_out(tmp_path: Path, line: str) -> None:
    file = tmp_path / "x.jsonl"
    append(file, {"a": 1}, line + "\n", {"a": 2})
    lines = JsonLines(file)
    assert lines.read() == ([{"a": 1}, {"a": 2}], False)
    assert lines.damaged == 1


def test_only_new_bytes_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.jsonl"
    append(file, *({"a": i} for i in range(1000)))
    lines = JsonLines(file)
    lines.read()
    parsed: list[bytes] = []
    before = lines._parse
    monkeypatch.setattr(lines, "_parse", lambda content: parsed.append(content) or before(content))
    append(file, {"a": 1000})
    assert lines.read()[0] == [{"a": 1000}]
    assert parsed == [b'{"a": 1000}\n']


@pytest.mark.parametrize("how", ["replaced", "shorter", "in place", "longer in place", "away", "away and back"])
def test_another_file_is_noticed_and_read_from_its_start(tmp_path: Path, how: str) -> None:
    file, draft = tmp_path / "x.jsonl", tmp_path / "draft"
    append(file, {"a": 1}, {"a": 2}, {"a": 3})
    lines = JsonLines(file)
    lines.read()
    new: list[dict[str, int]] = [{"a": 1}, {"a": 2}, {"a": 3}, {"a": 4}]
    if how == "replaced":  # the same and one more: a rewind that forgot nothing
        append(draft, *new)
        draft.replace(file)
    elif how == "shorter":
        new = [{"a": 1}]
        file.write_text('{"a": 1}\n')
    elif how == "in place":
        new = [{"a": 7}, {"a": 8}, {"a": 9}]
        file.write_text("".join(json.dumps(entry) + "\n" for entry in new))
        os.utime(file, ns=(1, 1))
    elif how == "longer in place":
        new = [{"a": i} for i in range(5, 15)]
        file.write_text("".join(json.dumps(entry) + "\n" for entry in new))
    elif how == "away":
        new = []
        file.unlink()
    else:
        file.unlink()
        assert lines.read() == ([], True)
        append(file, *new)
        assert lines.read() == (new, False)
        return
    assert lines.read() == (new, True)
    assert lines.read() == ([], False)


# -- runs


def test_a_recorded_run_is_read_as_its_files_have_it() -> None:
    run = read_run(RECORDED)
    lines = [json.loads(line) for line in (RECORDED / "metrics.jsonl").read_text().splitlines()]
    assert run.steps == [line["step"] for line in lines]
    assert set(run.metrics) == {name for line in lines for name in line} - {"step"}
    for name, column in run.metrics.items():
        assert column == [line.get(name) for line in lines]
    assert run.evaluations == [json.loads(line) for line in (RECORDED / "eval.jsonl").read_text().splitlines()]
    assert (run.finished, run.wall_seconds, run.seed, run.total_steps) == (True, 634.0, 0, 70)
    assert run.label == "ppo + epo, seed 0"
    assert run.notes == []
    json.dumps(run.page(), allow_nan=False)


def test_absent_metrics_nulls_and_numbers_that_are_none_leave_gaps(make_run: Callable[..., Path]) -> None:
    run = make_run("a", steps=2)
    file = run / "metrics.jsonl"
    append(file, '{"step": 3, "late": 1.5, "entropy/mean": null}\n', '{"step": 4, "late": NaN, "x": Infinity}\n')
    append(file, {"step": 5, "late": 2, "text": "no number", "list": [1]})
    data = read_run(run)
    assert data.steps == [1, 2, 3, 4, 5]
    assert data.metrics["late"] == [None, None, 1.5, None, 2]
    assert data.metrics["x"] == [None] * 5
    assert data.metrics["entropy/mean"][2:] == [None] * 3
    assert {"text", "list"}.isdisjoint(data.metrics)
    json.dumps(data.page(), allow_nan=False)


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(load_config("base").to_yaml())
    data = read_run(tmp_path)
    assert (data.steps, data.evaluations, data.finished, data.wall_seconds) == ([], [], False, None)
    json.dumps(data.page(), allow_nan=False)


def test_a_crashed_run_shows_what_was_complete(make_run: Callable[..., Path]) -> None:
    run = make_run("a")
    (run / "summary.json").unlink()
    append(run / "metrics.jsonl", '{"step": 4, "entropy/me')
    append(run / "eval.jsonl", panel(0), '{"step"')
    data = read_run(run)
    assert (data.steps, len(data.evaluations), data.finished, data.notes) == ([1, 2, 3], 1, False, [])


def test_damaged_lines_are_left_out_and_told(make_run: Callable[..., Path]) -> None:
    run = make_run("a")
    append(run / "metrics.jsonl", "{]\n", {"no": "step"}, {"step": True}, {"step": -1}, {"step": 4})
    append(run / "eval.jsonl", {"step": 1}, {"step": 1, "panels": [{}]}, panel(2))
    append(run / "trajectories" / "index.jsonl", {"step": 4, "columns": {"task": ["a"], "goal": []}})
    data = read_run(run)
    assert data.steps == [1, 2, 3, 4]
    assert [e["step"] for e in data.evaluations] == [2]
    assert data.notes == [
        "metrics.jsonl: 4 lines are damaged and left out",
        "eval.jsonl: 2 lines are damaged and left out",
        "trajectories/index.jsonl: 1 line is damaged and left out",
    ]


def test_an_old_run_gets_the_index_it_lacks(make_run: Callable[..., Path]) -> None:
    old, new = read_run(make_run("old", with_index=False)), read_run(make_run("new"))
    assert old.index == new.index
    assert old.turn_entropy == new.turn_entropy
    assert old.index["step"] == [1, 1, 2, 2, 3, 3]
    assert old.index["row"] == [0, 1, 0, 1, 0, 1]


def test_the_index_of_a_run_that_an_old_version_began(make_run: Callable[..., Path]) -> None:
    run = make_run("a")
    index = run / "trajectories" / "index.jsonl"
    whole = read_run(run).index
    index.write_text(index.read_text().splitlines(keepends=True)[-1])
    assert read_run(run).index == whole


# -- following a run


def test_a_page_that_merges_answers_equals_one_made_anew(make_run: Callable[..., Path]) -> None:
    run = make_run("a")
    reader = RunReader(run)
    page = reader.data.page()
    vocabulary = viewer_run.Vocabulary()
    for step in (4, 5, 6):
        records = viewer_run.make_records(vocabulary, step=step, groups=1, members=3)
        (run / "trajectories" / f"step_{step:06d}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        append(run / "trajectories" / "index.jsonl", index_entry(records))
        append(run / "metrics.jsonl", {"step": step, "entropy/mean": 1 / 3, f"new/{step}": 1.0})
        if step == 5:
            append(run / "eval.jsonl", panel(5))
        assert reader.update()
        part = reader.data.page_after(page["cursor"])
        assert not part["reset"]
        assert part["steps"] == [step]
        assert part["index"]["row"] == [0, 1, 2]
        page = merged(page, part)
    anew = read_run(run).page()
    for key in ("steps", "metrics", "evaluations", "index", "turn_entropy", "finished", "label"):
        assert page[key] == anew[key], key
    assert not reader.update()
    nothing = reader.data.page_after(page["cursor"])
    assert (nothing["steps"], nothing["metrics"], nothing["evaluations"]) == ([], {}, [])


def test_the_end_of_a_run_is_noticed(make_run: Callable[..., Path]) -> None:
    run = make_run("a")
    (run / "summary.json").unlink()
    reader = RunReader(run)
    assert not reader.data.finished
    (run / "summary.json").write_text('{"finished": true, "wall_seconds": 3, "halted": {"alarm": "length"}}')
    assert reader.update()
    part = reader.data.page_after(reader.data.cursor)
    assert (part["finished"], part["wall_seconds"], part["halted"]) == (True, 3.0, {"alarm": "length"})


@pytest.mark.parametrize("rewritten", [True, False])
def test_a_rewind_starts_the_page_anew(make_run: Callable[..., Path], rewritten: bool) -> None:
    run = make_run("a", steps=4)
    reader = RunReader(run)
    cursor = reader.data.cursor
    file = run / "metrics.jsonl"
    if rewritten:  # as `--resume` does it
        draft = run / ".draft"
        draft.write_text("".join(file.read_text().splitlines(keepends=True)[:2]))
        draft.replace(file)
    append(file, *({"step": step, "entropy/mean": 9.0} for step in (3, 4, 5)))
    reader.update()
    part = reader.data.page_after(cursor)
    assert part["reset"]  # although there is more than the cursor says
    assert part["steps"] == [1, 2, 3, 4, 5]
    assert part["metrics"]["entropy/mean"][2:] == [9.0] * 3


def test_another_run_of_the_same_name(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run("a")
    reader = RunReader(run)
    cursor = reader.data.cursor
    shutil.rmtree(run)
    assert not reader.update()
    assert reader.data.steps == [1, 2, 3]  # what was there stays to be looked at
    run.mkdir()
    assert not reader.update()
    run.rmdir()
    make_run("b", steps=1).rename(run)
    assert reader.update()
    assert reader.data.page_after(cursor)["reset"]
    assert reader.data.steps == [1]


@pytest.mark.parametrize("cursor", ["", "x", "....", "a.1.2.3", "{g}.-1.0.0", "{g}.99.0.0", "{g}.1", "{g}.²₀.0.0"])
def test_a_cursor_that_does_not_hold_gets_the_whole_run(make_run: Callable[..., Path], cursor: str) -> None:
    data = read_run(make_run("a"))
    assert data.page_after(cursor.format(g=data.generation)) == data.page()


# -- what is no run


def test_runs_are_found_alone_and_in_folders(make_run: Callable[..., Path], tmp_path: Path) -> None:
    b, a = make_run("b"), make_run("a")
    (tmp_path / "logs").mkdir()
    assert find_runs([tmp_path]) == [a, b]
    assert find_runs([b, tmp_path]) == [b, a]


@pytest.mark.parametrize(
    "config",
    [None, "", "a: b", "- 1", "{", "\x00", "steps: 3", "!!python/object/apply:os.system ['true']", "a: &a [*a]"],
)
def test_what_is_no_run_gets_one_clear_line(tmp_path: Path, config: str | None) -> None:
    folder = tmp_path / "foreign"
    folder.mkdir()
    if config is not None:
        (folder / "config.yaml").write_text(config)
    for read in (read_run, lambda path: find_runs([path])):
        with pytest.raises(UserError) as refused:
            read(folder)
        assert str(folder) in str(refused.value)
        assert "\n" not in str(refused.value)


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run in"):
        find_runs([tmp_path / "nothing"])


# -- trajectories


def test_a_payload_has_the_texts_of_its_tokens_and_no_others(make_run: Callable[..., Path]) -> None:
    run = make_run("a")
    pieces = [*json.loads((run / "vocabulary.json").read_text()), "unused"]
    (run / "vocabulary.json").write_text(json.dumps(pieces))
    payload = json.loads(TrajectoryFiles(run).payload(2))
    lines = (run / "trajectories" / "step_000002.jsonl").read_text().splitlines()
    assert payload["trajectories"] == [json.loads(line) for line in lines]
    drawn = {token for t in payload["trajectories"] for turn in t["turns"] for token in turn["response_ids"]}
    others = {
        pairs[k]
        for t in payload["trajectories"]
        for turn in t["turns"]
        for pairs in turn["alternatives"]
        for k in (0, 2, 4)
    }
    assert payload["vocabulary"] == {str(token): pieces[token] for token in drawn | others}


@pytest.mark.parametrize("vocabulary", [None, "{", "{}", "[1, null]", "[]"])
def test_a_payload_without_a_usable_vocabulary(make_run: Callable[..., Path], vocabulary: str | None) -> None:
    run = make_run("a")
    (run / "vocabulary.json").unlink()
    if vocabulary is not None:
        (run / "vocabulary.json").write_text(vocabulary)
    payload = json.loads(TrajectoryFiles(run).payload(1))
    assert payload["vocabulary"] == {}
    assert len(payload["trajectories"]) == 2


def test_rows_stay_line_numbers_beside_damaged_records(make_run: Callable[..., Path]) -> None:
    run = make_run("a")
    file = run / "trajectories" / "step_000001.jsonl"
    first, second = file.read_text().splitlines(keepends=True)
    file.write_text(first + '{"turns": [1]}\n' + '{"turns"\n' + second + "{")
    records = TrajectoryFiles(run).records(1)
    assert [record["turns"] != [] for record in records] == [True, False, False, True]
    json.loads(TrajectoryFiles(run).payload(1))


def test_search_finds_what_is_there_in_any_case(make_run: Callable[..., Path]) -> None:
    files = TrajectoryFiles(make_run("a"))
    everything = [{"step": step, "row": row} for step in (1, 2, 3) for row in (0, 1)]
    expected = [
        hit
        for hit in everything
        if any("BEDROOM" in turn["observation"].upper() for turn in files.records(hit["step"])[hit["row"]]["turns"])
    ]
    assert len(expected) > 0
    hits, complete = files.search("in the BEDroom", steps=[1, 2, 3])
    assert (hits, complete) == (
        [
            hit
            for hit in expected
            if any("in the bedroom" in t["observation"] for t in files.records(hit["step"])[hit["row"]]["turns"])
        ],
        True,
    )
    assert files.search("<think>", steps=[1, 2, 3]) == (everything, True)
    assert files.search("<think>", steps=[1, 2, 3], limit=2) == (everything[:2], False)
    assert files.search("nowhere to be found", steps=[1, 2, 3]) == ([], True)


@pytest.mark.parametrize(
    "name", ["config.yaml", "metrics.jsonl", "summary.json", "vocabulary.json", "trajectories/step_000001.jsonl"]
)
def test_links_out_of_the_run_are_not_followed(make_run: Callable[..., Path], tmp_path: Path, name: str) -> None:
    run = make_run("a")
    secret = tmp_path / "secret"
    (run / name).rename(secret)
    (run / name).symlink_to(secret)
    with pytest.raises(UserError, match="link out of the run folder"):
        read_run(run)
        TrajectoryFiles(run).payload(1)
