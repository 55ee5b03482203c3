"""The EPO loss as a whole: gradient identity, no-op indicator, metrics, additivity (conformance T1, T2, T4, T11)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from epo.objectives import (
    EntropyHistory,
    EPOControl,
    clipped_surrogate,
    epo_loss,
    make_control,
    phase_weight,
    token_logprobs_and_entropy,
    trajectory_weights,
)

COEFFICIENT, ALPHA, LOW, HIGH = 0.01, 0.8, 0.5, 1.5
STEP, TOTAL = 7, 40


def ragged_batch(seed: int, *, num: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """Entropies around 1 and ids of tokens in random order, two to four trajectories."""
    generator = torch.Generator().manual_seed(seed)
    entropy = torch.rand(num, generator=generator, dtype=torch.float64) * 2.5
    trajectory_ids = torch.randint(2 + seed % 3, (num,), generator=generator)
    turn_ids = torch.randint(4, (num,), generator=generator)
    return entropy, trajectory_ids, turn_ids


def brute_force_weights(trajectory_ids: Tensor, turn_ids: Tensor) -> list[float]:
    pairs = list(zip(trajectory_ids.tolist(), turn_ids.tolist(), strict=True))
    num_trajectories = len({j for j, _ in pairs})
    return [1 / (num_trajectories * len({t for i, t in pairs if i == j}) * pairs.count((j, turn))) for j, turn in pairs]


def history_of(*means: float) -> EntropyHistory:
    history = EntropyHistory()
    for mean in means:
        history.append(mean)
    return history


class ToyPolicy(torch.nn.Module):
    """A recurrent language model small enough for exact checks."""

    def __init__(self, vocab: int = 11, size: int = 6) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab, size, dtype=torch.float64)
        self.recurrence = torch.nn.GRU(size, size, batch_first=True, dtype=torch.float64)
        self.head = torch.nn.Linear(size, vocab, dtype=torch.float64)

    def forward(self, ids_B_T: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.recurrence(self.embedding(ids_B_T[:, :-1]))[0].flatten(0, 1)
        return token_logprobs_and_entropy(
            hidden, self.head.weight, ids_B_T[:, 1:].flatten(), head_bias=self.head.bias, tile_tokens=5, tile_vocab=4
        )


def toy_batch(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(11, (3, 9), generator=generator)
    trajectory_ids = torch.arange(3).repeat_interleave(8)
    turn_ids = torch.tensor([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 1, 1, 2, 2, 3, 3, 3])
    advantages = torch.randn(24, generator=generator, dtype=torch.float64)
    return ids, trajectory_ids, turn_ids, advantages


def test_parameter_gradient_is_the_identity_of_the_method_in_all_three_regions() -> None:
    """T1: dL/dtheta = dL_MT/dtheta - sum_i lambda w_i (1 - ab [above] + ab [below]) dH_i/dtheta."""
    torch.manual_seed(0)
    policy = ToyPolicy()
    with torch.no_grad():
        policy.head.weight.mul_(6)
    ids, trajectory_ids, turn_ids, advantages = toy_batch(1)
    parameters = list(policy.parameters())

    logprobs, entropy = policy(ids)
    least, most = (float(bound) for bound in entropy.detach().aminmax())
    reference = (least + most) / 2
    low, high = (least + (most - least) / 3) / reference, (most - (most - least) / 3) / reference
    history = history_of(reference - 0.1, reference + 0.1)
    surrogate = clipped_surrogate(logprobs, logprobs.detach() - 0.05, advantages)
    policy_loss = surrogate.loss_N.mean()
    loss, metrics = epo_loss(
        policy_loss,
        entropy,
        trajectory_ids,
        turn_ids,
        history,
        step=STEP,
        total_steps=TOTAL,
        coefficient=COEFFICIENT,
        alpha=ALPHA,
        kappa_low=low,
        kappa_high=high,
    )
    got = torch.autograd.grad(loss, parameters, retain_graph=True)

    expected = [gradient.clone() for gradient in torch.autograd.grad(policy_loss, parameters, retain_graph=True)]
    strength = ALPHA * phase_weight(STEP, TOTAL)
    regions = set()
    for index, weight in enumerate(brute_force_weights(trajectory_ids, turn_ids)):
        value = float(entropy[index].detach())
        region = (value > high * reference) - (value < low * reference)
        regions.add(region)
        factor = COEFFICIENT * weight * (1 - strength * region)
        gradients = torch.autograd.grad(entropy[index], parameters, retain_graph=True)
        for total, gradient in zip(expected, gradients, strict=True):
            total -= factor * gradient
    assert regions == {-1, 0, 1}
    assert strength > 0.5
    assert metrics["entropy/reference"] == pytest.approx(reference)
    for ours, theirs in zip(got, expected, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-9


def train(method: str, *, steps: int = 6, **options: Any) -> tuple[list[Tensor], list[float]]:
    """A toy RL loop; returns the final parameters and the logged L^smooth of each step."""
    torch.manual_seed(3)
    policy = ToyPolicy()
    parameters = list(policy.parameters())
    control = make_control(method, coefficient=0.1, **options)
    smoothing: list[float] = []
    for step in range(steps):
        ids, trajectory_ids, turn_ids, advantages = toy_batch(step)
        with torch.no_grad():
            old_logprobs, old_entropy = policy(ids)
        weights = trajectory_weights(trajectory_ids, turn_ids, dtype=torch.float64)
        for _ in range(2):
            logprobs, entropy = policy(ids)
            surrogate = control.surrogate(
                logprobs, old_logprobs, advantages, clip_low=0.2, clip_high=0.2, dual_clip=3.0
            )
            term = control.entropy_loss(entropy, weights, turn_ids, step=step, total_steps=steps)
            gradients = torch.autograd.grad(surrogate.loss_N.mean() + term.loss, parameters)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.sub_(0.5 * gradient)
        control.observe(old_entropy, trajectory_ids, turn_ids)
        smoothing.append(term.metrics.get("epo/smoothing", 0.0))
    return [parameter.detach() for parameter in parameters], smoothing


def test_indicator_leaves_every_parameter_bitwise_equal_to_the_bonus_alone() -> None:
    """T2, and that the same loop does tell a penalty with a gradient from none."""
    corridor = {"alpha": 2.0, "kappa_low": 0.999, "kappa_high": 1.001}
    plain, _ = train("bonus")
    indicator, logged = train("epo", penalty="indicator", **corridor)
    relu, _ = train("epo", penalty="relu", **corridor)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(indicator, plain, strict=True))
    assert logged[0] == 0.0
    assert min(logged[1:]) > 0.0
    assert not all(torch.equal(ours, theirs) for ours, theirs in zip(relu, plain, strict=True))


def test_the_first_step_has_no_smoothing_and_no_reference() -> None:
    entropy, trajectory_ids, turn_ids = ragged_batch(0)
    weights = trajectory_weights(trajectory_ids, turn_ids, dtype=torch.float64)
    for kind in ("scalar", "per_turn"):
        control = make_control("epo", reference=kind, alpha=5.0, kappa_low=0.9, kappa_high=1.1)
        term = control.entropy_loss(entropy, weights, turn_ids, step=0, total_steps=TOTAL)
        bonus = make_control("bonus").entropy_loss(entropy, weights, turn_ids, step=0, total_steps=TOTAL)
        assert term.metrics["epo/smoothing"] == 0.0
        assert term.metrics["entropy/below"] == term.metrics["entropy/above"] == 0.0
        assert "entropy/reference" not in term.metrics
        assert control.reference is None
        assert torch.equal(term.loss, bonus.loss)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    penalty=st.sampled_from(["relu", "indicator", "squared"]),
    history=st.sampled_from(["scalar", "per_turn"]),
)
def test_loss_and_metrics_equal_a_brute_force_count(seed: int, penalty: str, history: str) -> None:
    """T11, with the gradient by the entropies counted as well."""
    entropy, trajectory_ids, turn_ids = ragged_batch(seed)
    control = EPOControl(
        coefficient=COEFFICIENT, alpha=ALPHA, kappa_low=LOW, kappa_high=HIGH, penalty=penalty, reference=history
    )
    past_turns = torch.tensor([0, 0, 1, 2])
    past = torch.tensor([[0.5, 1.5, 0.8, 1.2], [1.0, 0.6, 0.7, 1.4]], dtype=torch.float64)
    for step_entropy in past:
        control.observe(step_entropy, torch.zeros(4, dtype=torch.long), past_turns)
    if history == "scalar":
        references: dict[int, float | None] = dict.fromkeys(range(4), (4.0 / 4 + 3.7 / 4) / 2)
        level = (4.0 / 4 + 3.7 / 4) / 2
    else:
        references = {0: (1.0 + 0.8) / 2, 1: (0.8 + 0.7) / 2, 2: (1.2 + 1.4) / 2, 3: None}
        level = (0.9 + 0.75 + 1.3) / 3

    beta = 1 + math.exp(-3 * STEP / 20)
    below = above = smoothing = bonus = gradient_share = 0.0
    slopes = []
    for h, turn, w in zip(
        entropy.tolist(), turn_ids.tolist(), brute_force_weights(trajectory_ids, turn_ids), strict=True
    ):
        reference = references[turn]
        under = max(0.0, LOW * reference - h) if reference is not None else 0.0
        over = max(0.0, h - HIGH * reference) if reference is not None else 0.0
        below += w * (under > 0)
        above += w * (over > 0)
        bonus += w * h
        value, slope = {
            "relu": (under + over, (over > 0) - (under > 0)),
            "squared": (under**2 + over**2, 2 * over - 2 * under),
            "indicator": (float(under + over > 0), 0),
        }[penalty]
        smoothing += w * ALPHA * value
        slopes.append(-COEFFICIENT * w * (1 - ALPHA * beta * slope))
        gradient_share += w * abs(ALPHA * beta * slope)

    entropy.requires_grad_()
    weights = trajectory_weights(trajectory_ids, turn_ids, dtype=torch.float64)
    term = control.entropy_loss(entropy, weights, turn_ids, step=STEP, total_steps=TOTAL)
    term.loss.backward()
    assert term.loss.item() == pytest.approx(-COEFFICIENT * (bonus - beta * smoothing), rel=1e-9)
    assert entropy.grad.tolist() == pytest.approx(slopes, rel=1e-9)
    assert term.metrics == pytest.approx(
        {
            "entropy/below": below,
            "entropy/above": above,
            "entropy/reference": level,
            "epo/smoothing": smoothing,
            "epo/beta": beta,
            "epo/effective_weight": -sum(slopes),
            "epo/gradient_share": gradient_share,
        },
        rel=1e-9,
        abs=1e-12,
    )


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    cuts=st.lists(st.integers(0, 24), max_size=4),
    method=st.sampled_from(["epo", "bonus", "none"]),
)
def test_micro_batches_add_up_and_token_order_does_not_matter(seed: int, cuts: list[int], method: str) -> None:
    entropy, trajectory_ids, turn_ids = ragged_batch(seed)
    options = {"alpha": ALPHA, "kappa_low": LOW, "kappa_high": HIGH, "reference": "per_turn"} if method == "epo" else {}
    control = make_control(method, **options)
    control.observe(torch.tensor([1.0, 0.8, 1.1]), torch.zeros(3, dtype=torch.long), torch.arange(3))
    order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))

    def run(tokens: Tensor, edges: list[int]) -> tuple[float, dict[str, float], Tensor]:
        leaf = entropy.clone().requires_grad_()
        weights = trajectory_weights(trajectory_ids[tokens], turn_ids[tokens], dtype=torch.float64)
        loss, metrics = 0.0, {}
        for start, stop in zip([0, *edges], [*edges, 24], strict=True):
            part = tokens[start:stop]
            term = control.entropy_loss(leaf[part], weights[start:stop], turn_ids[part], step=STEP, total_steps=TOTAL)
            if term.loss.requires_grad:
                term.loss.backward()
            loss += term.loss.item()
            metrics = {name: metrics.get(name, 0.0) + value for name, value in term.metrics.items()}
        return loss, metrics, torch.zeros(24) if leaf.grad is None else leaf.grad

    whole = run(torch.arange(24), [])
    for tokens, edges in ((torch.arange(24), sorted(cuts)), (order, sorted(cuts))):
        parts = run(tokens, edges)
        assert parts[0] == pytest.approx(whole[0], rel=1e-12, abs=1e-15)
        assert parts[1] == pytest.approx(whole[1], rel=1e-12, abs=1e-15)
        torch.testing.assert_close(parts[2], whole[2], rtol=1e-12, atol=1e-15)


def test_epo_loss_and_control_are_the_same_objective() -> None:
    entropy, trajectory_ids, turn_ids = ragged_batch(5)
    options = {"coefficient": COEFFICIENT, "alpha": ALPHA, "kappa_low": LOW, "kappa_high": HIGH, "gamma": 2.0}
    control = EPOControl(**options)
    control.history.append(1.1)
    weights = trajectory_weights(trajectory_ids, turn_ids, dtype=torch.float64)
    term = control.entropy_loss(entropy, weights, turn_ids, step=STEP, total_steps=TOTAL)
    loss, metrics = epo_loss(
        torch.tensor(2.5, dtype=torch.float64),
        entropy,
        trajectory_ids,
        turn_ids,
        history_of(1.1),
        step=STEP,
        total_steps=TOTAL,
        **options,
    )
    assert loss.item() == 2.5 + term.loss.item()
    assert metrics == term.metrics


@pytest.mark.parametrize(
    ("low", "high", "alpha", "step", "expected"),
    [
        (0.0, 2.0, 0.05, 0, (None, 1.0, 0.9)),
        (0.0, 2.0, 0.1, 0, (None, 1.0, 0.8)),
        (0.5, 1.5, 0.1, 0, (1.2, 1.0, 0.8)),
        (0.5, 1.5, 2.0, 0, (5.0, 1.0, -3.0)),
    ],
)
def test_effective_weight_below_inside_and_above(
    low: float, high: float, alpha: float, step: int, expected: tuple[float | None, float, float]
) -> None:
    """What the published settings do to the entropy bonus: they weaken it above, and never turn it around."""
    control = EPOControl(coefficient=1.0, alpha=alpha, kappa_low=low, kappa_high=high)
    control.history.append(1.0)
    for entropy, weight in zip((0.1, 1.0, 2.5), expected, strict=True):
        if weight is None:
            continue
        leaf = torch.tensor([entropy], dtype=torch.float64, requires_grad=True)
        term = control.entropy_loss(
            leaf, torch.ones(1, dtype=torch.float64), torch.tensor([0]), step=step, total_steps=10
        )
        term.loss.backward()
        assert leaf.grad.item() == pytest.approx(-weight)
        assert term.metrics["epo/effective_weight"] == pytest.approx(weight)
