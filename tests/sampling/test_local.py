"""The local sampler against a naive one: full forwards without a cache, whoever else is in the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch

from epo.errors import UserError
from epo.sampling.base import Completion, Request
from epo.sampling.draw import draw_and_score, draw_tokens
from epo.sampling.local import LocalSampler
from epo.training.policy import Policy

MakePolicy = Callable[..., Policy]
TOLERANCE = 1e-4


def request(episode: int, prompt_ids: Sequence[int], *, seed: int | None = None) -> Request:
    random = np.random.default_rng(episode if seed is None else seed)
    return Request(episode=episode, prompt_ids=prompt_ids, random=random)


def draw(
    sampler: LocalSampler, *requests: Request, temperature: float = 1.0, train_temperature: float = 1.0, tokens: int = 8
) -> list[Completion]:
    return sampler.generate(requests, temperature=temperature, train_temperature=train_temperature, max_tokens=tokens)


def words(policy: Policy, *, seed: int, length: int) -> list[int]:
    """Random ids without the end token."""
    return np.random.default_rng(seed).integers(1, policy.head_weight_V_D.shape[0], size=length).tolist()


@torch.no_grad()
def naive_logits(policy: Policy, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> torch.Tensor:
    """[R, V] one full forward of the whole model, no cache, no padding."""
    ids = torch.tensor([[*prompt_ids, *response_ids]])
    return policy.model(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1].double()


def assert_naive(policy: Policy, prompt_ids: Sequence[int], drawn: Completion, *, temperature: float = 1.0) -> None:
    logprobs = torch.log_softmax(naive_logits(policy, prompt_ids, drawn.response_ids.tolist()) / temperature, dim=-1)
    chosen = logprobs[torch.arange(len(drawn.response_ids)), torch.tensor(drawn.response_ids)]
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    np.testing.assert_allclose(drawn.logprobs, chosen.numpy(), atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(drawn.entropy, entropy.numpy(), atol=TOLERANCE, rtol=0)
    stop = policy.chat.stop_id
    assert drawn.finished == (drawn.response_ids[-1] == stop)
    assert stop not in drawn.response_ids[:-1]


def play(
    policy: Policy,
    sampler: LocalSampler,
    episodes: Sequence[int],
    *,
    turns: int,
    train_temperature: float = 1.0,
    temperature: float = 1.0,
) -> dict[int, list[tuple[list[int], Completion]]]:
    """Ragged transcripts; episode e joins in round e % 3 and leaves after `turns` turns."""
    played: dict[int, list[tuple[list[int], Completion]]] = {e: [] for e in episodes}
    prompts = {e: words(policy, seed=e, length=3 + 7 * e % 11) for e in episodes}
    streams = {e: np.random.default_rng([77, e]) for e in episodes}
    for round_ in range(turns + 3):
        live = [e for e in episodes if e % 3 <= round_ and len(played[e]) < turns]
        live.sort(key=lambda e: (e * 5 + round_) % 7)  # the order of the requests says nothing
        requests = [Request(episode=e, prompt_ids=prompts[e], random=streams[e]) for e in live]
        drawn = draw(sampler, *requests, temperature=temperature, train_temperature=train_temperature, tokens=7)
        assert [d.episode for d in drawn] == live
        for e, completion in zip(live, drawn, strict=True):
            played[e].append((prompts[e], completion))
            message = words(policy, seed=100 * e + round_, length=1 + (e + round_) % 6)
            prompts[e] = [*prompts[e], *completion.response_ids.tolist(), *message]
            if len(played[e]) == turns:
                sampler.release(e)
    return played


@pytest.mark.parametrize("prefill_tokens", [1, 40, 4096])
def test_whole_ragged_episodes_agree_with_full_forwards(policy: Policy, prefill_tokens: int) -> None:
    sampler = LocalSampler(policy, max_episodes=6, prefill_tokens=prefill_tokens)
    played = play(policy, sampler, range(6), turns=5)
    lengths = {len(completion.response_ids) for turns in played.values() for _, completion in turns}
    assert len(lengths) > 1  # some responses ended by themselves: the batch was ragged
    for turns in played.values():
        for prompt_ids, completion in turns:
            assert_naive(policy, prompt_ids, completion)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_modules_of_transformers_are_masked_whatever_attention_the_learner_has(
    make_policy: MakePolicy, attention: str
) -> None:
    policy = make_policy()
    policy.model.set_attn_implementation(attention)
    sampler = LocalSampler(policy, max_episodes=4, lean=False)
    for turns in play(policy, sampler, range(4), turns=3).values():
        for prompt_ids, completion in turns:
            assert_naive(policy, prompt_ids, completion)
    assert policy.model.config._attn_implementation == attention


def test_slots_are_used_again_by_later_episodes(policy: Policy) -> None:
    sampler = LocalSampler(policy, max_episodes=2)
    for first in range(0, 6, 2):
        for turns in play(policy, sampler, [first, first + 1], turns=3).values():
            for prompt_ids, completion in turns:
                assert_naive(policy, prompt_ids, completion)


def test_logprobs_are_those_of_the_training_temperature(policy: Policy) -> None:
    played = play(policy, LocalSampler(policy, max_episodes=2), [0, 1], turns=2, temperature=0.4, train_temperature=0.7)
    for turns in played.values():
        for prompt_ids, completion in turns:
            assert_naive(policy, prompt_ids, completion, temperature=0.7)


def test_a_changed_prompt_keeps_the_common_prefix_only(policy: Policy) -> None:
    sampler = LocalSampler(policy, max_episodes=2)
    head = words(policy, seed=1, length=9)
    prompts = [
        [*head, *words(policy, seed=2, length=20)],
        [*head, *words(policy, seed=3, length=4)],  # shorter than what is cached
        [*head, *words(policy, seed=4, length=30)],
        head[:5],  # a prefix of what is cached
        words(policy, seed=5, length=12),  # nothing in common
        words(policy, seed=5, length=12),  # the same again
    ]
    prefilled: list[int] = []
    for number, prompt_ids in enumerate(prompts):
        before = sampler.prefilled_tokens
        (completion,) = draw(sampler, request(0, prompt_ids, seed=number))
        prefilled.append(sampler.prefilled_tokens - before)
        assert_naive(policy, prompt_ids, completion)
    assert prefilled == [29, 4, 30, 1, 12, 1]


def test_only_new_tokens_are_prefilled_across_turns(policy: Policy) -> None:
    sampler = LocalSampler(policy, max_episodes=3)
    played = play(policy, sampler, range(3), turns=4)
    expected = 0
    for turns in played.values():
        expected += len(turns[0][0])
        for (before, completion), (after, _) in pairwise(turns):
            # The message, and the last token drawn, which no forward has read yet.
            expected += len(after) - len(before) - len(completion.response_ids) + 1
    assert sampler.prefilled_tokens == expected
    assert sampler.decoded_tokens == sum(len(c.response_ids) for turns in played.values() for _, c in turns)


def test_draws_do_not_depend_on_the_company(policy: Policy) -> None:
    together = play(policy, LocalSampler(policy, max_episodes=5), range(5), turns=4)
    for episode in range(5):
        alone = play(policy, LocalSampler(policy, max_episodes=1), [episode], turns=4)[episode]
        for (prompt_a, drawn_a), (prompt_b, drawn_b) in zip(alone, together[episode], strict=True):
            assert prompt_a == prompt_b
            assert drawn_a.response_ids.tolist() == drawn_b.response_ids.tolist()
            np.testing.assert_allclose(drawn_a.logprobs, drawn_b.logprobs, atol=TOLERANCE)


def test_temperature_zero_is_argmax(policy: Policy) -> None:
    sampler = LocalSampler(policy, max_episodes=4)
    for episode in range(4):
        prompt_ids = words(policy, seed=episode, length=5 + episode)
        random = np.random.default_rng(0)
        (completion,) = draw(
            sampler, Request(episode=episode, prompt_ids=prompt_ids, random=random), temperature=0.0, tokens=10
        )
        ids = completion.response_ids.tolist()
        assert ids == naive_logits(policy, prompt_ids, ids).argmax(-1).tolist()
        assert random.random() == np.random.default_rng(0).random()  # greedy draws no random numbers
        assert_naive(policy, prompt_ids, completion)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_drawn_frequencies_are_the_softmax(temperature: float) -> None:
    logits = torch.tensor([2.0, 0.5, -1.0, 1.5, 0.0])
    count = 20_000
    uniform = np.random.default_rng(11).random(count).tolist()
    drawn = draw_tokens((logits / temperature).expand(count, -1), uniform)
    observed = torch.bincount(drawn, minlength=5).double()
    weights = [np.exp(x / temperature) for x in logits.tolist()]
    expected = torch.tensor([count * w / sum(weights) for w in weights], dtype=torch.double)
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    assert chi_square < 18.47  # the 99.9 % point with 4 degrees of freedom


def test_a_policy_s_own_first_tokens_are_drawn_by_their_probability(policy: Policy) -> None:
    sampler = LocalSampler(policy, max_episodes=1)
    prompt_ids = words(policy, seed=0, length=6)
    random = np.random.default_rng(3)
    probabilities = torch.softmax(naive_logits(policy, prompt_ids, [1])[0] / 1.5, dim=-1).numpy()
    same = Request(episode=0, prompt_ids=prompt_ids, random=random)
    drawn = [int(draw(sampler, same, temperature=1.5, tokens=1)[0].response_ids[0]) for _ in range(600)]
    group = np.arange(len(probabilities)) % 6
    expected = 600 * np.bincount(group, weights=probabilities)
    observed = np.bincount(group[drawn], minlength=6)
    assert expected.min() > 10
    assert float(((observed - expected) ** 2 / expected).sum()) < 20.52  # the 99.9 % point, 5 degrees of freedom


def test_impossible_tokens_are_never_drawn_at_the_edges() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]] * 4)
    assert draw_tokens(logits, [0.0, 0.4999, 0.5, 1 - 2**-53]).tolist() == [1, 1, 3, 3]


def test_new_weights_drop_old_caches(policy: Policy) -> None:
    sampler = LocalSampler(policy, max_episodes=2)
    prompt_ids = words(policy, seed=0, length=15)
    (before,) = draw(sampler, request(0, prompt_ids), tokens=4)
    assert before.policy_version == 0
    with torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    policy.version += 1
    longer = [*prompt_ids, *before.response_ids.tolist(), *words(policy, seed=9, length=3)]
    prefilled = sampler.prefilled_tokens
    (after,) = draw(sampler, request(0, longer, seed=8))
    assert sampler.prefilled_tokens - prefilled == len(longer)
    assert after.policy_version == 1
    assert_naive(policy, longer, after)
    (fresh,) = draw(LocalSampler(policy, max_episodes=1), request(0, longer, seed=8))
    assert fresh.response_ids.tolist() == after.response_ids.tolist()
    np.testing.assert_allclose(fresh.logprobs, after.logprobs, atol=TOLERANCE)


def test_finished_episodes_stop_and_the_others_go_on(make_policy: MakePolicy) -> None:
    # With a nearly uniform policy over some 300 entries, 120 tokens end by chance in about a third of the episodes.
    policy = make_policy(lively=False)
    drawn = draw(
        LocalSampler(policy, max_episodes=12),
        *[request(e, words(policy, seed=e, length=3 + e), seed=e) for e in range(12)],
        tokens=120,
    )
    finished = [d for d in drawn if d.finished]
    cut = [d for d in drawn if not d.finished]
    assert finished and cut
    assert all(len(d.response_ids) == 120 for d in cut)
    assert len({len(d.response_ids) for d in finished}) > 1
    for number, completion in enumerate(drawn):
        assert_naive(policy, words(policy, seed=number, length=3 + number), completion)


def test_a_response_may_fill_the_context_exactly(make_policy: MakePolicy) -> None:
    policy = make_policy()
    sampler = LocalSampler(policy, max_episodes=2)
    limit = policy.max_context
    full, short = words(policy, seed=0, length=limit - 5), words(policy, seed=1, length=2)
    drawn = draw(sampler, request(0, full), request(1, short), tokens=5)
    assert_naive(policy, full, drawn[0])
    assert_naive(policy, short, drawn[1])
    with pytest.raises(ValueError, match=f"episode 1.*max_context {limit}"):
        draw(sampler, request(1, [*full, 7]), tokens=5)


def test_more_episodes_than_slots_are_refused_until_one_is_released(policy: Policy) -> None:
    sampler = LocalSampler(policy, max_episodes=2)
    draw(sampler, request(0, [5]), request(1, [6]))
    with pytest.raises(ValueError, match="more than 2 live episodes"):
        draw(sampler, request(2, [7]))
    sampler.release(0)
    sampler.release(0)
    sampler.release(99)
    (completion,) = draw(sampler, request(2, [7]))
    assert_naive(policy, [7], completion)


def test_no_requests_no_completions(policy: Policy) -> None:
    assert draw(LocalSampler(policy, max_episodes=1)) == []


def test_padding_behind_a_row_near_the_end_of_the_context_harms_nothing(policy: Policy) -> None:
    sampler = LocalSampler(policy, max_episodes=2)
    full, long = words(policy, seed=0, length=policy.max_context - 10), words(policy, seed=1, length=100)
    draw(sampler, request(0, full[:-2]), tokens=1)
    # Two new tokens next to a hundred: episode 0 is padded far over the end of its slot.
    for completion, prompt_ids in zip(draw(sampler, request(0, full), request(1, long)), (full, long), strict=True):
        assert_naive(policy, prompt_ids, completion)


def test_nothing_is_drawn_from_logits_that_are_not_finite() -> None:
    for bad in (torch.nan, torch.inf):
        logits_B_V = torch.tensor([[0.0, 1.0, 2.0], [0.0, bad, 1.0]])
        with pytest.raises(UserError, match="logits are not finite"):
            draw_and_score(logits_B_V, uniform=[0.5, 0.5], temperature=1.0, train_temperature=1.0)


def test_alternatives_are_the_most_probable_tokens_at_training_temperature(make_policy: MakePolicy) -> None:
    policy = make_policy()
    prompts = {e: words(policy, seed=e, length=5 + 4 * e) for e in range(3)}

    def sample(alternatives: int) -> list[Completion]:
        sampler = LocalSampler(policy, max_episodes=3)
        return sampler.generate(
            [request(e, prompt) for e, prompt in prompts.items()],
            temperature=0.7, train_temperature=1.3, max_tokens=6, alternatives=alternatives,
        )  # fmt: skip

    for plain, drawn, (episode, prompt) in zip(sample(0), sample(4), prompts.items(), strict=True):
        assert plain.alternatives is None and drawn.alternatives is not None
        assert drawn.episode == episode and drawn.response_ids.tolist() == plain.response_ids.tolist()
        np.testing.assert_array_equal(drawn.logprobs, plain.logprobs)
        logits = naive_logits(policy, prompt, drawn.response_ids.tolist())
        for place, expected in enumerate(torch.log_softmax(logits / 1.3, dim=-1).tolist()):
            best = sorted(range(len(expected)), key=lambda i: -expected[i])[:4]
            assert drawn.alternatives.ids_R_M[place].tolist() == best
            np.testing.assert_allclose(
                drawn.alternatives.logprobs_R_M[place], [expected[i] for i in best], atol=TOLERANCE
            )
