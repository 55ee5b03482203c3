"""Every EPO profile on random ragged batches: against loops over literal tokens, in any order and any split.

The brute force knows the method from the paper alone (equations E2 to E7) and shares no code with ours.
"""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged import Ragged, cut, ragged_batches
from torch import Tensor

from epo.objectives import make_control, trajectory_weights

PROFILES: dict[str, dict[str, Any]] = {
    "epo": {"coefficient": 0.001, "alpha": 0.05, "kappa": (0.0, 2.0), "gamma": 3.0},
    "epo_constant_beta": {"coefficient": 0.001, "alpha": 0.05, "kappa": (0.0, 2.0), "gamma": None},
    "epo_strong": {"coefficient": 0.001, "alpha": 10.0, "kappa": (0.0, 2.0), "gamma": 3.0},
    "epo_base": {"coefficient": 0.001, "alpha": 0.0, "kappa": (0.0, 2.0), "gamma": 3.0},
    "epo with a floor": {"coefficient": 0.001, "alpha": 2.0, "kappa": (0.5, 1.5), "gamma": 3.0},
}
FLOOR = {"alpha": 2.0, "kappa_low": 0.5, "kappa_high": 1.5}

batches = ragged_batches(max_groups=2, max_members=3)


def brute_weights(batch: Ragged) -> list[float]:
    """1 / (trajectories x turns of the trajectory x tokens of the turn), counted token by token."""
    tokens: dict[tuple[int, int], int] = {}
    for pair in zip(batch.trajectory_ids_N.tolist(), batch.turn_ids_N.tolist(), strict=True):
        tokens[pair] = tokens.get(pair, 0) + 1
    trajectories = {trajectory for trajectory, _ in tokens}
    turns = {t: sum(1 for trajectory, _ in tokens if trajectory == t) for t in trajectories}
    return [
        1 / (len(trajectories) * turns[trajectory] * tokens[trajectory, turn])
        for trajectory, turn in zip(batch.trajectory_ids_N.tolist(), batch.turn_ids_N.tolist(), strict=True)
    ]


def brute_references(past: list[Ragged], kind: str, average: str) -> dict[int, float]:
    """H_ref by turn. Averages: all steps, the last two, or an exponential one with decay 0.6."""
    means: dict[int, list[float]] = {}
    for batch in past:
        sums: dict[int, list[float]] = {}
        for turn, entropy in zip(batch.turn_ids_N.tolist(), batch.entropy_N.tolist(), strict=True):
            for key in range(41) if kind == "scalar" else [turn]:
                sums.setdefault(key, []).append(entropy)
        for turn, values in sums.items():
            means.setdefault(turn, []).append(sum(values) / len(values))
    found = {}
    for turn, values in means.items():
        if average == "ema":
            found[turn] = values[0]
            for value in values[1:]:
                found[turn] = 0.6 * found[turn] + 0.4 * value
        else:
            kept = values if average == "cumulative" else values[-2:]
            found[turn] = sum(kept) / len(kept)
    return found


def brute_loss(batch: Ragged, profile: dict[str, Any], references: dict[int, float], step: int, total: int) -> float:
    low, high = profile["kappa"]
    beta = 1.0 if profile["gamma"] is None else 1 + math.exp(-profile["gamma"] * step / max(1, total // 2))
    bonus = smoothing = 0.0
    for entropy, turn, weight in zip(
        batch.entropy_N.tolist(), batch.turn_ids_N.tolist(), brute_weights(batch), strict=True
    ):
        bonus += weight * entropy
        if turn in references:
            reference = references[turn]
            penalty = max(0.0, low * reference - entropy) + max(0.0, entropy - high * reference)
            smoothing += weight * profile["alpha"] * penalty
    return -profile["coefficient"] * (bonus - beta * smoothing)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(PROFILES)),
    kind=st.sampled_from(["scalar", "per_turn"]),
    average=st.sampled_from(["cumulative", "sliding", "ema"]),
    past=st.lists(batches, max_size=3),
    now=batches,
    step=st.integers(0, 30),
    total=st.integers(1, 30),
    cuts=st.lists(st.integers(0, 10_000), max_size=4),
    seed=st.integers(0, 1000),
)
def test_a_profile_is_its_equations_in_any_order_and_any_split(
    name: str,
    kind: str,
    average: str,
    past: list[Ragged],
    now: Ragged,
    step: int,
    total: int,
    cuts: list[int],
    seed: int,
) -> None:
    method, options = name, {}
    if name != "epo_base":
        options = {"reference": kind, "history": average, "window": 2, "ema_decay": 0.6}
    if name == "epo with a floor":
        method, options = "epo", {**options, **FLOOR}
    control = make_control(method, **options)
    for batch in past:
        control.observe(batch.entropy_N, batch.trajectory_ids_N, batch.turn_ids_N)
        # The state survives a checkpoint at any point.
        state = json.loads(json.dumps(control.state_dict()))
        control = make_control(method, **options)
        control.load_state_dict(state)
    profile, references = PROFILES[name], brute_references(past, kind, average)

    def run(batch: Ragged, parts: list[slice]) -> tuple[float, Tensor, dict[str, float]]:
        leaf = batch.entropy_N.clone().requires_grad_()
        weights = trajectory_weights(batch.trajectory_ids_N, batch.turn_ids_N, dtype=torch.float64)
        value, metrics = 0.0, {}
        for part in parts:
            term = control.entropy_loss(leaf[part], weights[part], batch.turn_ids_N[part], step=step, total_steps=total)
            term.loss.backward()
            value += term.loss.item()
            metrics = {name: metrics.get(name, 0.0) + number for name, number in term.metrics.items()}
        assert leaf.grad is not None
        return value, leaf.grad, metrics

    whole, gradient, metrics = run(now, [slice(0, len(now))])
    assert whole == pytest.approx(brute_loss(now, profile, references, step, total), rel=1e-9, abs=1e-15)

    # Finite differences of the brute force, for one token.
    token, eps = seed % len(now), 1e-7
    moved = []
    for shift in (eps, -eps):
        entropy = now.entropy_N.clone()
        entropy[token] += shift
        shifted = Ragged(**{**vars(now), "entropy_N": entropy})
        moved.append(brute_loss(shifted, profile, references, step, total))
    assert gradient[token].item() == pytest.approx((moved[0] - moved[1]) / (2 * eps), rel=1e-4, abs=1e-9)

    order = torch.randperm(len(now), generator=torch.Generator().manual_seed(seed))
    other, other_gradient, other_metrics = run(now.at(order), cut(len(now), cuts))
    assert other == pytest.approx(whole, rel=1e-12, abs=1e-15)
    torch.testing.assert_close(other_gradient, gradient[order], rtol=1e-12, atol=1e-16)
    assert other_metrics == pytest.approx(metrics, rel=1e-9, abs=1e-12)
