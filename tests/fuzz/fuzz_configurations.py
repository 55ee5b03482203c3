"""Targets: what says how a run is made."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fuzz_cases
import yaml
from fuzz_target import Throw, Verdict, dump_yaml, target

from epo.config import Config
from epo.recipe import load_config, parse_config
from epo.sweep.plan import load_sweep


@target("configuration trees", bounded=200, full=5000)
def config_trees(folder: Path) -> Iterator[Throw]:
    whole = Config().model_dump(mode="json")

    def throw(rng: random.Random) -> Verdict:
        draw = rng.random()
        tree = fuzz_cases.value(rng) if draw < 0.2 else fuzz_cases.mutated_tree(rng, whole, changes=rng.randrange(1, 3))
        config = parse_config(tree)
        assert parse_config(yaml.safe_load(config.to_yaml())) == config
        return "accepted"

    yield throw


@target("dotted overrides", bounded=200, full=2000)
def overrides(folder: Path) -> Iterator[Throw]:
    keys: list[str] = []

    def walk(tree: dict[str, Any], prefix: str) -> None:
        for key, value in tree.items():
            keys.append(prefix + key)
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")

    walk(Config().model_dump(mode="json"), "")

    def throw(rng: random.Random) -> Verdict:
        given: list[str] = []
        for _ in range(rng.randrange(1, 4)):
            key = rng.choice(keys) if rng.random() < 0.8 else fuzz_cases.text(rng, longest=12)
            draw = rng.random()
            if draw < 0.4:
                value = fuzz_cases.text(rng)
            elif draw < 0.7:
                value = yaml.safe_dump(fuzz_cases.value(rng), default_flow_style=True, allow_unicode=True)
            else:
                value = rng.choice(
                    ["&a [*a]", "[" * 500, "{a: " * 200, "!!python/name:os.system", "1" * 5000, "*a", "0x"]
                )
            given.append(rng.choice([f"{key}={value}", f"{key}.{fuzz_cases.text(rng, longest=4)}={value}", key]))
        config = load_config("base", given)
        assert parse_config(yaml.safe_load(config.to_yaml())) == config
        return "accepted"

    yield throw


@target("recipe files", bounded=50, full=600, seconds=10)
def recipes(folder: Path) -> Iterator[Throw]:
    whole = Config().model_dump(mode="json")
    file = folder / "recipe.yaml"

    def throw(rng: random.Random) -> Verdict:
        file.write_bytes(fuzz_cases.yaml_text(rng, dump_yaml, fuzz_cases.mutated_tree(rng, whole)))
        config = load_config(str(file))
        assert parse_config(yaml.safe_load(config.to_yaml())) == config
        return "accepted"

    yield throw


@target("sweep files", bounded=30, full=600)
def sweeps(folder: Path) -> Iterator[Throw]:
    whole = {
        "name": "s",
        "recipe": "base",
        "seeds": [0, 1],
        "set": {"steps": 3},
        "arms": {"a": None, "b": {"entropy": {"method": "epo"}}, "c": {"optimizer.learning_rate": 0.1}},
    }
    file = folder / "sweep.yaml"

    def throw(rng: random.Random) -> Verdict:
        file.write_bytes(fuzz_cases.yaml_text(rng, dump_yaml, fuzz_cases.mutated_tree(rng, whole)))
        load_sweep(file)
        return "accepted"

    yield throw


@target("prompt templates", bounded=100, full=1500)
def prompts(folder: Path) -> Iterator[Throw]:
    from epo.agent.prompts import Prompt, prompt_names, prompt_source

    shipped = [prompt_source(name) for name in prompt_names()]
    hostile = [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ observation.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('touch PWNED') }}",
        "{% for x in range(10**9) %}x{% endfor %}",
        "{{ 1/0 }}",
        "{{ observation + 1 }}",
        "{{ goal.nothing.nothing }}",
        "{{ history[9].action }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% extends observation %}",
        "{{ self.x() }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 'a'|nofilter }}",
        "{{ [1]|attr('__class__') }}",
        "{{ '%s'|format() }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ actions|sum }}",
        "{{ turn|int('x', 99) }}",
        "{{ lipsum(n=3) }}",
        "{% set x = namespace() %}{{ x.y }}",
        "{{",
        "{% if %}",
    ]
    file = folder / "prompt.j2"

    def throw(rng: random.Random) -> Verdict:
        draw = rng.random()
        if draw < 0.4:
            data = rng.choice(hostile).encode()
        elif draw < 0.8:
            data = fuzz_cases.mutated_bytes(rng, rng.choice(shipped).encode())
        else:
            data = fuzz_cases.text(rng).encode("utf-8", "surrogatepass")
        file.write_bytes(data)
        prompt = Prompt(str(file), think=rng.random() < 0.5, transcript=rng.random() < 0.5)
        shown = prompt.render(fuzz_cases.text(rng), goal=fuzz_cases.text(rng), admissible_actions=None, actions=["a"])
        assert isinstance(shown, str)
        return "accepted"

    yield throw
