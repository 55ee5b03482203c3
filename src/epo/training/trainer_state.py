"""What the training loop itself remembers. What a checkpoint, which may come from anybody, says of it is checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from epo.errors import UserError
from epo.reporting.reading.record_schema import Count, Number, problem_of_evaluation
from epo.reporting.terminal.text import visible
from epo.training.checkpoint import step_of


def _checked(entry: dict[str, Any]) -> dict[str, Any]:
    if (problem := problem_of_evaluation(entry)) is not None:
        raise ValueError(problem)
    try:
        json.dumps(entry, allow_nan=False)  # as `eval.jsonl` will have it
    except ValueError:
        raise ValueError("a number is not finite") from None
    return entry


class TrainerState(BaseModel):
    """What the loop itself remembers; part of every checkpoint."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    step: Count = 0
    """RL steps finished."""
    entropy_by_step: list[Number] = Field(default_factory=list[float])
    """Nats; without the steps of which every environment failed."""
    evaluations: list[Annotated[dict[str, Any], AfterValidator(_checked)]] = Field(default_factory=list[dict[str, Any]])
    """Lines of `eval.jsonl`."""
    wall_seconds: Annotated[Number, Field(ge=0)] = 0.0
    """Time of warm start, training and evaluation over all sessions of the run."""
    reference: str | None = None
    """Digest of the weights that the KL loss refers to; None without one."""

    @classmethod
    def kept_in(cls, checkpoint: Path, kept: Mapping[str, Any]) -> Self:
        """What `checkpoint` keeps as its state.

        Raises:
            UserError: names the file, the field, its value and the mend.
        """
        if unknown := sorted(visible(str(name))[:100] for name in kept if name not in cls.model_fields):
            raise UserError(
                f"checkpoint {str(checkpoint)!r} was written by another version of epo (state.json: state has an "
                f"unknown {unknown[0]}): use that one"
            )
        try:
            state = cls.model_validate(kept)
        except ValidationError as error:
            first = error.errors()[0]
            where, given = ".".join(map(str, first["loc"])), first["input"]
            raise _not_allowed(checkpoint, where, given, first["msg"].removeprefix("Value error, ")) from None
        if state.step != step_of(checkpoint):
            raise _not_allowed(checkpoint, "step", state.step, "the checkpoint's name says another")
        if len(state.entropy_by_step) > state.step:
            count = len(state.entropy_by_step)
            raise _not_allowed(
                checkpoint, "entropy_by_step", state.entropy_by_step, f"{count} after {state.step} steps"
            )
        for place, entry in enumerate(state.evaluations):
            if entry["step"] > state.step:
                where = f"evaluations.{place}.step"
                raise _not_allowed(checkpoint, where, entry["step"], f"after {state.step} steps")
        return state


def _not_allowed(checkpoint: Path, where: str, value: Any, why: str) -> UserError:
    return UserError(
        f"{str(checkpoint / 'state.json')!r}: state.{where}={visible(repr(value))[:100]} is not allowed ({why}): put "
        f"back what the run wrote, or delete {str(checkpoint)!r}: --resume then goes on from an older one, or the start"
    )
