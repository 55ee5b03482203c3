"""Surrogate, KL estimators and critic loss against scalar python and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epo.objectives import clipped_surrogate, kl_penalty, value_loss


def scalar_surrogate(
    logprob: float, old: float, advantage: float, low: float, high: float, dual: float | None
) -> tuple[float, float]:
    """Loss and its derivative by the log-probability, case by case."""
    ratio = math.exp(logprob - old)
    if advantage >= 0:
        return (-advantage * (1 + high), 0.0) if ratio > 1 + high else (-advantage * ratio, -advantage * ratio)
    if ratio < 1 - low:
        return -advantage * (1 - low), 0.0
    if dual is not None and ratio > dual:
        return -advantage * dual, 0.0
    return -advantage * ratio, -advantage * ratio


numbers = st.integers(-3000, 3000).map(lambda thousandths: thousandths / 1000)


@settings(deadline=None)
@given(
    rows=st.lists(st.tuples(numbers, numbers, numbers), min_size=1, max_size=12),
    low=st.floats(0.05, 0.5),
    high=st.floats(0.05, 0.5),
    dual=st.none() | st.floats(1.6, 5),
)
def test_surrogate_equals_the_case_by_case_definition(
    rows: list[tuple[float, float, float]], low: float, high: float, dual: float | None
) -> None:
    logprobs, old, advantages = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    logprobs.requires_grad_()
    result = clipped_surrogate(logprobs, old, advantages, clip_low=low, clip_high=high, dual_clip=dual)
    (gradient,) = torch.autograd.grad(result.loss_N.sum(), logprobs)
    for index, row in enumerate(rows):
        loss, slope = scalar_surrogate(*row, low, high, dual)
        assert result.loss_N[index].item() == pytest.approx(loss, rel=1e-12, abs=1e-12)
        assert float(gradient[index]) == pytest.approx(slope, rel=1e-12, abs=1e-12)
        assert bool(result.is_clipped_N[index]) == (slope == 0.0 and row[2] != 0.0)
        assert float(result.log_ratio_N[index]) == row[0] - row[1]


def test_asymmetric_clip_and_dual_clip_by_hand() -> None:
    ratios = torch.tensor([1.25, 1.30, 0.70, 0.85, 5.0, 5.0], dtype=torch.float64)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    result = clipped_surrogate(
        ratios.log(), torch.zeros(6, dtype=torch.float64), advantages, clip_low=0.2, clip_high=0.28, dual_clip=3.0
    )
    torch.testing.assert_close(result.loss_N, torch.tensor([-1.25, -1.28, 0.8, 0.85, 3.0, -1.28], dtype=torch.float64))
    assert result.is_clipped_N.tolist() == [False, True, True, False, True, True]


def test_on_policy_gradient_is_plain_policy_gradient() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 0.0])
    result = clipped_surrogate(logprobs, logprobs.detach(), advantages)
    result.loss_N.sum().backward()
    assert torch.equal(logprobs.grad, -advantages)
    assert not result.is_clipped_N.any()


def test_absurd_ratios_stay_finite_without_gradient() -> None:
    logprobs = torch.tensor([0.0, 0.0], requires_grad=True)
    result = clipped_surrogate(logprobs, torch.tensor([-200.0, -200.0]), torch.tensor([-1.0, 1.0]), dual_clip=None)
    result.loss_N.sum().backward()
    assert result.loss_N.isfinite().all()
    assert logprobs.grad.tolist() == [0.0, 0.0]
    assert result.log_ratio_N.tolist() == [200.0, 200.0]


@pytest.mark.parametrize(
    "options", [{"clip_low": 1.5}, {"clip_low": -0.1}, {"clip_high": -0.1}, {"dual_clip": 1.0}, {"dual_clip": 0.5}]
)
def test_surrogate_refuses_bad_numbers(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="clip"):
        clipped_surrogate(torch.zeros(1), torch.zeros(1), torch.zeros(1), **options)


def categorical_pair() -> tuple[torch.Tensor, torch.Tensor]:
    policy_logits = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    reference = torch.log_softmax(torch.tensor([0.1, -0.5, 1.1, -0.2], dtype=torch.float64), -1)
    return policy_logits, reference


def test_kl_estimators_have_their_closed_form_expectations() -> None:
    logits, reference = categorical_pair()
    log_p = torch.log_softmax(logits, -1).detach()
    p = log_p.exp()
    kl = float((p * (log_p - reference)).sum())
    assert float((p * kl_penalty(log_p, reference, kind="k1")).sum()) == pytest.approx(kl, rel=1e-12)
    assert float((p * kl_penalty(log_p, reference, kind="k3")).sum()) == pytest.approx(kl, rel=1e-12)
    second_moment = float((p * (log_p - reference) ** 2).sum()) / 2
    assert float((p * kl_penalty(log_p, reference, kind="k2")).sum()) == pytest.approx(second_moment, rel=1e-12)
    assert (kl_penalty(log_p, reference, kind="k3") >= 0).all()


def test_kl_estimator_gradients_as_losses_have_their_closed_form_expectations() -> None:
    """Tokens are drawn from p and then held fixed, as in training; the sum over tokens takes the expectation."""
    logits, reference = categorical_pair()
    log_p = torch.log_softmax(logits, -1)
    p = log_p.detach().exp()
    true_kl = (log_p.exp() * (log_p - reference)).sum()
    (true_gradient,) = torch.autograd.grad(true_kl, logits, retain_graph=True)

    def expected_gradient(kind: str) -> torch.Tensor:
        loss = (p * kl_penalty(log_p, reference, kind=kind)).sum()
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    torch.testing.assert_close(expected_gradient("k2"), true_gradient, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(expected_gradient("k1"), torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(expected_gradient("k3"), p - reference.exp(), rtol=1e-10, atol=1e-12)


def test_unknown_kl_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="k1, k2, k3"):
        kl_penalty(torch.zeros(1), torch.zeros(1), kind="k4")


@settings(deadline=None)
@given(rows=st.lists(st.tuples(numbers, numbers, numbers), min_size=1), clip=st.none() | st.floats(0.1, 1))
def test_value_loss_equals_its_definition(rows: list[tuple[float, float, float]], clip: float | None) -> None:
    values, old, returns = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    for got, (v, o, r) in zip(value_loss(values, old, returns, clip=clip).tolist(), rows, strict=True):
        near = v if clip is None else min(max(v, o - clip), o + clip)
        assert got == pytest.approx(max((v - r) ** 2, (near - r) ** 2), rel=1e-9, abs=1e-12)
