"""Targets: checkpoints. Damage is what checksums find; what they cannot find was made by somebody who renewed them."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fuzz_cases
from fuzz_guard import bounded_memory
from fuzz_models import tiny_policy
from fuzz_target import Throw, Verdict, target

from epo.config import Config
from epo.environments.base import TaskSuite
from epo.environments.pool import EnvPool
from epo.recipe import parse_config
from epo.reporting.plot import plot_run
from epo.sampling.local import LocalSampler
from epo.training.checkpoint import choose_checkpoint, newest_checkpoint, refuse_damaged_source, step_of
from epo.training.checksums import SUMS_FILE
from epo.training.learner import Learner
from epo.training.policy import Policy, load_policy
from epo.training.preparation import prepare_suite
from epo.training.run_folder import RunFolder
from epo.training.session import open_pool, quiet_libraries
from epo.training.trainer import Trainer, control_of, make_collector


class _Deaf:
    """Hears nothing of a run."""

    def begin(self, what: str, total: int) -> None: ...
    def advance(self, done: int, note: str = "") -> None: ...
    def step(self, step: int, metrics: dict[str, float]) -> None: ...
    def evaluated(self, step: int, results: Any) -> None: ...
    def note(self, text: str) -> None: ...


def _train(
    run: RunFolder, config: Config, suite: TaskSuite, pool: EnvPool, policy: Policy, *, resume_from: Path | None
) -> None:
    """What `epo train` does, in this process and with a pool that is open already."""
    learner = Learner(policy, config, control_of(config))
    collector = make_collector(config, pool, policy, LocalSampler(policy, max_episodes=pool.size))
    trainer = Trainer(config, suite, run, _Deaf(), learner=learner, collector=collector, resume_from=resume_from)
    if resume_from is not None:
        run.rewind(trainer.state.step, evaluations=trainer.state.evaluations)
    trainer.train()
    plot_run(run.path / "plot.svg", title="fuzz", metrics=run.metrics(), evaluations=run.evaluations())


def _reseal(checkpoint: Path, **more: str) -> None:
    """Checksums of what is there now, as somebody would renew them; `more` adds lines, or replaces some."""
    lines: dict[str, str] = {}
    for file in sorted(checkpoint.rglob("*")):
        name = file.relative_to(checkpoint).as_posix()
        if name != SUMS_FILE and not stat.S_ISDIR(file.lstat().st_mode):
            regular = stat.S_ISREG(file.lstat().st_mode)
            lines[name] = hashlib.sha256(file.read_bytes() if regular else b"").hexdigest()
    text = "".join(f"{digest}  {name}\n" for name, digest in (lines | more).items())
    (checkpoint / SUMS_FILE).write_text(text, errors="surrogatepass")


def _irregular(rng: random.Random, file: Path) -> None:
    """A pipe, a device, a link or a folder where a file was, or where none is."""
    file.unlink(missing_ok=True)
    draw = rng.random()
    if draw < 0.3:
        os.mkfifo(file)
    elif draw < 0.4:
        file.mkdir()
    else:
        beside = file.with_name("config.json")
        file.symlink_to(rng.choice([Path("/dev/zero"), Path("/dev/tty"), Path("/nowhere"), Path("/etc"), file, beside]))


def _names(rng: random.Random) -> str:
    odd = ["/dev/zero", "/proc/kmsg", "../../state.json", "policy/../../x", ".h/zero", "", ".", "a\0b", "policy"]
    return rng.choice([*odd, fuzz_cases.text(rng), "state.json", SUMS_FILE])


def _damages() -> list[Callable[[random.Random, Path], None]]:
    """Each changes a checkpoint."""

    def files(checkpoint: Path) -> list[Path]:
        return sorted(file for file in checkpoint.rglob("*") if file.is_file() and file.name != SUMS_FILE)

    def bits(rng: random.Random, checkpoint: Path) -> None:
        file = rng.choice([*files(checkpoint), checkpoint / SUMS_FILE])
        file.write_bytes(fuzz_cases.mutated_bytes(rng, file.read_bytes()))

    def sealed_bits(rng: random.Random, checkpoint: Path) -> None:
        file = rng.choice(files(checkpoint))
        file.write_bytes(fuzz_cases.mutated_bytes(rng, file.read_bytes()))
        _reseal(checkpoint)

    def sealed_state(rng: random.Random, checkpoint: Path) -> None:
        file = checkpoint / "state.json"
        tree = json.loads(file.read_bytes())
        part = rng.choice(["state", "state", "control", None])
        if part is None:
            tree = fuzz_cases.mutated_tree(rng, tree, changes=rng.randrange(1, 3))
        else:
            tree[part] = fuzz_cases.mutated_tree(rng, tree[part], changes=rng.randrange(1, 3))
        file.write_bytes(fuzz_cases.json_text(rng, tree))
        _reseal(checkpoint)

    def sealed_field(rng: random.Random, checkpoint: Path) -> None:
        file = checkpoint / "state.json"
        tree = json.loads(file.read_bytes())
        field = rng.choice([*tree["state"], "format", "run", "step"])
        part = tree if field in ("format", "run", "step") and rng.random() < 0.5 else tree["state"]
        part[field] = rng.choice([fuzz_cases.value(rng), fuzz_cases.leaf(rng), rng.choice(fuzz_cases.NUMBERS), "x", -5])
        file.write_bytes(fuzz_cases.json_text(rng, tree))
        _reseal(checkpoint)

    def sealed_tensors(rng: random.Random, checkpoint: Path) -> None:
        file = rng.choice(sorted(checkpoint.rglob("*.safetensors")))
        file.write_bytes(fuzz_cases.mutated_tensors(rng, file.read_bytes()))
        _reseal(checkpoint)

    def irregular(rng: random.Random, checkpoint: Path) -> None:
        new = [checkpoint / "more", checkpoint / "policy" / "more.bin", checkpoint / ".hidden"]
        _irregular(rng, rng.choice([*files(checkpoint), *new, checkpoint / SUMS_FILE, checkpoint / "state.json"]))
        sums = checkpoint / SUMS_FILE
        if sums.is_file():
            rng.choice([lambda: None, sums.unlink, lambda: _reseal(checkpoint)])()

    def names(rng: random.Random, checkpoint: Path) -> None:
        _reseal(checkpoint, **{_names(rng): rng.choice(["0" * 64, hashlib.sha256(b"").hexdigest(), "", "x"])})

    def first_format(rng: random.Random, checkpoint: Path) -> None:
        """As version 0.1.0 wrote it, with checksums of what somebody chose."""
        tree = json.loads((checkpoint / "state.json").read_bytes())
        sums: Any = {
            file.relative_to(checkpoint).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in checkpoint.rglob("*.safetensors")
        }
        draw = rng.random()
        if draw < 0.5:
            sums[_names(rng)] = "0" * 64
        elif draw < 0.7:
            sums = fuzz_cases.mutated_tree(rng, sums)
        elif draw < 0.8:
            tree["state"] = fuzz_cases.mutated_tree(rng, tree["state"])
        elif draw < 0.9:
            _irregular(rng, rng.choice(sorted(checkpoint.rglob("*.json"))[:-1]))
        tree |= {"format": 1, "sha256": sums}
        (checkpoint / SUMS_FILE).unlink()
        if (checkpoint / "state.json").is_file():
            (checkpoint / "state.json").write_bytes(fuzz_cases.json_text(rng, tree))

    def foreign(rng: random.Random, checkpoint: Path) -> None:
        """Something else under its name, or it under the name of something else."""
        other = next(path for path in checkpoint.parent.iterdir() if path != checkpoint)
        draw = rng.random()
        if draw < 0.3:
            shutil.rmtree(checkpoint)
            shutil.copytree(other if draw < 0.15 else other / "policy", checkpoint)
        elif draw < 0.6:
            name = rng.choice(["state.json", "optimizer.safetensors", "critic.safetensors", SUMS_FILE])
            shutil.copy(other / name, checkpoint / name)
            if rng.random() < 0.7:
                _reseal(checkpoint)
        elif draw < 0.8:
            step = rng.choice([0, 3, 7, 10**9, 10**200])
            moved = checkpoint.rename(checkpoint.with_name(f"step_{step:06d}"))
            tree = json.loads((moved / "state.json").read_bytes())
            tree["step"] = tree["state"]["step"] = step
            (moved / "state.json").write_text(json.dumps(tree))
            _reseal(moved)
        else:
            (checkpoint / rng.choice(["optimizer.safetensors", "critic.safetensors", "policy/tokenizer.json"])).unlink()
            _reseal(checkpoint)

    once = [bits, sealed_bits, sealed_tensors, names, foreign]
    return [*once, *[sealed_state, sealed_field, irregular, first_format] * 2]


@target(
    "checkpoints, read by `--resume`, `epo eval` and a run that starts with their policy",
    bounded=30, full=400, seconds=60, has_workers=True,
)  # fmt: skip
def checkpoints(folder: Path) -> Iterator[Throw]:
    quiet_libraries()
    start, model = tiny_policy()
    start.save(folder / "start")
    corridor = {"length": 3, "choices": 2, "tasks": 4}
    tree = {
        "environment": {"suite": "corridor", "options": corridor, "workers": 1, "max_turns": 2},
        "agent": {"format": "action", "max_response_tokens": 2},
        "model": model.model_dump(mode="json") | {"path": str(folder / "start")},
        "imitation": {"demonstrations": 0},
        "algorithm": {"name": "ppo"},
        "entropy": {"method": "epo"},
        "rollout": {"tasks_per_step": 2, "group_size": 1},
        "optimizer": {"minibatches": 1},
        "evaluation": {"every": 0, "episodes": 2, "splits": ["iid"]},
        "checkpoint": {"every": 1, "keep": 4},
        "steps": 3,
    }
    config = parse_config(tree)
    suite = prepare_suite(config, _Deaf())
    whole, here = folder / "whole", folder / "run"
    damages = _damages()
    with bounded_memory(8), open_pool(config) as pool:
        _train(RunFolder.create(whole, config, {}), config, suite, pool, start, resume_from=None)
        for checkpoint in (whole / "checkpoints").iterdir():
            if checkpoint.name in ("step_000000", "step_000003"):  # as if it had been stopped after the second step
                shutil.rmtree(checkpoint)
                continue
            content = json.loads((checkpoint / "state.json").read_bytes())
            content["state"]["wall_seconds"] = 1.5  # so that a case is the same on every day
            (checkpoint / "state.json").write_text(json.dumps(content, indent=1))
            _reseal(checkpoint)

        def throw(rng: random.Random) -> Verdict:
            shutil.rmtree(here, ignore_errors=True)
            shutil.copytree(whole, here)
            run = RunFolder.open(here)
            checkpoint = here / "checkpoints" / rng.choice(["step_000002", "step_000002", "step_000002", "step_000001"])
            rng.choice(damages)(rng, checkpoint)
            draw = rng.random()
            if draw < 0.6:
                newest = newest_checkpoint(run.checkpoints, run=run.id)
                if newest is not None:
                    run.require_steps(step_of(newest))
                    policy = load_policy(newest / "policy", config.model)
                    _train(run, config, suite, pool, policy, resume_from=newest)
            elif draw < 0.85:
                which = rng.choice(["last", "best", "1", "2"])
                chosen = choose_checkpoint(run.checkpoints, which, evaluations=run.evaluations(), run=run.id)
                if chosen is not None:
                    load_policy(chosen / "policy", config.model)
            else:
                refuse_damaged_source(checkpoint / "policy")
                load_policy(checkpoint / "policy", config.model)
            return "accepted"

        yield throw
