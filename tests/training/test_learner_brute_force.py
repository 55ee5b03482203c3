"""One update against a plain re-implementation: whole logits, explicit loops, one forward pass per turn, no packing."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from epo.config import Config
from epo.objectives import make_control
from epo.training.learner import Learner
from epo.training.policy import Policy
from epo.types import StopReason, Trajectory, TrajectoryGroup
from made_up import groups

TEMPERATURE = 1.3
REFERENCE = 0.7  # about the median entropy of the policy below: tokens lie on both sides of the corridor
STEP, TOTAL = 3, 8
EPO = {"coefficient": 0.3, "alpha": 1.5, "kappa_low": 0.8, "kappa_high": 1.5, "gamma": 2.0}


class Plain:
    """Everything in float64, from copies of the learner's networks."""

    def __init__(self, learner: Learner) -> None:
        self.model = copy.deepcopy(learner.policy.model).double()
        self.head = copy.deepcopy(learner.critic.head).double() if learner.critic is not None else None
        own = learner.critic is not None and learner.critic.trunk is not None
        self.critic_trunk = copy.deepcopy(learner.critic.trunk).double() if own else None

    def turn(self, turn: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability, entropy and value of each response token, from the turn's own sequence alone."""
        ids = torch.tensor(np.concatenate([turn.prompt_ids, turn.response_ids]))[None]
        before = slice(len(turn.prompt_ids) - 1, ids.shape[1] - 1)
        logits = self.model(ids).logits[0, before] / TEMPERATURE
        logp = torch.log_softmax(logits, dim=-1)
        chosen = torch.stack([logp[i, token] for i, token in enumerate(turn.response_ids)])
        entropy = torch.stack([-(row.exp() * row).sum() for row in logp])
        if self.head is None:
            return chosen, entropy, torch.zeros(len(chosen))
        trunk = self.critic_trunk if self.critic_trunk is not None else self.model.model
        return chosen, entropy, self.head(trunk(ids).last_hidden_state[0, before])[:, 0]


def policy_loss(logp: Tensor, old: float, advantage: float) -> Tensor:
    ratio = torch.exp(logp - old)
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.25))
    return torch.minimum(loss, torch.tensor(-advantage * 3.0)) if advantage < 0 else loss


def epo_term(entropies: list[list[Tensor]]) -> Tensor:
    """-lambda (L^H - beta L^smooth) of equations E2 to E7; `entropies[j]` has one tensor per turn of trajectory j."""
    beta = 1 + math.exp(-EPO["gamma"] * STEP / (TOTAL // 2))
    low, high = EPO["kappa_low"] * REFERENCE, EPO["kappa_high"] * REFERENCE

    def ragged_mean(function: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.stack([torch.stack([function(h).mean() for h in turns]).mean() for turns in entropies]).mean()

    smooth = EPO["alpha"] * ragged_mean(lambda h: (low - h).clamp(min=0) + (h - high).clamp(min=0))
    return -EPO["coefficient"] * (ragged_mean(lambda h: h) - beta * smooth)


def ppo_loss(plain: Plain, trajectories: list[Trajectory], *, gamma: float, lam: float, coefficient: float) -> Tensor:
    found = [[plain.turn(turn) for turn in t.turns] for t in trajectories]
    advantages: list[list[float]] = []
    returns: list[list[float]] = []
    for t, outputs in zip(trajectories, found, strict=True):
        values = [values[0].item() for _, _, values in outputs]
        rewards = [turn.environment_reward - turn.penalty for turn in t.turns]
        per_turn = []
        for k in range(len(rewards)):
            total, discount = 0.0, 1.0
            for later in range(k, len(rewards)):
                following = values[later + 1] if later + 1 < len(rewards) else 0.0
                total += discount * (rewards[later] + gamma * following - values[later])
                discount *= gamma * lam
            per_turn.append(total)
        advantages.append(per_turn)
        returns.append([a + v for a, v in zip(per_turn, values, strict=True)])
    per_token = [
        a
        for t, turns in zip(trajectories, advantages, strict=True)
        for turn, a in zip(t.turns, turns, strict=True)
        for _ in turn.response_ids
    ]
    mean, std = statistics.fmean(per_token), math.sqrt(statistics.variance(per_token) + 1e-8)
    losses, value_losses = [], []
    for j, t in enumerate(trajectories):
        for k, turn in enumerate(t.turns):
            logp, _, values = found[j][k]
            for i in range(len(turn.response_ids)):
                losses.append(policy_loss(logp[i], float(turn.logprobs[i]), (advantages[j][k] - mean) / std))
                value_losses.append((values[i] - returns[j][k]) ** 2)
    entropy = epo_term([[h for _, h, _ in turns] for turns in found])
    return torch.stack(losses).mean() + coefficient * torch.stack(value_losses).mean() + entropy


def grpo_loss(plain: Plain, reference: Plain, survivors: list[list[Trajectory]], *, kl: float) -> Tensor:
    losses, penalties, entropies = [], [], []
    for group in survivors:
        rewards = [sum(turn.environment_reward - turn.penalty for turn in t.turns) for t in group]
        for t, reward in zip(group, rewards, strict=True):
            advantage = (reward - statistics.fmean(rewards)) / (statistics.stdev(rewards) + 1e-6)
            entropies.append([])
            for turn in t.turns:
                logp, entropy, _ = plain.turn(turn)
                with torch.no_grad():
                    expected, _, _ = reference.turn(turn)
                entropies[-1].append(entropy)
                for i in range(len(turn.response_ids)):
                    losses.append(policy_loss(logp[i], float(turn.logprobs[i]), advantage))
                    difference = expected[i] - logp[i]
                    penalties.append(torch.exp(difference) - difference - 1)
    return torch.stack(losses).mean() + kl * torch.stack(penalties).mean() + epo_term(entropies)


def near_policy(policy: Policy, found: list[TrajectoryGroup], rng: np.random.Generator) -> None:
    """Sampling log-probabilities around the policy's own, so that some ratios are clipped and some are not."""
    with torch.no_grad():
        for group in found:
            for t in group.trajectories:
                for turn in t.turns:
                    ids = torch.tensor(np.concatenate([turn.prompt_ids, turn.response_ids]))[None]
                    logits = policy.model(ids).logits[0, len(turn.prompt_ids) - 1 : -1] / TEMPERATURE
                    chosen = torch.log_softmax(logits, -1)[torch.arange(len(turn.response_ids)), turn.response_ids]
                    noise = rng.uniform(-0.5, 0.5, size=len(chosen))
                    turn.logprobs = (chosen.numpy() + noise).astype(np.float32)


def perturb(parameters: Any, *, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.data.add_(scale * torch.randn(parameter.shape, generator=generator))


def make_learner(policy: Policy, config: Config, *, start: Policy | None = None) -> Learner:
    control = make_control("epo", **EPO)
    control.history.append(REFERENCE)
    learner = Learner(policy, config, control, start_policy=start)
    if learner.critic is not None:  # a fresh value head is zero and would hide everything behind it
        perturb(learner.critic.parameters(), scale=0.05, seed=3)
    return learner


def gradients(module: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], *, tolerance: float = 1e-5) -> None:
    assert set(found) == set(expected) and found
    for name, gradient in expected.items():
        scale = max(1.0, float(gradient.abs().max()))
        assert float((found[name].double() - gradient.double()).abs().max()) <= tolerance * scale, name
    assert max(float(g.abs().max()) for g in expected.values()) > 1e-3  # not a comparison of zeros


COMMON = (
    f"steps={TOTAL}",
    f"rollout.temperature={TEMPERATURE}",
    "optimizer.minibatches=1",
    "optimizer.grad_clip=1e9",
    "algorithm.clip_high=0.25",
    "entropy.method=epo",
)


@pytest.mark.parametrize("trunk", ["shared", "separate"])
def test_ppo_update(trunk: str, make_sharp_policy: Callable[..., Policy], minute_config: Callable[..., Config]):
    rng = np.random.default_rng(0)
    policy, found = make_sharp_policy(), groups(rng)
    near_policy(policy, found, rng)
    found[0].trajectories[0].turns[0].penalty = 0.7
    config = minute_config(
        *COMMON, f"algorithm.critic.trunk={trunk}", "algorithm.gamma=0.9", "algorithm.lam=0.8",
        "algorithm.critic.coefficient=0.4",
    )  # fmt: skip
    learner = make_learner(policy, config)
    assert learner.critic is not None
    plain = Plain(learner)
    trajectories = [t for group in found for t in group.trajectories]
    loss = ppo_loss(plain, trajectories, gamma=0.9, lam=0.8, coefficient=0.4)
    loss.backward()
    metrics = learner.update(found, step=STEP)
    assert_close(gradients(policy.model), gradients(plain.model))
    assert plain.head is not None
    assert_close(gradients(learner.critic.head), gradients(plain.head))
    if plain.critic_trunk is not None:
        assert_close(gradients(learner.critic.trunk), gradients(plain.critic_trunk))
    total = metrics["policy/loss"] + metrics["entropy/loss"] + 0.4 * metrics["value/loss"]
    assert total == pytest.approx(loss.item(), abs=1e-5)
    assert 0 < metrics["policy/clip_fraction"] < 1
    assert metrics["entropy/below"] > 0 and metrics["entropy/above"] > 0
    assert metrics["entropy/reference"] == pytest.approx(REFERENCE)


def test_grpo_update(make_sharp_policy: Callable[..., Policy], minute_config: Callable[..., Config]):
    rng = np.random.default_rng(1)
    start = make_sharp_policy()
    policy = start.frozen_copy()
    policy.model.requires_grad_(True)
    perturb(policy.parameters(), scale=0.02, seed=4)
    found = groups(rng, size=3)
    near_policy(policy, found, rng)
    config = minute_config(*COMMON, "algorithm.name=grpo", "rollout.group_size=3", "algorithm.kl_coefficient=0.7")
    learner = make_learner(policy, config, start=start)
    plain, reference = Plain(learner), Plain(Learner(start, minute_config(), make_control("none")))
    loss = grpo_loss(plain, reference, [group.trajectories for group in found], kl=0.7)
    loss.backward()
    metrics = learner.update(found, step=STEP)
    assert_close(gradients(policy.model), gradients(plain.model))
    assert metrics["policy/loss"] + metrics["entropy/loss"] + 0.7 * metrics["policy/reference_kl"] == pytest.approx(
        loss.item(), abs=1e-5
    )
    assert metrics["policy/reference_kl"] > 1e-3


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_gradient_does_not_depend_on_micro_batches_or_the_order_of_rows(
    algorithm: str, make_sharp_policy: Callable[..., Policy], minute_config: Callable[..., Config]
):
    found: list[dict[str, Tensor]] = []
    for budget, backwards in ((1, False), (40, False), (10**6, False), (40, True)):
        rng = np.random.default_rng(2)
        policy, made = make_sharp_policy(), groups(rng, count=4, size=3)
        near_policy(policy, made, rng)
        config = minute_config(
            *COMMON, f"algorithm.name={algorithm}", "rollout.group_size=3", f"optimizer.microbatch_tokens={budget}"
        )
        make_learner(policy, config).update(made[::-1] if backwards else made, step=STEP)
        found.append(gradients(policy.model))
    for other in found[1:]:
        assert_close(other, found[0])


def test_first_step_of_the_optimiser(make_sharp_policy: Callable[..., Policy], minute_config: Callable[..., Config]):
    """AdamW from zero moments, gradient clipped: w - lr wd w - lr g / (|g| + eps) (Loshchilov and Hutter)."""
    rng = np.random.default_rng(3)
    policy, made = make_sharp_policy(), groups(rng)
    config = minute_config(
        *COMMON, "optimizer.grad_clip=0.01", "optimizer.weight_decay=0.1", "optimizer.learning_rate=0.01",
        "algorithm.critic.learning_rate=0.03",
    )  # fmt: skip
    learner = make_learner(policy, config)
    assert learner.critic is not None
    parts = [(learner.policy.model, 0.01 * 0.2), (learner.critic, 0.03)]
    before = [{name: p.detach().clone() for name, p in part.named_parameters()} for part, _ in parts]
    metrics = learner.update(made, step=TOTAL)  # the last step of the schedule: `min_ratio` of the peak
    assert metrics["update/learning_rate"] == pytest.approx(0.01 * 0.2)
    assert metrics["policy/grad_norm"] > 0.01
    for (part, rate), old in zip(parts, before, strict=True):
        clipped = {name: p.grad for name, p in part.named_parameters()}
        assert math.sqrt(sum(float(g.square().sum()) for g in clipped.values())) <= 0.01 * (1 + 1e-4)
        for name, p in part.named_parameters():
            g = clipped[name]
            expected = old[name] * (1 - rate * 0.1) - rate * g / (g.abs() + 1e-8)
            torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-6)


def test_turns_carry_the_advantages_and_ratios_of_their_own_tokens(
    make_sharp_policy: Callable[..., Policy], minute_config: Callable[..., Config]
):
    """GRPO with a filter, two mini-batches: the later one sees what the earlier one changed."""
    rng = np.random.default_rng(5)
    policy, made = make_sharp_policy(), groups(rng, count=4, size=3)
    near_policy(policy, made, rng)
    for trajectory in made[2].trajectories:  # equal rewards: the filter drops this group
        trajectory.turns = trajectory.turns[:1]
        trajectory.turns[0].environment_reward = 1.0
    made[3].trajectories[0].stop_reason = StopReason.ENVIRONMENT_ERROR
    config = minute_config(
        *COMMON[:2], "optimizer.minibatches=2", "optimizer.learning_rate=0.05", "algorithm.name=grpo",
        "rollout.group_size=3", "algorithm.filter=snr", "algorithm.filter_keep=1.0", "optimizer.microbatch_tokens=40",
    )  # fmt: skip
    learner = Learner(policy, config, make_control("none"))
    first = Plain(learner)
    learner.update(made, step=STEP)
    unlike_start: list[bool] = []
    for number, group in enumerate(made):
        rewards = [t.total_reward for t in group.survivors]
        for t in group.trajectories:
            if number == 2 or t.stop_reason.is_error:
                assert all(turn.advantages is None and turn.ratios is None for turn in t.turns)
                continue
            expected = (t.total_reward - statistics.fmean(rewards)) / (statistics.stdev(rewards) + 1e-6)
            for turn in t.turns:
                assert turn.advantages is not None and turn.ratios is not None
                np.testing.assert_allclose(turn.advantages, [expected] * len(turn.response_ids), rtol=1e-4)
                assert len(turn.ratios) == len(turn.response_ids)
                start = np.exp(first.turn(turn)[0].detach().numpy() - turn.logprobs)
                unlike_start.append(not np.allclose(turn.ratios, start, rtol=1e-3))
    # The first mini-batch was seen by the policy that started, the second by one that had stepped.
    assert any(unlike_start) and not all(unlike_start)
