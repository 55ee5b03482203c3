"""History, penalty and phase weight against the equations written out (conformance T3, T4, T6)."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epo.objectives import EntropyHistory, phase_weight, smoothing_penalty
from epo.objectives.corridor import HistoryAverage


def test_phase_weight_follows_equation_e6() -> None:
    assert phase_weight(0, 125) == 2.0
    assert phase_weight(62, 125) == pytest.approx(1.049787, abs=1e-6)
    assert phase_weight(125, 125) == pytest.approx(1 + math.exp(-3 * 125 / 62), rel=1e-15)
    assert phase_weight(75, 150, gamma=1.5) == pytest.approx(1 + math.exp(-1.5), rel=1e-15)


@settings(deadline=None)
@given(total=st.integers(1, 400), factor=st.integers(2, 5))
def test_phase_weight_depends_on_the_configured_length_only(total: int, factor: int) -> None:
    """The same share of a run has the same weight in a run `factor` times as long."""
    even = 2 * total
    assert phase_weight(total, even) == pytest.approx(phase_weight(factor * total, factor * even), rel=1e-12)
    weights = [phase_weight(k, total) for k in range(total + 1)]
    assert weights[0] == 2.0
    assert all(later < earlier for earlier, later in itertools.pairwise(weights) if earlier > 1 + 1e-9)


def test_phase_weight_edges() -> None:
    assert phase_weight(0, 1) == 2.0
    assert phase_weight(1, 1) == pytest.approx(1 + math.exp(-3))
    assert phase_weight(17, 50, schedule="constant") == 1.0
    for wrong in ({"step": -1, "total_steps": 5}, {"step": 0, "total_steps": 0}):
        with pytest.raises(ValueError, match="phase_weight needs"):
            phase_weight(**wrong)


@settings(deadline=None)
@given(
    entropies=st.lists(st.floats(0, 8), min_size=1, max_size=20),
    reference=st.floats(0.01, 4),
    kappa_low=st.floats(0, 0.9),
    width=st.floats(0.1, 2),
)
def test_penalties_follow_equation_e4(entropies: list[float], reference: float, kappa_low: float, width: float) -> None:
    kappa_high = kappa_low + width
    entropy = torch.tensor(entropies, dtype=torch.float64)

    def penalty(kind: str) -> list[float]:
        return smoothing_penalty(entropy, reference, kappa_low=kappa_low, kappa_high=kappa_high, kind=kind).tolist()

    low, high = kappa_low * reference, kappa_high * reference
    assert penalty("relu") == [max(0.0, low - h) + max(0.0, h - high) for h in entropies]
    assert penalty("squared") == pytest.approx([max(0.0, low - h) ** 2 + max(0.0, h - high) ** 2 for h in entropies])
    assert penalty("indicator") == [0.0 if low <= h <= high else 1.0 for h in entropies]


@pytest.mark.parametrize(("kind", "slopes"), [("relu", [-1.0, 0.0, 0.0, 0.0, 1.0]), ("squared", [-0.5, 0, 0, 0, 2.0])])
def test_penalty_slopes_below_on_the_edges_inside_and_above(kind: str, slopes: list[float]) -> None:
    entropy = torch.tensor([0.25, 0.5, 1.0, 1.5, 2.5], dtype=torch.float64, requires_grad=True)
    smoothing_penalty(entropy, 1.0, kappa_low=0.5, kappa_high=1.5, kind=kind).sum().backward()
    assert entropy.grad.tolist() == slopes


def test_indicator_has_no_gradient_at_all() -> None:
    entropy = torch.tensor([0.1, 5.0], requires_grad=True)
    assert not smoothing_penalty(entropy, 1.0, kappa_low=0.5, kappa_high=1.5, kind="indicator").requires_grad


def test_the_reference_carries_no_gradient() -> None:
    reference = torch.tensor([1.0, 1.0], requires_grad=True)
    entropy = torch.tensor([0.1, 5.0], requires_grad=True)
    smoothing_penalty(entropy, reference, kappa_low=0.5, kappa_high=1.5).sum().backward()
    assert reference.grad is None


def test_without_reference_there_is_no_penalty() -> None:
    entropy = torch.tensor([0.0, 3.0, 50.0], requires_grad=True)
    for reference in (None, math.nan, torch.tensor([math.nan, 1.0, math.nan])):
        penalty = smoothing_penalty(entropy, reference, kappa_low=0.5, kappa_high=1.5)
        expected = [0.0, 1.5 if isinstance(reference, torch.Tensor) else 0.0, 0.0]
        assert penalty.tolist() == expected
        (gradient,) = torch.autograd.grad(penalty.sum(), entropy)
        assert gradient.tolist() == [0.0, float(expected[1] > 0), 0.0]


def test_bad_corridors_are_refused() -> None:
    for low, high in ((-0.1, 1.0), (1.0, 1.0), (2.0, 1.0), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="0 <= kappa_low < kappa_high"):
            smoothing_penalty(torch.ones(1), 1.0, kappa_low=low, kappa_high=high)
    with pytest.raises(ValueError, match="relu, indicator, squared"):
        smoothing_penalty(torch.ones(1), 1.0, kappa_low=0, kappa_high=1, kind="hinge")


def test_scalar_reference_is_the_mean_of_the_steps_before() -> None:
    history = EntropyHistory()
    means = [1.3, 0.7, 2.2, 0.1]
    for k, mean in enumerate(means):
        assert history.reference() == (None if k == 0 else pytest.approx(sum(means[:k]) / k, rel=1e-15))
        history.append(mean)
    assert history.reference(torch.tensor([0, 5])).tolist() == pytest.approx([sum(means) / 4] * 2)
    assert EntropyHistory().reference(torch.tensor([0, 5])).isnan().all()


def test_sliding_and_ema_histories_by_hand() -> None:
    sliding, ema = EntropyHistory("scalar", "sliding", window=2), EntropyHistory("scalar", "ema", ema_decay=0.75)
    for mean in (10.0, 1.0, 3.0):
        sliding.append(mean)
        ema.append(mean)
    assert sliding.reference() == 2.0
    assert ema.reference() == 0.75 * (0.75 * 10.0 + 0.25 * 1.0) + 0.25 * 3.0
    per_turn = EntropyHistory("per_turn", "sliding", window=2)
    for step in ({0: 1.0, 1: 8.0}, {0: 2.0}, {0: 4.0}):
        per_turn.append(step)
    # Turn 1 was reached once, three steps ago: its own latest steps count.
    assert per_turn.reference(torch.tensor([0, 1])).tolist() == [3.0, 8.0]


def test_observe_is_the_token_mean_of_the_step() -> None:
    history = EntropyHistory()
    history.observe(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0, 0, 1]))
    assert history.reference() == 3.0
    history.observe(torch.zeros(0), torch.zeros(0, dtype=torch.long))
    assert len(history) == 1


def test_short_episodes_leave_the_references_of_later_turns_untouched() -> None:
    history = EntropyHistory("per_turn")
    for _ in range(20):
        history.observe(torch.tensor([1.2, 0.9, 0.6]), torch.tensor([0, 1, 2]))
    before = history.reference(torch.tensor([0, 1, 2]))
    for _ in range(20):
        history.observe(torch.tensor([1.2]), torch.tensor([0]))
    torch.testing.assert_close(history.reference(torch.tensor([0, 1, 2])), before, rtol=1e-12, atol=0)


def test_per_turn_references_average_the_steps_that_reached_the_turn() -> None:
    history = EntropyHistory("per_turn")
    history.observe(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1]))
    history.observe(torch.tensor([4.0]), torch.tensor([0]))
    assert history.reference(torch.tensor([1, 0, 0])).tolist() == [5.0, 3.0, 3.0]
    assert math.isnan(history.reference(torch.tensor([2]))[0])
    assert history.reference() == 4.0


@settings(deadline=None)
@given(
    steps=st.lists(st.dictionaries(st.integers(0, 5), st.floats(0, 9), min_size=1), max_size=6),
    window=st.integers(1, 4),
    average=st.sampled_from(["cumulative", "sliding", "ema"]),
)
def test_state_survives_json_exactly(steps: list[dict[int, float]], window: int, average: HistoryAverage) -> None:
    turns = torch.arange(6)
    per_turn, scalar = (EntropyHistory(kind, average, window=window) for kind in ("per_turn", "scalar"))
    for step in steps:
        per_turn.append(step)
        scalar.append(max(step.values()))
    for history in (per_turn, scalar):
        restored = EntropyHistory(history.kind, average, window=window)
        restored.load_state_dict(json.loads(json.dumps(history.state_dict())))
        assert restored.reference() == history.reference()
        assert torch.equal(restored.reference(turns).nan_to_num(-1.0), history.reference(turns).nan_to_num(-1.0))
        more = {0: 1.5} if history.kind == "per_turn" else 1.5
        history.append(more)
        restored.append(more)
        assert restored.state_dict() == history.state_dict()


def test_a_saved_state_is_not_changed_by_later_steps() -> None:
    history = EntropyHistory()
    history.append(1.0)
    state = history.state_dict()
    history.append(2.0)
    assert len(state["steps"]) == 1


def test_histories_refuse_what_is_not_theirs() -> None:
    with pytest.raises(TypeError, match="one number"):
        EntropyHistory().append({0: 1.0})
    with pytest.raises(TypeError, match="mapping from turn"):
        EntropyHistory("per_turn").append(1.0)
    with pytest.raises(ValueError, match="finite"):
        EntropyHistory().append(math.nan)
    with pytest.raises(ValueError, match="'per_turn', this run asks for 'scalar'"):
        EntropyHistory().load_state_dict(EntropyHistory("per_turn").state_dict())
    for kind, step in (("scalar", [[0, 1.0]]), ("scalar", [[-1, math.nan]]), ("scalar", []), ("per_turn", [[-1, 1.0]])):
        history = EntropyHistory(kind)
        with pytest.raises(ValueError, match=f"saved {kind} entropy history has a step"):
            history.load_state_dict({"kind": kind, "steps": [step]})
        assert len(history) == 0
    with pytest.raises(ValueError, match="window must be at least 1"):
        EntropyHistory(window=0)
    with pytest.raises(ValueError, match="scalar, per_turn"):
        EntropyHistory("ema")
    with pytest.raises(ValueError, match="cumulative, sliding, ema"):
        EntropyHistory("scalar", "per_turn")
    with pytest.raises(ValueError, match=r"ema_decay must lie in \[0, 1\)"):
        EntropyHistory("scalar", "ema", ema_decay=1.0)
