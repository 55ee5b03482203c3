"""Filters of task groups: what they keep by definition, ties, steps without any difference, rounding."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from epo.objectives import snr, starpo_s

rewards = st.sampled_from([0.0, 0.0, 1.0, 0.99, -0.5]) | st.floats(-3, 3).map(lambda x: round(x, 3))
groups = st.lists(st.lists(rewards, min_size=1, max_size=6), min_size=1, max_size=9)
shares = st.floats(0.01, 1)


def tensors(found: list[list[float]]) -> list[Tensor]:
    return [torch.tensor(group, dtype=torch.float64) for group in found]


def deviation(group: list[float]) -> float:
    return statistics.stdev(group) if len(group) > 1 else 0.0


@settings(deadline=None)
@given(found=groups, keep=shares)
def test_starpo_s_keeps_the_share_with_the_largest_deviations(found: list[list[float]], keep: float) -> None:
    kept = starpo_s(tensors(found), keep=keep)
    assert kept == sorted(set(kept))
    assert len(kept) == max(1, int(keep * len(found) + 1e-9))
    dropped = [i for i in range(len(found)) if i not in kept]
    for i in kept:
        for j in dropped:
            assert deviation(found[i]) >= deviation(found[j]) - 1e-12


@settings(deadline=None)
@given(found=groups, keep=shares)
def test_snr_keeps_the_fewest_groups_that_hold_the_share(found: list[list[float]], keep: float) -> None:
    kept = snr(tensors(found), keep=keep)
    assert kept == sorted(set(kept))
    sizes = [deviation(group) for group in found]
    total, held = math.fsum(sizes), math.fsum(sizes[i] for i in kept)
    assert held >= keep * total * (1 - 2e-6)
    assert all(sizes[i] > 0 for i in kept)
    if kept:
        # No set of one group less holds the share: the largest ones do not.
        fewer = sorted(sizes, reverse=True)[: len(kept) - 1]
        assert math.fsum(fewer) < keep * total


@settings(deadline=None, max_examples=50)
@given(found=groups, keep=shares, seed=st.integers(0, 2**31), shift=st.floats(-2, 2), scale=st.floats(0.1, 10))
def test_members_shift_and_scale_do_not_matter(
    found: list[list[float]], keep: float, seed: int, shift: float, scale: float
) -> None:
    # Far apart, so that rounding decides no tie.
    spread = [[reward * (i + 1) for reward in group] for i, group in enumerate(found)]
    if len({round(deviation(group), 6) for group in spread}) < len(spread):
        return
    generator = torch.Generator().manual_seed(seed)
    changed = [group[torch.randperm(len(group), generator=generator)] * scale + shift for group in tensors(spread)]
    assert starpo_s(changed, keep=keep) == starpo_s(tensors(spread), keep=keep)
    order = torch.randperm(len(spread), generator=generator).tolist()
    for choose in (starpo_s, snr):
        kept = choose([changed[i] for i in order], keep=keep)
        assert sorted(order[i] for i in kept) == choose(changed, keep=keep)


def test_by_hand() -> None:
    """Deviations 0, 0.5, 1, 1, 1.5 (groups of two differ by sqrt(2) times that)."""
    found = [torch.tensor([0.0, width * 2**0.5]) for width in (0.0, 0.5, 1.0, 1.0, 1.5)]
    assert starpo_s(found) == [4]
    assert starpo_s(found, keep=0.4) == [2, 4]  # of the two that tie, the earlier
    assert starpo_s(found, keep=0.6) == [2, 3, 4]
    assert starpo_s(found, keep=1.0) == [0, 1, 2, 3, 4]
    assert snr(found, keep=0.3) == [4]  # 1.5 of 4 is more than 1.2
    assert snr(found, keep=0.5) == [2, 4]
    assert snr(found, keep=0.625) == [2, 4]  # exactly the share is enough
    assert snr(found) == [1, 2, 3, 4]
    assert snr(found, keep=1.0) == [1, 2, 3, 4]


def test_a_step_of_equal_rewards() -> None:
    found = [torch.full((4,), reward) for reward in (0.0, 1.0, 0.1, 1.0, 0.0, 0.3, 0.3, 1.0)]
    assert starpo_s(found) == [0, 1]
    assert snr(found) == []


def test_rounding_is_no_difference() -> None:
    once, twice = 1 - 0.1 - 0.1 - 0.1, 1 - 0.3
    assert once != twice
    found = tensors([[once, twice], [0.0, 1e-6]])
    assert snr(found, keep=1.0) == [1]
    assert starpo_s(found, keep=0.5) == [1]
    for dtype in (torch.float32, torch.float64):
        assert snr([torch.tensor([once, twice], dtype=dtype), torch.tensor([0.1 + 0.2, 0.3], dtype=dtype)]) == []
    next_to_one = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    assert snr([torch.stack([torch.tensor(1.0), next_to_one])]) == []


def test_a_group_of_one_and_integer_rewards() -> None:
    found = [torch.tensor([5]), torch.tensor([0, 1, 1])]
    assert snr(found) == [1]
    assert starpo_s(found) == [1]


def test_no_share_of_a_hundred_is_lost_to_rounding() -> None:
    found = [torch.tensor([0.0, float(i)]) for i in range(100)]
    for percent in range(1, 101):
        assert len(starpo_s(found, keep=percent / 100)) == percent


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.1])
def test_refusals(keep: float) -> None:
    for choose in (starpo_s, snr):
        with pytest.raises(ValueError, match=rf"keep must lie in \(0, 1\], got {keep}"):
            choose([torch.zeros(2)], keep=keep)
        with pytest.raises(ValueError, match="empty group"):
            choose([torch.zeros(0)])
