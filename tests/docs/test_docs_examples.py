"""Every example of README and docs/ does what a reader would try, and a broken one is noticed."""

from __future__ import annotations

from pathlib import Path

import pytest
from docs_examples import carry_out, runnable
from docs_pages import ROOT, Block, Page, pages

BLOCKS = list(runnable(pages()))


@pytest.mark.parametrize(("page", "block"), BLOCKS, ids=[f"{page.name}:{block.line}" for page, block in BLOCKS])
def test_a_block_of_a_page_runs(page: Page, block: Block, tmp_path: Path) -> None:
    carry_out(block, tmp_path)


def test_blocks_that_are_not_run_say_why() -> None:
    said = {f"{page.name}:{block.line}": block.not_run for page in pages() for block in page.fenced() if block.not_run}
    assert all(len(reason) > 10 for reason in said.values()), said
    assert len(said) <= 4, f"the exception grows into the rule: {said}"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("```python\nfrom epo.objectives import make_contrl\n```\n", ImportError),
        ("```python\ncontrol = no_such_name\n```\n", NameError),
        ("```python\nfrom epo.objectives import make_control\nmake_control('epo', alhpa=1)\n```\n", ValueError),
        ("```python\nassert hidden_N_D.shape == (1, 1)\n```\n", AssertionError),
        ("```python\nif True print()\n```\n", SyntaxError),
        ("```toml\n[a\n```\n", ValueError),
        ("```yaml\nsteps: 5\noptimizer: {learning_rat: 1}\n```\n", Exception),
        ("```yaml\nrecipe: quickstart\nseeds: [0]\narms: {a: {entropy: {method: epoo}}}\n```\n", Exception),
    ],
)
def test_a_broken_block_is_noticed(text: str, error: type[Exception], tmp_path: Path) -> None:
    ((_, block),) = runnable([Page(path=ROOT / "docs" / "made-up.md", text=text)])
    with pytest.raises(error):
        carry_out(block, tmp_path)


def test_a_comment_above_a_block_takes_it_out_and_nothing_else_does() -> None:
    text = "<!-- not run: needs a GPU -->\n\n```python\n1 / 0\n```\n\nText.\n\n```python\n2 / 0\n```\n"
    page = Page(path=ROOT / "docs" / "made-up.md", text=text)
    assert [block.code for _, block in runnable([page])] == ["2 / 0\n"]
