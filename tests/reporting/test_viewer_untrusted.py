"""Whatever models and environments write is shown as text by the viewer, and as nothing else."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import watch
from payloads import LONG, PAYLOADS, is_active, printable
from playwright.sync_api import Browser, Page, expect
from viewer_run import Vocabulary, turn_record, write_run, write_viewer_report

NAMES = list(PAYLOADS)
OWN_ELEMENTS = {
    *(
        "article",
        "b",
        "button",
        "caption",
        "dd",
        "details",
        "div",
        "dl",
        "dt",
        "fieldset",
        "figcaption",
        "figure",
        "form",
    ),
    *(
        "h3",
        "h4",
        "header",
        "i",
        "input",
        "label",
        "legend",
        "mark",
        "option",
        "p",
        "section",
        "select",
        "small",
        "span",
    ),
    *("summary", "table", "tbody", "td", "tr"),
}
"""Every kind of element that the viewer makes."""


def hostile_record(vocabulary: Vocabulary, group: int, text: str) -> dict[str, Any]:
    """A trajectory that says `text` wherever something can be said."""
    piece = vocabulary.id_of(text)
    response = f"act {text}" if len(text) < 10_000 else "act long"
    turn = turn_record(vocabulary, random.Random(0), observation=text, response=response, action=text)
    turn["response"] = text
    turn["response_ids"] = [piece, *turn["response_ids"][1:]]
    turn["alternatives"][0][2] = piece
    return {
        "step": 1,
        "group": group,
        "task": text,
        "goal": text,
        "instruction": text,
        "stop_reason": "environment_error",
        "success": False,
        "score": 0.0,
        "reward": 0.0,
        "error": text,
        "restarts": 1,
        "trained": True,
        "turns": [turn],
    }


def write_hostile_report(folder: Path, texts: list[str]) -> str:
    """A report of one step, a trajectory for each text. Returns its address."""
    vocabulary = Vocabulary()
    records = [hostile_record(vocabulary, group, text) for group, text in enumerate(texts)]
    run = write_run(folder / "run", {1: records}, vocabulary.pieces)
    return write_viewer_report(folder / "report.html", run)


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that must not log an error, open a dialog or another page, ask for anything, or go anywhere."""
    problems: list[str] = []
    context = browser.new_context(viewport={"width": 900, "height": 500})
    page = context.new_page()
    page.set_default_timeout(30_000)
    watch(page, problems)
    context.on("page", lambda other: problems.append("another page"))
    yield page
    assert page.evaluate("[window.pwned, ({}).pwned]") == [None, None]
    context.close()
    assert problems == []


def go_to(page: Page, row: int) -> None:
    page.evaluate(f"location.hash = 'trajectories?run=0&step=1&row={row}'")
    expect(page.locator(".summary .note").first).to_contain_text("1 of 1")
    page.wait_for_function(f"document.querySelector('.list-row[aria-selected=true]')?.id.endsWith('-{row}')")


SEEN = """
async (count) => {
  const text = (selector) => document.querySelector(selector).textContent;
  const soon = () => new Promise((go) => setTimeout(go));
  const all = [];
  for (let row = 0; row < count; row++) {
    location.hash = `trajectories?run=0&step=1&row=${row}`;
    while (!document.querySelector(".list-row[aria-selected=true]")?.id.endsWith(`-${row}`)) await soon();
    document.querySelector(".tok").focus();
    const elements = [...document.querySelectorAll(".viewer *")];
    all.push({
      title: text(".summary h3"), goal: text(".summary .note"), error: text(".summary .error"),
      instruction: text(".summary .instruction"),
      observation: text(".observation .text"), action: text(".action"), response: text(".response"),
      token: text(".tok"), card: text("#token-card"), row: text(".list-row[aria-selected=true] .c-task"),
      tags: [...new Set(elements.map((e) => e.localName))],
      attributes: elements.flatMap((e) => [...e.attributes])
        .map((a) => `${a.name}=${a.value}`).filter((a) => /^(on|href|src|style|action)/.test(a)),
    });
  }
  return all;
}
"""
STYLE = re.compile(r"style=((left|top|height|width|--left|--top): -?[\d.]+(px|%);? ?)+")
"""The only attribute that could do anything: where rows, bars and the card stand."""


def seen_of(text: str) -> str:
    """What is printable in what the viewer shows, without its own signs for what is not."""
    return printable(re.sub(r"⟨U\+[0-9A-F]+⟩", "", text))


def test_every_payload_is_shown_and_nothing_more(page: Page, tmp_path: Path) -> None:
    page.goto(write_hostile_report(tmp_path, list(PAYLOADS.values())) + "#trajectories?run=0&step=1&row=0")
    expect(page.locator(".summary")).to_have_count(1)
    for name, seen in zip(NAMES, page.evaluate(SEEN, len(NAMES)), strict=True):
        shown = printable(PAYLOADS[name])
        for place in ("title", "goal", "instruction", "error", "observation", "action"):
            assert shown in seen_of(seen[place]), (name, place)
        folded = len(PAYLOADS[name]) > 120  # a long token is cut where it stands, and whole in the text below it
        assert folded or shown in seen_of(seen["token"]), name
        assert shown in seen_of(seen["response"]), name
        assert folded or shown in seen_of(seen["card"]), name
        assert seen_of(seen["row"])[:40] == shown[:40], name
        for place, text in seen.items():
            if isinstance(text, str):
                assert not [c for c in text if is_active(c) and c not in "\n\t"], (name, place)
        assert set(seen["tags"]) <= OWN_ELEMENTS, name
        assert all(STYLE.fullmatch(attribute) for attribute in seen["attributes"]), name


def test_payloads_in_the_group_and_in_searches(page: Page, tmp_path: Path) -> None:
    vocabulary = Vocabulary()
    records = [hostile_record(vocabulary, 0, text) for text in PAYLOADS.values()]
    run = write_run(tmp_path / "run", {1: records}, vocabulary.pieces)
    page.goto(write_viewer_report(tmp_path / "report.html", run) + "#trajectories?run=0&step=1&row=0&compare=1")
    expect(page.locator(".member")).to_have_count(len(NAMES))
    everything = seen_of(page.locator(".compare").text_content() or "")
    assert [name for name in NAMES if printable(PAYLOADS[name]) not in everything] == []
    page.get_by_role("button", name="List", exact=True).click()
    for name in ("image with handler", "Jinja", "entities", "attribute end"):
        page.get_by_role("searchbox", name="Text").fill(PAYLOADS[name])
        page.get_by_role("button", name="Search").click()
        count = sum(PAYLOADS[name].lower() in text.lower() for text in PAYLOADS.values())
        expect(page.locator(".search-note")).to_contain_text(re.compile(f"^{count} traject"))
        page.get_by_role("searchbox", name="Task").fill(PAYLOADS[name])
        assert page.locator(".list-status").inner_text() == f"{count} of {len(PAYLOADS)} trajectories"
        page.get_by_role("button", name="Clear filters").click()
    tags = page.evaluate("[...new Set([...document.querySelectorAll('.viewer *')].map((e) => e.localName))]")
    assert set(tags) <= OWN_ELEMENTS


@pytest.mark.parametrize(
    "address", ["run=x&step=-1&row=1e9", "run=99&step=1&row=99", "step=<img>&colour=__proto__", "%"]
)
def test_an_address_can_be_anything(page: Page, tmp_path: Path, address: str) -> None:
    page.goto(write_hostile_report(tmp_path, ["plain"]) + f"#trajectories?{address}")
    expect(page.locator(".viewer .summary, .viewer .failure")).to_have_count(1)


def test_long_texts_are_folded_and_whole_on_demand(page: Page, tmp_path: Path) -> None:
    page.goto(write_hostile_report(tmp_path, list(LONG.values())) + "#trajectories?run=0&step=1&row=0")
    for row, text in enumerate(LONG.values()):
        go_to(page, row)
        box = page.locator(".observation .text")
        assert len(box.text_content() or "") < 10_000
        assert page.locator(".viewer *").count() < 5_000
        fold = page.locator(".observation .fold")
        fold.evaluate("button => button.click()")
        # Every character, and a sign for those that cannot be seen.
        assert box.text_content() == text.replace("\n", "⏎\n").replace("\x1b", "␛")
        fold.evaluate("button => button.click()")
        assert len(box.text_content() or "") < 10_000


def test_records_of_the_wrong_kind(page: Page, tmp_path: Path) -> None:
    """Damaged or made up: shown as far as possible."""
    broken: list[dict[str, Any]] = [
        {"turns": []},
        {"turns": [{}], "task": 7, "goal": None, "instruction": 5, "success": "yes"},
        {"turns": [{"observation": {"a": "<b>"}, "response": ["x"], "response_ids": "no", "entropy": 3}]},
        {"turns": [{"response_ids": [1, "2", None, 3], "entropy": [None, "x"], "alternatives": [[1], None, 7]}]},
        {"turns": [{"response_ids": [-1, 10**9], "logprobs": [-1e300, 5], "entropy": [1e300, -2], "ratios": [0, -1]}]},
    ]
    vocabulary = Vocabulary()
    good = hostile_record(vocabulary, 0, "plain")
    run = write_run(tmp_path / "run", {1: [good] * 5}, vocabulary.pieces)
    lines = "".join(json.dumps(record) + "\n" for record in broken)
    (run / "trajectories" / "step_000001.jsonl").write_text(lines, encoding="utf-8")
    page.goto(write_viewer_report(tmp_path / "report.html", run) + "#trajectories?run=0&step=1&row=0")
    for row, record in enumerate(broken):
        page.evaluate(f"location.hash = 'trajectories?run=0&step=1&row={row}&colour=ratio'")
        page.wait_for_function(f"document.querySelector('.list-row[aria-selected=true]')?.id.endsWith('-{row}')")
        assert page.locator(".viewer article").count() == len(record["turns"])
        for token in page.locator(".tok").all():
            token.hover()
    assert not re.search("undefined|NaN|\\[object", page.locator(".viewer-reader").inner_text())
