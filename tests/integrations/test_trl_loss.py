"""The gradient that TRL's trainer gets: its own, and an entropy term computed here in float64 with literal turns."""

from __future__ import annotations

import copy
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted import EPO, PROMPT, SCRIPT, Scripted, literal_turn_ids, tokens_of
from trl import GRPOConfig, GRPOTrainer

from epo.errors import UserError
from epo.integrations.trl import EPOConfig, EPOTrainer


def entropies(model: Any, row: int, step: int) -> dict[int, list[torch.Tensor]]:
    """Entropy of every sampled token of a row by turn, from the logits of a float64 model, one row at a time."""
    ids = tokens_of(row, step)
    log_p = model(torch.tensor([PROMPT + ids])).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
    by_turn: dict[int, list[torch.Tensor]] = {}
    for place, turn in enumerate(literal_turn_ids(row)):
        if turn >= 0:
            by_turn.setdefault(turn, []).append(-(log_p[place].exp() * log_p[place]).sum())
    return by_turn


def mean_entropy(model: Any, step: int) -> float:
    with torch.no_grad():
        rows = [entropies(model, row, step) for row in range(len(SCRIPT))]
    return statistics.fmean(float(h) for row in rows for turn in row.values() for h in turn)


def expected(model: Any, step: int, *, references: list[float], steps: int) -> tuple[dict[str, torch.Tensor], Any]:
    """Gradient and value of -lambda [L^H - beta L^smooth], and what of it is logged, by plain loops."""
    reference = statistics.fmean(references) if references else None
    bonus, smooth, below, above = [], [], 0.0, 0.0
    for row in range(len(SCRIPT)):
        by_turn = entropies(model, row, step)
        turn_bonus, turn_smooth = [], []
        for hs in by_turn.values():
            penalties = []
            for h in hs:
                share = 1 / (len(SCRIPT) * len(by_turn) * len(hs))
                low, high = (0.9 * reference, 1.05 * reference) if reference is not None else (-math.inf, math.inf)
                below += share * float(h < low)
                above += share * float(h > high)
                zero = torch.zeros((), dtype=torch.float64)
                penalties.append(low - h if h < low else h - high if h > high else zero)
            turn_bonus.append(sum(hs) / len(hs))
            turn_smooth.append(sum(penalties) / len(penalties))
        bonus.append(sum(turn_bonus) / len(turn_bonus))
        smooth.append(sum(turn_smooth) / len(turn_smooth))
    beta = 1 + math.exp(-3.0 * step / (steps // 2))
    smoothing = 2.0 * sum(smooth) / len(smooth)
    loss = -0.7 * (sum(bonus) / len(bonus) - beta * smoothing)
    model.zero_grad()
    loss.backward()
    logged = {
        "entropy/loss": loss.item(),
        "epo/smoothing": float(torch.as_tensor(smoothing).detach()),
        "epo/beta": beta,
        "entropy/below": below,
        "entropy/above": above,
    }
    return {name: p.grad.clone() for name, p in model.named_parameters()}, logged


def gap(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Largest distance over the largest entry."""
    assert ours.keys() == theirs.keys()
    scale = max(float(g.abs().max()) for g in theirs.values())
    return max(float((ours[n].double() - theirs[n].double()).abs().max()) for n in theirs) / scale


@pytest.mark.parametrize("options", [{"epo_coefficient": 0.0, "epo_kappa_high": 0.5}, {"epo_method": "none"}])
def test_without_a_coefficient_every_gradient_is_that_of_grpo_bit_for_bit(
    scripted: Scripted, options: dict[str, Any]
) -> None:
    rate = {"learning_rate": 1e-3, "max_steps": 2}
    _, stock = scripted.run(GRPOTrainer, GRPOConfig, **rate)
    _, ours = scripted.run(EPOTrainer, EPOConfig, **rate, **options)
    assert len(stock.steps) == len(ours.steps) == 2
    assert any(bool(g.any()) for g in stock.steps[1].values())
    for theirs, mine in zip(stock.steps, ours.steps, strict=True):
        assert theirs.keys() == mine.keys()
        assert all(torch.equal(theirs[name], mine[name]) for name in theirs)


@pytest.mark.parametrize(
    ("rows", "accumulation", "optimizer_steps", "iterations"), [(2, 4, 1, 1), (8, 1, 1, 1), (2, 2, 2, 2)]
)
def test_the_term_is_that_of_the_whole_generation_batch_however_it_is_cut(
    scripted: Scripted, rows: int, accumulation: int, optimizer_steps: int, iterations: int
) -> None:
    """No reward differs, so that TRL's own gradient is 0; the weights stay, so that optimiser steps can be averaged."""
    per_rl_step = optimizer_steps * iterations
    trainer, gradients = scripted.run(
        EPOTrainer,
        EPOConfig,
        rewards=False,
        max_steps=4 * per_rl_step,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=accumulation * optimizer_steps,
        num_iterations=iterations,
        **EPO,
    )
    model = copy.deepcopy(scripted.policy.model).double()
    logs = [entry for entry in trainer.state.log_history if "epo/beta" in entry]
    assert len(logs) == 4
    references: list[float] = []
    for step in range(4):
        wanted, logged = expected(model, step, references=references, steps=4)
        given = gradients.steps[step * per_rl_step : (step + 1) * per_rl_step]
        mean = {name: sum(g[name].double() for g in given) / per_rl_step for name in wanted}
        assert gap(mean, wanted) < 1e-4
        for name, value in logged.items():
            assert logs[step][name] == pytest.approx(value, abs=1e-5), name
        if references:
            assert logged["epo/smoothing"] > 0.01
            assert logs[step]["entropy/reference"] == pytest.approx(statistics.fmean(references), abs=1e-5)
        else:
            assert "entropy/reference" not in logs[step]
        references.append(mean_entropy(model, step))


def test_the_term_comes_on_top_of_the_policy_loss(scripted: Scripted) -> None:
    _, stock = scripted.run(GRPOTrainer, GRPOConfig)
    _, ours = scripted.run(EPOTrainer, EPOConfig, **EPO)
    model = copy.deepcopy(scripted.policy.model).double()
    wanted, _ = expected(model, 0, references=[], steps=2)
    difference = {name: ours.steps[0][name].double() - stock.steps[0][name].double() for name in wanted}
    assert gap(difference, wanted) < 1e-4
    assert gap(stock.steps[0], wanted) > 0.1


@pytest.mark.parametrize(
    ("accumulation", "iterations", "optimizer_steps"), [(4, 1, 3), (2, 2, 12), (8, 1, 2)], ids=["on", "off", "two"]
)
def test_the_history_has_one_entry_for_each_generation_batch_and_it_is_the_sampling_policys(
    scripted: Scripted, accumulation: int, iterations: int, optimizer_steps: int
) -> None:
    """`off`: four optimiser steps for a batch; `two`: two batches for an optimiser step."""
    seen: list[float] = []
    trainer, _ = scripted.run(
        EPOTrainer,
        EPOConfig,
        watch=lambda model: seen.append(mean_entropy(copy.deepcopy(model).double(), len(seen))),
        max_steps=optimizer_steps,
        learning_rate=3e-3,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=4,
        num_iterations=iterations,
        epo_coefficient=0.1,
    )
    steps = trainer.entropy_control.state_dict()["history"]["steps"]
    assert len(seen) == len(steps) == (4 if accumulation == 8 else 3)
    if accumulation == 2:
        assert abs(seen[2] - seen[0]) > 0.01
    assert [mean for [[_, mean]] in steps] == pytest.approx(seen, abs=1e-4)


def test_tokens_can_be_weighed_alike_instead(scripted: Scripted) -> None:
    _, gradients = scripted.run(EPOTrainer, EPOConfig, rewards=False, epo_method="bonus", epo_aggregate="token")
    model = copy.deepcopy(scripted.policy.model).double()
    hs = [h for row in range(len(SCRIPT)) for turn in entropies(model, row, 0).values() for h in turn]
    (-0.001 * sum(hs) / len(hs)).backward()
    assert gap(gradients.steps[0], {name: p.grad for name, p in model.named_parameters()}) < 1e-4


def test_an_entropy_without_gradient_is_refused_rather_than_not_trained(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = GRPOTrainer._get_per_token_logps_and_entropies

    def detached(self: Any, *args: Any, **kwargs: Any) -> Any:
        logprobs, entropy, auxiliary = scored(self, *args, **kwargs)
        return logprobs, entropy.detach(), auxiliary

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", detached)
    with pytest.raises(UserError, match=r"TRL 1\.16\.0 computes no entropy that a gradient could flow through"):
        scripted.run(EPOTrainer, EPOConfig, **EPO)


def test_what_the_settings_cannot_do_is_said_when_the_trainer_is_made(
    scripted: Scripted, caplog: pytest.LogCaptureFixture
) -> None:
    scripted.run(EPOTrainer, EPOConfig, epo_method="epo")
    assert "the corridor has no floor" in caplog.text


def test_two_processes_train_like_one(scripted: Scripted, tmp_path: Path) -> None:
    scripted.policy.model.save_pretrained(tmp_path / "model")
    scripted.policy.tokenizer.save_pretrained(tmp_path / "model")
    script = Path(__file__).with_name("two_processes.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(
        [*launch, str(tmp_path / "model"), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert first["history"] == second["history"]
    model = copy.deepcopy(scripted.policy.model).double()
    references: list[float] = []
    for step in range(2):
        wanted, logged = expected(model, step, references=references, steps=2)
        for rank in (first, second):
            given = {name.removeprefix("module."): g for name, g in rank["gradients"][step].items()}
            assert gap(given, wanted) < 1e-4
        log = [entry for entry in first["log"] if "epo/beta" in entry][step]
        for name, value in logged.items():
            assert log[name] == pytest.approx(value, abs=1e-5), name
        references.append(mean_entropy(model, step))
    assert [mean for [[_, mean]] in first["history"]] == pytest.approx(references, abs=1e-4)
