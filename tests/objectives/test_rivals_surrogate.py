"""Rivals that act on the surrogate, on ragged batches: against loops over tokens, in any order and any split."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from ragged import Ragged, cut, ragged_batches
from torch import Tensor

from epo.objectives import EntropyControl, covariances, make_control

LOW, HIGH = 0.2, 0.3
WIDTHS: dict[str, Any] = {"clip_low": LOW, "clip_high": HIGH, "dual_clip": None}
batches = ragged_batches(max_groups=2, max_members=3, max_turns=20)


def marks_of(control: EntropyControl, batch: Ragged, *, seed: int = 0) -> Tensor | None:
    if not control.previews:
        return None
    return control.preview(
        batch.logprobs_N,
        batch.old_logprobs_N,
        batch.advantages_N,
        batch.entropy_N,
        batch.trajectory_ids_N,
        generator=torch.Generator().manual_seed(seed),
    )


def losses(control: EntropyControl, batch: Ragged, marks: Tensor | None) -> tuple[list[float], list[float], list[bool]]:
    """Loss of each token, its slope by its own log-probability, and whether it is said to have none."""
    leaf = batch.logprobs_N.clone().requires_grad_()
    found = control.surrogate(leaf, batch.old_logprobs_N, batch.advantages_N, **WIDTHS, marks_N=marks)
    (slope,) = torch.autograd.grad(found.loss_N.sum(), leaf)
    return found.loss_N.tolist(), slope.tolist(), found.is_clipped_N.tolist()


def ppo(logp: float, old: float, advantage: float, low: float, high: float) -> float:
    ratio = math.exp(logp - old)
    return max(-advantage * ratio, -advantage * min(max(ratio, 1 - low), 1 + high))


def brute_covariances(batch: Ragged) -> list[float]:
    logps, advantages = batch.logprobs_N.tolist(), batch.advantages_N.tolist()
    mean_logp, mean_advantage = sum(logps) / len(logps), sum(advantages) / len(advantages)
    return [(p - mean_logp) * (a - mean_advantage) for p, a in zip(logps, advantages, strict=True)]


def rows(batch: Ragged) -> list[tuple[float, float, float]]:
    parts = (batch.logprobs_N, batch.old_logprobs_N, batch.advantages_N)
    return list(zip(*(part.tolist() for part in parts), strict=True))


def finite_difference(function: Any, logp: float, eps: float = 1e-6) -> float:
    return (function(logp + eps) - function(logp - eps)) / (2 * eps)


@settings(max_examples=50, deadline=None)
@given(batch=batches, high=st.floats(0, 2))
def test_clip_higher_is_ppo_with_its_own_widths(batch: Ragged, high: float) -> None:
    found, slopes, clipped = losses(make_control("clip_higher", clip_low=0.1, clip_high=high), batch, None)
    for (logp, old, advantage), loss, slope, is_clipped in zip(rows(batch), found, slopes, clipped, strict=True):
        assert loss == pytest.approx(ppo(logp, old, advantage, 0.1, high), rel=1e-12)
        assert is_clipped == (slope == 0.0 and advantage != 0)


@settings(max_examples=50, deadline=None)
@given(batch=batches)
def test_covariances_are_those_of_the_tokens_given(batch: Ragged) -> None:
    found = covariances(batch.logprobs_N, batch.advantages_N)
    assert found.tolist() == pytest.approx(brute_covariances(batch), rel=1e-9, abs=1e-12)
    # Their mean is the covariance of the whole, here by another formula.
    stacked = torch.stack([batch.logprobs_N, batch.advantages_N])
    if len(batch) > 1:
        assert found.mean().item() == pytest.approx(torch.cov(stacked, correction=0)[0, 1].item(), abs=1e-9)


@settings(max_examples=80, deadline=None)
@given(
    batch=batches,
    ratio=st.sampled_from([2e-4, 0.05, 0.5, 1.0]),
    lower=st.floats(-0.5, 0.5),
    seed=st.integers(0, 99),
)
def test_clip_cov_drops_the_right_number_of_candidates_and_leaves_the_rest_to_ppo(
    batch: Ragged, ratio: float, lower: float, seed: int
) -> None:
    control = make_control("clip_cov", ratio=ratio, lower=lower, upper=1.5, clip_low=LOW, clip_high=HIGH)
    marks = marks_of(control, batch, seed=seed)
    assert marks is not None
    candidates = []
    for c, (logp, old, advantage) in zip(brute_covariances(batch), rows(batch), strict=True):
        assume(min(abs(c - lower), abs(c - 1.5)) > 1e-9)
        clipped = ppo(logp, old, advantage, LOW, HIGH) > -advantage * math.exp(logp - old)
        candidates.append(lower < c < 1.5 and not clipped)
    assert int(marks.sum()) == min(sum(candidates), max(1, int(ratio * len(batch))))
    assert all(candidate for candidate, mark in zip(candidates, marks.tolist(), strict=True) if mark)
    found, slopes, is_clipped = losses(control, batch, marks)
    for (logp, old, advantage), mark, loss, slope, gone in zip(
        rows(batch), marks.tolist(), found, slopes, is_clipped, strict=True
    ):
        assert loss == (0.0 if mark else pytest.approx(ppo(logp, old, advantage, LOW, HIGH), rel=1e-12))
        assert not mark or (slope == 0.0 and gone)


def test_clip_cov_draws_every_candidate_alike() -> None:
    generator = torch.Generator().manual_seed(5)
    logprobs = torch.linspace(-4, -0.1, 40, dtype=torch.float64)
    batch = Ragged(
        group_ids_N=torch.zeros(40, dtype=torch.long),
        trajectory_ids_N=torch.zeros(40, dtype=torch.long),
        turn_ids_N=torch.zeros(40, dtype=torch.long),
        entropy_N=torch.ones(40, dtype=torch.float64),
        logprobs_N=logprobs,
        old_logprobs_N=logprobs,
        advantages_N=torch.randn(40, generator=generator, dtype=torch.float64) + logprobs,
    )
    control = make_control("clip_cov", ratio=0.1, lower=0.3, upper=9.0)
    counts = sum(marks_of(control, batch, seed=seed).double() for seed in range(3000))  # type: ignore[union-attr]
    drawn = counts[counts > 0]
    expected = 4 * 3000 / len(drawn)
    assert len(drawn) > 8
    assert ((drawn - expected).abs() < 5 * expected**0.5).all()


@settings(max_examples=80, deadline=None)
@given(batch=batches, ratio=st.sampled_from([0.0002, 0.1, 0.5, 1.0]), weight=st.floats(0, 3))
def test_kl_cov_penalises_the_highest_covariances_and_clips_nothing(batch: Ragged, ratio: float, weight: float) -> None:
    control = make_control("kl_cov", ratio=ratio, weight=weight)
    marks = marks_of(control, batch)
    assert marks is not None
    count = min(len(batch), max(1, int(ratio * len(batch))))
    assert int(marks.sum()) == count
    values = brute_covariances(batch)
    marked = [c for c, mark in zip(values, marks.tolist(), strict=True) if mark]
    others = [c for c, mark in zip(values, marks.tolist(), strict=True) if not mark]
    assert not others or min(marked) >= max(others) - 1e-12
    found, slopes, clipped = losses(control, batch, marks)
    assert not any(clipped)
    for (logp, old, advantage), mark, loss, slope in zip(rows(batch), marks.tolist(), found, slopes, strict=True):

        def by_hand(p: float, old: float = old, advantage: float = advantage, mark: bool = mark) -> float:
            return -advantage * math.exp(p - old) + (weight * abs(p - old) if mark else 0.0)

        assert loss == pytest.approx(by_hand(logp), rel=1e-12, abs=1e-15)
        if abs(logp - old) > 1e-5:
            assert slope == pytest.approx(finite_difference(by_hand, logp), rel=1e-5, abs=1e-8)


@settings(max_examples=60, deadline=None)
@given(batch=batches, dual=st.sampled_from([None, 1.5]))
def test_aepo_keeps_the_gradient_of_the_clip_above_and_nothing_else(batch: Ragged, dual: float | None) -> None:
    leaf = batch.logprobs_N.clone().requires_grad_()
    options = {**WIDTHS, "dual_clip": dual}
    plain = make_control("none").surrogate(leaf, batch.old_logprobs_N, batch.advantages_N, **options)
    (plain_slope,) = torch.autograd.grad(plain.loss_N.sum(), leaf)
    found = make_control("aepo_clip").surrogate(leaf, batch.old_logprobs_N, batch.advantages_N, **options)
    (slope,) = torch.autograd.grad(found.loss_N.sum(), leaf)
    torch.testing.assert_close(found.loss_N, plain.loss_N, rtol=1e-12, atol=0)
    for i, (logp, old, advantage) in enumerate(rows(batch)):
        if advantage > 0 and math.exp(logp - old) > 1 + HIGH:
            assert slope[i].item() == pytest.approx(-advantage * (1 + HIGH), rel=1e-12)
            assert not found.is_clipped_N[i]
        else:
            assert slope[i].item() == plain_slope[i].item()
            assert found.is_clipped_N[i] == plain.is_clipped_N[i]


def test_aepo_survives_ratios_that_overflow() -> None:
    leaf = torch.tensor([-1.0], requires_grad=True)
    found = make_control("aepo_clip").surrogate(leaf, torch.tensor([-900.0]), torch.tensor([2.0]), **WIDTHS)
    found.loss_N.sum().backward()
    assert found.loss_N.item() == pytest.approx(-2 * (1 + HIGH))
    assert leaf.grad is not None and leaf.grad.item() == pytest.approx(-2 * (1 + HIGH))


@settings(max_examples=60, deadline=None)
@given(
    batch=batches,
    entropies=st.lists(st.floats(0, 3), max_size=5),
    target=st.floats(0, 2),
    threshold=st.sampled_from([0.0, 0.3, 0.9]),
)
def test_entropic_is_its_controller_and_its_weights(
    batch: Ragged, entropies: list[float], target: float, threshold: float
) -> None:
    options = {"target": target, "proportional": 0.8, "integral": 0.1, "threshold": threshold}
    control = make_control("entropic", **options)
    ids = torch.zeros(2, dtype=torch.long)
    for entropy in entropies:
        control.observe(torch.tensor([entropy, entropy], dtype=torch.float64), ids, ids)
        state = json.loads(json.dumps(control.state_dict()))
        control = make_control("entropic", **options)
        control.load_state_dict(state)
    c = 0.0
    if entropies:
        c = max(-1.0, min(1.0, 0.8 * (entropies[-1] - target) + 0.1 * sum(h - target for h in entropies)))
    found, slopes, clipped = losses(control, batch, None)
    for (logp, old, advantage), loss, slope, gone in zip(rows(batch), found, slopes, clipped, strict=True):
        assume(threshold == 0 or abs(math.exp(logp) - threshold) > 1e-9)
        steered = math.exp(logp) > threshold

        def by_hand(p: float, old: float = old, advantage: float = advantage, steered: bool = steered) -> float:
            extra = -c * math.exp(p - old) * abs(advantage) if steered else 0.0
            return ppo(p, old, advantage, LOW, HIGH) + extra

        assert loss == pytest.approx(by_hand(logp), rel=1e-9, abs=1e-12)
        ratio = math.exp(logp - old)
        if min(abs(ratio - 1 + LOW), abs(ratio - 1 - HIGH)) > 1e-4:
            assert slope == pytest.approx(finite_difference(by_hand, logp), rel=1e-4, abs=1e-7)
        assert gone == (slope == 0.0)


def test_entropic_at_its_limit_silences_one_sign_and_revives_what_is_clipped() -> None:
    """c = 1: A < 0 loses its gradient, and A > 0 beyond the clip has that of the added term alone."""
    control = make_control("entropic", target=0.1, threshold=0.5)
    zeros = torch.zeros(1, dtype=torch.long)
    control.observe(torch.tensor([7.0]), zeros, zeros)
    leaf = torch.log(torch.tensor([0.6, 0.6, 0.9, 0.4], dtype=torch.float64)).requires_grad_()
    old = torch.log(torch.tensor([0.6, 0.6, 0.5, 0.4], dtype=torch.float64))
    found = control.surrogate(leaf, old, torch.tensor([-2.0, 2.0, 2.0, -2.0], dtype=torch.float64), **WIDTHS)
    (slope,) = torch.autograd.grad(found.loss_N.sum(), leaf)
    assert slope.tolist() == pytest.approx([0.0, -4.0, -2.0 * 1.8, 2.0])
    assert found.is_clipped_N.tolist() == [True, False, False, False]


def test_entropic_too_high_an_entropy_sharpens_and_too_low_a_one_spreads() -> None:
    """One state, softmax policy, tokens weighed by their probability: the step moves the entropy towards the target."""
    logits = torch.tensor([1.0, 0.2, -0.5, -1.0], dtype=torch.float64)
    start = float(torch.distributions.Categorical(logits=logits).entropy())
    for target, direction in ((0.1, -1), (1.38, 1)):
        control = make_control("entropic", target=target, threshold=0.0, limit=1.0)
        zeros = torch.zeros(1, dtype=torch.long)
        control.observe(torch.tensor([start], dtype=torch.float64), zeros, zeros)
        leaf = logits.clone().requires_grad_()
        logp = leaf.log_softmax(-1)
        # |A| largest for the likely token, of either sign: what remains of the plain loss cancels in the mean.
        total = torch.zeros((), dtype=torch.float64)
        for sign in (1.0, -1.0):
            advantages = sign * logp.detach().exp()
            found = control.surrogate(logp, logp.detach(), advantages, **WIDTHS)
            total = total + (logp.detach().exp() * found.loss_N).sum()
        (gradient,) = torch.autograd.grad(total, leaf)
        after = float(torch.distributions.Categorical(logits=logits - 0.1 * gradient).entropy())
        assert (after - start) * direction > 0


@settings(max_examples=60, deadline=None)
@given(
    batch=batches,
    cuts=st.lists(st.integers(0, 10_000), max_size=4),
    seed=st.integers(0, 99),
    method=st.sampled_from(["clip_higher", "clip_cov", "kl_cov", "entropic", "aepo_clip"]),
)
def test_any_split_and_any_order_give_the_same(batch: Ragged, cuts: list[int], seed: int, method: str) -> None:
    # Every candidate is dropped, so that the draw does not depend on the order of the tokens.
    options = {
        "clip_cov": {"ratio": 1.0, "lower": 0.1},
        "kl_cov": {"ratio": 0.3},
        "entropic": {"target": 0.8, "threshold": 0.3},
    }.get(method, {})
    control = make_control(method, **options)
    control.observe(batch.entropy_N, batch.trajectory_ids_N, batch.turn_ids_N)
    whole = losses(control, batch, marks_of(control, batch))
    marks = marks_of(control, batch)
    parts: tuple[list[float], list[float], list[bool]] = ([], [], [])
    for part in cut(len(batch), cuts):
        found = losses(control, batch.at(part), None if marks is None else marks[part])
        for total, values in zip(parts, found, strict=True):
            total.extend(values)  # type: ignore[arg-type]
    assert parts == whole
    if method == "kl_cov":
        values = sorted(brute_covariances(batch))
        assume(all(b - a > 1e-9 for a, b in pairwise(values)))  # ties are broken by place
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed))
    shuffled = batch.at(order)
    other = losses(control, shuffled, marks_of(control, shuffled))
    for ours, theirs in zip(other, whole, strict=True):
        assert ours == pytest.approx([theirs[i] for i in order.tolist()], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("advantage", "logprob"), [(0.7, None), (None, -1.0), (0.7, -1.0)])
def test_equal_covariances_mark_the_first_tokens_or_none(advantage: float | None, logprob: float | None) -> None:
    """Equal advantages, or equal log-probabilities, make every covariance 0 exactly."""
    values = torch.arange(64, dtype=torch.float64) / 64
    batch = Ragged(
        group_ids_N=torch.zeros(64, dtype=torch.long),
        trajectory_ids_N=torch.zeros(64, dtype=torch.long),
        turn_ids_N=torch.arange(64),
        entropy_N=values,
        logprobs_N=-values if logprob is None else torch.full_like(values, logprob),
        old_logprobs_N=-values,
        advantages_N=values - 0.5 if advantage is None else torch.full_like(values, advantage),
    )
    marks = marks_of(make_control("kl_cov", ratio=0.25), batch)
    assert marks is not None and marks.nonzero()[:, 0].tolist() == list(range(16))
    marks = marks_of(make_control("clip_cov", ratio=0.25, lower=0.0, upper=5.0), batch)
    assert marks is not None and not marks.any()


@pytest.mark.parametrize("method", ["clip_cov", "kl_cov"])
def test_a_single_token_and_missing_marks(method: str) -> None:
    control = make_control(method)
    one = torch.tensor([-1.0])
    marks = control.preview(one, one, one, one, one, generator=torch.Generator())
    assert marks is not None and marks.shape == (1,)
    # One token has covariance 0: no candidate for Clip-Cov, the highest there is for KL-Cov.
    assert bool(marks[0]) == (method == "kl_cov")
    with pytest.raises(ValueError, match=r"needs the marks of preview\(\)"):
        control.surrogate(one, one, one, **WIDTHS)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("clip_higher", {"clip_high": -0.1}, "clip_high"),
        ("clip_cov", {"ratio": 0.0}, r"ratio must lie in \(0, 1\], got 0.0"),
        ("clip_cov", {"lower": 5.0}, "lower must be below upper"),
        ("clip_cov", {"clip_low": 1.5}, "clip_low"),
        ("kl_cov", {"ratio": 1.1}, "ratio"),
        ("kl_cov", {"weight": -1.0}, "weight"),
        ("entropic", {"target": -1.0}, "target"),
        ("entropic", {"integral": -1.0}, "integral"),
        ("entropic", {"proportional": math.inf}, "proportional"),
        ("entropic", {"limit": 0.0}, "limit"),
        ("entropic", {"threshold": 1.0}, "threshold"),
        ("aepo_clip", {"clip_low": 2.0}, "clip_low"),
        ("aepo_clip", {"clip_high": -1.0}, "clip_high"),
    ],
)
def test_bad_options_are_refused(method: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_control(method, **options)


def test_settings_that_do_nothing_say_so() -> None:
    assert "nothing is higher" in make_control("clip_higher", clip_high=0.2).warnings()[0]
    assert "nothing is steered" in make_control("entropic", proportional=0.0, integral=0.0).warnings()[0]
    assert "no token is held back" in make_control("kl_cov", weight=0.0).warnings()[0]
    assert make_control("kl_cov").warnings() == make_control("clip_cov").warnings() == []
    assert make_control("clip_higher").warnings() == make_control("entropic").warnings() == []
