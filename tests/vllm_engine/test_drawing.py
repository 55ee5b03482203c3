"""What the engine draws, and what it says of it, against plain forward passes of the learner's model."""

from __future__ import annotations

import numpy as np
import pytest
from engines import draw, largest_difference, prompts

from epo.errors import UserError
from epo.sampling.base import Request
from epo.sampling.vllm import VllmSampler
from epo.training.policy import Policy

Shared = tuple[Policy, VllmSampler]


@pytest.mark.parametrize(("temperature", "train_temperature"), [(1.0, 1.0), (0.7, 0.7), (0.4, 1.3), (0.0, 1.0)])
def test_log_probabilities_are_those_at_training_temperature(
    shared: Shared, temperature: float, train_temperature: float
):
    policy, sampler = shared
    asked = prompts(6)
    drawn = draw(sampler, asked, temperature=temperature, train_temperature=train_temperature)
    assert largest_difference(policy, asked, drawn, temperature=train_temperature) < 1e-3
    if temperature != train_temperature:  # they are not those of the distribution that was drawn from
        assert largest_difference(policy, asked, drawn, temperature=temperature or 0.01) > 0.1
    assert all(np.isnan(c.entropy).all() and len(c.entropy) == len(c.response_ids) for c in drawn)
    assert {c.policy_version for c in drawn} == {policy.version}


@pytest.mark.parametrize("alternatives", [0, 4])
def test_alternatives_are_the_likeliest_tokens(shared: Shared, alternatives: int):
    import torch

    policy, sampler = shared
    asked = prompts(3)
    requests = [Request(episode=i, prompt_ids=ids, random=np.random.default_rng([7, i])) for i, ids in enumerate(asked)]
    drawn = sampler.generate(requests, temperature=1.3, train_temperature=0.8, max_tokens=5, alternatives=alternatives)
    for prompt, completion in zip(asked, drawn, strict=True):
        if not alternatives:
            assert completion.alternatives is None
            continue
        assert completion.alternatives is not None
        ids = torch.tensor([[*prompt, *completion.response_ids.tolist()]])
        with torch.inference_mode():
            logits_R_V = policy.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double()
        expected = torch.log_softmax(logits_R_V / 0.8, dim=-1).topk(alternatives)
        np.testing.assert_array_equal(completion.alternatives.ids_R_M, expected.indices.numpy())
        np.testing.assert_allclose(completion.alternatives.logprobs_R_M, expected.values.numpy(), atol=1e-3)


def test_tokens_are_drawn_at_the_temperature_asked_for(shared: Shared):
    """Of 800 first tokens after one prompt, in bins of about equal probability (chi-squared, 7 degrees of freedom)."""
    import torch

    policy, sampler = shared
    (prompt,) = prompts(1)
    with torch.inference_mode():
        logits_V = policy.model(input_ids=torch.tensor([prompt])).logits[0, -1].double()
    probability_V = torch.softmax(logits_V / 0.8, dim=-1).numpy()
    order = np.argsort(-probability_V)
    bins_V = np.empty(len(order), dtype=int)
    bins_V[order] = np.minimum(7, (np.cumsum(probability_V[order]) * 8).astype(int))
    expected = np.bincount(bins_V, weights=probability_V, minlength=8) * 800
    asked = [prompt] * 100
    drawn = [c for seed in range(8) for c in draw(sampler, asked, seed=seed, temperature=0.8, tokens=1)]
    found = np.bincount(bins_V[[c.response_ids[0] for c in drawn]], minlength=8)
    filled = expected > 5
    assert ((found - expected)[filled] ** 2 / expected[filled]).sum() < 24.3  # the 99.9 % point


def test_an_episode_draws_the_same_whoever_is_beside_it(shared: Shared):
    _, sampler = shared
    asked = prompts(5)
    first, again = draw(sampler, asked), draw(sampler, asked)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.response_ids, b.response_ids)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
    other = draw(sampler, asked, seed=1)
    assert any(a.response_ids.tolist() != b.response_ids.tolist() for a, b in zip(first, other, strict=True))
    (alone,) = draw(sampler, asked[:1])
    assert alone.response_ids.tolist() == first[0].response_ids.tolist()


def test_a_response_ends_at_the_stop_token_or_at_the_limit(shared: Shared):
    policy, sampler = shared
    drawn = draw(sampler, prompts(64), tokens=20)
    stop = policy.chat.stop_id
    for completion in drawn:
        ids = completion.response_ids.tolist()
        assert completion.finished == (ids[-1] == stop) and stop not in ids[:-1]
        assert completion.finished or len(ids) == 20
        assert len(completion.logprobs) == len(ids)
    assert {c.finished for c in drawn} == {True, False}


def test_nothing_asked_nothing_drawn(shared: Shared):
    assert draw(shared[1], []) == []


def test_a_prompt_that_leaves_no_room_is_refused(shared: Shared):
    policy, sampler = shared
    fits = prompts(1, length=policy.max_context - 4)
    assert len(draw(sampler, fits, tokens=4)[0].response_ids) <= 4
    with pytest.raises(ValueError, match=f"episode 0: .* max_context {policy.max_context}"):
        draw(sampler, fits, tokens=5)


def test_a_temperature_that_vllm_would_change_is_refused(shared: Shared):
    with pytest.raises(UserError, match=r"temperature 0\.005 is too close to 0 .* set it to 0"):
        draw(shared[1], prompts(1), temperature=0.005)


def test_later_turns_find_the_earlier_ones_in_the_cache(shared: Shared):
    """All whole blocks of 32 tokens of the last prompt and response."""
    policy, sampler = shared
    policy.version += 1  # an empty cache to begin with
    asked = prompts(4, length=70, seed=9)
    drawn = draw(sampler, asked, tokens=12)
    for _ in range(2):
        before = sampler.cached_tokens, sampler.prefilled_tokens
        # The last token drawn was never fed to the model.
        known = [len(p) + len(c.response_ids) - 1 for p, c in zip(asked, drawn, strict=True)]
        asked = [[*p, *c.response_ids.tolist(), 5, 6, 7] for p, c in zip(asked, drawn, strict=True)]
        drawn = draw(sampler, asked, tokens=12)
        cached = sum(n // 32 * 32 for n in known)
        assert sampler.cached_tokens - before[0] == cached > 0
        assert sampler.prefilled_tokens - before[1] == sum(map(len, asked)) - cached
        assert largest_difference(policy, asked, drawn) < 1e-3
