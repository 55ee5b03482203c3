"""A step's trajectories as plain data: the records that viewers show, and the index that finds them.

Legend: R tokens of a response.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from epo.types import FloatArray, Trajectory, Turn


def trajectory_record(trajectory: Trajectory, *, step: int, group: int) -> dict[str, Any]:
    """Everything a viewer needs to show what the policy read, wrote and was paid."""
    return {
        "step": step,
        "group": group,
        "task": trajectory.task.id,
        "split": trajectory.task.split,
        "goal": trajectory.task.goal,
        "instruction": trajectory.instruction,
        "stop_reason": trajectory.stop_reason.value,
        "success": trajectory.success,
        "score": trajectory.score,
        "reward": round(trajectory.total_reward, 6),
        "error": trajectory.error,
        "restarts": trajectory.restarts,
        "trained": any(turn.advantages is not None for turn in trajectory.turns),
        "turns": [_turn_record(turn) for turn in trajectory.turns],
    }


def index_entry(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What lists and heat maps need of the `records` of one step.

    `turn_entropy` is the mean entropy per sampled token of turn k over the trajectories that played it, each counting
    alike; `turn_count` is how many did.
    """
    by_turn: list[list[float]] = []
    columns: dict[str, list[Any]] = {name: [] for name in INDEX_COLUMNS}
    for record in records:
        turns = record["turns"]
        entropies = [[h for h in turn["entropy"] if h is not None] for turn in turns]
        for k, entropy_R in enumerate(entropies):
            if k == len(by_turn):
                by_turn.append([])
            if entropy_R:
                by_turn[k].append(statistics.fmean(entropy_R))
        tokens = [h for entropy_R in entropies for h in entropy_R]
        row = {
            **{name: record[name] for name in ("group", "task", "goal", "success", "stop_reason")},
            "reward": round(sum(turn["reward"] for turn in turns), 6),
            "turns": len(turns),
            "invalid": sum(not turn["is_valid"] for turn in turns),
            "tokens": sum(turn.get("response_tokens") or len(turn["response_ids"]) for turn in turns),
            "entropy": round(statistics.fmean(tokens), 5) if tokens else None,
        }
        for name in INDEX_COLUMNS:
            columns[name].append(row[name])
    return {
        "step": records[0]["step"] if records else None,
        "turn_entropy": [round(statistics.fmean(values), 5) if values else None for values in by_turn],
        "turn_count": [len(values) for values in by_turn],
        "columns": columns,
    }


INDEX_COLUMNS = ("group", "task", "goal", "success", "stop_reason", "reward", "turns", "invalid", "tokens", "entropy")


def _turn_record(turn: Turn) -> dict[str, Any]:
    counts = {} if turn.counts is None else {"response_tokens": turn.counts.response}
    return counts | {
        "observation": turn.observation,
        "response": turn.response,
        "action": turn.action,
        "is_valid": turn.is_valid,
        "understood": turn.understood,
        "reward": turn.reward,
        "score": turn.score,
        "dropped_turns": turn.dropped_turns,
        "prompt_tokens": len(turn.prompt_ids) or (turn.counts.prompt if turn.counts else None),
        "response_ids": turn.response_ids.tolist(),
        "logprobs": _rounded(turn.logprobs),
        "entropy": _rounded(turn.entropy),
        "advantages": None if turn.advantages is None else _rounded(turn.advantages),
        "ratios": None if turn.ratios is None else _rounded(turn.ratios),
        "alternatives": None if turn.alternatives is None else _flat(turn),
    }


def _flat(turn: Turn) -> list[list[float | None]]:
    """Per token: id, log-probability, id, log-probability, and so on."""
    assert turn.alternatives is not None
    return [
        [x for pair in zip(ids_M.tolist(), _rounded(logprobs_M), strict=True) for x in pair]
        for ids_M, logprobs_M in zip(*turn.alternatives, strict=True)
    ]


def _rounded(values_R: FloatArray) -> list[float | None]:
    """For strict JSON: what is not finite becomes None."""
    return [round(x, 5) if abs(x) < float("inf") else None for x in values_R.tolist()]
