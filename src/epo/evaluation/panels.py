"""Evaluation on fixed panels: the same tasks with the same random numbers every time, so changes are the policy's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from epo.errors import UserError
from epo.evaluation.statistics import wilson_interval
from epo.rollout import Collector, EpisodeSpec
from epo.seeds import PANEL_STREAM
from epo.types import StopReason, Task, Trajectory


@dataclass(frozen=True, kw_only=True, slots=True)
class PanelResult:
    """What came out of one panel."""

    split: str
    success: float
    """Share of episodes with full success. Lost episodes count as failures."""
    low: float
    high: float
    """95 % Wilson interval of `success`."""
    episodes: int
    score: float
    """Mean progress in [0, 1]."""
    turns: float
    invalid: float
    """Share of turns without the required format."""
    errors: int
    """Episodes lost to errors of the environment, or of the server that answers for the model."""
    by_goal: dict[str, float]
    """Success by task type."""

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def evaluate(
    collector: Collector,
    tasks: Sequence[Task],
    *,
    split: str,
    temperature: float,
    on_done: Callable[[Trajectory], None] | None = None,
) -> PanelResult:
    """Play `tasks` once each at `temperature` (0 is greedy).

    Raises:
        UserError: the context has no room for the first prompt of any of them.
    """
    specs = [EpisodeSpec(task=task, seed=(_PANEL_SEED, PANEL_STREAM, index)) for index, task in enumerate(tasks)]
    trajectories = collector.collect(specs, temperature=temperature, on_done=on_done)
    if all(t.stop_reason is StopReason.CONTEXT_OVERFLOW and not t.turns for t in trajectories):
        raise UserError(
            f"no first prompt of the split {split!r} fits into model.max_context={collector.max_context} less "
            f"agent.max_response_tokens={collector.max_response}: raise model.max_context"
        )
    return summarise(split, trajectories)


_PANEL_SEED = 2509_22576  # the same for every run: panels compare policies, not draws


def summarise(split: str, trajectories: Sequence[Trajectory]) -> PanelResult:
    successes = sum(t.success for t in trajectories)
    low, high = wilson_interval(successes, len(trajectories))
    turns = [turn for t in trajectories for turn in t.turns]
    by_goal: dict[str, list[bool]] = {}
    for t in trajectories:
        by_goal.setdefault(t.task.goal, []).append(t.success)
    return PanelResult(
        split=split,
        success=successes / len(trajectories),
        low=low,
        high=high,
        episodes=len(trajectories),
        score=sum(t.score for t in trajectories) / len(trajectories),
        turns=len(turns) / len(trajectories),
        invalid=sum(not turn.is_valid for turn in turns) / max(1, len(turns)),
        errors=sum(t.stop_reason.is_error for t in trajectories),
        by_goal={goal: sum(flags) / len(flags) for goal, flags in sorted(by_goal.items())},
    )
