"""The trajectory viewer beside a run at work, and with ten thousand trajectories."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Route, expect
from viewer_run import Vocabulary, make_records, without_plotly, write_run, write_viewer_report

from epo.reporting.pages.builder import page_object, render_page
from epo.reporting.reading.run_reader import read_run
from epo.reporting.reading.trajectory_files import TrajectoryFiles

ADDRESS = "http://viewer.test/"


class Played:
    """Stands for the server of a live page: a run folder that grows, and what the page has of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.vocabulary = Vocabulary()
        self.steps = {1: make_records(self.vocabulary, step=1)}
        self.write()
        page = page_object([self.run().page()], mode="live", title="live", comparison=None)
        with without_plotly():
            self.html, self.csp = render_page(page, blobs={})

    def write(self, name: str = "run") -> None:
        self.path = write_run(self.folder / name, self.steps, self.vocabulary.pieces)

    def run(self) -> Any:
        return read_run(self.path)

    def answer(self, route: Route) -> None:
        path = route.request.url.removeprefix(ADDRESS).split("?")[0]
        if path == "":
            route.fulfill(body=self.html, content_type="text/html", headers={"Content-Security-Policy": self.csp})
        elif path == "api/page":
            # Always everything, as after a run was rewound; what is the same stays the same.
            route.fulfill(body=json.dumps({"runs": [self.run().page()]}), content_type="application/json")
        elif path.startswith("api/runs/0/trajectories/"):
            step = int(path.rsplit("/", 1)[1])
            route.fulfill(body=TrajectoryFiles(self.path).payload(step), content_type="application/json")
        else:
            route.fulfill(status=404, body='{"error": "no such thing"}', content_type="application/json")


def test_live_list_grows_and_a_replayed_step_is_read_anew(browser: Browser, tmp_path: Path) -> None:
    played = Played(tmp_path)
    page = browser.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.route(f"{ADDRESS}**", played.answer)
    page.goto(f"{ADDRESS}#trajectories?run=0&step=1&row=2")
    first = played.steps[1]
    expect(page.locator(".summary h3")).to_have_text(first[2]["task"])
    expect(page.locator(".list-status")).to_have_text(f"{len(first)} trajectories")
    page.get_by_role("searchbox", name="Task").fill("lamp")

    played.steps[2] = make_records(played.vocabulary, step=2)
    played.write("grown")
    lamps = sum("lamp" in record["task"] for records in played.steps.values() for record in records)
    total = sum(map(len, played.steps.values()))
    expect(page.locator(".list-status")).to_have_text(f"{lamps} of {total} trajectories", timeout=20_000)
    assert page.get_by_role("searchbox", name="Task").input_value() == "lamp"
    assert page.get_by_role("combobox", name="Step").input_value() == "1", "reading goes on where it was"

    again = make_records(played.vocabulary, step=1, seed=1)
    assert again[2]["turns"][0]["entropy"] != first[2]["turns"][0]["entropy"]
    again[2]["turns"][0]["observation"] = "played again"
    played.steps = {1: again}
    played.write("rewound")
    expect(page.locator(".observation .text").first).to_have_text("played again", timeout=20_000)
    assert errors == []
    page.close()


def test_ten_thousand_trajectories_stay_smooth(browser: Browser, tmp_path: Path) -> None:
    vocabulary, rng = Vocabulary(), random.Random(0)
    record = make_records(vocabulary, step=1, groups=1, members=1)[0]
    steps = {
        step: [
            {
                **record,
                "step": step,
                "group": k // 4,
                "task": f"task-{rng.randrange(200)}",
                "success": rng.random() < 0.3,
            }
            for k in range(40)
        ]
        for step in range(1, 251)
    }
    run = write_run(tmp_path / "run", steps, vocabulary.pieces)
    address = write_viewer_report(tmp_path / "report.html", run, steps=[1, 250])
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(address + "#trajectories?run=0&step=1&row=0")
    expect(page.locator(".list-status")).to_have_text("10,000 trajectories")
    assert page.locator(".list-row").count() < 60, "only rows in sight are elements"
    page.locator(".list").evaluate("list => void (list.scrollTop = list.scrollHeight)")
    last = page.locator('.list-row[aria-posinset="10000"]')
    expect(last).to_be_visible()
    assert last.locator(".c-step").inner_text() == "1"
    assert last.locator(".c-task").text_content() == steps[1][39]["task"]
    search = page.get_by_role("searchbox", name="Task")
    seconds = search.evaluate(
        """input => {
          const times = ["t", "ta", "task-7", "task-77"].map((text) => {
            const start = performance.now();
            input.value = text;
            input.dispatchEvent(new Event("input", { bubbles: true }));
            return performance.now() - start;
          });
          return Math.min(...times) / 1000;
        }"""
    )
    assert seconds < 0.25
    count = sum("task-77" in r["task"] for records in steps.values() for r in records)
    expect(page.locator(".list-status")).to_have_text(f"{count} of 10,000 trajectories")
    page.close()
