"""`sampler.old_logprobs=learner`: rescored turns, truncated importance weights, the loss against a float64 loop."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quiet import QuietObserver
from torch import Tensor

from epo.config import Config
from epo.errors import UserError
from epo.objectives import make_control
from epo.reporting.timetable import PHASES
from epo.sampling.base import Completion
from epo.sampling.local import LocalSampler
from epo.training.learner import Learner
from epo.training.policy import Policy
from epo.training.rescoring import truncated_importance_weights
from epo.training.session import train_run
from epo.types import TrajectoryGroup, Turn
from made_up import groups

MakePolicy = Callable[..., Policy]
MakeConfig = Callable[..., Config]
TEMPERATURE = 1.3
COMMON = (
    f"rollout.temperature={TEMPERATURE}",
    "rollout.group_size=2",
    "algorithm.name=grpo",
    "optimizer.minibatches=1",
    "optimizer.grad_clip=1e9",
)


def turns(found: list[TrajectoryGroup]) -> list[Turn]:
    return [turn for group in found for t in group.trajectories for turn in t.turns]


def learner_for(policy: Policy, minute_config: MakeConfig, *options: str) -> Learner:
    return Learner(policy, minute_config(*COMMON, *options), make_control("none"))


def double(model: Any, turn: Turn) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of a turn from its own sequence alone, in the precision of `model`."""
    ids = torch.tensor(np.concatenate([turn.prompt_ids, turn.response_ids]))[None]
    logp = torch.log_softmax(model(ids).logits[0, len(turn.prompt_ids) - 1 : -1] / TEMPERATURE, dim=-1)
    chosen = logp[torch.arange(len(turn.response_ids)), torch.tensor(turn.response_ids)]
    return chosen, -(logp.exp() * logp).sum(-1)


def drawn_near(policy: Policy, found: list[TrajectoryGroup], *, noise: float) -> None:
    """Sampling statistics of `policy` with uniform noise of that width, as of an engine with other numerics."""
    rng = np.random.default_rng(9)
    model = copy.deepcopy(policy.model).double()
    with torch.no_grad():
        for turn in turns(found):
            logp, entropy = double(model, turn)
            turn.logprobs = (logp.numpy() + rng.uniform(-noise, noise, size=len(logp))).astype(np.float32)
            turn.entropy = entropy.numpy().astype(np.float32)


def quantile(values: list[float], share: float) -> float:
    """By hand: the sorted values, and a straight line between neighbours."""
    ordered, place = sorted(values), share * (len(values) - 1)
    below = int(place)
    return ordered[below] + (place - below) * (ordered[min(below + 1, len(values) - 1)] - ordered[below])


def gradients(policy: Policy) -> list[Tensor]:
    return [p.grad.clone() for p in policy.parameters() if p.grad is not None]


def test_rescoring_replaces_entropies_and_leaves_the_rest(make_sharp_policy: MakePolicy, minute_config: MakeConfig):
    policy, found = make_sharp_policy(), groups(np.random.default_rng(0))
    before = copy.deepcopy(found)
    for turn in turns(found):
        turn.entropy = np.full_like(turn.entropy, np.nan)
    rescored = learner_for(policy, minute_config, "sampler.old_logprobs=learner").rescore(found)
    model = copy.deepcopy(policy.model).double()
    assert len(turns(list(rescored))) == len(turns(before))
    for old, new in zip(turns(before), turns(list(rescored)), strict=True):
        logp, entropy = double(model, old)
        assert new.learner_logprobs is not None
        np.testing.assert_allclose(new.learner_logprobs, logp.detach().numpy(), atol=2e-5)
        np.testing.assert_allclose(new.entropy, entropy.detach().numpy(), atol=2e-5)
        np.testing.assert_array_equal(new.logprobs, old.logprobs)
        np.testing.assert_array_equal(new.response_ids, old.response_ids)
        assert new.reward == old.reward
    assert all(np.isnan(turn.entropy).all() for turn in turns(found)), "the argument was changed"


def test_sampler_variant_hands_the_groups_on(make_sharp_policy: MakePolicy, minute_config: MakeConfig):
    found = groups(np.random.default_rng(0))
    assert learner_for(make_sharp_policy(), minute_config).rescore(found) is found


def test_equal_numerics_need_no_correction(make_sharp_policy: MakePolicy, minute_config: MakeConfig):
    results = []
    for who in ("sampler", "learner"):
        policy, found = make_sharp_policy(), groups(np.random.default_rng(1))
        drawn_near(policy, found, noise=0.0)
        learner = learner_for(policy, minute_config, f"sampler.old_logprobs={who}")
        metrics = learner.update(learner.rescore(found), step=2)
        results.append((metrics, gradients(policy), [p.detach().clone() for p in policy.parameters()]))
    (plain, plain_gradient, _), (corrected, gradient, _) = results
    assert corrected["sampler/importance_mean"] == pytest.approx(1.0, abs=1e-5)
    assert corrected["sampler/importance_truncated"] == 0
    assert corrected["sampler/mismatch_max"] < 1e-4 and corrected["sampler/mismatch_kl"] < 1e-8
    assert 1 - 1e-4 < corrected["sampler/ratio_p01"] <= corrected["sampler/ratio_p99"] < 1 + 1e-4
    assert corrected["sampler/ratio_outside"] == 0
    assert corrected["policy/loss"] == pytest.approx(plain["policy/loss"], abs=1e-5)
    for a, b in zip(plain_gradient, gradient, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("cap", "asked"),
    [(1.1, "sampler.old_logprobs=learner"), (4.0, "sampler.old_logprobs=learner"), (1.1, "cluster.max_staleness=4")],
)
def test_loss_with_shifted_sampler_is_that_of_a_loop(
    cap: float, asked: str, make_sharp_policy: MakePolicy, minute_config: MakeConfig
):
    """mean over tokens of min(exp(learner - sampler), cap) * clipped surrogate whose ratio is 1 in value.

    Its gradient is that of -w A log pi with w held constant: a weight that let the gradient through would add to it.
    """
    policy, found = make_sharp_policy(), groups(np.random.default_rng(2))
    drawn_near(policy, found, noise=0.6)
    plain = copy.deepcopy(policy.model).double()
    losses, surrogates, weights, ratios = [], [], [], []
    for group in found:
        rewards = [t.total_reward for t in group.trajectories]
        mean, std = np.mean(rewards), np.std(rewards, ddof=1)
        for t, reward in zip(group.trajectories, rewards, strict=True):
            advantage = float((reward - mean) / (std + 1e-6))
            for turn in t.turns:
                logp, _ = double(plain, turn)
                for i in range(len(turn.response_ids)):
                    ratio = math.exp(logp[i].item() - float(turn.logprobs[i]))
                    ratios.append(ratio)
                    weights.append(min(ratio, cap))
                    losses.append(-weights[-1] * advantage)
                    surrogates.append(-weights[-1] * advantage * logp[i])
    torch.stack(surrogates).mean().backward()
    learner = learner_for(policy, minute_config, asked, f"sampler.importance_cap={cap}")
    policy.version = 7
    drawn: list[int] = []  # how old the weights of each token are
    for number, turn in enumerate(turns(found)):
        turn.policy_version = 7 - number % 5
        drawn += [number % 5] * len(turn.response_ids)
    metrics = learner.update(learner.rescore(found), step=2)
    if asked == "cluster.max_staleness=4":
        assert metrics["sampler/staleness"] == pytest.approx(np.mean(drawn))
        assert metrics["sampler/staleness_max"] == 4
    else:
        assert "sampler/staleness" not in metrics
    assert metrics["policy/loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert metrics["sampler/importance_mean"] == pytest.approx(np.mean(weights), abs=1e-5)
    assert metrics["sampler/importance_truncated"] == pytest.approx(np.mean([r > cap for r in ratios]), abs=1e-6)
    assert (metrics["sampler/importance_truncated"] > 0.1) == (cap < 2)
    logs = np.log(ratios)
    assert metrics["sampler/mismatch_kl"] == pytest.approx(np.mean(np.exp(logs) - 1 - logs), rel=1e-3)
    assert metrics["sampler/mismatch_max"] == pytest.approx(np.abs(logs).max(), rel=1e-3)
    assert metrics["sampler/ratio_p01"] == pytest.approx(quantile(ratios, 0.01), rel=1e-4)
    assert metrics["sampler/ratio_p99"] == pytest.approx(quantile(ratios, 0.99), rel=1e-4)
    assert metrics["sampler/ratio_p99"] > 1.5, "it is that before truncation"
    outside = sum(not 0.9 <= ratio <= 1.1 for ratio in ratios) / len(ratios)
    assert metrics["sampler/ratio_outside"] == pytest.approx(outside, abs=1e-6) and 0.5 < outside < 1
    expected = [p.grad for p in plain.parameters() if p.grad is not None]
    assert max(float(g.abs().max()) for g in expected) > 1e-3
    for found_gradient, gradient in zip(gradients(policy), expected, strict=True):
        scale = max(1.0, float(gradient.abs().max()))
        assert float((found_gradient.double() - gradient).abs().max()) <= 2e-5 * scale


def test_sampler_variant_ignores_the_cap_and_says_the_mismatch(
    make_sharp_policy: MakePolicy, minute_config: MakeConfig
):
    policy, found = make_sharp_policy(), groups(np.random.default_rng(3))
    drawn_near(policy, found, noise=0.3)
    metrics = learner_for(policy, minute_config).update(found, step=0)
    assert 0.2 < metrics["sampler/mismatch_max"] <= 0.3 + 1e-4
    assert 0 < metrics["sampler/mismatch_kl"] < 0.1
    assert 0.7 < metrics["sampler/ratio_p01"] < 0.85 and 1.2 < metrics["sampler/ratio_p99"] < 1.4
    assert not any(name.startswith("sampler/importance") for name in metrics)


def test_weights_are_constants_and_bounded():
    learner_N = torch.tensor([-1.0, -2.0, -50.0, -1.0], requires_grad=True)
    sampler_N = torch.tensor([-1.0, -3.0, -1.0, -200.0])
    weights_N = truncated_importance_weights(learner_N, sampler_N, cap=2.0)
    assert not weights_N.requires_grad
    assert weights_N.tolist() == pytest.approx([1.0, 2.0, 0.0, 2.0], abs=1e-6)


@pytest.mark.parametrize(("name", "who", "expected"), [
    ("local", "auto", False), ("local", "sampler", False), ("local", "learner", True), ("vllm", "auto", True),
    ("vllm", "learner", True),
])  # fmt: skip
def test_auto_follows_the_sampler(name: str, who: str, expected: bool, minute_config: MakeConfig):
    config = minute_config(f"sampler.name={name}", f"sampler.old_logprobs={who}")
    assert config.is_rescored is expected


def test_vllm_without_the_learners_entropies_is_refused(minute_config: MakeConfig):
    with pytest.raises(UserError, match=r"sampler\.old_logprobs"):
        minute_config("sampler.name=vllm", "sampler.old_logprobs=sampler")


class Forgetful(LocalSampler):
    """Like an inference engine: it cannot tell entropies, and its log-probabilities are a little off."""

    def generate(self, *args: Any, **kwargs: Any) -> list[Completion]:
        return [
            replace(found, entropy=np.full_like(found.entropy, np.nan), logprobs=found.logprobs - np.float32(0.01))
            for found in super().generate(*args, **kwargs)
        ]


def test_run_with_a_sampler_that_knows_no_entropies(
    minute_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Metrics, records and the history of EPO hold the learner's entropies; the phases add up to the step."""
    monkeypatch.setattr("epo.training.trainer.LocalSampler", Forgetful)
    config = minute_config("steps=2", "evaluation.every=0", "sampler.old_logprobs=learner", "entropy.method=epo")
    train_run(config, tmp_path / "run", QuietObserver(), resume=False)
    recorded = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for number, metrics in enumerate(recorded, start=1):
        file = tmp_path / "run" / "trajectories" / f"step_{number:06d}.jsonl"
        records = [json.loads(line) for line in file.read_text().splitlines()]
        entropies = [h for record in records for turn in record["turns"] for h in turn["entropy"]]
        assert np.isfinite(entropies).all()
        assert metrics["entropy/mean"] == pytest.approx(np.mean(entropies), abs=1e-4)
        assert metrics["sampler/mismatch_max"] == pytest.approx(0.01, abs=1e-3)
        assert metrics["sampler/importance_mean"] == pytest.approx(math.exp(0.01), abs=1e-3)
        assert sum(metrics[f"time/{name}"] for name in PHASES) == pytest.approx(metrics["time/step"], rel=0.01)
        assert metrics["time/old_logprobs"] > 0 and metrics["time/backward"] > 0 and metrics["time/values"] > 0
        assert 0 <= metrics["time/other"] < 0.5 * metrics["time/step"]
    assert recorded[1]["entropy/reference"] == pytest.approx(recorded[0]["entropy/mean"], rel=1e-4)
