"""The control contract: neutral defaults, names, state, warnings; and that the package stands alone."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch

from epo.objectives import (
    METHODS,
    BonusControl,
    EntropyControl,
    EntropyTerm,
    EPOControl,
    NoControl,
    clipped_surrogate,
    make_control,
)

IDS = torch.tensor([0, 0, 1])
TURNS = torch.tensor([0, 1, 0])
ENTROPY = torch.tensor([0.5, 1.0, 1.5])


NEEDED = {"epo_decay": {"max_turns": 5}}
"""Options without which a method cannot work."""
THROUGH_THE_LOSS = ["none", "bonus", "epo_base", "epo", "epo_constant_beta", "epo_strong", "epo_decay"]


def entropy_loss(control: EntropyControl, weights: torch.Tensor) -> EntropyTerm:
    marks = None
    if control.previews:
        marks = control.preview(-ENTROPY, -ENTROPY, ENTROPY, ENTROPY, IDS, generator=torch.Generator())
    return control.entropy_loss(ENTROPY, weights, TURNS, step=3, total_steps=9, marks_N=marks)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_honours_the_contract(method: str) -> None:
    control = make_control(method, **NEEDED.get(method, {}))
    assert isinstance(control, EntropyControl)
    for _ in range(3):
        control.observe(ENTROPY, IDS, TURNS)
    state = json.loads(json.dumps(control.state_dict()))
    restored = make_control(method, **NEEDED.get(method, {}))
    restored.load_state_dict(state)
    assert restored.state_dict() == control.state_dict()
    assert restored.reference == control.reference
    weights = torch.full((3,), 1 / 3)
    first, second = (entropy_loss(c, weights) for c in (control, restored))
    assert torch.equal(first.loss, second.loss)
    assert first.loss.shape == ()
    assert first.metrics == second.metrics
    assert json.loads(json.dumps(first.metrics)) == first.metrics


@pytest.mark.parametrize("method", THROUGH_THE_LOSS)
def test_methods_that_act_through_the_loss_leave_the_other_hooks_neutral(method: str) -> None:
    control = make_control(method)
    advantages = torch.tensor([1.0, -1.0, 0.5])
    assert torch.equal(control.shape_advantages(advantages, ENTROPY, IDS, TURNS, IDS), advantages)
    logprobs, old = torch.tensor([-1.0, -0.2, -2.0]), torch.tensor([-1.5, -1.8, -2.0])
    got = control.surrogate(logprobs, old, advantages, clip_low=0.1, clip_high=0.3, dual_clip=4.0)
    expected = clipped_surrogate(logprobs, old, advantages, clip_low=0.1, clip_high=0.3, dual_clip=4.0)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, expected, strict=True))


def test_no_control_adds_nothing_and_bonus_adds_the_weighted_mean() -> None:
    entropy = ENTROPY.clone().requires_grad_()
    weights = torch.tensor([0.25, 0.25, 0.5])
    none = NoControl().entropy_loss(entropy, weights, TURNS, step=0, total_steps=2)
    assert none.loss.item() == 0.0
    assert not none.loss.requires_grad
    bonus = BonusControl(coefficient=0.1).entropy_loss(entropy, weights, TURNS, step=0, total_steps=2)
    assert bonus.loss.item() == pytest.approx(-0.1 * (0.125 + 0.25 + 0.75))
    bonus.loss.backward()
    torch.testing.assert_close(entropy.grad, -0.1 * weights)


def test_epo_base_is_the_bonus() -> None:
    assert type(make_control("epo_base")) is type(make_control("bonus")) is BonusControl


def test_observed_entropies_count_only_from_the_next_step_on() -> None:
    control = make_control("epo")
    assert control.reference is None
    control.observe(torch.tensor([1.0, 2.0, 6.0]), IDS, TURNS)
    assert control.reference == 3.0
    control.observe(torch.tensor([1.0, 1.0, 1.0]), IDS, TURNS)
    assert control.reference == 2.0


def test_resumed_control_continues_as_the_uninterrupted_one() -> None:
    entropies = torch.rand(6, 3, generator=torch.Generator().manual_seed(0))
    for kind in ("scalar", "per_turn"):
        whole, first = make_control("epo", reference=kind), make_control("epo", reference=kind)
        for step in range(3):
            whole.observe(entropies[step], IDS, TURNS)
            first.observe(entropies[step], IDS, TURNS)
        second = make_control("epo", reference=kind)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        for step in range(3, 6):
            whole.observe(entropies[step], IDS, TURNS)
            second.observe(entropies[step], IDS, TURNS)
        assert second.state_dict() == whole.state_dict()
        assert second.reference == whole.reference


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ["never push entropy down", "no floor"]),
        ({"alpha": 0.5, "kappa_low": 0.5, "kappa_high": 1.5}, ["alpha * beta_max = 1 <= 1"]),
        ({"alpha": 0.51, "kappa_low": 0.5, "kappa_high": 1.5}, []),
        ({"alpha": 0.51, "kappa_low": 0.5, "kappa_high": 1.5, "schedule": "constant"}, ["needs alpha > 1"]),
        ({"alpha": 9.0, "kappa_low": 0.5, "kappa_high": 1.5, "penalty": "indicator"}, ["no gradient"]),
        ({"alpha": 0.1, "kappa_low": 0.0, "penalty": "squared"}, ["no floor"]),
    ],
)
def test_warnings_say_what_the_corridor_cannot_do(options: dict[str, object], words: list[str]) -> None:
    found = make_control("epo", **options).warnings()
    assert len(found) == len(words)
    assert all(word in warning for word, warning in zip(words, found, strict=True))
    assert make_control("none").warnings() == make_control("bonus").warnings() == []


def test_the_warning_about_strength_is_true() -> None:
    """Just below the threshold no token's entropy is pushed down at any step; just above it, some step does."""

    def pushes_down(alpha: float) -> bool:
        control = EPOControl(coefficient=1.0, alpha=alpha, kappa_low=0.5, kappa_high=1.5)
        control.history.append(1.0)
        slopes = []
        for step in range(101):
            leaf = torch.tensor([5.0], dtype=torch.float64, requires_grad=True)
            weights = torch.ones(1, dtype=torch.float64)
            control.entropy_loss(leaf, weights, TURNS[:1], step=step, total_steps=100).loss.backward()
            slopes.append(leaf.grad.item())
        return max(slopes) > 1e-12

    assert not pushes_down(0.5)
    assert pushes_down(0.51)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("epoo", {}, r"unknown entropy control method: 'epoo'; did you mean 'epo'\?.* none, bonus, epo_base, epo"),
        ("zzz", {}, "Valid: none"),
        ("epo", {"kapa_low": 0.5}, r"option of entropy control 'epo': 'kapa_low'; did you mean 'kappa_low'\?"),
        ("none", {"coefficient": 0.1}, r"'none': 'coefficient'.*no options"),
        ("bonus", {"coefficient": -1.0}, "coefficient must be >= 0, got -1.0"),
        ("epo", {"alpha": -1.0}, "alpha must be >= 0"),
        ("epo", {"kappa_low": 3.0}, "0 <= kappa_low < kappa_high"),
        ("epo", {"penalty": "hinge"}, "relu, indicator, squared"),
        ("epo", {"reference": "ema"}, "scalar, per_turn"),
        ("epo", {"history": "scalar"}, "cumulative, sliding, ema"),
        ("epo", {"schedule": "cosine"}, "paper, constant"),
        ("epo", {"gamma": -1.0}, "gamma >= 0"),
        ("epo", {"window": 0}, "window"),
    ],
)
def test_mistakes_are_named_with_the_valid_choices(method: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_control(method, **options)


def test_a_state_of_another_method_is_refused() -> None:
    epo = make_control("epo")
    epo.observe(ENTROPY, IDS, TURNS)
    with pytest.raises(ValueError, match="another entropy control method"):
        make_control("none").load_state_dict(epo.state_dict())
    with pytest.raises(ValueError, match="another entropy control method"):
        make_control("epo").load_state_dict(make_control("bonus").state_dict())


def test_importing_objectives_brings_nothing_but_torch() -> None:
    code = (
        "import sys, epo.objectives\n"
        "ours = [m for m in sys.modules if m.startswith('epo.') and not m.startswith('epo.objectives')]\n"
        "heavy = [m for m in ('transformers', 'tokenizers', 'pydantic', 'safetensors') if m in sys.modules]\n"
        "assert not ours and not heavy, (ours, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("method", ["epo", "adaptive", "entropic"])
def test_an_entropy_that_is_not_finite_is_refused_and_leaves_the_state_alone(method: str) -> None:
    control = make_control(method)
    control.observe(ENTROPY, IDS, TURNS)
    before = control.state_dict()
    with pytest.raises(ValueError, match="finite"):
        control.observe(torch.tensor([1.0, math.nan, 1.0]), IDS, TURNS)
    assert control.state_dict() == before


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_takes_bfloat16(method: str) -> None:
    low = ENTROPY.bfloat16()
    control = make_control(method, **NEEDED.get(method, {}))
    control.shape_advantages(low, low, IDS, TURNS, IDS)
    marks = control.preview(-low, -low, low, low, IDS, generator=torch.Generator())
    control.surrogate(-low, -low, low, clip_low=0.2, clip_high=0.2, dual_clip=None, marks_N=marks)
    control.entropy_loss(low, low, TURNS, step=1, total_steps=4, marks_N=marks)
    control.observe(low, IDS, TURNS)
