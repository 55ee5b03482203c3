"""Seconds of a step by what they were spent on, under `time/*`."""

from __future__ import annotations

from collections.abc import Mapping

PHASES = (
    "environment",
    "prefill",
    "decode",
    "sampling_rest",
    "workers",
    "old_logprobs",
    "values",
    "reference",
    "health",
    "update",
    "other",
)
"""They add up to the step."""
UPDATE_PARTS = ("forward", "backward", "optimizer")
"""They add up to `update`."""
_LABELS = {
    "sampling_rest": "sampling, rest",
    "workers": "rollout workers",
    "old_logprobs": "old log-probs",
    "health": "mutual information",
}


def time_metrics(
    seconds: Mapping[str, float], *, step_seconds: float, rollout_seconds: float, sampling_seconds: float
) -> dict[str, float]:
    """`time/<phase>` for every phase, its parts and the sums `step`, `rollout` and `sampling`.

    Args:
        seconds: what was measured, by phase or part of the update; what is missing took no time.
        step_seconds: of the whole step; what nothing else accounts for is `other`.
        rollout_seconds: of the episodes, environments included.
        sampling_seconds: of drawing responses; what is neither prefill nor decode is `sampling_rest`.
    """
    found = {name: seconds.get(name, 0.0) for name in (*PHASES, *UPDATE_PARTS)}
    found["sampling_rest"] = sampling_seconds - found["prefill"] - found["decode"]
    found["update"] = sum(found[name] for name in UPDATE_PARTS)
    found["other"] = step_seconds - sum(found[name] for name in PHASES if name != "other")
    found |= {"step": step_seconds, "rollout": rollout_seconds, "sampling": sampling_seconds}
    return {f"time/{name}": value for name, value in found.items()}


def time_table(totals: Mapping[str, float], *, steps: int) -> list[str]:
    """Lines to read: mean seconds of every phase and its share of the step; phases that took no time are left out.

    Args:
        totals: `time/*` summed over `steps` steps.
    """
    step = totals.get("time/step", 0.0)
    if step <= 0:
        return []
    rows: list[tuple[str, str]] = []
    for name in PHASES:
        rows.append((name, _LABELS.get(name, name)))
        if name == "update":
            rows += [(part, f"  {part}") for part in UPDATE_PARTS]
    lines = [f"{'time of a step':<18}{'seconds':>9}{'share':>8}"]
    for name, label in (*rows, ("step", "step")):
        seconds = totals.get(f"time/{name}", 0.0)
        if seconds / step >= 0.0005:
            lines.append(f"{label:<18}{seconds / steps:>9.2f}{seconds / step:>8.1%}")
    return lines
