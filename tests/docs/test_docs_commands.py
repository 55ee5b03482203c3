"""Commands, settings, make targets and files that pages name exist, and a wrong one is noticed."""

from __future__ import annotations

import pytest
from docs_commands import command_problems, file_problems, make_problems, makefile_targets, setting_problems
from docs_pages import ROOT, Page, pages

PAGES = pages()
NAMES = [page.name for page in PAGES]


def made_up(text: str) -> Page:
    return Page(path=ROOT / "docs" / "made-up.md", text=text)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_what_a_page_tells_to_type_is_accepted(page: Page) -> None:
    assert not command_problems(page)
    assert not setting_problems(page)
    assert not make_problems(page, targets=makefile_targets())
    assert not file_problems(page)


@pytest.mark.parametrize(
    "line",
    [
        "epo trian quickstart",
        "epo train",
        "epo train quickstart --resum",
        "epo train quickstar",
        "epo train quickstart stepz=5",
        "epo train quickstart steps=-1",
        "epo train quickstart entropy.method=epo entropy.alhpa=1",
        "epo train quickstart \\\n    steps=many",
        "epo eval runs/try1 --episodes ten",
        "epo eval runs/try1 --episodes 0",
        "epo eval model --recipe scienceworld",
        "epo show runs/try1 --step",
        "epo env check gymnasum",
        "epo env check corridor lenth=5",
        "epo play corridor length=3",
        "epo methods epo_weak",
        "epo explain smooting",
        "epo sweep benchmarks/sweeps/nothing.yaml",
        "$ epo report",
        "cd x && .venv/bin/epo doctor --fast",
    ],
)
@pytest.mark.parametrize("frame", ["```\n{}\n```\n", "Text:\n\n    {}\n\n"], ids=["fenced", "indented"])
def test_a_wrong_command_is_noticed(line: str, frame: str) -> None:
    indented = line if frame.startswith("`") else line.replace("\n", "\n    ")
    assert len(command_problems(made_up(frame.format(indented)))) == 1


@pytest.mark.parametrize(
    "line",
    [
        "epo train quickstart seed=1 --name try1     # a comment with a ' in it",
        "epo train RECIPE [key=value ...] [--name N] [--resume]",
        "epo train my.yaml 'health.halt=[entropy_eruption, cascade]'",
        "epo report RUN|SWEEP ...",
        "epo plan --help",
        "epo show runs/try1 --step 3 | less",
        "epo train maze/recipe.yaml && epo watch runs/maze",
    ],
)
def test_a_right_command_is_accepted(line: str) -> None:
    assert not command_problems(made_up(f"```\n{line}\n```\n"))


def test_within_the_text_a_command_may_be_unfinished_but_not_wrong() -> None:
    assert not command_problems(made_up("`epo train` and `epo env new` and `epo show RUN` and `epo show --step`"))
    assert len(command_problems(made_up("`epo tran` and `epo env neww` and `epo show RUN --stp 1`"))) == 3


def test_wrong_settings_are_noticed() -> None:
    assert not setting_problems(
        made_up("`optimizer.learning_rate=1e-4`, `entropy.alpha=1`, `health.halt`, `x.y=1`, `seed`")
    )
    wrong = "`optimizer.learning_rat=1e-4`, `entropy.alpha=-1`, `health.hlt`, `steps=many`, `agent.format=act`"
    assert len(setting_problems(made_up(wrong))) == 5


def test_wrong_make_targets_and_files_are_noticed() -> None:
    targets = {"test", "lint"}
    right = '`make test lint`, `VAR=1 make test`, `make` and "make do"\n\n```\nmake lint   # make everything\n```\n'
    assert not make_problems(made_up(right), targets=targets)
    assert len(make_problems(made_up("`make tests`\n\n```\nX=1 make lint tset\n```\n"), targets=targets)) == 2
    assert not file_problems(made_up("`python benchmarks/cost.py`, `tests/docs`, `other/thing.py`"))
    assert len(file_problems(made_up("`python benchmarks/costs.py`\n\n    pytest tests/dosc\n"))) == 2


def test_the_makefiles_targets_are_found() -> None:
    assert {"train", "test", "docs", "docs-serve", "lint"} <= makefile_targets()
    assert not {"export", "BIN", "PIP"} & makefile_targets()
