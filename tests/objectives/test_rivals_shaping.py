"""Rivals that shape advantages or adapt the entropy bonus, on ragged batches: against loops over literal tokens."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from ragged import Ragged, cut, ragged_batches
from torch import Tensor

from epo.objectives import AdaptiveControl, EntropyControl, make_control

batches = ragged_batches()
SHAPERS = ["ea", "empg", "aem"]
rates = st.sampled_from([0.0, 0.5, 1.0, 3.0])


def shape(control: EntropyControl, batch: Ragged) -> Tensor:
    return control.shape_advantages(
        batch.advantages_N, batch.entropy_N, batch.trajectory_ids_N, batch.turn_ids_N, batch.group_ids_N
    )


def changed(batch: Ragged, **parts: Tensor) -> Ragged:
    return Ragged(**{**vars(batch), **parts})


def literal(**parts: list[Any]) -> Ragged:
    """A batch from lists; log-probabilities play no part here."""
    size = len(parts["entropy"])
    zeros = torch.zeros(size, dtype=torch.float64)
    return Ragged(
        group_ids_N=torch.tensor(parts.get("groups", [0] * size)),
        trajectory_ids_N=torch.tensor(parts["trajectories"]),
        turn_ids_N=torch.tensor(parts["turns"]),
        entropy_N=torch.tensor(parts["entropy"], dtype=torch.float64),
        advantages_N=torch.tensor(parts["advantages"], dtype=torch.float64),
        logprobs_N=zeros,
        old_logprobs_N=zeros,
    )


def keys_of(batch: Ragged) -> list[tuple[int, int]]:
    return list(zip(batch.trajectory_ids_N.tolist(), batch.turn_ids_N.tolist(), strict=True))


def turn_entropies(batch: Ragged) -> dict[tuple[int, int], float]:
    """Token mean by (trajectory, turn)."""
    tokens: dict[tuple[int, int], list[float]] = {}
    for key, entropy in zip(keys_of(batch), batch.entropy_N.tolist(), strict=True):
        tokens.setdefault(key, []).append(entropy)
    return {key: math.fsum(values) / len(values) for key, values in tokens.items()}


def mean_over_turns(batch: Ragged, values: list[float]) -> float:
    means = turn_entropies(changed(batch, entropy_N=torch.tensor(values, dtype=torch.float64)))
    return math.fsum(means.values()) / len(means)


def brute_ea(batch: Ragged, *, alpha: float, kappa: float) -> list[float]:
    return [
        a + min(alpha * h, abs(a) / kappa)
        for a, h in zip(batch.advantages_N.tolist(), batch.entropy_N.tolist(), strict=True)
    ]


def brute_empg(batch: Ragged, *, k: float, k_future: float, zeta: float) -> list[float]:
    means = turn_entropies(batch)
    low, high = min(means.values()), max(means.values())
    h = {key: (mean - low) / (high - low) if len(means) > 1 else 0.0 for key, mean in means.items()}
    average = sum(math.exp(-k * value) for value in h.values()) / len(h)
    shaped = []
    for (trajectory, turn), a in zip(keys_of(batch), batch.advantages_N.tolist(), strict=True):
        later = sorted(other for j, other in h if j == trajectory and other > turn)
        future = math.exp(-k_future * h[trajectory, later[0]]) if later else 0.0
        shaped.append(a * math.exp(-k * h[trajectory, turn]) / average + zeta * future)
    mean = mean_over_turns(batch, shaped)
    return [value - mean for value in shaped]


def brute_aem(batch: Ragged, *, rate: float, min_range: float) -> list[float]:
    means = turn_entropies(batch)
    group_of = dict(zip(batch.trajectory_ids_N.tolist(), batch.group_ids_N.tolist(), strict=True))
    shaped = []
    for (trajectory, turn), a in zip(keys_of(batch), batch.advantages_N.tolist(), strict=True):
        members = {key: mean for key, mean in means.items() if group_of[key[0]] == group_of[trajectory]}
        low, width = min(members.values()), max(members.values()) - min(members.values())
        weight = 1.0
        if len(members) > 1 and width >= min_range:
            raw = {key: math.exp(-rate * (mean - low) / width) for key, mean in members.items()}
            weight = raw[trajectory, turn] / (sum(raw.values()) / len(raw))
        shaped.append(weight * a)
    return shaped


# ---------------------------------------------------------------- the formulas


@settings(max_examples=80, deadline=None)
@given(batch=batches, alpha=rates, kappa=st.floats(1.01, 10))
def test_ea_is_its_formula_and_never_turns_an_advantage_around(batch: Ragged, alpha: float, kappa: float) -> None:
    control = make_control("ea", alpha=alpha, kappa=kappa)
    got = shape(control, batch)
    assert got.tolist() == pytest.approx(brute_ea(batch, alpha=alpha, kappa=kappa), rel=1e-12)
    assert torch.equal(got.sign(), batch.advantages_N.sign())
    assert (got >= batch.advantages_N).all()
    nothing = changed(batch, advantages_N=torch.zeros_like(batch.advantages_N))
    assert torch.equal(shape(control, nothing), nothing.advantages_N)


@settings(max_examples=80, deadline=None)
@given(batch=batches, k=rates, k_future=rates, zeta=st.sampled_from([0.0, 0.05, 1.0]))
def test_empg_is_its_formula(batch: Ragged, k: float, k_future: float, zeta: float) -> None:
    means = turn_entropies(batch).values()
    assume(len(means) == 1 or max(means) - min(means) > 1e-5)
    got = shape(make_control("empg", k=k, k_future=k_future, zeta=zeta), batch)
    assert got.tolist() == pytest.approx(brute_empg(batch, k=k, k_future=k_future, zeta=zeta), rel=1e-9, abs=1e-12)
    assert mean_over_turns(batch, got.tolist()) == pytest.approx(0.0, abs=1e-12)


@settings(max_examples=80, deadline=None)
@given(batch=batches, rate=rates, min_range=st.sampled_from([0.0, 0.1, 0.8, 5.0]))
def test_aem_is_its_formula(batch: Ragged, rate: float, min_range: float) -> None:
    got = shape(make_control("aem", rate=rate, min_range=min_range), batch)
    assert got.tolist() == pytest.approx(brute_aem(batch, rate=rate, min_range=min_range), rel=1e-9, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(batch=batches, rate=rates)
def test_aem_moves_weight_inside_a_group_and_makes_none(batch: Ragged, rate: float) -> None:
    """For an advantage of 1 everywhere, the mean over a group's responses stays 1."""
    ones = changed(batch, advantages_N=torch.ones_like(batch.advantages_N))
    got = shape(make_control("aem", rate=rate), ones).tolist()
    by_group: dict[int, dict[tuple[int, int], float]] = {}
    for group, key, value in zip(batch.group_ids_N.tolist(), keys_of(batch), got, strict=True):
        by_group.setdefault(group, {})[key] = value
    for weights in by_group.values():
        assert math.fsum(weights.values()) / len(weights) == pytest.approx(1.0, rel=1e-12)


def test_published_defaults_by_hand() -> None:
    """Two trajectories; turn means 0.5, 1.5 | 1.0, and turn 1 of the first has no tokens."""
    batch = literal(
        trajectories=[0, 0, 0, 1], turns=[0, 0, 2, 0], entropy=[0.2, 0.8, 1.5, 1.0], advantages=[1.0, 1.0, 1.0, -2.0]
    )
    assert shape(make_control("ea"), batch).tolist() == pytest.approx([1.08, 1.32, 1.5, -1.6])
    e = [1.0, math.exp(-1.0), math.exp(-0.5)]
    mean = sum(e) / 3
    assert shape(make_control("aem"), batch).tolist() == pytest.approx(
        [e[0] / mean, e[0] / mean, e[1] / mean, -2 * e[2] / mean]
    )
    raw = [e[0] / mean + 0.05 * e[1], e[0] / mean + 0.05 * e[1], e[1] / mean, -2 * e[2] / mean]
    assert shape(make_control("empg"), batch).tolist() == pytest.approx([value - sum(raw[1:]) / 3 for value in raw])


# ---------------------------------------------------------------- what a shaper must and must not depend on


@settings(max_examples=80, deadline=None)
@given(method=st.sampled_from(SHAPERS), batch=batches, seed=st.integers(0, 1000))
def test_order_and_names_of_ids_change_nothing(method: str, batch: Ragged, seed: int) -> None:
    control = make_control(method)
    expected = shape(control, batch)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(batch), generator=generator)
    names = torch.randperm(1000, generator=generator) - 500
    renamed = changed(batch, trajectory_ids_N=names[batch.trajectory_ids_N], group_ids_N=names[500 + batch.group_ids_N])
    torch.testing.assert_close(shape(control, renamed.at(order)), expected[order], rtol=1e-9, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(method=st.sampled_from(SHAPERS), batch=batches)
def test_what_comes_out_is_a_constant_of_the_dtype_that_came_in(method: str, batch: Ragged) -> None:
    control = make_control(method)
    half = changed(
        batch,
        advantages_N=batch.advantages_N.float().requires_grad_(),
        entropy_N=batch.entropy_N.float().requires_grad_(),
    )
    got = shape(control, half)
    assert got.dtype == torch.float32
    assert not got.requires_grad
    torch.testing.assert_close(got.double(), shape(control, batch), rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(batch=batches, level=st.floats(0, 10))
def test_equal_entropies_give_no_turn_more_than_another(batch: Ragged, level: float) -> None:
    """Also where means of equal numbers differ in their last digit."""
    flat = changed(batch, entropy_N=torch.full_like(batch.entropy_N, level))
    assert torch.equal(shape(make_control("aem", min_range=0.0), flat), batch.advantages_N)
    centred = batch.advantages_N - mean_over_turns(batch, batch.advantages_N.tolist())
    torch.testing.assert_close(shape(make_control("empg", zeta=0.0), flat), centred, rtol=1e-9, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), batch=ragged_batches(max_groups=3))
def test_aem_looks_at_no_other_group(data: st.DataObject, batch: Ragged) -> None:
    group = data.draw(st.sampled_from(sorted(set(batch.group_ids_N.tolist()))))
    own = batch.group_ids_N == group
    alone = batch.at(own.nonzero()[:, 0])
    torch.testing.assert_close(shape(make_control("aem"), batch)[own], shape(make_control("aem"), alone))


@pytest.mark.parametrize("method", SHAPERS)
def test_a_batch_without_tokens_stays_empty(method: str) -> None:
    empty = torch.zeros(0, dtype=torch.long)
    assert make_control(method).shape_advantages(empty.double(), empty.double(), empty, empty, empty).shape == (0,)


def test_ids_that_cannot_be_are_refused() -> None:
    values, ids, negative = torch.ones(2), torch.tensor([0, 0]), torch.tensor([0, -1])
    for method in ("empg", "aem"):
        with pytest.raises(ValueError, match=r"turn_ids must be >= 0, got -1"):
            make_control(method).shape_advantages(values, values, ids, negative, ids)
        with pytest.raises(ValueError, match=r"must both be \[N\], got \[2\] and \[1\]"):
            make_control(method).shape_advantages(values, values, ids, ids[:1], ids)
    with pytest.raises(ValueError, match="group_ids must be the same for all tokens of a response"):
        make_control("aem").shape_advantages(values, values, ids, ids, torch.tensor([0, 1]))


# ---------------------------------------------------------------- the adaptive coefficient


def brute_controller(
    levels: list[float], *, target: float, delta: float, maximum: float, initial: float
) -> tuple[float, float]:
    """c, and the weight of the bonus in the next step."""
    c = initial
    for level in levels:
        c = c + delta if level < target else c - delta
        c = 0.0 if c < 0 else maximum if c > maximum else c
    return c, c if levels and levels[-1] < target else 0.0


@settings(max_examples=80, deadline=None)
@given(
    past=st.lists(ragged_batches(max_groups=1, max_members=2, max_turns=8), max_size=6),
    now=batches,
    target=st.sampled_from([0.2, 0.9, 1.0, 1.1, 5.0]),
    maximum=st.sampled_from([0.0, 0.0025, 0.01]),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    cuts=st.lists(st.integers(0, 10_000), max_size=4),
    seed=st.integers(0, 1000),
)
def test_adaptive_is_its_rule_in_any_order_and_any_split(
    past: list[Ragged], now: Ragged, target: float, maximum: float, share: float, cuts: list[int], seed: int
) -> None:
    options: dict[str, float] = {"target": target, "delta": 1e-3, "maximum": maximum, "initial": share * maximum}
    control = make_control("adaptive", **options)
    levels = []
    for batch in past:
        values = batch.entropy_N.tolist()
        levels.append(math.fsum(values) / len(values))
        assume(abs(levels[-1] - target) > 1e-9)
        control.observe(batch.entropy_N, batch.trajectory_ids_N, batch.turn_ids_N)
    c, acting = brute_controller(levels, **options)
    assert control.state_dict()["coefficient"] == pytest.approx(c, abs=1e-15)

    # Unequal weights that sum to 1.
    weights = torch.rand(len(now), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    weights = weights / weights.sum()
    order = torch.randperm(len(now), generator=torch.Generator().manual_seed(seed))
    for index, parts in ((torch.arange(len(now)), [slice(0, len(now))]), (order, cut(len(now), cuts))):
        leaf = now.entropy_N[index].clone().requires_grad_()
        value, metric = 0.0, 0.0
        for part in parts:
            term = control.entropy_loss(
                leaf[part], weights[index][part], now.turn_ids_N[index][part], step=3, total_steps=9
            )
            term.loss.backward()
            value += term.loss.item()
            assert set(term.metrics) == {"adaptive/coefficient"}
            metric += term.metrics["adaptive/coefficient"]
        bonus = math.fsum(w * h for w, h in zip(weights.tolist(), now.entropy_N.tolist(), strict=True))
        assert value == pytest.approx(-acting * bonus, rel=1e-9, abs=1e-15)
        assert metric == pytest.approx(acting, rel=1e-9, abs=1e-15)
        assert leaf.grad is not None
        assert leaf.grad.tolist() == pytest.approx([-acting * w for w in weights[index].tolist()], rel=1e-9, abs=1e-15)


@settings(max_examples=40, deadline=None)
@given(
    past=st.lists(ragged_batches(max_groups=1, max_turns=6), max_size=4),
    later=st.lists(ragged_batches(max_groups=1, max_turns=6), max_size=4),
)
def test_adaptive_continues_from_json_as_if_never_stopped(past: list[Ragged], later: list[Ragged]) -> None:
    whole = make_control("adaptive", target=1.0)
    for batch in past:
        whole.observe(batch.entropy_N, batch.trajectory_ids_N, batch.turn_ids_N)
    resumed = make_control("adaptive", target=1.0)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for control in (whole, resumed):
        for batch in later:
            control.observe(batch.entropy_N, batch.trajectory_ids_N, batch.turn_ids_N)
    assert resumed.state_dict() == whole.state_dict()
    assert isinstance(whole, AdaptiveControl) and isinstance(resumed, AdaptiveControl)
    assert resumed.coefficient == whole.coefficient


def test_adaptive_by_hand_at_the_published_values() -> None:
    control = AdaptiveControl()
    low, at, ids = torch.tensor([0.0, 0.3]), torch.tensor([0.0, 0.4], dtype=torch.float64), torch.tensor([0, 0])
    assert (control.reference, control.coefficient, control.aggregate) == (0.2, 0.0, "token")
    for _ in range(2):
        control.observe(low, ids, ids)
    assert control.coefficient == pytest.approx(2e-4)
    control.observe(low[:0], ids[:0], ids[:0])
    assert control.coefficient == pytest.approx(2e-4)
    # At the target there is no bonus, and the coefficient falls.
    control.observe(at, ids, ids)
    assert control.coefficient == 0.0
    assert control.state_dict() == {"coefficient": pytest.approx(1e-4), "entropy": 0.2}
    for _ in range(100):
        control.observe(low, ids, ids)
    assert control.coefficient == 0.005


def test_adaptive_has_no_bonus_before_it_has_seen_anything() -> None:
    control = AdaptiveControl(initial=0.005)
    entropy = torch.tensor([0.01, 0.02], requires_grad=True)
    term = control.entropy_loss(entropy, torch.full((2,), 0.5), torch.zeros(2).long(), step=0, total_steps=2)
    assert term.loss.item() == 0.0
    assert term.metrics == {"adaptive/coefficient": 0.0}
    control.observe(entropy, torch.zeros(2).long(), torch.zeros(2).long())
    assert control.coefficient == 0.005


@pytest.mark.parametrize("state", [{}, {"coefficient": 0.001}, {"history": {}}, {"coefficient": 0.006, "entropy": 0.1}])
def test_adaptive_refuses_a_state_of_another_method_or_other_settings(state: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="was written with"):
        AdaptiveControl().load_state_dict(state)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("ea", {"alpha": -0.1}, "alpha must be >= 0 and finite, got -0.1"),
        ("ea", {"alpha": math.inf}, "alpha must be >= 0 and finite, got inf"),
        ("ea", {"kappa": 1.0}, r"kappa must be > 1 and finite, got 1.0"),
        ("empg", {"k": -1.0}, "k must be >= 0 and finite, got -1.0"),
        ("empg", {"k_future": math.nan}, "k_future must be >= 0 and finite, got nan"),
        ("empg", {"zeta": -0.05}, "zeta must be >= 0 and finite, got -0.05"),
        ("aem", {"rate": -1.0}, "rate must be >= 0 and finite, got -1.0"),
        ("aem", {"min_range": -0.1}, "min_range must be >= 0 and finite, got -0.1"),
        ("adaptive", {"target": -0.2}, "target must be >= 0 and finite, got -0.2"),
        ("adaptive", {"delta": -1e-4}, "delta must be >= 0 and finite, got -0.0001"),
        ("adaptive", {"maximum": math.nan}, "maximum must be >= 0 and finite, got nan"),
        ("adaptive", {"initial": 0.006}, r"initial must lie in \[0, maximum = 0.005\], got 0.006"),
        ("adaptive", {"aggregate": "turn"}, "aggregate must be trajectory or token, got 'turn'"),
    ],
)
def test_bad_values_are_refused_by_name(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_control(method, **options)


def unchanged(control: EntropyControl, batch: Ragged) -> bool:
    """Neither advantages nor gradient, however long the method has watched low entropies."""
    for _ in range(3):
        control.observe(torch.zeros_like(batch.entropy_N), batch.trajectory_ids_N, batch.turn_ids_N)
    leaf = batch.entropy_N.clone().requires_grad_()
    term = control.entropy_loss(leaf, torch.ones_like(leaf), batch.turn_ids_N, step=1, total_steps=2)
    if term.loss.requires_grad:
        term.loss.backward()
    return torch.equal(shape(control, batch), batch.advantages_N) and (leaf.grad is None or not leaf.grad.any())


@pytest.mark.parametrize(
    ("method", "inert", "acting"),
    [
        ("ea", {"alpha": 0.0}, {}),
        ("aem", {"rate": 0.0}, {}),
        ("adaptive", {"target": 0.0}, {}),
        ("adaptive", {"maximum": 0.0}, {}),
        ("adaptive", {"delta": 0.0}, {"delta": 0.0, "initial": 0.001}),
    ],
)
def test_options_are_said_to_be_inert_exactly_where_they_are(
    method: str, inert: dict[str, float], acting: dict[str, float]
) -> None:
    batch = literal(trajectories=[0, 0, 1], turns=[0, 1, 0], entropy=[0.2, 1.0, 2.0], advantages=[1.0, -1.0, 0.5])
    (said,) = make_control(method, **inert).warnings()
    assert "the run equals method 'none'" in said
    assert unchanged(make_control(method, **inert), batch)
    assert make_control(method, **acting).warnings() == []
    assert not unchanged(make_control(method, **acting), batch)


def test_empg_without_both_terms_only_centres_and_says_so() -> None:
    batch = literal(trajectories=[0, 0, 1], turns=[0, 1, 0], entropy=[0.2, 1.0, 2.0], advantages=[1.0, -1.0, 3.0])
    control = make_control("empg", k=0.0, zeta=0.0)
    assert shape(control, batch).tolist() == pytest.approx([0.0, -2.0, 2.0])
    (said,) = control.warnings()
    assert "entropy has no effect" in said
    assert make_control("empg").warnings() == []
