"""The charts of the page: what they draw, over one another or for one run, by arm, found by search, and live."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browser import DESKTOP, point_at
from page_runs import make_run
from playwright.sync_api import Browser, Page, Route, expect

from epo.reporting.pages.builder import page_object, render_page
from epo.reporting.reading.run_reader import read_run

Open = Callable[..., Page]


def show(page: Page, chart: str) -> None:
    """Scroll to a chart and wait until it is drawn."""
    page.locator(f"#chart-{chart} .plot").scroll_into_view_if_needed()
    expect(page.locator(f"#chart-{chart} .main-svg").first).to_be_visible()


def traces(page: Page, chart: str) -> list[dict[str, Any]]:
    """What Plotly was given, bands left out."""
    show(page, chart)
    return page.evaluate(
        """id => document.querySelector(`#chart-${id} .plot`).data.filter((t) => !t.isBand).map((t) => (
            {name: t.name, x: t.steps || t.x, y: t.y, z: t.z, line: t.line, symbol: t.marker?.symbol,
             intervals: t.intervals, high: t.error_y?.array, low: t.error_y?.arrayminus}))""",
        chart,
    )


def bands(page: Page, chart: str) -> list[list[float]]:
    show(page, chart)
    return page.evaluate(
        "id => document.querySelector(`#chart-${id} .plot`).data.filter((t) => t.isBand).map((t) => t.y)", chart
    )


def test_charts_draw_the_numbers_of_the_run(open_page: Open, single_report: Path, runs_folder: Path) -> None:
    page = open_page(single_report, "charts")
    run = read_run(runs_folder / "single")
    (reward,) = traces(page, "reward-mean")
    assert reward["x"] == run.steps
    assert reward["y"] == pytest.approx(run.metrics["reward/mean"], rel=1e-5)

    panels = {t["name"]: t for t in traces(page, "success")}
    assert set(panels) == {"train", "iid", "ood"}
    for split in ("iid", "ood"):
        points = [(e["step"], p) for e in run.evaluations for p in e["panels"] if p["split"] == split]
        assert panels[split]["x"] == [step for step, _ in points]
        assert panels[split]["y"] == pytest.approx([p["success"] for _, p in points], rel=1e-5)
        assert panels[split]["high"] == pytest.approx([p["high"] - p["success"] for _, p in points], rel=1e-3)
        assert panels[split]["low"] == pytest.approx([p["success"] - p["low"] for _, p in points], rel=1e-3, abs=1e-6)
    assert len({(t["line"]["color"], t["line"]["dash"]) for t in panels.values()}) == 3
    assert len({t["line"]["dash"] for t in panels.values()}) == 3, "not by colour alone"

    # The corridor of this run: 0.5 and 2 times the history, which the first step does not have.
    low, high = bands(page, "entropy")
    reference = run.metrics["entropy/reference"][1:]
    assert low == pytest.approx([0.5 * h for h in reference], rel=1e-4)
    assert high == pytest.approx([2.0 * h for h in reference], rel=1e-4)
    assert [t["name"] for t in traces(page, "entropy")] == ["early turns", "late turns", "all tokens", "history"]

    (heat,) = traces(page, "heat-map")
    assert heat["z"][7][29] == pytest.approx(run.turn_entropy["values"][29][7], rel=1e-4)
    expect(page.locator("#chart-heat-map .colorbar, #chart-heat-map .infolayer .cbtitle").first).to_be_attached()

    stops = traces(page, "stops")
    assert [sum(t["y"][i] for t in stops) for i in (0, 29)] == pytest.approx([1, 1], rel=1e-4)
    assert len(traces(page, "time")) == 8

    expect(page.locator("#chart-policy-kl")).to_contain_text("KL of the update")
    absent = page.locator("#chart-entropy-oscillation")
    assert absent.locator(".no-data").count() == 0
    # PPO's run has no such metric in its lines: the card says so.
    page.evaluate("delete EPO.page.runs[0].metrics['policy/kl']; EPO.redraw()")
    page.locator("#chart-policy-kl").scroll_into_view_if_needed()
    expect(page.locator("#chart-policy-kl .no-data")).to_have_text("No data")


def test_hover_and_numbers(open_page: Open, single_report: Path, runs_folder: Path) -> None:
    page = open_page(single_report, "charts")
    run = read_run(runs_folder / "single")
    show(page, "policy-kl")
    # In one box: the step, then each run with its value.
    label = point_at(page, "policy-kl", text="ppo + epo, seed 0")
    step, value = re.fullmatch(r"(\d+) *ppo \+ epo, seed 0 : ([\d.]+)", label.strip()).groups()
    assert float(value) == pytest.approx(run.metrics["policy/kl"][run.steps.index(int(step))], rel=1e-3)

    button = page.get_by_role("button", name="KL of the update: show the numbers")
    button.focus()
    page.keyboard.press("Enter")
    rows = page.locator("#chart-policy-kl .card-table tbody tr")
    assert rows.count() == len(run.steps)
    assert float(rows.nth(4).locator("td").inner_text().split()[0]) == pytest.approx(
        run.metrics["policy/kl"][4], rel=0.01
    )
    page.keyboard.press("Enter")
    expect(rows.first).to_be_hidden()


def test_any_metric_is_found_and_kept_in_the_address(open_page: Open, single_report: Path) -> None:
    page = open_page(single_report, "charts")
    search = page.get_by_role("combobox", name="Add a chart of any metric")
    search.scroll_into_view_if_needed()
    search.fill("grad critic")
    expect(page.locator("#metric-list [role=option]")).to_have_count(1)
    page.keyboard.press("Enter")
    show(page, "own-value-grad-norm")
    assert "metrics=value%2Fgrad_norm" in page.url
    search.fill("learning")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    show(page, "own-update-learning-rate")
    search.fill("no such thing")
    expect(page.locator("#metric-list")).to_contain_text("No metric")
    page.keyboard.press("Escape")
    page.reload()
    show(page, "own-value-grad-norm")
    page.get_by_role("button", name="Gradient norm, critic: remove this chart").click()
    expect(page.locator("#chart-own-value-grad-norm")).to_have_count(0)
    assert page.locator("#chart-own-update-learning-rate").count() == 1


def test_smoothing_is_the_running_mean(open_page: Open, single_report: Path, runs_folder: Path) -> None:
    page = open_page(single_report, "charts")
    reward = [r for r in read_run(runs_folder / "single").metrics["reward/mean"] if r is not None]
    show(page, "reward-mean")
    page.get_by_label("Smoothing").select_option("5")
    page.wait_for_function("() => document.querySelector('#chart-reward-mean .plot').data.length === 2")
    (smooth,) = traces(page, "reward-mean")
    assert smooth["y"][9] == pytest.approx(sum(reward[5:10]) / 5, rel=1e-4)
    assert smooth["y"][1] == pytest.approx(sum(reward[:2]) / 2, rel=1e-4)


def test_runs_lie_over_one_another_and_can_be_hidden(open_page: Open, comparison_report: Path) -> None:
    page = open_page(comparison_report, "charts")
    page.get_by_role("button", name="Single runs").click()
    lines = traces(page, "reward-mean")
    assert len(lines) == 4
    assert len({(t["line"]["color"], t["line"]["dash"]) for t in lines}) == 4
    first = page.locator(".chip").first
    first.focus()
    page.keyboard.press("Space")
    expect(first).to_have_attribute("aria-pressed", "false")
    page.wait_for_function("() => document.querySelector('#chart-reward-mean .plot').data.length === 3")
    page.get_by_label("In detail").select_option("3")
    expect(page.locator("#chart-entropy")).to_contain_text("Run: ppo + epo, seed 1")


def test_arms_are_means_with_intervals(open_page: Open, comparison_report: Path) -> None:
    page = open_page(comparison_report, "charts")
    curves = page.evaluate("EPO.page.comparison.curves['eval/ood/success']")
    lines = {t["name"]: t for t in traces(page, "success-ood")}
    assert set(lines) == {"ppo", "ppo + epo"}
    for name, line in lines.items():
        assert line["y"] == curves[name]["mean"]
        assert line["intervals"] == [list(pair) for pair in zip(curves[name]["low"], curves[name]["high"], strict=True)]
    assert len(bands(page, "success-ood")) == 4
    page.get_by_role("button", name="ppo (2 seeds)", exact=True).click()
    page.wait_for_function(
        "() => document.querySelector('#chart-success-ood .plot').data.filter((t) => !t.isBand).length === 1"
    )


def test_figures_show_the_papers_figures_and_the_table(open_page: Open, comparison_report: Path) -> None:
    page = open_page(comparison_report, "figures")
    comparison = page.evaluate("EPO.page.comparison")
    headings = page.locator("#panel-figures h2").all_inner_texts()
    assert headings == ["Arms compared", *(figure["title"] for figure in comparison["figures"])]
    table = page.locator(".arms-table")
    row = next(r for r in comparison["table"] if r["arm"] == "ppo + epo" and r["split"] == "iid")
    cells = table.locator("tbody").first.locator("tr", has_text="ppo + epo")
    expect(cells).to_contain_text(f"{100 * row['window_mean']:.1f} %")
    expect(cells).to_contain_text(f"{100 * row['low']:.1f} to {100 * row['high']:.1f} %")
    expect(cells).to_contain_text(f"{100 * row['best_mean']:.1f} %")
    expect(table.locator("thead")).to_contain_text("Best, biased")
    expect(page.locator("#panel-figures")).to_contain_text("Seeds: ppo: 0, 1; ppo + epo: 0, 1")
    hint = page.get_by_role("button", name="What is Best, biased?")
    hint.focus()
    expect(hint.get_by_role("tooltip")).to_be_visible()
    figure = comparison["figures"][0]
    lines = traces(page, f"{figure['id']}-1")
    metric = figure["panels"][1]["metric"]
    assert {t["name"]: t["y"] for t in lines} == {
        arm: comparison["curves"][metric][arm]["mean"] for arm in figure["panels"][1]["arms"]
    }


def test_live_data_arrives_without_losing_the_place(browser: Browser, tmp_path: Path) -> None:
    """The zoom stays, charts grow, a lost connection is told, a run that started anew replaces the old one."""
    path = make_run(tmp_path / "run", steps=12, finished=False)
    full = read_run(path).page() | {"total_steps": 20}
    run = json.loads(json.dumps(full))
    cut = {"steps": run["steps"][:8], "metrics": {k: v[:8] for k, v in run["metrics"].items()}, "cursor": "a"}
    cut["evaluations"] = run["evaluations"][:2]
    more = {"reset": False, "cursor": "b", "finished": True, "steps": run["steps"][8:]}
    more |= {"metrics": {k: v[8:] for k, v in run["metrics"].items()} | {"new/metric": [1.0, 2.0, 3.0, 4.0]}}
    more |= {"evaluations": run["evaluations"][2:], "turn_entropy": {}, "index": {}}
    html, _ = render_page(page_object([run | cut], mode="live", title="live", comparison=None), blobs={})
    answers: list[Any] = [{"runs": [{"reset": False, "finished": False}]}, {"runs": [more]}, None]
    answers.append({"runs": [full | cut | {"reset": True, "finished": False}]})

    def answer(route: Route) -> None:
        if "/api/page" not in route.request.url:
            route.fulfill(body=html, content_type="text/html")
        elif (data := answers.pop(0) if answers else {"runs": []}) is None:
            route.abort()
        else:
            route.fulfill(json=data)

    page = browser.new_page(viewport=DESKTOP)
    page.clock.install()
    page.route("http://live.test/**", answer)
    page.goto("http://live.test/#charts")
    page.clock.run_for(500)
    status = page.locator("#status")
    expect(status).to_contain_text("Live, step 8 of 20")
    show(page, "reward-mean")
    page.evaluate("Plotly.relayout(document.querySelector('#chart-reward-mean .plot'), {'xaxis.range': [3, 6]})")

    def wait(text: str, milliseconds: int) -> None:
        page.clock.run_for(milliseconds)
        expect(status).to_contain_text(text)
        page.clock.run_for(200)  # frames in which charts are drawn

    wait("Live, step 8 of 20", 2100)
    wait("Finished", 2100)
    (reward,) = traces(page, "reward-mean")
    assert reward["x"] == full["steps"]
    assert page.evaluate("document.querySelector('#chart-reward-mean .plot').layout.xaxis.range") == [3, 6]
    assert page.evaluate("EPO.page.runs[0].metrics['new/metric']") == [None] * 8 + [1, 2, 3, 4]
    wait("Connection lost since", 2100)
    wait("Live, step 8 of 20", 4100)
    (reward,) = traces(page, "reward-mean")
    assert reward["x"] == full["steps"][:8]
    page.close()
