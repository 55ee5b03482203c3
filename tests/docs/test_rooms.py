"""Who may import whom, as the table of docs/architecture.md says it, held against every import of the package."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "epo"
ROOMS = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}


def rooms_in(cell: str) -> set[str]:
    return {name.removesuffix("/").removesuffix(".py") for name in re.findall(r"`([\w./]+)`", cell)} & ROOMS


def allowed() -> dict[str, set[str]]:
    """Room -> rooms that it may import."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page.partition("## The house")[2].partition("\n\nEnvironment workers")[0]
    found: dict[str, set[str]] = {}
    for line in table.splitlines():
        cells = line.split("|")
        if len(cells) != 5:
            continue
        here, named = rooms_in(cells[1]), rooms_in(cells[3])
        if cells[3].strip().startswith("everything but"):
            named = ROOMS - rooms_in(cells[3].partition(";")[0])
        elif "everything but" in cells[3]:  # the command line
            named = ROOMS
        for room in here:
            found[room] = named | here
    return found


def imports() -> Iterator[tuple[str, str, str]]:
    """Room, the room that it imports, and where; names of types alone count too."""
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                modules = [node.module] if node.module != "epo" else [f"epo.{alias.name}" for alias in node.names]
            for module in modules:
                top, _, rest = module.partition(".")
                other = rest.partition(".")[0]
                if top == "epo" and other in ROOMS and other != room:
                    yield room, other, f"{path.relative_to(ROOT)}:{node.lineno}"


def test_every_room_is_in_the_table() -> None:
    assert ROOMS - {"__init__", "recipes", "__main__"} <= allowed().keys()


def test_no_room_imports_what_the_table_does_not_let_it() -> None:
    table = allowed()
    found = [f"{where}: {room} imports {other}" for room, other, where in imports() if other not in table[room]]
    assert not found
    assert sum(1 for _ in imports()) > 200


def test_the_contracts_import_nothing_and_the_integrations_are_imported_by_nobody() -> None:
    edges = {(room, other) for room, other, _ in imports()}
    assert not [other for room, other in edges if room in ("errors", "types")]
    assert {other for room, other in edges if room == "objectives"} == set()
    assert {room for room, other in edges if other in ("integrations", "cli")} <= {"__main__"}
