"""The mutual information of prompt and response: against enumeration, against plain passes, and where it must be 0."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from epo.config import Config
from epo.training.input_dependence import cross_scores, dependence, dependence_metrics, sample_turns
from epo.training.passes import Passes
from epo.training.policy import Policy
from epo.types import TrajectoryGroup, Turn
from made_up import groups, trajectory


def turns(*prompts: list[int], responses: list[list[int]]) -> list[Turn]:
    made = trajectory(np.random.default_rng(0), turns=1).turns[0]
    found = []
    for prompt, response in zip(prompts, responses, strict=True):
        zeros = np.zeros(len(response), dtype=np.float32)
        fields = {name: getattr(made, name) for name in ("observation", "response", "action", "is_valid")}
        ids = {"prompt_ids": np.array(prompt), "response_ids": np.array(response)}
        found.append(Turn(**ids, logprobs=zeros, entropy=zeros, **fields))
    return found


def test_its_expectation_is_the_mutual_information_by_enumeration():
    """Two tokens of three, all nine responses; three prompts, one policy per prompt, written down as tables."""
    generator = torch.Generator().manual_seed(0)
    first_X_V = torch.randn(3, 3, generator=generator, dtype=torch.float64).softmax(-1)
    second_X_V_V = torch.randn(3, 3, 3, generator=generator, dtype=torch.float64).softmax(-1)
    joint_X_Z = (first_X_V[:, :, None] * second_X_V_V).flatten(1)  # p(z | x)
    mixture_Z = joint_X_Z.mean(0)
    exact = sum(
        (1 / 3) * joint_X_Z[x, z].item() * math.log(joint_X_Z[x, z].item() / mixture_Z[z].item())
        for x in range(3)
        for z in range(9)
    )
    expected = 0.0
    for drawn in itertools.product(range(9), repeat=3):  # one response per prompt, each as likely as the policy says
        probability = math.prod(joint_X_Z[x, z].item() for x, z in enumerate(drawn))
        scores_M_M = joint_X_Z[:, list(drawn)].log().T
        found = dependence(scores_M_M, torch.tensor([2, 2, 2]))
        expected += probability * found["input/mutual_information"]
        assert found["input/mutual_information_per_token"] == pytest.approx(found["input/mutual_information"] / 2)
    assert 0.05 < exact < math.log(3)
    assert expected == pytest.approx(exact, abs=1e-12)


def test_retrieval_by_hand():
    scores_M_M = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0], [-5.0, -4.0, -4.0]], dtype=torch.float64)
    found = dependence(scores_M_M, torch.tensor([1, 2, 5]))
    # The first finds its prompt, the second another's, the third guesses between two.
    assert found["input/retrieval_accuracy"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert found["input/retrieval_chance"] == pytest.approx(1 / 3)
    mixtures = [math.log(sum(math.exp(s) for s in row) / 3) for row in scores_M_M.tolist()]
    gains = [-1 - mixtures[0], -2 - mixtures[1], -4 - mixtures[2]]
    assert found["input/mutual_information"] == pytest.approx(sum(gains) / 3, abs=1e-12)
    assert found["input/mutual_information_per_token"] == pytest.approx(sum(gains) / 8, abs=1e-12)


def plain_scores(made: list[Turn], policy: Policy, *, temperature: float) -> Tensor:
    """One sequence at a time, a softmax written out, in float64."""
    model = policy.model.double()
    found = torch.zeros(len(made), len(made), dtype=torch.float64)
    for i, j in itertools.product(range(len(made)), repeat=2):
        prompt, response = made[j].prompt_ids.tolist(), made[i].response_ids.tolist()
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0].double() / temperature
        for place, token in enumerate(response, start=len(prompt)):
            found[i, j] += logits[place - 1][token] - logits[place - 1].exp().sum().log()
    model.float()
    return found


@torch.no_grad()
def test_scores_are_those_of_plain_passes(
    make_sharp_policy: Callable[..., Policy], minute_config: Callable[..., Config]
):
    policy = make_sharp_policy()
    made = turns([5, 9, 7], [8, 4], [6, 11, 12, 13], responses=[[20, 21], [30], [40, 41, 42]])
    for budget in (16, 8192):
        config = minute_config("rollout.temperature=0.7", f"optimizer.microbatch_tokens={budget}")
        found = cross_scores(made, policy, Passes(config))
        torch.testing.assert_close(found, plain_scores(made, policy, temperature=0.7), rtol=1e-5, atol=1e-4)


def test_a_policy_that_ignores_its_prompt_has_none(policy: Policy, minute_config: Callable[..., Config]):
    """Without attention a token sees only the one before it, and all prompts end in the same token."""
    made = turns([5, 9, 7], [8, 4, 7], [6, 11, 12, 7], responses=[[20, 21], [30], [40, 41, 42]])
    lengths_M = torch.tensor([2, 1, 3])
    passes = Passes(minute_config())
    attentive = dependence(cross_scores(made, policy, passes), lengths_M)
    assert attentive["input/mutual_information"] != pytest.approx(0, abs=0.1)
    for name, parameter in policy.model.named_parameters():
        if "o_proj" in name:
            parameter.data.zero_()
    policy.version += 1
    blind = dependence(cross_scores(made, policy, passes), lengths_M)
    assert blind["input/mutual_information"] == pytest.approx(0, abs=1e-4)
    assert blind["input/retrieval_accuracy"] == pytest.approx(1 / 3)


def test_a_sample_has_different_tasks_different_prompts_and_room(minute_config: Callable[..., Config]):
    config = minute_config("health.prompts=4", "model.max_context=30", "agent.max_response_tokens=6")
    made = groups(np.random.default_rng(1), count=6, size=2)
    made += groups(np.random.default_rng(2), count=1)  # a task that was drawn twice
    owner = {id(turn): g.task.id for g in made for t in g.trajectories for turn in t.turns}
    seen = set()
    for step in range(300):
        sample = sample_turns(made, config, step=step)
        again = sample_turns(made, config, step=step)
        assert [id(t) for t in sample] == [id(t) for t in again]
        assert len({tuple(t.prompt_ids.tolist()) for t in sample}) == len(sample) == 4
        assert len({owner[id(t)] for t in sample}) == 4
        assert all(len(t.prompt_ids) + 6 <= 30 for t in sample)
        seen |= {id(t) for t in sample}
    fitting = set(owner) - {
        id(turn) for g in made for t in g.trajectories for turn in t.turns if len(turn.prompt_ids) > 24
    }
    assert seen == fitting


def test_fewer_than_two_prompts_say_nothing(policy: Policy, minute_config: Callable[..., Config]):
    config = minute_config()
    one = groups(np.random.default_rng(1), count=1)
    assert dependence_metrics(one, policy, Passes(config), config, step=0) == {}
    twice = [
        TrajectoryGroup(task=g.task, trajectories=one[0].trajectories[:1]) for g in groups(np.random.default_rng(2))
    ]
    for g in twice:
        g.trajectories[0].turns[1:] = []
    assert dependence_metrics(twice, policy, Passes(config), config, step=0) == {}
