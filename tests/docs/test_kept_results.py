"""Every kept result has a row that tells how it is made again and where it is quoted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from docs_commands import file_problems, make_problems, makefile_targets
from docs_pages import ROOT, Page
from test_docs_pages import link_problems

RESULTS = ROOT / "benchmarks" / "results"
PAGE = Page.read(RESULTS / "README.md")
ROWS = {
    cells[1].strip().strip("`"): cells[2:5]
    for line in PAGE.text.splitlines()
    if line.startswith("| `") and len(cells := line.split("|")) == 6
}


def test_every_entry_has_a_row_and_every_row_an_entry() -> None:
    assert set(ROWS) == {path.name for path in RESULTS.iterdir()} - {"README.md"}


def test_every_script_sweep_target_and_page_that_is_named_exists() -> None:
    assert not file_problems(PAGE)
    assert not make_problems(PAGE, targets=makefile_targets())
    assert not link_problems(PAGE)


@pytest.mark.parametrize("name", ROWS)
def test_the_command_names_what_it_makes_and_the_pages_quote_it(name: str) -> None:
    _, command, pages = ROWS[name]
    assert re.search(r"`(?:epo|python|make) ", command) or command.strip() == "none"
    if (RESULTS / name).is_dir() and (ROOT / "benchmarks" / "sweeps" / f"{name}.yaml").is_file():
        assert f"benchmarks/sweeps/{name}.yaml" in command
    quoted = re.findall(r"\]\(([^)]+)\)", pages)
    texts = [(RESULTS / page).read_text(encoding="utf-8") for page in quoted]
    stem = Path(name).name
    assert texts and any(re.search(rf"results/{re.escape(stem)}(?![\w.-]*\w)", text) for text in texts), (
        f"none of {quoted} links to {name}"
    )


def test_a_missing_script_is_noticed() -> None:
    text = "`python benchmarks/none.py`, `epo sweep benchmarks/sweeps/none.yaml`, `make nothing`\n"
    made_up = Page(path=RESULTS / "README.md", text=text)
    assert len(file_problems(made_up)) == 2 and len(make_problems(made_up, targets=makefile_targets())) == 1


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks" / "sweeps").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_kept_run_is_of_an_arm_of_its_sweep(file: Path) -> None:
    from epo.sweep.plan import load_sweep

    sweep, kept = load_sweep(file), RESULTS / file.stem
    arms = {run.name.partition("--seed")[0] for run in kept.iterdir()} if kept.is_dir() else set()
    assert arms == (set(sweep.configs) if kept.is_dir() else set())
