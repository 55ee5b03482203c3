"""Every entropy control reaches the weights, with PPO and with GRPO (conformance T8); previews and marks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from epo.config import Config
from epo.objectives import METHODS, EntropyControl, Surrogate, clipped_surrogate, make_control
from epo.training.learner import Learner
from epo.training.policy import Policy
from made_up import groups

MakePolicy = Callable[..., Policy]
MakeConfig = Callable[..., Config]

ALGORITHMS = {
    "ppo": ("algorithm.name=ppo",),
    "grpo": ("algorithm.name=grpo", "rollout.group_size=2"),
    "gigpo": ("algorithm.name=gigpo", "rollout.group_size=2"),
}
REQUIRED: dict[str, tuple[str, ...]] = {
    "clip_higher": ("entropy.clip_high=5",),
    "entropic": ("entropy.threshold=0",),
    "adaptive": ("entropy.target=100",),
}
"""Options by method that make it act on these few made-up tokens."""


def learner_for(method: str, algorithm: str, policy: Policy, minute_config: MakeConfig, *options: str) -> Learner:
    config = minute_config(
        "steps=6",
        "optimizer.epochs=2",
        *ALGORITHMS[algorithm],
        f"entropy.method={method}",
        *REQUIRED.get(method, ()),
        *options,
    )
    return Learner(policy, config, make_control(config.entropy.method, **config.entropy.options()))


def trained(learner: Learner) -> list[Tensor]:
    rng = np.random.default_rng(0)
    for step in range(3):
        found = learner.update(groups(rng, count=4), step=step)
        assert all(np.isfinite(value) for value in found.values()), found
        assert found["update/skipped"] == 0
    return [p.detach().clone() for p in learner.policy.parameters()]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("method", [name for name in METHODS if name != "none"])
def test_every_method_changes_what_is_learnt(
    method: str, algorithm: str, make_sharp_policy: MakePolicy, minute_config: MakeConfig
):
    plain = trained(learner_for("none", algorithm, make_sharp_policy(), minute_config))
    controlled = trained(learner_for(method, algorithm, make_sharp_policy(), minute_config))
    assert not all(torch.equal(a, b) for a, b in zip(plain, controlled, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_change_nothing(method: str, make_sharp_policy: MakePolicy, minute_config: MakeConfig):
    """Two optimiser steps with one row per micro-batch, and with all rows in one."""
    found = []
    for budget in (1, 100_000):
        learner = learner_for(
            method, "ppo", make_sharp_policy(), minute_config, f"optimizer.microbatch_tokens={budget}"
        )
        metrics = learner.update(groups(np.random.default_rng(1), count=4), step=0)
        found.append((metrics, [p.grad for p in learner.policy.parameters() if p.grad is not None]))
    (one, one_gradient), (all_rows, all_gradient) = found
    assert one == pytest.approx(all_rows, rel=1e-3, abs=1e-5)
    for a, b in zip(one_gradient, all_gradient, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-5)


class Watcher(EntropyControl):
    """Marks every token with twice its old log-probability, and checks that each comes back to its token."""

    previews = True

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor, Tensor, int]] = []
        self.drawn: list[int] = []
        self.returned = 0

    def preview(
        self,
        logprobs_N: Tensor,
        old_logprobs_N: Tensor,
        advantages_N: Tensor,
        entropy_N: Tensor,
        trajectory_ids_N: Tensor,
        *,
        generator: torch.Generator,
    ) -> Tensor:
        self.seen.append((logprobs_N, entropy_N, trajectory_ids_N, len(advantages_N)))
        self.drawn.append(int(torch.randint(2**40, (1,), generator=generator)))
        return 2 * old_logprobs_N

    def surrogate(
        self,
        logprobs_N: Tensor,
        old_logprobs_N: Tensor,
        advantages_N: Tensor,
        *,
        clip_low: float,
        clip_high: float,
        dual_clip: float | None,
        marks_N: Tensor | None = None,
    ) -> Surrogate:
        assert marks_N is not None and torch.equal(marks_N, 2 * old_logprobs_N)
        self.returned += len(marks_N)
        return clipped_surrogate(logprobs_N, old_logprobs_N, advantages_N)


def test_preview_sees_the_whole_mini_batch_and_marks_find_their_tokens(
    make_sharp_policy: MakePolicy, minute_config: MakeConfig
):
    made = groups(np.random.default_rng(2), count=4)
    tokens = sum(t.num_tokens for group in made for t in group.trajectories)
    watchers = []
    for budget in (1, 100_000):
        config = minute_config("optimizer.minibatches=2", "optimizer.epochs=2", f"optimizer.microbatch_tokens={budget}")
        watcher = Watcher()
        Learner(make_sharp_policy(), config, watcher).update(made, step=0)
        watchers.append(watcher)
        assert len(watcher.seen) == 4
        sizes = [count for _, _, _, count in watcher.seen]
        assert sizes[0] + sizes[1] == sizes[2] + sizes[3] == tokens
        assert watcher.returned == 2 * tokens
        assert len({int(i) for _, _, ids, _ in watcher.seen[:2] for i in ids}) == sum(len(g.trajectories) for g in made)
        assert all((entropy > 0).all() and not entropy.requires_grad for _, entropy, _, _ in watcher.seen)
    # What is drawn belongs to the step and the mini-batch, not to how it is cut up, and never repeats.
    assert watchers[0].drawn == watchers[1].drawn
    assert len(set(watchers[0].drawn)) == 4
    torch.testing.assert_close(watchers[0].seen[0][0], watchers[1].seen[0][0], rtol=1e-4, atol=1e-5)
