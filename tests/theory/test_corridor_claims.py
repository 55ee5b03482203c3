"""What a corridor around past entropies excludes and what it does not (the paper's propositions 6.2 and 6.4)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from epo.objectives import EntropyHistory, smoothing_penalty


@given(reference=st.floats(0.01, 12), shares=st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_the_published_corridor_contains_every_collapse(reference: float, shares: list[float]) -> None:
    entropy_N = 2 * reference * torch.tensor(shares, dtype=torch.float64)
    for values_N in (entropy_N, torch.zeros_like(entropy_N)):
        assert smoothing_penalty(values_N, reference, kappa_low=0.0, kappa_high=2.0).tolist() == [0.0] * len(shares)


@given(low=st.floats(0, 1), high=st.floats(1.001, 4))
def test_the_half_width_bounds_the_deviation_only_for_a_corridor_centred_on_one(low: float, high: float) -> None:
    """max(|1 - kappa_l|, |kappa_r - 1|) <= (kappa_r - kappa_l) / 2 is used in the proof of 6.2; >= always holds."""
    deviation, half_width = max(abs(1 - low), abs(high - 1)), (high - low) / 2
    assert deviation >= half_width - 1e-12
    assert (deviation <= half_width + 1e-9) == (abs(low + high - 2) <= 2e-9 + 1e-12)


def test_the_published_corridors_are_centred_and_one_that_is_not_breaks_the_step() -> None:
    for low, high in ((0.0, 2.0), (0.5, 1.5), (0.8, 1.2)):
        assert max(1 - low, high - 1) == pytest.approx((high - low) / 2)
    # kappa = (0.5, 2.0): a step at the ceiling deviates by H_ref, the claimed bound is 0.75 H_ref.
    assert smoothing_penalty(torch.tensor([2.0]), 1.0, kappa_low=0.5, kappa_high=2.0).item() == 0
    assert abs(2.0 - 1.0) > (2.0 - 0.5) / 2


@given(
    steps=st.integers(1, 200),
    actions=st.integers(2, 50),
    reference_share=st.floats(0, 1),
    shares=st.lists(st.floats(0, 1), min_size=200, max_size=200),
)
def test_every_policy_has_a_total_deviation_of_order_t(
    steps: int, actions: int, reference_share: float, shares: list[float]
) -> None:
    """Entropy lies in [0, log A]: Gamma_T = sum |H_t - H_ref| <= T max(H_ref, log A - H_ref), corridor or not."""
    most = math.log(actions)
    reference = reference_share * most
    total = sum(abs(share * most - reference) for share in shares[:steps])
    assert total <= steps * max(reference, most - reference) + 1e-9


def test_deviations_that_grow_by_the_same_amount_hit_the_bound_after_a_few_steps() -> None:
    """The T^2 of 6.2 adds delta at every step: delta T (T + 1) / 2, until the entropy has reached an end."""
    delta, reference, most = 0.1, 0.5, math.log(3)
    deviations = [min(delta * step, most - reference) for step in range(1, 101)]
    assert sum(deviations[:5]) == pytest.approx(delta * 5 * 6 / 2)
    assert sum(deviations) < 100 * (most - reference) < delta * 100 * 101 / 2 / 8
    for turns, ratio in ((10, 5.5), (20, 10.5)):
        assert sum(delta * t for t in range(1, turns + 1)) / (delta * turns) == pytest.approx(ratio)


@pytest.mark.parametrize(("kappa_low", "penalty"), [(0.0, 0.0), (0.5, 0.5), (0.8, 0.8)])
def test_a_deterministic_optimum_lies_inside_only_without_a_floor(kappa_low: float, penalty: float) -> None:
    """6.4: no smoothing error if pi* lies inside. Where one action is best, pi* has entropy 0."""
    assert smoothing_penalty(torch.zeros(1), 1.0, kappa_low=kappa_low, kappa_high=2.0).item() == pytest.approx(penalty)


@pytest.mark.parametrize(
    ("kappa", "after_125"), [(0.5, 0.1008), (0.8, 0.4085), (1.2, 2.387), (1.5, 8.441), (2.0, 63.0)]
)
def test_a_policy_that_rides_an_edge_carries_the_corridor_along(kappa: float, after_125: float) -> None:
    """H_k = kappa H_ref(k) gives H_ref(k) = H_0 Gamma(k + kappa) / (k! Gamma(1 + kappa)), about k^(kappa - 1)."""
    history = EntropyHistory()
    history.append(1.0)
    for _ in range(124):
        reference = history.reference()
        assert reference is not None
        history.append(kappa * reference)
    steps = len(history)
    exact = math.exp(math.lgamma(steps + kappa) - math.lgamma(steps + 1) - math.lgamma(1 + kappa))
    assert history.reference() == pytest.approx(exact, rel=1e-9)
    assert history.reference() == pytest.approx(after_125, rel=1e-3)
    assert exact == pytest.approx(steps ** (kappa - 1) / math.gamma(1 + kappa), rel=0.01)
