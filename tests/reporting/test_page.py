"""The frame of the page: tabs, keyboard, deep links, themes, widths, and texts that are not ours."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from browser import DESKTOP, PHONE, find_chromium, point_at
from page_runs import make_run
from payloads import PAYLOADS
from playwright.sync_api import Page, expect

from epo.reporting.pages.builder import page_object, render_page
from epo.reporting.reading.run_reader import read_run

Open = Callable[..., Page]

SINGLE = ["overview", "charts", "health", "trajectories", "setup"]
COMPARISON = ["overview", "charts", "figures", "health", "trajectories", "setup"]
TEXT_COLOURS = ("--text", "--muted", "--accent", "--good", "--bad", "--warn")
GROUNDS = ("--bg", "--surface", "--raised", "--sunken")
SERIES = tuple(f"--series-{i}" for i in range(7))


def tab(page: Page, name: str) -> None:
    page.locator(f"#tab-{name}").click()
    expect(page.locator(f"#panel-{name}")).to_be_visible()


def overflow(page: Page) -> int:
    """Pixels that the page is wider than the window."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def test_tabs_are_reached_by_arrow_keys_and_by_address(open_page: Open, single_report: Path) -> None:
    page = open_page(single_report)
    expect(page.get_by_role("tablist")).to_be_visible()
    shown = page.locator("[role=tab]:visible")
    assert shown.evaluate_all("all => all.map((t) => t.id)") == [f"tab-{name}" for name in SINGLE]
    page.locator("#tab-overview").focus()
    for key, name in (
        ("ArrowRight", "charts"),
        ("ArrowLeft", "overview"),
        ("ArrowLeft", "setup"),
        ("Home", "overview"),
    ):
        page.keyboard.press(key)
        expect(page.locator(f"#tab-{name}")).to_be_focused()
        expect(page.locator(f"#tab-{name}")).to_have_attribute("aria-selected", "true")
        expect(page.get_by_role("tabpanel")).to_have_id(f"panel-{name}")
        assert page.url.endswith(f"#{name}")
    outline = page.locator("#tab-overview").evaluate("node => getComputedStyle(node).outlineStyle")
    assert outline == "solid", "the focus must be seen"
    page.go_back()
    expect(page.locator("#panel-setup")).to_be_visible()
    page.evaluate("location.hash = '#health'")
    expect(page.locator("#panel-health")).to_be_visible()
    page.evaluate("location.hash = '#no-such-tab'")
    expect(page.locator("#panel-health")).to_be_visible()


def test_a_tab_is_drawn_when_it_is_first_shown(open_page: Open, single_report: Path) -> None:
    page = open_page(single_report, "setup")
    expect(page.locator("#panel-setup")).to_be_visible()
    assert page.locator("#panel-charts").evaluate("node => node.childElementCount") == 0
    tab(page, "charts")
    drawn = page.locator("#panel-charts .plot .main-svg").first
    expect(drawn).to_be_visible()
    cards = page.locator("#panel-charts .plot").count()
    # Of the charts far below the window none is drawn yet.
    assert page.locator("#panel-charts .plot:has(.main-svg)").count() < cards / 2
    page.locator("#chart-budget").scroll_into_view_if_needed()
    expect(page.locator("#chart-budget .main-svg").first).to_be_visible()


def test_overview_says_what_came_out_and_setup_how(open_page: Open, single_report: Path, runs_folder: Path) -> None:
    page = open_page(single_report)
    run = read_run(runs_folder / "single")
    for evaluation in (run.evaluations[0], run.evaluations[-1]):
        for panel in evaluation["panels"]:
            row = page.locator(".result tbody tr", has_text=panel["split"])
            expect(row).to_contain_text(f"{100 * panel['success']:.1f} %")
            expect(row).to_contain_text(f"{100 * panel['low']:.1f} to {100 * panel['high']:.1f} %")
    expect(page.locator(".facts")).to_contain_text("10 min 34 s")
    assert page.locator(".alarm-list li").count() >= 1
    expect(page.locator(".alarm-list")).to_contain_text("Surge of invalid actions at steps 2–3")

    tab(page, "setup")
    panel = page.locator("#panel-setup")
    expect(panel.locator(".command")).to_have_text("epo train base 'environment.options={length: 5}'")
    expect(panel.locator(".pairs")).to_contain_text("2.13.0")
    expect(panel.locator(".config")).to_contain_text("kappa_low: 0.5")
    assert panel.locator("mark").count() == 0, "one run differs from nothing"


def test_health_names_the_steps_and_leads_to_their_trajectories(open_page: Open, single_report: Path) -> None:
    page = open_page(single_report, "health")
    alarm = page.locator("#alarm-invalid_actions")
    expect(alarm.locator("summary")).to_contain_text("2 steps")
    assert alarm.locator("rect.fired").count() == 1, "two steps in a row are one stretch"
    expect(page.locator("#alarm-dead_critic summary")).to_contain_text("quiet")
    alarm.locator("summary").focus()
    page.keyboard.press("Enter")
    for word in ("Looks for", "Threshold", "Source", "What to try"):
        expect(alarm).to_contain_text(word)
    expect(alarm.locator(".main-svg").first).to_be_visible()
    alarm.get_by_role("link", name="2–3").click()
    expect(page.locator("#panel-trajectories")).to_be_visible()
    assert "step=2" in page.url


def test_setup_marks_what_differs_between_runs(open_page: Open, comparison_report: Path) -> None:
    page = open_page(comparison_report, "setup")
    row = page.locator(".diff tr", has_text="entropy.method")
    assert row.locator("td").all_inner_texts() == ["none", "epo"]
    assert page.locator(".diff tr", has_text="optimizer.learning_rate").count() == 0
    marked = page.locator(".config").first.locator("mark").all_text_contents()
    assert "  method: epo" in marked or "  method: none" in marked


@pytest.mark.parametrize("which", ["single_report", "comparison_report"])
def test_no_part_is_wider_than_the_window(open_page: Open, request: pytest.FixtureRequest, which: str) -> None:
    page = open_page(request.getfixturevalue(which), theme="dark")
    for size in (DESKTOP, PHONE):
        page.set_viewport_size(size)
        for name in SINGLE if which == "single_report" else COMPARISON:
            tab(page, name)
            assert overflow(page) <= 0, (name, size)


def test_theme_follows_the_system_and_the_button(open_page: Open, single_report: Path) -> None:
    page = open_page(single_report, "charts", theme="dark")
    root, button = page.locator("html"), page.locator("#theme")
    expect(root).to_have_attribute("data-theme", "dark")
    text = page.locator("#chart-reward-mean .xtick text").first
    expect(text).to_be_visible()
    dark = text.evaluate("node => getComputedStyle(node).fill")
    button.click()
    expect(root).to_have_attribute("data-theme", "light")
    page.wait_for_function(
        "was => getComputedStyle(document.querySelector('#chart-reward-mean .xtick text')).fill !== was", arg=dark
    )
    page.reload()
    expect(root).to_have_attribute("data-theme", "light")
    expect(button).to_have_accessible_name(re.compile("light"))
    button.click()
    button.click()
    expect(root).to_have_attribute("data-theme", "dark")  # auto again, and the system is dark
    page.emulate_media(color_scheme="light")
    expect(root).to_have_attribute("data-theme", "light")


def luminance(rgb: list[float]) -> float:
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """WCAG 2: (lighter + 0.05) / (darker + 0.05)."""
    values = [luminance([int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]) for colour in (one, other)]
    return (max(values) + 0.05) / (min(values) + 0.05)


def test_contrast_is_enough_for_text_and_lines(open_page: Open, single_report: Path) -> None:
    page = open_page(single_report)
    names = [*TEXT_COLOURS, *GROUNDS, *SERIES, "--focus", "--accent-text"]
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)  # pyright: ignore[reportArgumentType]
        expect(page.locator("html")).to_have_attribute("data-theme", theme)
        colour = page.evaluate("names => Object.fromEntries(names.map((n) => [n, EPO.color(n)]))", names)
        for ground in GROUNDS:
            for text in TEXT_COLOURS:
                assert contrast(colour[text], colour[ground]) >= 4.5, (theme, text, ground)
        assert contrast(colour["--accent-text"], colour["--accent"]) >= 4.5
        for line in (*SERIES, "--focus"):
            assert contrast(colour[line], colour["--surface"]) >= 3.0, (theme, line)


def test_works_where_nothing_may_be_remembered(open_page: Open, single_report: Path) -> None:
    page = open_page("about:blank")
    page.add_init_script(
        "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('no', 'SecurityError'); }})"
    )
    page.goto(single_report.as_uri())
    page.locator("#theme").click()
    expect(page.locator("html")).to_have_attribute("data-theme", "light")


def test_foreign_texts_stay_texts(open_page: Open, tmp_path: Path) -> None:
    """Labels, notes, paths, settings, metric names and panels may hold anything."""
    runs = []
    for i, method in enumerate(("epo", "none")):
        run = read_run(make_run(tmp_path / f"run{i}", method=method, steps=6)).page()
        evil = list(PAYLOADS.values())[i::2]
        run |= {"label": evil[0] + " <b>bold</b>", "name": f"<img src=x onerror=alert({i})>", "path": evil[1]}
        run |= {"notes": evil, "config_yaml": "\n".join(evil), "config": {**run["config"], "x": evil, evil[2]: evil[3]}}
        run["provenance"] = {"command": evil, **{f"key {text}": text for text in evil}}
        run["metrics"] |= dict.fromkeys(evil, run["metrics"]["reward/mean"])
        for evaluation in run["evaluations"]:
            evaluation["panels"][0]["split"] = "<b>iid</b>"
        runs.append(run)
    html, _ = render_page(page_object(runs, mode="report", title=runs[0]["label"], comparison=None), blobs={})
    file = tmp_path / "evil.html"
    file.write_text(html, encoding="utf-8")
    page = open_page(file)
    for name in SINGLE:
        tab(page, name)
        page.wait_for_timeout(50)
    tab(page, "charts")
    assert page.locator("main img, main iframe, main b, header b, main script, main a[href^=javascript]").count() == 0
    chip = page.locator(".chip").first
    assert "<b>bold</b>" in chip.inner_text()
    expect(page.locator("#panel-charts .main-svg").first).to_be_visible()
    point_at(page, "reward-mean", text="<b>bold</b>")


def test_a_report_without_runs_says_so(open_page: Open, tmp_path: Path) -> None:
    html, _ = render_page(page_object([], mode="report", title="nothing", comparison=None), blobs={})
    (tmp_path / "empty.html").write_text(html, encoding="utf-8")
    page = open_page(tmp_path / "empty.html")
    for name in SINGLE:
        tab(page, name)
        expect(page.locator(f"#panel-{name}")).to_contain_text(re.compile("no run", re.I))


def test_every_documented_metric_has_a_title_and_a_sentence() -> None:
    root = Path(__file__).parents[2]
    rows = [
        line.split("|")[1]
        for line in (root / "docs/metrics.md").read_text(encoding="utf-8").splitlines()
        if "|" in line
    ]
    documented = {name for row in rows for name in re.findall(r"`([\w/]+)`", row)}
    script = (root / "src/epo/reporting/pages/assets/core-metrics.js").read_text(encoding="utf-8")
    known = set(re.findall(r'^    "?([\w/]+)"?: \[\s*"', script, re.M))
    assert len(documented) > 40
    assert {name for name in documented if not name.startswith("health/")} <= known


def test_without_chromium_the_tests_fail_and_name_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("EPO_CHROMIUM", raising=False)
    with pytest.raises(pytest.fail.Exception, match="apt install chromium"):
        find_chromium()
    monkeypatch.setenv("EPO_CHROMIUM", str(tmp_path / "none"))
    with pytest.raises(pytest.fail.Exception, match="EPO_CHROMIUM"):
        find_chromium()
    (tmp_path / "chromium").touch(mode=0o755)
    monkeypatch.delenv("EPO_CHROMIUM")
    assert find_chromium() == str(tmp_path / "chromium")
