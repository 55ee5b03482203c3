"""What is fuzzed. A target opens whatever it needs and gives a function that throws one case at the real code.

A case is accepted or refused: refused by the one error that users see, `UserError`, in one line, or, where an
environment is at fault, as an episode that ends with `StopReason.ENVIRONMENT_ERROR`. Everything else is a crash.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import fuzz_cases
import yaml
from fuzz_guard import contained
from typer.testing import CliRunner

from epo.agent.parsing import MAX_ACTION_CHARACTERS, parse_response
from epo.cli import app
from epo.config import Config
from epo.environments.pool import EnvPool
from epo.environments.registry import make_suite, register_suite
from epo.errors import UserError
from epo.packing import pack
from epo.recipe import load_config, parse_config
from epo.rollout import EpisodeSpec, RolloutCollector
from epo.sampling.local import LocalSampler
from epo.sweep.plan import load_sweep
from epo.training.policy import Policy, load_policy
from epo.training.run_folder import RunFolder
from epo.training.session import quiet_libraries
from epo.types import Observation, Step, StopReason, Task, TrajectoryGroup

Verdict = Literal["accepted", "refused"]
Throw = Callable[[random.Random], Verdict]

register_suite("babbling", "babbling_suite:BabblingSuite")


@dataclass(frozen=True, kw_only=True)
class Target:
    name: str
    what: str
    """For the table in the docs."""
    open: Callable[[Path], AbstractContextManager[Throw]]
    bounded: int
    """Cases in `make test`."""
    full: int
    """Cases in `make fuzz`."""
    seconds: float = 20.0
    """A case that takes longer hangs."""
    has_workers: bool = False


TARGETS: dict[str, Target] = {}


def target(
    what: str, *, bounded: int, full: int, seconds: float = 20.0, has_workers: bool = False
) -> Callable[[Callable[[Path], Iterator[Throw]]], Any]:
    def register(function: Callable[[Path], Iterator[Throw]]) -> Any:
        name = function.__name__
        opened = contextmanager(function)
        TARGETS[name] = Target(
            name=name, what=what, open=opened, bounded=bounded, full=full, seconds=seconds, has_workers=has_workers
        )
        return opened

    return register


def throw_case(chosen: Target, throw: Throw, rng: random.Random, folder: Path) -> Verdict:
    """One case under watch. Raises whatever is wrong."""
    with contained(folder=folder, seconds=chosen.seconds, has_workers=chosen.has_workers):
        try:
            return throw(rng)
        except UserError as error:
            message = str(error)
            assert message.strip() and len(message.splitlines()) == 1, f"not one line: {message[:300]!r}"
            assert len(message) < 5000, f"{len(message)} characters of error"
            return "refused"


def epo(*arguments: str) -> None:
    """The command line in this process; a usage error is a refusal too."""
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    if result.exit_code == 2:
        raise UserError(f"usage: {result.output.strip().splitlines()[-1:]}")
    assert result.exit_code == 0, result.output


# Configurations


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


def _dump(tree: Any) -> str:
    return yaml.safe_dump(tree, allow_unicode=True, sort_keys=False)


@target("recipe files", bounded=50, full=600, seconds=10)
def recipes(folder: Path) -> Iterator[Throw]:
    whole = Config().model_dump(mode="json")
    file = folder / "recipe.yaml"

    def throw(rng: random.Random) -> Verdict:
        file.write_bytes(fuzz_cases.yaml_text(rng, _dump, fuzz_cases.mutated_tree(rng, whole)))
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
        file.write_bytes(fuzz_cases.yaml_text(rng, _dump, fuzz_cases.mutated_tree(rng, whole)))
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


# Files of runs


@target("run folders, read by `epo show`, `report`, `compare` and `watch`", bounded=25, full=600, seconds=60)
def run_folders(folder: Path) -> Iterator[Throw]:
    import viewer_run

    from epo.reporting.pages.watch import WatchedRuns

    vocabulary = viewer_run.Vocabulary()
    records = {step: viewer_run.make_records(vocabulary, step=step, groups=1, members=2) for step in (1, 2)}
    whole = viewer_run.write_run(folder / "whole", records, vocabulary.pieces)
    (whole / "provenance.json").write_text('{"packages": {"torch": "2"}}')
    (whole / "summary.json").write_text('{"finished": true, "halted": null, "wall_seconds": 1.5}')
    other = Path(shutil.copytree(whole, folder / "other"))
    run = folder / "run"
    names = sorted(str(file.relative_to(whole)) for file in whole.rglob("*") if file.is_file())

    def damage(rng: random.Random, name: str) -> None:
        file = run / name
        data, draw = file.read_bytes(), rng.random()
        if draw < 0.1:
            file.unlink()
            if rng.random() < 0.5:
                file.mkdir()
            return
        if draw < 0.35:
            file.write_bytes(fuzz_cases.mutated_bytes(rng, data))
        elif draw < 0.45:
            file.write_bytes(fuzz_cases.json_text(rng, fuzz_cases.value(rng)) + b"\n")
        elif name.endswith(".yaml"):
            tree = fuzz_cases.mutated_tree(rng, yaml.safe_load(data))
            file.write_bytes(fuzz_cases.yaml_text(rng, _dump, tree))
        elif name.endswith(".jsonl"):
            lines = data.splitlines()
            place = rng.randrange(len(lines))
            tree = fuzz_cases.mutated_tree(rng, json.loads(lines[place]), changes=rng.randrange(1, 3))
            lines[place] = fuzz_cases.json_text(rng, tree)
            file.write_bytes(b"\n".join(lines) + b"\n")
        else:
            tree = fuzz_cases.mutated_tree(rng, json.loads(data))
            file.write_bytes(fuzz_cases.json_text(rng, tree))

    def throw(rng: random.Random) -> Verdict:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(whole, run)
        for name in rng.sample(names, rng.randrange(1, 3)):
            damage(rng, name)
        reader = rng.choice(["show", "list", "search", "json", "report", "compare", "watch"])
        if reader == "show":
            step, row = rng.choice(["1", "2"]), rng.choice(["0", "1"])
            by = rng.choice(["entropy", "logprob", "advantage", "ratio"])
            extra = rng.sample(["--mask", "--whole", "--top=5"], rng.randrange(3))
            epo("show", str(run), "--step", step, "--row", row, "--by", by, "--pager", "off", *extra)
        elif reader == "list":
            epo(
                "show",
                str(run),
                "--pager",
                "off",
                *rng.sample(["--success", "--invalid", "--goal=a"], rng.randrange(3)),
            )
        elif reader == "search":
            epo("show", str(run), "--search", "door", "--pager", "off")
        elif reader == "json":
            epo("show", str(run), "--json")
        elif reader == "report":
            epo("report", str(run), "--out", str(folder / "report.html"))
        elif reader == "compare":
            epo("compare", str(other), str(run), *rng.choice([[], ["--json"], ["--csv"]]))
        else:
            watched = WatchedRuns([run, other])
            json.dumps(watched.page(), allow_nan=False)
            shutil.copy(whole / "metrics.jsonl", run / "metrics.jsonl") if rng.random() < 0.5 else None
            json.dumps(watched.page_after(["x", "y.1.2.3"]), allow_nan=False)
            for step in (1, 2):
                json.loads(watched.trajectories(0, step))
            watched.search(0, "door")
        return "accepted"

    yield throw


# Models


def tiny_policy() -> tuple[Policy, Any]:
    from epo.config import ModelConfig
    from epo.training.tiny import build_model, build_tokenizer

    tiny = {"vocabulary_size": 300, "hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 32}
    config = ModelConfig.model_validate({"max_context": 512, "device": "cpu", "tiny": tiny})
    tokenizer = build_tokenizer(["open the door", "go to the kitchen <think> <action>"] * 4, vocabulary_size=300)
    return Policy(build_model(tokenizer, config, seed=0).eval(), tokenizer, max_context=512), config


@target("model directories", bounded=15, full=300, seconds=60)
def model_directories(folder: Path) -> Iterator[Throw]:
    policy, config = tiny_policy()
    whole, model = folder / "whole-model", folder / "model"
    policy.save(whole)
    names = sorted(file.name for file in whole.iterdir())
    foreign = ["bert", "gpt2", "t5", "mamba", "whisper", "llama4", "qwen3_moe", "vit", "nothing", "auto", "../x", ""]
    templates = [
        "{{ cycler.__init__.__globals__.os.system('touch PWNED') }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ 1/0 }}",
        "{% for m in messages %}{{ m['content'] + 1 }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
        "{{ raise_exception('no') }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ messages[7].content }}",
        "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}",
        "{%",
        "",
        "constant",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ]

    def damage(rng: random.Random) -> None:
        kind = rng.randrange(9)
        if kind == 0:
            file = model / rng.choice(names)
            file.write_bytes(fuzz_cases.mutated_bytes(rng, file.read_bytes()))
        elif kind == 1:
            weights = model / "model.safetensors"
            data = weights.read_bytes()
            (length,) = struct.unpack("<Q", data[:8])
            header = fuzz_cases.mutated_tree(rng, json.loads(data[8 : 8 + length]), changes=rng.randrange(1, 4))
            text = fuzz_cases.json_text(rng, header)
            claimed = rng.choice([len(text), len(text), len(text), 2**63, 2**32, 0, length])
            weights.write_bytes(struct.pack("<Q", claimed) + text + data[8 + length :])
        elif kind == 2:
            name = rng.choice([n for n in names if n.endswith(".json")])
            tree = fuzz_cases.mutated_tree(rng, json.loads((model / name).read_bytes()), changes=rng.randrange(1, 4))
            (model / name).write_bytes(fuzz_cases.json_text(rng, tree))
        elif kind == 3:
            tree = json.loads((model / "config.json").read_bytes())
            tree["model_type"] = rng.choice(foreign)
            if rng.random() < 0.5:
                del tree["architectures"]
            (model / "config.json").write_text(json.dumps(tree))
        elif kind == 4:
            tree = json.loads((model / "config.json").read_bytes())
            key = rng.choice([k for k, v in tree.items() if isinstance(v, int)])
            tree[key] = rng.choice([-1, 0, 10**6, 10**12, 10**30, 0.5, "8", None])
            (model / "config.json").write_text(json.dumps(tree))
        elif kind == 5:
            (model / "chat_template.jinja").write_text(rng.choice(templates))
        elif kind == 6:
            evil = "import os\nopen('PWNED', 'w')\nos.system('touch PWNED')\n"
            for name in ("modeling_evil", "configuration_evil", "tokenization_evil"):
                (model / f"{name}.py").write_text(evil)
            auto = {
                "AutoConfig": "configuration_evil.EvilConfig",
                "AutoModelForCausalLM": "modeling_evil.EvilModel",
                "AutoTokenizer": ["tokenization_evil.EvilTokenizer", None],
            }
            for name in rng.choice(
                [["config.json"], ["tokenizer_config.json"], ["config.json", "tokenizer_config.json"]]
            ):
                tree = json.loads((model / name).read_bytes()) | {"auto_map": auto}
                if rng.random() < 0.5:
                    tree |= {"model_type": "evil", "tokenizer_class": "EvilTokenizer"}
                (model / name).write_text(json.dumps(tree))
        elif kind == 7:
            file = model / rng.choice(names)
            file.unlink()
            links = [file, Path("/dev/zero"), Path("/etc/passwd"), Path("/nowhere"), model, whole / file.name]
            draw = rng.random()
            if draw < 0.2:
                file.mkdir()
            elif draw < 0.4:
                os.mkfifo(file)
            elif draw < 0.8:
                file.symlink_to(rng.choice(links))
        else:
            shards = {
                "lm_head.weight": rng.choice(["../whole-model/model.safetensors", "/etc/passwd", "x", "", 7, None])
            }
            index = {"metadata": {}, "weight_map": rng.choice([shards, [], None, "x", {}])}
            (model / "model.safetensors.index.json").write_text(json.dumps(index))

    quiet_libraries()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, hard))

    def throw(rng: random.Random) -> Verdict:
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(whole, model)
        for _ in range(rng.randrange(1, 3)):
            if not all(file.is_file() for file in model.iterdir()):  # what opens a pipe waits
                break
            try:
                damage(rng)
            except (OSError, ValueError, KeyError, AttributeError, IndexError):  # damaged already
                continue
        policy = load_policy(str(model), config)
        policy.chat.first_prompt(fuzz_cases.text(rng))
        return "accepted"

    try:
        yield throw
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# Environments and agents


@target("responses through the action parser", bounded=10_000, full=100_000)
def responses(folder: Path) -> Iterator[Throw]:
    def throw(rng: random.Random) -> Verdict:
        text = fuzz_cases.text(rng)
        if rng.random() < 0.3:
            text = f"<think>{text}</think><action>{fuzz_cases.text(rng)}</action>"
        for response_format in ("action", "think_action"):
            parsed = parse_response(text, response_format=response_format, finished=rng.random() < 0.9)
            assert type(parsed.action) is str and len(parsed.action) <= MAX_ACTION_CHARACTERS
            assert not parsed.is_valid or parsed.action in text
        return "accepted" if parsed.is_valid else "refused"

    yield throw


def _steps(suite_name: str, options: dict[str, Any]) -> Iterator[Throw]:
    """Random strings as actions; an episode goes on over cases and begins anew when it is over."""
    suite = make_suite(suite_name, options)
    tasks = suite.tasks("train")
    with suite.make_env() as env:
        playing = False

        def throw(rng: random.Random) -> Verdict:
            nonlocal playing
            if not playing or rng.random() < 0.02:
                assert isinstance(env.reset(rng.choice(tasks)), Observation)
            step = env.step(fuzz_cases.text(rng))
            assert isinstance(step, Step) and isinstance(step.observation.text, str)
            assert 0 <= step.score <= 1 and not (step.success and not step.terminated)
            playing = not step.terminated and not step.truncated
            return "accepted" if step.understood else "refused"

        yield throw


@target("actions in the corridor", bounded=5000, full=100_000)
def corridor_actions(folder: Path) -> Iterator[Throw]:
    yield from _steps("corridor", {})


@target("actions in ScienceWorld", bounded=100, full=3000, seconds=90, has_workers=True)
def scienceworld_actions(folder: Path) -> Iterator[Throw]:
    yield from _steps("scienceworld", {"tasks": ["find-animal", "boil", "power-component"]})


@target("actions in household games", bounded=20, full=300, seconds=120, has_workers=True)
def household_actions(folder: Path) -> Iterator[Throw]:
    options = {
        "counts": {"train": 1, "iid": 0, "ood": 0},
        "max_receptacles": 6,
        "max_copies": 1,
        "density": 0.2,
        "task_types": ["pick_and_place_simple"],
        "cache": str(folder / "games"),
    }
    yield from _steps("household", options)


@target(
    "replies of environments, through pool, rollout, packing and run folder", bounded=25, full=300, has_workers=True
)
def replies(folder: Path) -> Iterator[Throw]:
    policy, model = tiny_policy()
    config = parse_config(
        {"agent": {"format": "action", "max_response_tokens": 4}, "model": model.model_dump(mode="json")}
    )
    variants = [
        config.agent.model_copy(update={"context": context, "overflow": overflow, "list_actions": listed})
        for context in ("transcript", "window")
        for overflow in ("end", "drop_oldest")
        for listed in (True, False)
    ]
    run = RunFolder.create(Path(tempfile.mkdtemp(dir=folder)) / "run", config, {})
    sampler = LocalSampler(policy, max_episodes=1)
    step = 0
    with EnvPool("babbling", size=1, max_restarts=1) as pool:

        def throw(rng: random.Random) -> Verdict:
            nonlocal step
            step += 1
            task = Task(
                suite="babbling", id=fuzz_cases.text(rng, longest=8) + str(rng.random()), split="train", goal="any"
            )
            collector = RolloutCollector(pool, sampler, policy.chat, rng.choice(variants), max_turns=6, max_context=512)
            (trajectory,) = collector.collect([EpisodeSpec(task=task, seed=(step,))], temperature=1.0)
            group = TrajectoryGroup(task=task, trajectories=[trajectory])
            if trajectory.turns:
                pack(group.trajectories)
            run.add_step(step, {}, [group])
            (record,) = (run.trajectories / f"step_{step:06d}.jsonl").read_bytes().splitlines()
            json.loads(record, parse_constant=lambda name: 1 / 0)
            return "refused" if trajectory.stop_reason is StopReason.ENVIRONMENT_ERROR else "accepted"

        yield throw
