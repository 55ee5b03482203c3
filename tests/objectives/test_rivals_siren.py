"""SIREN against loops over literal tokens; the entropy it is given has tests of its own (`test_nucleus.py`)."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged import Ragged, cut, ragged_batches
from torch import Tensor

from epo.objectives import SIRENControl, make_control


def brute_selection(batch: Ragged, quantile: float) -> list[float]:
    """Weight of each token in M, with the quantile as numpy interpolates it."""
    ids, entropies = batch.trajectory_ids_N.tolist(), batch.entropy_N.tolist()
    chosen: dict[int, list[int]] = {}
    for trajectory in set(ids):
        members = [i for i, other in enumerate(ids) if other == trajectory]
        edge = float(np.quantile([entropies[i] for i in members], quantile))
        above = [i for i in members if entropies[i] > edge + 1e-12]
        if above:
            chosen[trajectory] = above
    weights = [0.0] * len(ids)
    for above in chosen.values():
        for i in above:
            weights[i] = 1 / (len(chosen) * len(above))
    return weights


def previewed(control: SIRENControl, batch: Ragged) -> Tensor:
    return control.preview(
        batch.logprobs_N,
        batch.old_logprobs_N,
        batch.advantages_N,
        batch.entropy_N,
        batch.trajectory_ids_N,
        generator=torch.Generator(),
    )


def siren(**options: Any) -> SIRENControl:
    control = make_control("siren", **options)
    assert isinstance(control, SIRENControl)
    return control


@settings(max_examples=50, deadline=None)
@given(
    first=ragged_batches(max_groups=2, max_members=2, max_turns=15),
    now=ragged_batches(max_groups=2, max_members=3, max_turns=15),
    quantile=st.sampled_from([0.0, 0.5, 0.8]),
    cuts=st.lists(st.integers(0, 10_000), max_size=4),
    seed=st.integers(0, 999),
)
def test_siren_is_the_squared_distance_from_its_anchor_in_any_order_and_split(
    first: Ragged, now: Ragged, quantile: float, cuts: list[int], seed: int
) -> None:
    control = siren(coefficient=0.7, quantile=quantile)
    previewed(control, first)
    restored = siren(coefficient=0.7, quantile=quantile)
    restored.load_state_dict(json.loads(json.dumps(control.state_dict())))
    control = restored
    past = [w * h for w, h in zip(brute_selection(first, quantile), first.entropy_N.tolist(), strict=True)]
    weights = brute_selection(now, quantile)
    had_anchor = any(past)
    mean = sum(w * h for w, h in zip(weights, now.entropy_N.tolist(), strict=True))
    anchor = sum(past) if had_anchor else mean

    def run(batch: Ragged, parts: list[slice]) -> tuple[float, Tensor, dict[str, float]]:
        marks = previewed(control, batch)
        leaf = batch.entropy_N.clone().requires_grad_()
        value, metrics = 0.0, {}
        for part in parts:
            term = control.entropy_loss(
                leaf[part], marks[part], batch.turn_ids_N[part], step=0, total_steps=9, marks_N=marks[part]
            )
            value += term.loss.item()
            if term.loss.requires_grad:
                term.loss.backward()
            metrics = {name: metrics.get(name, 0.0) + number for name, number in term.metrics.items()}
        return value, torch.zeros(len(batch)) if leaf.grad is None else leaf.grad, metrics

    whole, gradient, metrics = run(now, [slice(0, len(now))])
    has_tokens = any(weights)
    assert whole == pytest.approx(0.7 * (mean - anchor) ** 2 if has_tokens else 0.0, rel=1e-9, abs=1e-12)
    expected = [0.7 * 2 * (mean - anchor) * w for w in weights]
    assert gradient.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    if has_tokens:
        assert metrics == pytest.approx({"siren/entropy": mean, "siren/anchor": anchor}, rel=1e-9)
    order = torch.randperm(len(now), generator=torch.Generator().manual_seed(seed))
    other, other_gradient, _ = run(now.at(order), cut(len(now), cuts))
    assert other == pytest.approx(whole, rel=1e-9, abs=1e-12)
    torch.testing.assert_close(other_gradient.double(), gradient[order].double(), rtol=1e-9, atol=1e-12)


def test_the_anchor_is_the_first_mean_that_is_seen_and_never_moves() -> None:
    control = siren(quantile=0.0)
    ids = torch.zeros(3, dtype=torch.long)
    zeros = torch.zeros(3)
    assert control.reference is None
    for entropy in ([1.0, 2.0, 4.0], [0.0, 5.0, 7.0]):
        control.preview(zeros, zeros, zeros, torch.tensor(entropy), ids, generator=torch.Generator())
        assert control.reference == 3.0


def test_equal_entropies_select_nothing_and_missing_marks_are_named() -> None:
    control = siren()
    zeros, ids = torch.zeros(3), torch.zeros(3, dtype=torch.long)
    marks = control.preview(zeros, zeros, zeros, torch.ones(3), ids, generator=torch.Generator())
    assert marks.tolist() == [0.0, 0.0, 0.0]
    term = control.entropy_loss(torch.ones(3), marks, ids, step=0, total_steps=1, marks_N=marks)
    assert term.loss.item() == 0.0
    with pytest.raises(ValueError, match="needs the marks"):
        control.entropy_loss(torch.ones(3), marks, ids, step=0, total_steps=1)


@pytest.mark.parametrize("options", [{"coefficient": -1.0}, {"top_p": 0.0}, {"quantile": 1.0}])
def test_bad_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        make_control("siren", **options)
    assert "nothing is held" in make_control("siren", coefficient=0.0).warnings()[0]
