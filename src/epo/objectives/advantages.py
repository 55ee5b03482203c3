"""Advantages of one trajectory from a critic. Those without a critic are in `groups.py`.

The functions for a trajectory take its trained tokens in order and one reward per turn, and differ in how far credit
travels:

    within_turn_gae   inside one turn; a turn's reward never reaches an earlier turn
    trajectory_gae    token by token through the whole trajectory
    turn_gae          turn by turn; the tokens of a turn share its advantage
    bilevel_gae       turn by turn, then token by token inside each turn

values_N[i] is the value of the state in which token i is chosen. Nothing here carries a gradient.

Legend for tensor suffixes: _N trained tokens of one trajectory, _T its turns, _S any sequence of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import NamedTuple, cast

import torch
from torch import Tensor


class Advantages(NamedTuple):
    """Aligned with the values they were computed from."""

    advantages_N: Tensor
    returns_N: Tensor
    """Targets of the critic."""


def gae(
    rewards_S: Tensor, values_S: Tensor, *, gamma: float = 1.0, lam: float = 1.0, last_value: float = 0.0
) -> Advantages:
    """Generalised advantage estimation along one sequence (Schulman et al., arXiv 1506.02438).

    delta_s = r_s + gamma V_{s+1} - V_s; A_s = sum_l (gamma lam)^l delta_{s+l}; return = A + V.

    Args:
        rewards_S: [S] reward received after step s.
        values_S: [S] value of the state before step s.
        gamma: discount per step, in [0, 1].
        lam: trace decay per step, in [0, 1].
        last_value: value of the state after the last step; 0 where the episode really ended.

    Returns:
        [S] advantages and returns in the dtype of the values.

    Raises:
        ValueError: lengths differ, or a number out of its range.
    """
    _check_discounts(gamma=gamma, lam=lam)
    if rewards_S.shape != values_S.shape or values_S.dim() != 1:
        raise ValueError(f"rewards and values must both be [S], got {list(rewards_S.shape)} and {list(values_S.shape)}")
    rewards, values = _floats(rewards_S), _floats(values_S)
    return _like(values_S, *_recursion(rewards, values, gamma=gamma, lam=lam, last_value=last_value))


def within_turn_gae(
    rewards_T: Sequence[float] | Tensor, values_N: Tensor, turn_ids_N: Tensor, *, gamma: float = 1.0, lam: float = 1.0
) -> Advantages:
    """GAE inside each turn, its reward on its last token and value 0 after it.

    With gamma = lam = 1 this is A_i = r_t - V_i. Credit crosses turns only through `rewards_T`: with the whole
    episode's reward on every turn this is the PPO of the EPO release.

    Args:
        rewards_T: [T] one per turn that has tokens, in order.
        values_N: [N].
        turn_ids_N: [N] non-decreasing.
        gamma: discount per token.
        lam: trace decay per token.

    Raises:
        ValueError: lengths that do not fit, turns out of order, or a number out of its range.
    """
    _check_discounts(gamma=gamma, lam=lam)
    rewards, values, spans = _turns(rewards_T, values_N, turn_ids_N)
    return _inside_turns(rewards, values, spans, values_N, gamma=gamma, lam=lam)


def trajectory_gae(
    rewards_T: Sequence[float] | Tensor,
    values_N: Tensor,
    turn_ids_N: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    last_value: float = 0.0,
) -> Advantages:
    """GAE over all trained tokens of the trajectory as one sequence, each turn's reward on its last token.

    Args:
        rewards_T: [T] one per turn that has tokens, in order.
        values_N: [N].
        turn_ids_N: [N] non-decreasing.
        gamma: discount per token.
        lam: trace decay per token.
        last_value: value of the state after the last turn; 0 where the episode really ended.

    Raises:
        ValueError: lengths that do not fit, turns out of order, or a number out of its range.
    """
    _check_discounts(gamma=gamma, lam=lam)
    rewards, values, spans = _turns(rewards_T, values_N, turn_ids_N)
    token_rewards = [0.0] * len(values)
    for reward, (_, stop) in zip(rewards, spans, strict=True):
        token_rewards[stop - 1] = reward
    return _like(values_N, *_recursion(token_rewards, values, gamma=gamma, lam=lam, last_value=last_value))


def turn_gae(
    rewards_T: Sequence[float] | Tensor,
    values_N: Tensor,
    turn_ids_N: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    last_value: float = 0.0,
) -> Advantages:
    """GAE over turns as the steps of the decision process (Turn-PPO, arXiv 2512.17008).

    delta_t = r_t + gamma V_{t+1} - V_t with V_t the value at the first token of turn t: what was expected before the
    agent wrote anything. All tokens of a turn share A_t and the return A_t + V_t.

    Args:
        rewards_T: [T] one per turn that has tokens, in order.
        values_N: [N]; only the first of each turn is read.
        turn_ids_N: [N] non-decreasing.
        gamma: discount per turn.
        lam: trace decay per turn.
        last_value: value of the state after the last turn; 0 where the episode really ended.

    Raises:
        ValueError: lengths that do not fit, turns out of order, or a number out of its range.
    """
    _check_discounts(gamma=gamma, lam=lam)
    rewards, values, spans = _turns(rewards_T, values_N, turn_ids_N)
    starts = [values[start] for start, _ in spans]
    advantages, returns = _recursion(rewards, starts, gamma=gamma, lam=lam, last_value=last_value)
    lengths = [stop - start for start, stop in spans]
    return _like(values_N, _spread(advantages, lengths), _spread(returns, lengths))


def bilevel_gae(
    rewards_T: Sequence[float] | Tensor,
    values_N: Tensor,
    turn_ids_N: Tensor,
    *,
    gamma_turn: float = 0.95,
    lam_turn: float = 1.0,
    gamma_token: float = 1.0,
    lam_token: float = 1.0,
    last_value: float = 0.0,
) -> Advantages:
    """GAE over turns, then inside each turn towards what the first level says the turn was worth (VAGEN).

    First level: delta_t = r_t + gamma_turn V_{t+1} - V_t with V_t the value at the last token of turn t. Second level:
    within-turn GAE with A_t + V_t as the turn's reward, so its last token gets exactly A_t. The published code has one
    lambda for both levels, and in one version takes for a turn's end every token with a reward other than 0, so that
    turns without a reward merge with the next; here every turn ends.

    Args:
        rewards_T: [T] one per turn that has tokens, in order.
        values_N: [N].
        turn_ids_N: [N] non-decreasing.
        gamma_turn: discount per turn.
        lam_turn: trace decay per turn.
        gamma_token: discount per token inside a turn.
        lam_token: trace decay per token inside a turn.
        last_value: value of the state after the last turn; 0 where the episode really ended.

    Raises:
        ValueError: lengths that do not fit, turns out of order, or a number out of its range.
    """
    _check_discounts(gamma_turn=gamma_turn, lam_turn=lam_turn, gamma_token=gamma_token, lam_token=lam_token)
    rewards, values, spans = _turns(rewards_T, values_N, turn_ids_N)
    ends = [values[stop - 1] for _, stop in spans]
    _, worths = _recursion(rewards, ends, gamma=gamma_turn, lam=lam_turn, last_value=last_value)
    return _inside_turns(worths, values, spans, values_N, gamma=gamma_token, lam=lam_token)


def whiten(advantages_N: Tensor, *, centre: bool = True, eps: float = 1e-8) -> Tensor:
    """Scale to standard deviation 1 over all tokens given, and to mean 0.

    Args:
        advantages_N: [N] of the whole global batch: a micro-batch would be scaled by its own statistics.
        centre: subtract the mean; without it only the scale changes and no sign flips.
        eps: added to the unbiased variance.

    Returns:
        [N]; all zero (or unchanged without `centre`) for fewer than two tokens or equal advantages.
    """
    advantages_N = advantages_N.detach()
    if len(advantages_N) < 2 or bool(advantages_N.min() == advantages_N.max()):
        return torch.zeros_like(advantages_N) if centre else advantages_N.clone()
    shifted_N = advantages_N - advantages_N.mean() if centre else advantages_N
    return shifted_N * torch.rsqrt(advantages_N.var() + eps)


def _recursion(
    rewards: list[float], values: list[float], *, gamma: float, lam: float, last_value: float
) -> tuple[list[float], list[float]]:
    """Advantages and returns of one sequence. Plain floats: far faster than tensors of one element."""
    advantages = [0.0] * len(values)
    advantage, next_value = 0.0, last_value
    for index in reversed(range(len(values))):
        advantage = rewards[index] + gamma * next_value - values[index] + gamma * lam * advantage
        advantages[index], next_value = advantage, values[index]
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def _inside_turns(
    rewards: list[float],
    values: list[float],
    spans: list[tuple[int, int]],
    values_N: Tensor,
    *,
    gamma: float,
    lam: float,
) -> Advantages:
    advantages: list[float] = []
    returns: list[float] = []
    for reward, (start, stop) in zip(rewards, spans, strict=True):
        token_rewards = [0.0] * (stop - start - 1) + [reward]
        found = _recursion(token_rewards, values[start:stop], gamma=gamma, lam=lam, last_value=0.0)
        advantages += found[0]
        returns += found[1]
    return _like(values_N, advantages, returns)


def _turns(
    rewards_T: Sequence[float] | Tensor, values_N: Tensor, turn_ids_N: Tensor
) -> tuple[list[float], list[float], list[tuple[int, int]]]:
    """Rewards, values, and the [start, stop) of each turn's tokens."""
    if values_N.shape != turn_ids_N.shape or values_N.dim() != 1:
        raise ValueError(
            f"values and turn_ids must both be [N], got {list(values_N.shape)} and {list(turn_ids_N.shape)}"
        )
    if bool((turn_ids_N.diff() < 0).any()):
        raise ValueError("turn_ids must not decrease: give the tokens of one trajectory in order")
    lengths = [len(list(tokens)) for _, tokens in groupby(_floats(turn_ids_N))]
    rewards = _floats(rewards_T)
    if len(rewards) != len(lengths):
        raise ValueError(f"rewards must have one entry per turn with tokens: {len(lengths)}, got {len(rewards)}")
    stops = list(accumulate(lengths))
    spans = [(stop - length, stop) for stop, length in zip(stops, lengths, strict=True)]
    return rewards, _floats(values_N), spans


def _floats(numbers: Sequence[float] | Tensor) -> list[float]:
    if isinstance(numbers, Tensor):
        return cast("list[float]", numbers.detach().double().tolist())  # pyright: ignore[reportUnknownMemberType]
    return [float(number) for number in numbers]


def _spread(per_turn: list[float], lengths: list[int]) -> list[float]:
    return [value for value, length in zip(per_turn, lengths, strict=True) for _ in range(length)]


def _like(values: Tensor, advantages: list[float], returns: list[float]) -> Advantages:
    def tensor(numbers: list[float]) -> Tensor:
        return torch.tensor(numbers, dtype=values.dtype, device=values.device)

    return Advantages(tensor(advantages), tensor(returns))


def _check_discounts(**discounts: float) -> None:
    for name, value in discounts.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {value}")
