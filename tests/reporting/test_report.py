"""The report as a file: it loads nothing, lets nothing but its own scripts run, and carries what it says."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import random
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import viewer_run
from payloads import PAYLOADS as NAMED
from playwright.sync_api import Browser

from epo.errors import UserError
from epo.reporting.pages import builder as page_builder
from epo.reporting.pages.builder import SCRIPTS, STYLES, json_for_html
from epo.reporting.pages.report import spread, write_report
from epo.reporting.reading.run_reader import read_run
from epo.reporting.reading.trajectory_files import TrajectoryFiles

PAYLOADS = [*NAMED.values()]


class Parsed(HTMLParser):
    """Elements with their attributes and, for scripts and styles, their text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, dict[str, str | None], str]] = []
        self._raw: list[str] | None = None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style", "title"):
            self._raw = []

    def handle_data(self, data: str) -> None:
        if self._raw is not None:
            self._raw.append(data)

    def handle_endtag(self, tag: str) -> None:
        if self._raw is not None and tag in ("script", "style", "title"):
            self.texts.append((tag, self.elements[-1][1], "".join(self._raw)))
            self._raw = None

    def scripts(self) -> list[str]:
        return [text for tag, attributes, text in self.texts if tag == "script" and "type" not in attributes]

    def data(self, name: str) -> str:
        return next(text for tag, attributes, text in self.texts if attributes.get("id") == name)

    def policy(self) -> dict[str, list[str]]:
        meta = (a for tag, a in self.elements if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy")
        directives = [part.split() for part in (next(meta)["content"] or "").split(";")]
        return {name: values for name, *values in directives}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps of four trajectories."""
    vocabulary = viewer_run.Vocabulary()
    records = {step: viewer_run.make_records(vocabulary, step=step, groups=2, members=2) for step in range(1, 7)}
    return viewer_run.write_run(tmp_path_factory.mktemp("runs") / "shown", records, vocabulary.pieces)


@pytest.fixture(scope="module")
def parsed(run: Path) -> Parsed:
    out = run.parent / "shown.html"
    write_report(out, [read_run(run)])
    return Parsed(out.read_text(encoding="utf-8"))


def hostile_run(folder: Path) -> Path:
    """A run in which everything that can be text is a payload."""
    vocabulary = viewer_run.Vocabulary()
    rng = random.Random(0)
    records: list[dict[str, Any]] = []
    for k, text in enumerate(PAYLOADS):
        record = viewer_run.trajectory(vocabulary, rng, step=1, group=k, task=k, member=0, turns=1)
        record |= {"task": text, "goal": text, "error": text}
        record["turns"][0] |= {"observation": text, "response": text, "action": text}
        records.append(record)
    run = viewer_run.write_run(folder / "<script>alert(1)<", {1: records}, [*vocabulary.pieces, *PAYLOADS])
    panels = [{"split": text, "success": 0.5, "low": 0.1, "high": 0.9, "by_goal": {text: 1.0}} for text in PAYLOADS]
    (run / "eval.jsonl").write_text(json.dumps({"step": 1, "panels": panels}) + "\n")
    (run / "provenance.json").write_text(json.dumps({text: text for text in PAYLOADS}))
    return run


# -- nothing is loaded, nothing else runs


def test_nothing_is_loaded_from_anywhere(parsed: Parsed) -> None:
    for tag, attributes in parsed.elements:
        for name in ("src", "href", "srcset", "poster", "data", "action", "background", "formaction", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:,", "#")), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
    for tag, _, text in parsed.texts:
        assert tag != "style" or not re.search(r"@import|url\((?!['\"]?data:)", text)
    policy = parsed.policy()
    assert policy["default-src"] == ["'none'"]
    assert policy["connect-src"] == ["'none'"]
    assert set(policy["img-src"]) <= {"data:", "blob:"}


def test_the_policy_names_every_script_and_no_others(parsed: Parsed) -> None:
    scripts = parsed.scripts()
    assert len(scripts) == 1 + len(SCRIPTS)
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts]
    assert parsed.policy()["script-src"] == hashes


def test_the_browser_runs_no_other_script(run: Path, browser: Browser, tmp_path: Path) -> None:
    out = tmp_path / "changed.html"
    write_report(out, [read_run(run)])
    html = out.read_text(encoding="utf-8")
    added = "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'>"
    out.write_text(html.replace("<body>", "<body>" + added), encoding="utf-8")
    assert added in out.read_text(encoding="utf-8")
    page = browser.new_page()
    try:
        page.goto(out.as_uri())
        page.wait_for_selector("#tab-overview")  # ours do
        assert page.evaluate("window.pwned") is None
    finally:
        page.close()


def test_every_asset_is_used_and_there() -> None:
    folder = Path(page_builder.__file__).parent / "assets"
    assert {f"{name}.js" for name in SCRIPTS} == {file.name for file in folder.glob("*.js")}
    assert {f"{name}.css" for name in STYLES} == {file.name for file in folder.glob("*.css")}


# -- text stays text


@pytest.mark.parametrize("text", [*PAYLOADS, "</script>", "\u2028\u2029", "\ud800", "<!--<script>", "\0", "]]>", "é"])
def test_json_survives_the_page(text: str) -> None:
    embedded = json_for_html({text: [text, {"a": text}]})
    assert embedded.isascii()
    assert not set("<>&") & set(embedded)
    assert json.loads(embedded) == {text: [text, {"a": text}]}


def test_a_number_that_json_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match="Out of range"):
        json_for_html([float("nan")])


def test_hostile_runs_change_no_element_of_the_page(parsed: Parsed, tmp_path: Path) -> None:
    run = hostile_run(tmp_path)
    out = tmp_path / "hostile.html"
    write_report(out, [read_run(run)])
    hostile = Parsed(out.read_text(encoding="utf-8"))
    blobs = [a for _, a in parsed.elements if str(a.get("id")).startswith("trajectories-")]
    before = [(tag, sorted(a)) for tag, a in parsed.elements if a not in blobs[1:]]
    assert [(tag, sorted(a)) for tag, a in hostile.elements] == before
    assert hostile.scripts() == parsed.scripts()
    page = json.loads(hostile.data("page-data"))
    assert page["runs"][0]["name"] == "<script>alert(1)<"
    assert page["runs"][0]["index"]["task"] == PAYLOADS
    assert [panel["split"] for panel in page["runs"][0]["evaluations"][0]["panels"]] == PAYLOADS
    blob = json.loads(gzip.decompress(base64.b64decode(hostile.data("trajectories-0-1"))))
    assert [t["turns"][0]["response"] for t in blob["trajectories"]] == PAYLOADS


# -- what it carries


def test_it_carries_the_run(parsed: Parsed, run: Path) -> None:
    page = json.loads(parsed.data("page-data"))
    data = read_run(run)
    assert page["mode"] == "report"
    assert page["comparison"] is None
    assert page["title"] in [text for tag, _, text in parsed.texts if tag == "title"]
    shown = page["runs"][0]
    assert shown["steps"] == data.steps
    assert shown["metrics"]["reward/mean"] == data.metrics["reward/mean"]
    assert shown["metrics"]["entropy/mean"][2] == 0.333333
    assert shown["config"] == data.config
    assert (shown["embedded_steps"], shown["embedded_note"]) == ([1, 2, 3, 4, 5, 6], None)
    for step in data.steps:
        blob = gzip.decompress(base64.b64decode(parsed.data(f"trajectories-0-{step}")))
        assert json.loads(blob) == json.loads(TrajectoryFiles(run).payload(step))


def test_what_does_not_fit_is_left_out_and_told(parsed: Parsed, run: Path, tmp_path: Path) -> None:
    sizes = {step: len(parsed.data(f"trajectories-0-{step}")) for step in range(1, 7)}
    for chosen in ([], [1], [1, 6], [1, 3, 6]):
        out = tmp_path / "r.html"
        room = sum(sizes[step] for step in chosen)
        written = write_report(out, [read_run(run)], trajectory_mb=room / 1e6)
        smaller = Parsed(out.read_text(encoding="utf-8"))
        shown = json.loads(smaller.data("page-data"))["runs"][0]
        names = [str(a["id"]) for _, a in smaller.elements if str(a.get("id")).startswith("trajectories-")]
        assert sorted(names) == [f"trajectories-0-{step}" for step in chosen]
        assert shown["embedded_steps"] == written.embedded["shown"] == chosen
        assert f"{len(chosen)} of 6 steps" in shown["embedded_note"]
        assert f"epo watch {run}" in shown["embedded_note"]


def test_chosen_steps(run: Path, tmp_path: Path) -> None:
    written = write_report(tmp_path / "r.html", [read_run(run)], steps=[2, 5])
    assert written.embedded == {"shown": [2, 5]}
    with pytest.raises(UserError, match="step 9 has no trajectories"):
        write_report(tmp_path / "r.html", [read_run(run)], steps=[9])
    with pytest.raises(UserError, match="raise --trajectory-mb"):
        write_report(tmp_path / "r.html", [read_run(run)], steps=[2], trajectory_mb=0.001)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 7, 50, 1000])
def test_steps_are_spread_wherever_the_choice_ends(count: int) -> None:
    steps = [10 * i for i in range(1, count + 1)]
    order = list(dict.fromkeys(spread(steps)))
    assert sorted(order) == steps
    assert set(order[:2]) == {*steps[:1], *steps[-1:]}
    for taken in range(2, count):
        chosen = sorted(order[:taken])
        gaps = [(b - a) // 10 for a, b in pairwise(chosen)]
        assert max(gaps) <= 2 * min(gaps) + 2


def test_several_runs_are_compared(run: Path, tmp_path: Path) -> None:
    vocabulary = viewer_run.Vocabulary()
    records = {step: viewer_run.make_records(vocabulary, step=step, groups=1, members=2) for step in (1, 6)}
    other = viewer_run.write_run(tmp_path / "other", records, vocabulary.pieces, "entropy.method=epo", "seed=3")
    out = tmp_path / "both.html"
    write_report(out, [read_run(run), read_run(other)])
    page = json.loads(Parsed(out.read_text(encoding="utf-8")).data("page-data"))
    assert [r["name"] for r in page["runs"]] == ["shown", "other"]
    assert sorted(i for arm in page["comparison"]["arms"] for i in arm["runs"]) == [0, 1]


# -- what is missing


def test_without_plotly_it_says_what_to_install(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_builder, "has_plotly", lambda: False)
    with pytest.raises(UserError, match=r"pip install -e '\.\[report\]'"):
        write_report(tmp_path / "r.html", [read_run(run)])
    assert not (tmp_path / "r.html").exists()


def test_a_place_that_cannot_be_written(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out"):
        write_report(tmp_path / "file" / "r.html", [read_run(run)])


def test_the_same_run_gives_the_same_trajectories(run: Path, tmp_path: Path) -> None:
    files: list[list[str]] = []
    for name in ("a", "b"):
        write_report(tmp_path / name, [read_run(run)])
        parsed = Parsed((tmp_path / name).read_text(encoding="utf-8"))
        files.append([text for _, a, text in parsed.texts if str(a.get("id")).startswith("trajectories-")])
    assert files[0] == files[1]
