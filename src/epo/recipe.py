"""From a recipe's YAML to a checked configuration.

A recipe may name a parent with `extends:`; dotted overrides (`optimizer.learning_rate=1e-4`) come last. Unknown keys
are errors that offer the nearest valid name.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ValidationError

from epo.bounded_yaml import check_plain, load_yaml
from epo.config import Config, EntropyConfig, EnvironmentConfig
from epo.config.section import FOLDER_NAME
from epo.errors import UserError


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package, folders as prefixes. `_name` files are parts of recipes."""
    root = Path(str(resources.files("epo") / "recipes"))
    files = [path for path in root.rglob("*.yaml") if not path.name.startswith("_")]
    # Not with_suffix: model names in recipe names have dots.
    return sorted(path.relative_to(root).as_posix().removesuffix(".yaml") for path in files)


def load_config(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe by name or path, apply `key=value` overrides, and check everything.

    Raises:
        UserError: unknown recipe or key (the nearest name is offered), bad value, unreadable file.
    """
    tree = _read(recipe, seen=())
    tree.setdefault("name", Path(recipe).name.removesuffix(".yaml"))
    return parse_config(_override(tree, overrides))


def folder_name(name: str | None, *, default: str) -> str:
    """`--name`, or what it is by default, as the name of a folder inside the folder of runs or sweeps.

    Raises:
        UserError: it would lead out of that folder, or cannot be shown.
    """
    if name is not None and (len(name) > 200 or not re.fullmatch(FOLDER_NAME, name)):
        raise UserError(
            f"--name {_shorten(repr(name))} is no name of a folder: leave out slashes, control characters and a dot at "
            "the start; --runs (--sweeps) says which folder it is made in"
        )
    return default if name is None else name


def apply_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """`config` with `key=value` overrides applied, checked again.

    Raises:
        UserError: unknown key or bad value.
    """
    return parse_config(_override(config.model_dump(mode="json"), overrides))


def parse_config(tree: Mapping[str, Any]) -> Config:
    """Check a plain tree of values.

    Raises:
        UserError: names the first bad field, its value, and what is allowed.
    """
    try:
        check_plain(tree)
    except ValueError as error:
        raise UserError(f"the configuration cannot be used: {error}") from None
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(error)) from None


def _read(recipe: str, *, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = _locate(recipe)
    if path in seen:
        raise UserError(f"recipe {recipe!r} extends itself: " + " -> ".join(p.name for p in (*seen, path)))
    try:
        loaded = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"recipe {str(path)!r} cannot be read as YAML: {reason}") from None
    if loaded is None:
        loaded = {}
    if not isinstance(loaded, dict):
        raise UserError(f"recipe {str(path)!r} must be a mapping of sections, not a {type(loaded).__name__}")
    tree = cast("dict[str, Any]", loaded)
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    beside = [str(path.parent / f"{parent}{suffix}") for suffix in (".yaml", "")]
    base = _read(next((p for p in beside if _is_recipe_file(p)), str(parent)), seen=(*seen, path))
    base.pop("name", None)
    return _merge(base, tree)


def _locate(recipe: str) -> Path:
    if _is_recipe_file(recipe):
        return Path(recipe).resolve()
    if recipe in recipe_names():
        return Path(str(resources.files("epo") / "recipes" / f"{recipe}.yaml"))
    raise UserError(
        f"unknown recipe {recipe!r}{_nearest(recipe, recipe_names())}. Recipes: {', '.join(recipe_names())}; "
        "or give the path of a .yaml file"
    )


def _is_recipe_file(name: str) -> bool:
    # Not Path.is_file, which raises when a name is too long for the file system.
    return name.endswith((".yaml", ".yml")) and os.path.isfile(name)


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            section = cast("dict[str, Any]", value)
            for choice in _CHOICES:
                parent, _, leaf = choice.partition(".")
                if key == parent and leaf in section:
                    _leave(base[key], choice, section[leaf])
            _merge(base[key], section)
        else:
            base[key] = value
    return base


def _leave(section: dict[str, Any], choice: str, value: Any) -> None:
    """Options belong to the suite or method they were given for: another choice starts from none of them."""
    _, _, leaf = choice.partition(".")
    if value == section.get(leaf, _CHOICES[choice].model_fields[leaf].default):
        return
    for name in list(section):
        if name == "options" or (choice == "entropy.method" and name != leaf):
            del section[name]


_CHOICES: dict[str, type[BaseModel]] = {"environment.suite": EnvironmentConfig, "entropy.method": EntropyConfig}


def _override(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    # Suite and method first: options on the same command line are meant for them, in whatever order they are given.
    for override in sorted(overrides, key=lambda text: text.partition("=")[0] not in _CHOICES):
        _apply(tree, override)
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(
            f"override {_shorten(repr(override))} is not of the form key=value, for example "
            "optimizer.learning_rate=1e-4"
        )
    try:
        value = load_yaml(text)
    except ValueError as error:
        raise UserError(
            f"override {_shorten(repr(override))}: the value is not valid YAML; quote it ({error})"
        ) from None
    node = tree
    *parents, leaf = key.split(".")
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"override {_shorten(repr(override))}: {_shorten(repr(parent))} is a value, not a section")
        node = cast("dict[str, Any]", child)
    if key in _CHOICES:
        _leave(node, key, value)
    node[leaf] = value


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    where = _shorten(".".join(str(part) for part in first["loc"]))
    if first["type"] == "extra_forbidden":
        fields = _fields_at(first["loc"][:-1])
        name = str(first["loc"][-1])
        everywhere = [f for f in _all_fields(Config) if f.split(".")[-1] == name]
        hint = _nearest(name, fields) or (f" (did you mean {everywhere[0]!r}?)" if everywhere else "")
        return f"unknown key {where!r}{hint}. Valid here: {', '.join(fields)}"
    message = _shorten(first["msg"].removeprefix("Value error, "), most=600)
    if first["type"] == "model_type":
        message = "a section of keys and values goes here"
    if first["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where}={_shorten(repr(first['input']))} is not allowed: {message[0].lower()}{message[1:]}"


def _shorten(text: str, *, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = Config
    for part in location:
        annotation = model.model_fields[str(part)].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        model = annotation
    return list(model.model_fields)


def _all_fields(model: type[BaseModel], prefix: str = "") -> list[str]:
    names: list[str] = []
    for name, info in model.model_fields.items():
        names.append(prefix + name)
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            names += _all_fields(info.annotation, f"{prefix}{name}.")
    if model is EntropyConfig:
        from epo.objectives.control import METHODS, method_options

        names += dict.fromkeys(f"{prefix}{option}" for method in METHODS for option in method_options(method))
    return names


def _nearest(name: str, options: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
