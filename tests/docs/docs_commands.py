"""Command lines of pages, held against the real command line: parsed as a user's would be, and not carried out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import typer
from docs_pages import ROOT, Page, epo_commands

from epo.cli import app
from epo.config import Config
from epo.environments.registry import make_suite
from epo.errors import UserError
from epo.methods import list_methods
from epo.recipe import load_config, recipe_names

OVERRIDE = re.compile(r"[a-z_]+(?:\.[a-z_]+)*=\S.*", re.DOTALL)
SETTING = re.compile(r"[a-z_]+(?:\.[a-z_]+)+")
WITH_RECIPE = {("train",), ("imitate",), ("plan",), ("explain", "smoothing")}
WITH_SUITE = {("play",), ("envs",), ("env", "check")}
SUITES_TO_COME = {"maze"}
"""Written by the reader, by `epo env new maze`."""
METHODS = [str(entry["name"]) for entry in list_methods()]
MAKE = re.compile(r"^\s*(?:\$ )?(?:[A-Z_]+=\S+ )*make((?:\s+(?:[A-Z_]+=\S+|[a-z][a-z0-9-]*))+)")
FILE = re.compile(r".*\.(?:py|jsonl?|safetensors|yaml|md)")
ATTRIBUTES = {"sampler.path", "sampler.path_reason"}
"""Of objects in Python; no keys of a recipe, although they look like them."""
PAGES_OF_OTHERS = {"docs/verl.md"}
"""Their settings are another program's."""


def command_problems(page: Page) -> list[str]:
    """What is wrong with the `epo ...` lines of a page; those within the text may leave out what has to follow."""
    lines = [(number, line, True) for number, line in page.shell_lines()]
    lines += [(number, span, False) for number, span in page.spans()]
    return [
        f"{page.name}:{number}: epo {' '.join(args)}: {problem}"
        for number, line, whole in lines
        for args in epo_commands(line)
        if (problem := problem_of(args, whole=whole)) is not None
    ]


def problem_of(args: Sequence[str], *, whole: bool) -> str | None:
    """Why the command line would be refused, or None. In capitals stands what the reader puts in."""
    args = _without_brackets(args)
    called: list[tuple[tuple[str, ...], dict[str, Any]]] = []
    try:
        _recording(called).main(args, prog_name="epo", standalone_mode=False)
    except Exception as error:
        message = str(error.format_message()) if hasattr(error, "format_message") else repr(error)
        unfinished = type(error).__name__ in ("MissingParameter", "NoArgsIsHelpError", "BadOptionUsage")
        if unfinished and not whole:
            return None
        placeholder = next((word for word in args if word.isupper() and word in message), None)
        return None if placeholder else message
    if not called:  # --help and --version are carried out while the line is parsed
        return None
    path, values = called[-1]
    if path in WITH_RECIPE:
        return _recipe_problem(values.get("recipe"), values.get("overrides") or ())
    if path == ("eval",):
        return _recipe_problem(values.get("recipe"), values.get("overrides") or ())
    if path in WITH_SUITE:
        return _suite_problem(values["suite"], values.get("options") or ())
    if path == ("methods",) and values["method"] not in (None, *METHODS) and not _is_placeholder(values["method"]):
        return f"no method {values['method']!r}"
    if path == ("sweep",) and (file := str(values["file"])).startswith("benchmarks/") and not (ROOT / file).is_file():
        return f"no file {file}"
    return None


def setting_problems(page: Page) -> list[str]:
    """What is wrong with settings that stand within the text, such as `optimizer.learning_rate=1e-4`, or keys alone."""
    if page.name in PAGES_OF_OTHERS:
        return []
    return [
        f"{page.name}:{number}: {span}: {problem}"
        for number, span in page.spans()
        if (problem := _setting_problem(span)) is not None
    ]


def make_problems(page: Page, *, targets: set[str]) -> list[str]:
    """Targets of `make` that a page names and the Makefile does not have."""
    lines = [*page.shell_lines(), *page.spans()]
    return [
        f"{page.name}:{number}: make {target}: no such target"
        for number, line in lines
        for call in MAKE.findall(re.sub(r"\s#.*", "", line))
        for target in call.split()
        if "=" not in target and target not in targets
    ]


def file_problems(page: Page) -> list[str]:
    """Programs and tests of the repository that a page calls by name and that are not there."""
    called = re.compile(r"(?<![\w./-])((?:benchmarks|docs|examples|tests|crosscheck|requirements|src)/[\w./-]*[\w/])")
    return [
        f"{page.name}:{number}: no file or folder {name}"
        for number, line in [*page.shell_lines(), *page.spans()]
        for name in called.findall(line)
        if not (ROOT / name).exists()
    ]


def makefile_targets() -> set[str]:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return {name for names in re.findall(r"^([a-z][a-z0-9 -]*):(?!=)", text, re.MULTILINE) for name in names.split()}


def _recording(called: list[tuple[tuple[str, ...], dict[str, Any]]]) -> Any:
    root = typer.main.get_command(app)

    def replace(command: Any, path: tuple[str, ...]) -> None:
        command.callback = lambda **values: called.append((path, values))
        for name, child in getattr(command, "commands", {}).items():
            replace(child, (*path, name))

    replace(root, ())
    return root


def _without_brackets(args: Sequence[str]) -> list[str]:
    """Leaves `[--name N]` and `RUN ...` as the reader would write them."""
    depth, plain = 0, []
    for word in args:
        opening = word.startswith("[")
        depth += opening
        closing = depth > 0 and word.endswith("]")
        word = word.removeprefix("[") if opening else word
        word = word.removesuffix("]") if closing else word
        depth -= closing
        if word.lower() not in ("...", "key=value", "option=value"):
            plain.append(word)
    return plain


def _is_placeholder(word: str) -> bool:
    return re.fullmatch(r"[A-Z][A-Z_]*(\.yaml)?", word) is not None


def _recipe_problem(recipe: str | None, overrides: Sequence[str]) -> str | None:
    known = recipe in recipe_names()
    if recipe is not None and not known and not _is_placeholder(recipe) and not recipe.endswith((".yaml", ".yml")):
        return f"no recipe {recipe!r}"
    return _config_problem(recipe if known and recipe is not None else "base", overrides)


def _config_problem(recipe: str, overrides: Sequence[str]) -> str | None:
    try:
        load_config(recipe, list(overrides))
    except UserError as error:
        return str(error)
    return None


def _suite_problem(suite: str | None, options: Sequence[str]) -> str | None:
    if suite is None or suite in SUITES_TO_COME or _is_placeholder(suite):
        return None
    try:
        overrides = [f"environment.suite={suite}", *(f"environment.options.{option}" for option in options)]
        make_suite(suite, load_config("base", overrides).environment.options)
    except UserError as error:
        lacking = ("is not installed", "No such file or directory")  # what the reader installs, or writes before
        return None if any(words in str(error) for words in lacking) else str(error)
    return None


def _setting_problem(span: str) -> str | None:
    if OVERRIDE.fullmatch(span) and not re.search(r"\s(?!.*[\]}])", span):
        key = span.partition("=")[0]
        if key.split(".")[0] not in Config.model_fields or ("." not in key and key not in ("seed", "steps", "name")):
            return None  # not a setting of ours
        if key.startswith("environment.options."):
            return None
        problems = [_config_problem("base", [*before, span]) for before in _choices(key)]
        return None if None in problems else problems[0]
    if SETTING.fullmatch(span) and span.split(".")[0] in Config.model_fields:
        return None if _is_key(span) or span in ATTRIBUTES or FILE.fullmatch(span) else "no such key"
    return None


def _choices(key: str) -> Iterator[list[str]]:
    """What else may have to be set for a setting to be allowed, such as the method that an option belongs to."""
    yield []
    if key.startswith("entropy.") and key != "entropy.method":
        yield from ([f"entropy.method={method}"] for method in METHODS)
    yield ["algorithm.name=grpo", "rollout.group_size=8"]
    yield ["model.path=/models/one", "imitation.demonstrations=0"]
    yield ["logging.to=[wandb]"]


@cache
def _keys() -> set[str]:
    """Every key and section that a recipe may have, whatever its method."""
    found: set[str] = set()

    def walk(node: dict[str, Any], prefix: str) -> None:
        for name, value in node.items():
            found.add(f"{prefix}{name}")
            if isinstance(value, dict):
                walk(value, f"{prefix}{name}.")

    for method in METHODS:
        walk(load_config("base", [f"entropy.method={method}"]).model_dump(mode="json"), "")
    return found


def _is_key(key: str) -> bool:
    return key.startswith("environment.options.") or key in _keys()
