"""The trajectory viewer in a browser: what it shows is what the records say, by mouse and by keyboard.

Legend: the run "demo" has steps 1..5, of which its report holds 1, 4 and 5; "old" is as an older version left it.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from browser import DESKTOP, PHONE, watch
from playwright.sync_api import Browser, Page, ViewportSize, expect
from viewer_run import Vocabulary, make_records, without_new_keys, write_run, write_viewer_report

EMBEDDED = [1, 4, 5]


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary()


@pytest.fixture(scope="module")
def steps(vocabulary: Vocabulary) -> dict[int, list[dict[str, Any]]]:
    """The records of "demo". In step 5, group 0 was filtered out and the environment failed in row 4."""
    made = {step: make_records(vocabulary, step=step) for step in range(1, 6)}
    for record in made[5][:5]:
        record["trained"] = False
        for turn in record["turns"]:
            turn["advantages"] = turn["ratios"] = None
    made[5][4] |= {"stop_reason": "environment_error", "success": False, "error": "the worker died"}
    return made


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, vocabulary: Vocabulary, steps: dict[int, Any]) -> str:
    folder = tmp_path_factory.mktemp("viewer")
    old = {step: [without_new_keys(record) for record in steps[step]] for step in EMBEDDED}
    grpo = ("algorithm.name=grpo", "algorithm.filter=snr", "rollout.group_size=4")
    runs = [
        write_run(folder / "demo", steps, vocabulary.pieces, *grpo),
        write_run(folder / "old", old, None, with_index=False),
    ]
    return write_viewer_report(folder / "report.html", *runs, steps=EMBEDDED)


Open = Callable[..., Page]


@pytest.fixture(scope="module")
def visit(browser: Browser, report: str) -> Iterator[Open]:
    """`visit("run=0&step=4", ...)`: the report at this address. Pages of a look (theme, width) are used again; at the
    end none of them may have logged an error."""
    pages: dict[tuple[str, int], Page] = {}
    problems: list[str] = []

    def go(address: str = "", *, theme: str = "light", size: ViewportSize = DESKTOP) -> Page:
        key = (theme, size["width"])
        if key not in pages:
            context = browser.new_context(viewport=size, color_scheme=theme)
            context.set_default_timeout(30_000)
            page = context.new_page()
            watch(page, problems)
            page.goto(f"{report}#trajectories?{address}")
            pages[key] = page
        else:
            page = pages[key]
            page.goto("about:blank")
            page.goto(f"{report}#trajectories?{address}")
        expect(page.locator(".viewer .summary, .viewer .failure")).to_have_count(1)
        return page

    yield go
    for page in pages.values():
        page.context.close()
    assert problems == []


def title(page: Page) -> str:
    return page.locator(".viewer .summary h3").inner_text()


def rows_of(steps: dict[int, Any], accept: Callable[[dict[str, Any]], bool]) -> int:
    return sum(accept(record) for records in steps.values() for record in records)


def test_opens_the_last_step_it_holds(visit: Open, steps: dict[int, Any]) -> None:
    page = visit()
    assert title(page) == steps[5][0]["task"]
    assert "#trajectories?run=0&step=5&row=0" in page.url
    assert page.locator(".viewer article").count() == len(steps[5][0]["turns"])


def test_pick_step_task_trajectory_and_run(visit: Open, steps: dict[int, Any]) -> None:
    page = visit()
    page.get_by_role("combobox", name="Step").select_option("4")
    expect(page.locator(".summary .note")).to_contain_text("step 4, 1 of 4")
    page.get_by_role("combobox", name="Task").select_option("1")
    expect(page.locator(".summary h3")).to_have_text(steps[4][4]["task"])
    page.get_by_role("combobox", name="Trajectory").select_option("6")
    expect(page.locator(".summary .note")).to_contain_text("3 of 4")
    assert "step=4&row=6" in page.url
    record = steps[4][6]
    first = page.locator(".observation .text").first
    expect(first).to_have_text(record["turns"][0]["observation"], use_inner_text=True)
    assert page.locator(".action").all_inner_texts() == [turn["action"] for turn in record["turns"]]
    page.get_by_role("button", name="Next in the list").click()
    expect(page.locator(".summary .note")).to_contain_text("4 of 4")
    page.get_by_role("combobox", name="Run").select_option("1")
    expect(page.locator(".viewer article").first).to_contain_text("not recorded whether it was trained on")
    page.go_back()
    expect(page.locator(".summary .note")).to_contain_text("step 4, 4 of 4")


def test_filters_and_sorting(visit: Open, steps: dict[int, Any]) -> None:
    page = visit()
    status = page.locator(".list-status")
    total = rows_of(steps, lambda r: True)
    assert status.inner_text() == f"{total} trajectories"
    page.locator(".filters summary").click()

    def shows(accept: Callable[[dict[str, Any]], bool]) -> None:
        assert status.inner_text() == f"{rows_of(steps, accept)} of {total} trajectories"

    page.get_by_label("Outcome").select_option("0")
    shows(lambda r: not r["success"])
    page.get_by_label("Stopped by").select_option("environment_error")
    shows(lambda r: r["stop_reason"] == "environment_error")
    page.get_by_role("button", name="Clear filters").click()
    page.get_by_label("has an invalid action").check()
    shows(lambda r: any(not turn["is_valid"] for turn in r["turns"]))
    page.get_by_label("Goal").select_option("light-lamp")
    shows(lambda r: any(not turn["is_valid"] for turn in r["turns"]) and r["goal"] == "light-lamp")
    page.get_by_role("button", name="Clear filters").click()
    page.get_by_label("Step from").fill("2")
    page.get_by_label("to", exact=True).fill("3")
    shows(lambda r: 2 <= r["step"] <= 3)
    page.get_by_label("can be opened here").check()
    shows(lambda r: False)
    page.get_by_role("button", name="Clear filters").click()
    page.get_by_role("searchbox", name="Task").fill("PLANT/2")
    shows(lambda r: "plant/2" in r["task"])
    page.get_by_role("button", name="Clear filters").click()

    page.get_by_role("button", name="Sort by turns").click()
    by_turns = sorted((len(r["turns"]) for records in steps.values() for r in records), reverse=True)
    shown = [int(text) for text in page.locator(".list-row .c-turns").all_inner_texts()]
    assert shown == by_turns[: len(shown)]
    page.get_by_role("button", name="Sort by entropy").click()
    page.get_by_role("button", name="Sort by entropy").click()
    shown = [float(text) for text in page.locator(".list-row .c-entropy").all_inner_texts()]
    assert shown == sorted(shown)


def test_a_step_the_report_does_not_hold_says_what_to_do(visit: Open, steps: dict[int, Any]) -> None:
    page = visit("run=0&step=2&row=1")
    failure = page.locator(".viewer .failure")
    assert "1, 4, 5" in failure.inner_text()
    assert "epo watch" in failure.inner_text() and "--steps 2" in failure.inner_text()
    row = page.locator(".list-row.closed").first
    assert "not embedded" in row.inner_text()
    page.get_by_role("button", name="Go to step 1").click()
    expect(page.locator(".summary h3")).to_have_text(steps[1][0]["task"])


def level_class(name: str, x: float) -> str:
    """By the ranges that the page states: 0 to 3 nats in 16 parts, 0 to -5, -3 to 3 in 15 parts, a half to double."""
    if name == "entropy":
        return f"s{min(15, int(x / 3 * 16))}"
    if name == "logprob":
        return f"s{min(15, int(-x / 5 * 16))}"
    position = x / 3 if name == "advantage" else math.log2(x)
    return f"d{7 + math.floor(max(-1.0, min(1.0, position)) * 7 + 0.5)}"


@pytest.mark.parametrize(
    ("name", "field", "ends"),
    [
        ("entropy", "entropy", ("0", "3")),
        ("logprob", "logprobs", ("0", "−5")),
        ("advantage", "advantages", ("−3", "+3")),
        ("ratio", "ratios", ("0.5", "2")),
    ],
)
def test_colours_follow_the_values(
    visit: Open, steps: dict[int, Any], name: str, field: str, ends: tuple[str, str]
) -> None:
    page = visit(f"run=0&step=4&row=1&colour={name}")
    values = [x for turn in steps[4][1]["turns"] for x in turn[field]]
    classes = page.locator(".tok").evaluate_all("spans => spans.map(span => span.classList[1])")
    assert classes == [level_class(name, x) for x in values]
    ticks = page.locator(".legend-ticks > span").all_inner_texts()
    assert (ticks[0].split()[0], ticks[-1].split()[0]) == ends
    weigh = {"ratio": lambda x: abs(math.log2(x)), "entropy": float, "logprob": lambda x: -x, "advantage": abs}[name]
    weights = sorted(map(weigh, values), reverse=True)
    rarest = weights[math.ceil(len(weights) / 20) - 1]  # the 5 % most extreme, and their equals
    assert page.locator(".tok.extreme").count() == sum(weight >= rarest for weight in weights)


def test_switch_colour_numbers_underline(visit: Open, steps: dict[int, Any]) -> None:
    page = visit("run=0&step=4&row=1")
    page.get_by_role("radio", name="Ratio").check(force=True)
    assert "colour=ratio" in page.url
    ratios = steps[4][1]["turns"][0]["ratios"]
    assert page.locator(".tok").first.get_attribute("class").split()[1] == level_class("ratio", ratios[0])
    page.get_by_label("Numbers").check()
    shown = (
        page.locator(".turn").first.locator(".tok").evaluate_all("spans => spans.map(s => Number(s.dataset.number))")
    )
    assert shown == [pytest.approx(x, rel=0.05) for x in ratios]
    extreme = page.locator(".tok.extreme").first
    assert "underline" in extreme.evaluate("s => getComputedStyle(s).textDecorationLine")
    page.get_by_label("Underline extremes").uncheck()
    assert "underline" not in extreme.evaluate("s => getComputedStyle(s).textDecorationLine")


CARD = "#token-card"


def check_card(page: Page, vocabulary: Vocabulary, turn: dict[str, Any], i: int) -> None:
    """The card holds the numbers of token i."""
    card = page.locator(CARD)
    expect(card).to_be_visible()
    terms = dict(zip(card.locator("dt").all_inner_texts(), card.locator("dd").all_inner_texts(), strict=True))
    number = {
        name: float(text.split()[0].replace("−", "-").rstrip("%")) for name, text in terms.items() if name != "trained"
    }
    assert number["id"] == turn["response_ids"][i]
    assert number["entropy"] == pytest.approx(turn["entropy"][i], rel=0.01)
    assert number["log-probability"] == pytest.approx(turn["logprobs"][i], rel=0.01)
    assert number["probability"] == pytest.approx(100 * math.exp(turn["logprobs"][i]), abs=0.06)
    assert number["advantage"] == pytest.approx(turn["advantages"][i], rel=0.01)
    assert number["ratio"] == pytest.approx(turn["ratios"][i], rel=0.01)
    assert terms["trained"] == "yes"
    assert card.locator(".piece").first.text_content() == vocabulary.pieces[turn["response_ids"][i]]
    rows = card.locator("tr").all_inner_texts()
    flat = turn["alternatives"][i]
    for row, token, logprob in zip(rows, flat[::2], flat[1::2], strict=False):
        assert vocabulary.pieces[token].strip() in row
        share = 100 * math.exp(logprob)
        assert f"{share:.1f} %" in row or "< 0.1 %" in row
        assert ("drawn" in row) == (token == turn["response_ids"][i])


def test_hover_shows_the_card(visit: Open, vocabulary: Vocabulary, steps: dict[int, Any]) -> None:
    page = visit("run=0&step=4&row=0")
    page.locator(".turn").nth(1).locator(".tok").nth(3).hover()
    check_card(page, vocabulary, steps[4][0]["turns"][1], 3)
    page.mouse.move(0, 0)
    expect(page.locator(CARD)).to_be_hidden()


def test_arrow_keys_walk_the_tokens(visit: Open, vocabulary: Vocabulary, steps: dict[int, Any]) -> None:
    page = visit("run=0&step=4&row=0")
    turns = steps[4][0]["turns"]
    page.locator(".strip button").first.focus()
    page.keyboard.press("Tab")  # the tokens are one stop
    check_card(page, vocabulary, turns[0], 0)
    page.keyboard.press("ArrowRight")
    check_card(page, vocabulary, turns[0], 1)
    page.keyboard.press("ArrowDown")
    check_card(page, vocabulary, turns[1], 1)
    page.keyboard.press("Home")
    page.keyboard.press("ArrowLeft")
    check_card(page, vocabulary, turns[0], len(turns[0]["response_ids"]) - 1)
    page.keyboard.press("ArrowUp")  # there is none above
    page.keyboard.press("Home")
    check_card(page, vocabulary, turns[0], 0)
    focused = page.evaluate("document.activeElement.getAttribute('aria-describedby')")
    assert focused == "token-card"
    page.keyboard.press("Escape")
    expect(page.locator(CARD)).to_be_hidden()


def test_list_by_keyboard(visit: Open) -> None:
    page = visit("run=0&step=5&row=0")
    page.locator(".list").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page.locator(".summary .note")).to_contain_text("step 5, 3 of 4")
    assert "row=2" in page.url
    selected = page.locator('.list-row[aria-selected="true"]')
    assert selected.get_attribute("id") == page.locator(".list").get_attribute("aria-activedescendant")


def test_loss_mask_and_reasons(visit: Open) -> None:
    page = visit("run=0&step=5&row=0")
    assert "algorithm.filter=snr kept other task groups" in page.locator(".response .flag.mask").first.inner_text()
    assert page.get_by_role("radio", name="Advantage").is_disabled()
    page.get_by_label("Loss mask").check()
    ground = "getComputedStyle(document.querySelector('.viewer .tok')).backgroundColor"
    assert page.evaluate(ground) == "rgba(0, 0, 0, 0)"  # not trained: without colour
    page.get_by_role("combobox", name="Task").select_option("1")
    expect(page.locator(".summary .error")).to_contain_text("the worker died")
    assert "the environment failed" in page.locator(".response .flag.mask").first.inner_text()
    page.get_by_role("combobox", name="Trajectory").select_option("5")
    expect(page.locator(".response .flag.mask").first).to_have_text("trained")
    assert page.locator(".observation .flag.mask").first.inner_text() == "context, not trained"
    assert page.evaluate(ground) != "rgba(0, 0, 0, 0)"


def test_group_side_by_side(visit: Open, steps: dict[int, Any]) -> None:
    page = visit("run=0&step=4&row=5")
    page.get_by_role("button", name="Compare the group (4)").click()
    assert "compare=1" in page.url
    group = steps[4][4:8]
    members = page.locator(".member")
    assert [members.nth(m).locator("article").count() for m in range(4)] == [len(r["turns"]) for r in group]
    tops = [members.nth(m).locator("article").nth(1).bounding_box()["y"] for m in range(4)]
    assert max(tops) - min(tops) < 1, "turns stand on one line"
    lefts = [members.nth(m).bounding_box()["x"] for m in range(4)]
    assert lefts == sorted(lefts) and lefts[0] < lefts[-1]
    same = sum(r["turns"][0]["action"] == group[0]["turns"][0]["action"] for r in group)
    assert f"{same} of 4 did this" in members.first.locator("article").first.inner_text()
    page.get_by_role("button", name="Read trajectory 3 alone").click()
    expect(page.locator(".summary .note")).to_contain_text("3 of 4")
    assert page.locator(".member").count() == 0


def test_group_at_400_pixels_is_one_below_the_other(visit: Open) -> None:
    page = visit("run=0&step=4&row=5&compare=1", size=PHONE)
    boxes = [page.locator(".member").nth(m).bounding_box() for m in range(4)]
    assert len({box["x"] for box in boxes}) == 1
    assert all(above["y"] + above["height"] <= below["y"] + 1 for above, below in itertools.pairwise(boxes))
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_narrow_window_has_no_sideways_scrolling(visit: Open, theme: str) -> None:
    page = visit("run=0&step=4&row=1", theme=theme, size=PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    page.locator(".list-row").nth(2).click()
    expect(page.locator(".summary")).to_be_in_viewport()
    page.locator(".tok").nth(2).click()
    box = page.locator(CARD).bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 400 and box["y"] + box["height"] <= 800


def test_search_in_the_texts(visit: Open, steps: dict[int, Any]) -> None:
    page = visit("run=0&step=4&row=1")
    page.get_by_role("searchbox", name="Text").fill("Take Apple")
    page.get_by_role("button", name="Search").click()

    def has(record: dict[str, Any]) -> bool:
        return any("take apple" in turn["response"] for turn in record["turns"])

    count = sum(has(record) for step in EMBEDDED for record in steps[step])
    expect(page.locator(".search-note")).to_contain_text(
        f"{count} trajectories have “Take Apple”, of those whose texts"
    )
    assert page.locator(".list-status").inner_text().startswith(f"{count} of ")
    page.locator(".list-row").first.click()
    expect(page.locator(".action mark").last).to_have_text("take apple")


def test_strip_leads_to_a_turn(visit: Open, steps: dict[int, Any]) -> None:
    longest = max(range(len(steps[4])), key=lambda row: len(steps[4][row]["turns"]))
    page = visit(f"run=0&step=4&row={longest}")
    turns = steps[4][longest]["turns"]
    labels = page.locator(".strip button").evaluate_all("buttons => buttons.map(b => b.title)")
    means = [sum(turn["entropy"]) / len(turn["entropy"]) for turn in turns]
    assert [float(label.split("entropy ")[1].split()[0]) for label in labels] == [
        pytest.approx(m, rel=0.01) for m in means
    ]
    page.locator(".strip button").last.click()
    expect(page.locator(f'.turn[data-turn="{len(turns) - 1}"]')).to_be_in_viewport()
    page.locator(".strip button").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.title").startswith("Turn 2")


def test_old_runs_show_what_they_have(visit: Open, steps: dict[int, Any]) -> None:
    page = visit("run=1&step=4&row=1&colour=advantage")
    assert page.get_by_role("radio", name="Entropy").is_checked()
    assert page.get_by_role("radio", name="Advantage").is_disabled()
    turn = steps[4][1]["turns"][0]
    assert page.locator(".tok").first.inner_text() == f"⟨#{turn['response_ids'][0]}⟩"
    assert turn["response"] in page.locator(".response").first.inner_text()  # the text instead of the pieces
    page.locator(".tok").first.hover()
    card = page.locator(CARD)
    assert "not recorded" in card.inner_text() and "What else could have been drawn" in card.inner_text()


def test_copies_are_exact(visit: Open, steps: dict[int, Any]) -> None:
    page = visit("run=0&step=4&row=1")
    page.evaluate("navigator.clipboard.writeText = async (text) => void (window.copied = text)")
    record = steps[4][1]
    page.get_by_role("button", name="Copy actions").click()
    assert json.loads(page.evaluate("window.copied")) == [turn["action"] for turn in record["turns"]]
    page.get_by_role("button", name="Copy JSON").click()
    assert json.loads(page.evaluate("window.copied")) == record
    page.get_by_role("button", name="Copy text").click()
    assert record["turns"][0]["observation"] in page.evaluate("window.copied")
    expect(page.get_by_role("button", name="Copied ✓").last).to_be_visible()


CONTRAST = """
() => {
  const luminance = (css) => {
    const [r, g, b] = css.match(/[\\d.]+/g).slice(0, 3).map((x) => x / 255)
      .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const viewer = document.querySelector(".viewer");
  const worst = {};
  const names = [...Array(16).keys()].map((k) => `s${k}`).concat([...Array(15).keys()].map((k) => `d${k}`));
  for (const name of names) {
    const span = EPO.el("span", { class: `tok ${name}` }, "x");
    viewer.append(span);
    const style = getComputedStyle(span);
    const [a, b] = [luminance(style.color), luminance(style.backgroundColor)].sort((x, y) => y - x);
    worst[name] = [(a + 0.05) / (b + 0.05), luminance(style.backgroundColor)];
    span.remove();
  }
  return worst;
}
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_token_colour_is_readable_and_ordered_without_hue(visit: Open, theme: str) -> None:
    colours = visit("run=0&step=4&row=1", theme=theme).evaluate(CONTRAST)
    assert min(contrast for contrast, _ in colours.values()) >= 4.5
    sequential = [colours[f"s{k}"][1] for k in range(16)]
    assert sequential == sorted(sequential, reverse=theme == "light")
    middle = [colours[f"d{k}"][1] for k in range(15)]
    halves = (middle[:8], middle[:6:-1])
    assert all(half == sorted(half, reverse=theme == "dark") for half in halves)
