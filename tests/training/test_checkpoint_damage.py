"""Cut short, flipped, foreign: a checkpoint that is not what was written is refused in one line that names the file."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from epo.config import Config, ModelConfig
from epo.errors import UserError
from epo.files import sha256_of
from epo.objectives import make_control
from epo.training.checkpoint import (
    FORMAT,
    best_evaluation,
    checkpoints,
    choose_checkpoint,
    load_checkpoint,
    newest_checkpoint,
    read_state,
    refuse_damaged_source,
    save_checkpoint,
)
from epo.training.checksums import write_checksums
from epo.training.learner import Learner
from epo.training.policy import Policy
from epo.training.tiny import build_model

FLIPS_PER_FILE, CUTS_PER_FILE = 32, 10


def make_learner(config: Config, tiny_config: ModelConfig, tokenizer: Any, *, seed: int = 0) -> Learner:
    """With moments in the optimiser, as after a step."""
    policy = Policy(build_model(tokenizer, tiny_config, seed=seed), tokenizer, max_context=tiny_config.max_context)
    learner = Learner(policy, config, make_control(config.entropy.method, **config.entropy.options()))
    generator = torch.Generator().manual_seed(seed)
    for group in learner.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    learner.optimizer.step()
    return learner


@pytest.fixture(scope="module")
def config(minute_config: Callable[..., Config]) -> Config:
    return minute_config("algorithm.name=ppo", "entropy.method=epo")


@pytest.fixture(scope="module")
def learner(config: Config, tiny_config: ModelConfig, tokenizer: Any) -> Learner:
    return make_learner(config, tiny_config, tokenizer)


@pytest.fixture(scope="module")
def whole(learner: Learner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, not to be changed."""
    folder = tmp_path_factory.mktemp("whole")
    return save_checkpoint(folder, learner, step=3, state={"step": 3, "evaluations": []}, keep=2, run="this")


@pytest.fixture
def mine(whole: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(whole, tmp_path / "checkpoints" / whole.name))


def refusal(path: Path, *, run: str | None = None) -> str:
    with pytest.raises(UserError) as refused:
        read_state(path, run=run)
    message = str(refused.value)
    assert "\n" not in message and str(path) in message
    return message


def files_of(checkpoint: Path) -> list[str]:
    return sorted(p.relative_to(checkpoint).as_posix() for p in checkpoint.rglob("*") if p.is_file())


def test_a_whole_checkpoint_is_read_and_every_file_has_a_checksum(mine: Path, learner: Learner):
    assert read_state(mine, run="this")["step"] == 3
    assert load_checkpoint(mine, learner) == {"step": 3, "evaluations": []}
    names = files_of(mine)
    assert {"state.json", "SHA256SUMS", "critic.safetensors", "optimizer.safetensors"} <= set(names)
    assert {"policy/model.safetensors", "policy/config.json", "policy/tokenizer.json"} <= set(names)
    # An independent program agrees, about all files but the list itself.
    checked = subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=mine, capture_output=True, text=True)
    assert checked.returncode == 0
    assert sorted(line.removesuffix(": OK") for line in checked.stdout.splitlines()) == sorted(
        set(names) - {"SHA256SUMS"}
    )


def test_any_flipped_bit_and_any_cut_of_any_file_is_refused_with_the_name_of_the_file(mine: Path):
    rng = random.Random(0)
    damages = 0
    for name in files_of(mine):
        file = mine / name
        content = file.read_bytes()
        changed = [
            content[:length]
            for length in {0, len(content) - 1, *(rng.randrange(len(content)) for _ in range(CUTS_PER_FILE))}
        ]
        for _ in range(FLIPS_PER_FILE):
            place, bit = rng.randrange(len(content)), rng.randrange(8)
            changed.append(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
        for damaged in changed:
            file.write_bytes(damaged)
            message = refusal(mine)
            # What a damaged list of checksums speaks of may be any file.
            assert "is damaged (" in message and (name == "SHA256SUMS" or f"({name}:" in message)
            damages += 1
        file.unlink()
        expected = "(SHA256SUMS: missing)" if name == "SHA256SUMS" else f"({name}: missing)"
        assert expected in refusal(mine)
        file.write_bytes(content)
    assert damages >= 400
    assert read_state(mine)["step"] == 3


def test_what_does_not_belong_there_is_refused_but_not_what_file_managers_leave(mine: Path):
    (mine / ".DS_Store").write_bytes(b"x")
    assert read_state(mine)["step"] == 3
    (mine / "policy" / "pytorch_model.bin").write_bytes(b"x")
    assert "policy/pytorch_model.bin: not in SHA256SUMS" in refusal(mine)


def put(kind: str, file: Path) -> None:
    """Something that is no regular file, in place of `file`."""
    elsewhere = file.with_name(f".{file.name}")
    if file.is_file():
        shutil.copy(file, elsewhere)
        file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to({"device": Path("/dev/zero"), "link": elsewhere, "dangling": Path("/nowhere")}[kind])


@pytest.mark.timeout(60)  # what opens a pipe or reads a device never ends
@pytest.mark.parametrize("kind", ["pipe", "device", "link", "dangling"])
@pytest.mark.parametrize(
    "name", ["SHA256SUMS", "state.json", "optimizer.safetensors", "policy/config.json", "policy/more.bin", "more"]
)
def test_what_is_no_regular_file_is_refused_and_never_opened(name: str, kind: str, mine: Path):
    put(kind, mine / name)
    assert f"is damaged ({name}: no regular file)" in refusal(mine)
    with pytest.raises(UserError, match="belongs to a checkpoint that is damaged"):
        refuse_damaged_source(mine / "policy")
    # Without checksums of that kind, as in format 1, the others are not opened either.
    sums = mine / "SHA256SUMS"
    sums.unlink()
    content = json.loads((mine / "state.json").read_text()) if name != "state.json" else None
    if content is not None:
        tensors = {"critic.safetensors": sha256_of(mine / "critic.safetensors")}
        (mine / "state.json").write_text(json.dumps(content | {"format": 1, "sha256": tensors}))
    if name != "SHA256SUMS":
        assert f"is damaged ({name}: no regular file)" in refusal(mine)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "name",
    [
        *("/dev/zero", "../state.json", "policy/../../x", ".hidden/zero", "./state.json", "", ".", "policy"),
        *("a\0b", "\ud800", "a" * 5000, "a\nb\u2028c"),
    ],
)
def test_checksums_name_files_of_the_checkpoint_and_nothing_else(name: str, mine: Path):
    (mine / ".hidden").symlink_to("/dev")
    content = json.loads((mine / "state.json").read_text())
    sums = {"critic.safetensors": sha256_of(mine / "critic.safetensors")}
    (mine / "SHA256SUMS").unlink()
    (mine / "state.json").write_text(json.dumps(content | {"format": 1, "sha256": sums}))
    assert read_state(mine)["step"] == 3
    (mine / "state.json").write_text(json.dumps(content | {"format": 1, "sha256": sums | {name: "0" * 64}}))
    message = refusal(mine)
    assert "is damaged (" in message and len(message.splitlines()) == 1 and len(message) < 1000


@pytest.mark.parametrize(
    "change", [{"format": float("inf")}, {"format": "2"}, {"format": 0}, {"step": 3.0}, {"step": None}]
)
def test_format_and_step_are_whole_numbers(change: dict[str, Any], mine: Path):
    content = json.loads((mine / "state.json").read_text())
    (mine / "state.json").write_text(json.dumps(content | change))
    (mine / "SHA256SUMS").unlink()
    write_checksums(mine)
    assert "is damaged (state.json: no state of a checkpoint" in refusal(mine)


def test_foreign_checkpoints_are_refused(
    mine: Path,
    whole: Path,
    config: Config,
    tiny_config: ModelConfig,
    tokenizer: Any,
    minute_config: Callable[..., Config],
):
    assert "that of another run" in refusal(mine, run="another")
    other_step = mine.with_name("step_000005")
    shutil.copytree(mine, other_step)
    assert "it is that of step 3" in refusal(other_step)
    # A model directory, and things that are no directory at all, under the name of a checkpoint.
    shutil.rmtree(other_step)
    shutil.copytree(mine / "policy", other_step)
    assert "state.json" in refusal(other_step)
    (other_step / "state.json").write_text("[" * 100_000)
    assert "state.json" in refusal(other_step)
    (mine.parent / "step_000007").write_text("no folder")
    assert [p.name for p in checkpoints(mine.parent)] == ["step_000003", "step_000005"]
    # Of a run that looks alike and is not: other sizes, no critic, another method.
    bigger = tiny_config.model_copy(update={"tiny": tiny_config.tiny.model_copy(update={"hidden_size": 16})})
    for learner in (
        make_learner(config, bigger, tokenizer),
        make_learner(minute_config("entropy.method=epo", "entropy.reference=per_turn"), tiny_config, tokenizer),
        make_learner(minute_config("algorithm.critic.trunk=separate"), tiny_config, tokenizer),
    ):
        with pytest.raises(UserError, match="does not fit this run") as refused:
            load_checkpoint(whole, learner)
        assert "\n" not in str(refused.value)


def test_a_newer_format_asks_for_the_epo_that_wrote_it(mine: Path):
    state = json.loads((mine / "state.json").read_text())
    (mine / "state.json").write_text(json.dumps(state | {"format": FORMAT + 1}))
    assert "state.json: its content is not what was written" in refusal(mine)  # damage comes first
    (mine / "SHA256SUMS").unlink()
    assert f"has format {FORMAT + 1}, this version of epo reads up to {FORMAT}: use the epo that wrote it" in refusal(
        mine
    )


def test_the_message_says_which_older_one_is_whole(whole: Path, learner: Learner, tmp_path: Path):
    folder = tmp_path / "checkpoints"
    for step in (2, 4, 6):
        save_checkpoint(folder, learner, step=step, state={"step": step}, keep=3)
    assert newest_checkpoint(folder) == folder / "step_000006"
    evaluations = [
        {"step": step, "panels": [{"success": a}, {"success": b}]} for step, a, b in ((0, 0.5, 0.0), (4, 0.5, 0.25))
    ]
    assert choose_checkpoint(folder, "best", evaluations=evaluations) == folder / "step_000004"
    assert choose_checkpoint(folder, "2", evaluations=[]) == folder / "step_000002"
    for step in (6, 4):
        (folder / f"step_{step:06d}" / "policy" / "config.json").unlink()
    with pytest.raises(UserError) as refused:
        newest_checkpoint(folder)
    message = str(refused.value)
    assert "step_000006' is damaged (policy/config.json: missing): delete" in message and "\n" not in message
    assert f"{str(folder / 'step_000004')!r} and {str(folder / 'step_000006')!r}" in message
    assert "'step_000002' is whole" in message and "--checkpoint 2" in message
    with pytest.raises(UserError, match=r"damaged .*choose another --checkpoint \(last, 2, 4, 6\)"):
        choose_checkpoint(folder, "best", evaluations=evaluations)
    # What it says helps.
    for step in (6, 4):
        shutil.rmtree(folder / f"step_{step:06d}")
    assert newest_checkpoint(folder) == folder / "step_000002"
    (folder / "step_000002" / "state.json").write_text("")
    with pytest.raises(UserError, match=r"no older one is whole: delete .* starts the run again"):
        newest_checkpoint(folder)


def test_checkpoints_that_nobody_has(learner: Learner, tmp_path: Path):
    folder = tmp_path / "checkpoints"
    assert newest_checkpoint(folder) is None and choose_checkpoint(folder, "best", evaluations=[]) is None
    save_checkpoint(folder, learner, step=2, state={}, keep=1)
    for which in ("3", "-1", "newest", "²"):
        with pytest.raises(UserError, match="is not there: choose from last, 2, best"):
            choose_checkpoint(folder, which, evaluations=[])
    with pytest.raises(UserError, match="nothing was evaluated yet"):
        choose_checkpoint(folder, "best", evaluations=[])
    with pytest.raises(UserError, match="that of step 1, the best, was not kept"):
        choose_checkpoint(folder, "best", evaluations=[{"step": 1, "panels": [{"success": 0.0}]}])


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: {k: v[:1] if v.dim() else v for k, v in tensors.items()},
        lambda tensors: {k: v for k, v in tensors.items() if k != "1.exp_avg"},
        lambda tensors: tensors | {"99999.exp_avg": torch.zeros(3)},
        lambda tensors: tensors | {"0.other": torch.zeros(())},
        lambda tensors: {k: v.reshape(1) if k.endswith("step") else v for k, v in tensors.items()},
    ],
)
def test_moments_that_are_not_those_of_the_parameters_do_not_fit(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], mine: Path, learner: Learner
):
    """The checksums hold, so that only reading can find it; left alone, it would end the next optimiser step."""
    file = mine / "optimizer.safetensors"
    save_file(change(load_file(file)), file)
    write_checksums(mine)
    with pytest.raises(UserError, match="does not fit this run") as refused:
        load_checkpoint(mine, learner)
    assert "\n" not in str(refused.value)


def test_without_panels_there_is_no_best():
    assert best_evaluation([{"step": 0, "panels": []}]) is None


def test_the_first_of_equal_evaluations_is_the_best():
    rated = [{"step": step, "panels": [{"success": value}]} for step, value in ((0, 0.1), (5, 0.3), (10, 0.3))]
    assert best_evaluation(rated) == (5, 0.3)
    assert best_evaluation([]) is None


def test_the_newest_and_the_protected_are_kept(learner: Learner, tmp_path: Path):
    for step in range(1, 7):
        save_checkpoint(tmp_path, learner, step=step, state={}, keep=2, protect=[2, 3])
    assert [int(p.name[5:]) for p in checkpoints(tmp_path)] == [2, 3, 5, 6]
    assert len(list(tmp_path.iterdir())) == 4
