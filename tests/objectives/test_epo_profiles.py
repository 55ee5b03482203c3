"""The profiles of EPO: what each changes, and that the release's smoothing changes nothing (conformance T2, T3)."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from epo.objectives import METHODS, EPODecayControl, make_control, method_options, trajectory_weights
from epo.objectives.control.release import release_schedule

TRAJECTORIES = torch.tensor([0, 0, 0, 1, 1, 2])
TURNS = torch.tensor([0, 0, 3, 0, 29, 1])
WEIGHTS = trajectory_weights(TRAJECTORIES, TURNS, dtype=torch.float64)
ENTROPY = torch.tensor([0.1, 0.9, 2.0, 4.0, 0.6, 1.1], dtype=torch.float64)


def slopes(control: object, *, step: int = 0, total_steps: int = 10, weights: Tensor = WEIGHTS) -> list[float]:
    leaf = ENTROPY.clone().requires_grad_()
    control.entropy_loss(leaf, weights, TURNS, step=step, total_steps=total_steps).loss.backward()  # type: ignore[attr-defined]
    assert leaf.grad is not None
    return leaf.grad.tolist()


def test_presets_are_what_their_names_say() -> None:
    paper = method_options("epo")
    assert (paper["coefficient"], paper["alpha"], paper["kappa_low"], paper["kappa_high"]) == (0.001, 0.05, 0.0, 2.0)
    assert (paper["gamma"], paper["penalty"], paper["schedule"], paper["reference"]) == (3.0, "relu", "paper", "scalar")
    constant = method_options("epo_constant_beta")
    assert {name for name in paper if constant[name] != paper[name]} == {"schedule"}
    strong = method_options("epo_strong")
    assert {name for name in paper if strong[name] != paper[name]} == {"alpha"}
    assert strong["alpha"] == 10
    assert make_control("epo_strong", kappa_low=0.1).warnings() == []
    (warning,) = make_control("epo_strong").warnings()
    assert "no floor" in warning
    assert len(make_control("epo").warnings()) == 2
    # An option given by the user wins over the preset.
    assert len(make_control("epo_strong", alpha=0.3).warnings()) == 2


@pytest.mark.parametrize("step", [0, 3, 9])
def test_strong_turns_the_bonus_around_at_every_step_and_published_never(step: int) -> None:
    """H_ref = 1. Above 2 the strong corridor pushes down; below a floor of 0.5 one pushes up more."""
    floor = {"alpha": 2.0, "kappa_low": 0.5, "kappa_high": 1.5}
    controls = [*(make_control(name) for name in ("bonus", "epo", "epo_strong")), make_control("epo", **floor)]
    for control in controls:
        control.observe(torch.ones(4, dtype=torch.float64), torch.arange(4), torch.zeros(4, dtype=torch.long))
    bonus, published, strong, floored = (slopes(control, step=step) for control in controls)
    beta = 1 + math.exp(-3 * step / 5)
    for i, entropy in enumerate(ENTROPY.tolist()):
        assert published[i] / bonus[i] == pytest.approx(1 - 0.05 * beta * (entropy > 2))
        assert published[i] / bonus[i] > 0
        assert strong[i] / bonus[i] == pytest.approx(1 - 10 * beta * (entropy > 2))
        assert (strong[i] / bonus[i] < 0) == (entropy > 2)
        assert floored[i] / bonus[i] == pytest.approx(1 - 2 * beta * (entropy > 1.5) + 2 * beta * (entropy < 0.5))


def test_per_turn_corridors_judge_a_turn_by_its_own_past() -> None:
    control = make_control("epo", alpha=2.0, kappa_low=0.5, kappa_high=1.5, reference="per_turn")
    bonus = slopes(make_control("bonus"))
    for _ in range(3):
        control.observe(
            torch.tensor([0.1, 0.9, 2.0, 0.6, 1.1], dtype=torch.float64),
            torch.zeros(5, dtype=torch.long),
            torch.tensor([0, 0, 3, 29, 1]),
        )
    factors = [got / plain for got, plain in zip(slopes(control), bonus, strict=True)]
    # Turn 0 has mean 0.5: 0.1 lies below, 0.9 and 4.0 above; every other turn meets exactly its own mean.
    assert factors == pytest.approx([5.0, -3.0, 1.0, -3.0, 1.0, 1.0])


def test_decay_over_turns_by_hand() -> None:
    control = make_control("epo_decay", coefficient=0.5, max_turns=30)
    raw = [1 + math.exp(-3 * t / 30) for t in range(30)]
    expected = [-0.5 * float(w) * raw[int(t)] / (sum(raw) / 30) for w, t in zip(WEIGHTS, TURNS.tolist(), strict=True)]
    assert slopes(control) == pytest.approx(expected, rel=1e-12)
    assert slopes(control, step=7) == pytest.approx(expected, rel=1e-12)
    assert slopes(make_control("epo_decay", max_turns=30, rate=0.0)) == pytest.approx(slopes(make_control("bonus")))


def test_decay_over_training_by_hand() -> None:
    control = EPODecayControl(coefficient=0.5, decay="phase", rate=2.0)
    raw = [1 + math.exp(-2 * k / 10) for k in range(10)]
    bonus = slopes(make_control("bonus", coefficient=0.5))
    for step in (0, 4, 9, 12):
        factor = raw[min(step, 9)] / (sum(raw) / 10)
        assert slopes(control, step=step) == pytest.approx([factor * slope for slope in bonus], rel=1e-12)


def test_decay_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match="needs max_turns"):
        slopes(make_control("epo_decay"))
    for options in ({"decay": "step"}, {"rate": -1.0}, {"max_turns": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            make_control("epo_decay", **options)


def test_release_equals_the_token_mean_bonus_bit_for_bit() -> None:
    """200 Adam steps of a small policy, with and without the released smoothing term."""

    def trained(method: str, **options: object) -> Tensor:
        control = make_control(method, coefficient=0.1, **options)
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(6, 5, generator=generator).requires_grad_()
        rewards = torch.randn(6, 5, generator=generator)
        optimizer = torch.optim.Adam([logits], lr=0.05)
        weights = torch.full((6,), 1 / 6)
        for step in range(200):
            log_p = logits.log_softmax(-1)
            entropy = -(log_p.exp() * log_p).sum(-1)
            control.shape_advantages(torch.zeros(6), entropy.detach(), TRAJECTORIES, TURNS, TRAJECTORIES)
            term = control.entropy_loss(entropy, weights, TURNS, step=step, total_steps=200)
            optimizer.zero_grad()
            (term.loss - (log_p.exp() * rewards).sum(-1).mean()).backward()
            optimizer.step()
            control.observe(entropy.detach(), TRAJECTORIES, TURNS)
            if method == "epo_release" and step == 150:
                outside = term.metrics["entropy/below"] + term.metrics["entropy/above"]
                assert outside > 0, "nothing lies outside the corridor: the comparison would be empty"
        return logits.detach()

    assert make_control("epo_release").aggregate == make_control("bonus", aggregate="token").aggregate == "token"
    assert torch.equal(trained("epo_release"), trained("bonus"))
    assert not torch.equal(trained("epo_strong", kappa_low=0.9), trained("bonus"))


def test_release_reference_includes_the_step_itself_and_its_gate_opens_late() -> None:
    control = make_control("epo_release", alpha=0.5, coefficient=1.0)
    control.shape_advantages(torch.zeros(2), torch.tensor([1.0, 2.0]), TURNS[:2], torch.tensor([3, 29]), TURNS[:2])
    assert control.history.reference(torch.tensor([3, 29])).tolist() == [1.0, 2.0]  # type: ignore[attr-defined]
    entropy = torch.tensor([9.0, 9.0])
    term = control.entropy_loss(entropy, torch.tensor([0.5, 0.5]), torch.tensor([3, 29]), step=75, total_steps=9)
    # Both tokens lie above; only turn 29 is late.
    assert term.metrics["entropy/above"] == 1.0
    assert term.metrics["epo/smoothing"] == pytest.approx(0.5 * 0.5)
    assert term.loss.item() == pytest.approx(-9.0 + release_schedule(75) * 0.25)


def test_release_schedule_at_the_steps_that_were_read_off_it() -> None:
    steps = {0: 1.0, 75: 0.827, 76: 0.769, 100: 0.294, 149: 0.0415}
    for step, weight in steps.items():
        assert release_schedule(step) == pytest.approx(weight, abs=5e-4)


@pytest.mark.parametrize("method", [name for name in METHODS if name.startswith("epo")])
def test_parts_of_a_mini_batch_add_up(method: str) -> None:
    options = {"max_turns": 30} if method == "epo_decay" else {}
    control = make_control(method, **options)
    control.shape_advantages(ENTROPY, ENTROPY, TRAJECTORIES, TURNS, TRAJECTORIES)
    control.observe(ENTROPY, TRAJECTORIES, TURNS)
    whole = control.entropy_loss(ENTROPY, WEIGHTS, TURNS, step=2, total_steps=9)
    parts = [
        control.entropy_loss(ENTROPY[part], WEIGHTS[part], TURNS[part], step=2, total_steps=9)
        for part in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    assert sum(part.loss for part in parts).item() == pytest.approx(whole.loss.item(), rel=1e-12)  # type: ignore[union-attr]
    for name, value in whole.metrics.items():
        assert sum(part.metrics[name] for part in parts) == pytest.approx(value, rel=1e-12)
    assert json.loads(json.dumps(control.state_dict())) == control.state_dict()
