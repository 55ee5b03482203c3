"""What a stored trajectory or evaluation must have, so that whoever shows one can rely on it. Files may come from
anybody."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from epo.reporting.terminal.text import visible
from epo.reporting.trajectories import INDEX_COLUMNS

Number = Annotated[float, Field(ge=-1e12, le=1e12)]
Logprob = Annotated[float, Field(le=100)]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Share = Annotated[float, Field(ge=0, le=1)]
Token = Annotated[int, Field(ge=0, lt=2**31)]


class _Schema(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class _Turn(_Schema):
    """Lists are as long as `response_ids`. What has a default is absent in runs of older versions."""

    observation: str
    response: str
    action: str
    is_valid: bool
    understood: bool = True
    reward: Number
    score: Number
    prompt_tokens: Count | None = None
    dropped_turns: Count | None = None
    response_tokens: Count | None = None
    """Of a turn without ids, as the server that answered counts them."""
    response_ids: list[Token]
    logprobs: list[Logprob | None]
    entropy: list[Number | None]
    advantages: list[Number | None] | None = None
    ratios: list[Number | None] | None = None
    alternatives: list[list[Token | Logprob | None]] | None = None

    @model_validator(mode="after")
    def _lists_belong_together(self) -> Self:
        for name in ("logprobs", "entropy", "advantages", "ratios", "alternatives"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.response_ids):
                raise ValueError(f"{name} has {len(values)} entries for {len(self.response_ids)} tokens")
        for pairs in self.alternatives or ():
            if len(pairs) % 2 or not all(type(token) is int for token in pairs[::2]):
                raise ValueError("alternatives are no pairs of token and log-probability")
        return self


class _Record(_Schema):
    step: Count
    group: Count
    task: str
    goal: str
    stop_reason: str
    success: bool
    score: Number
    turns: list[_Turn]


class _Columns(_Schema):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    group: list[Count]
    task: list[str]
    goal: list[str]
    success: list[bool]
    stop_reason: list[str]
    reward: list[Number]
    turns: list[Count]
    invalid: list[Count]
    tokens: list[Count]
    entropy: list[Number | None]

    @model_validator(mode="after")
    def _columns_are_of_one_length(self) -> Self:
        if len({len(getattr(self, name)) for name in INDEX_COLUMNS}) > 1:
            raise ValueError("columns differ in length")
        return self


class _Entry(_Schema):
    step: Count
    columns: _Columns


class _Panel(_Schema):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    split: str
    success: Share
    low: Share
    high: Share
    episodes: Annotated[Count, Field(ge=1)]
    score: Number | None = None
    turns: Number | None = None
    invalid: Number | None = None
    errors: Count | None = None

    @model_validator(mode="after")
    def _interval_holds_the_rate(self) -> Self:
        if not self.low <= self.success <= self.high:
            raise ValueError(f"success {self.success} is not between low {self.low} and high {self.high}")
        return self


class _Evaluation(_Schema):
    step: Count
    panels: list[_Panel]


_PIECES = TypeAdapter(list[str], config=ConfigDict(strict=True))


def problem_of_record(record: dict[str, Any]) -> str | None:
    """What is wrong with a line of a step's file; None if it is a trajectory."""
    return _problem(lambda: _Record.model_validate(record))


def is_entry(entry: dict[str, Any]) -> bool:
    """Whether a line of the index has what lists need of it."""
    return _problem(lambda: _Entry.model_validate(entry)) is None


def problem_of_evaluation(entry: dict[str, Any]) -> str | None:
    """What is wrong with a line of `eval.jsonl`; None if it is an evaluation."""
    return _problem(lambda: _Evaluation.model_validate(entry))


def is_vocabulary(pieces: Any) -> bool:
    """Whether it is a list of texts."""
    return _problem(lambda: _PIECES.validate_python(pieces)) is None


def _problem(validate: Any) -> str | None:
    try:
        validate()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return visible(f"{where}: {first['msg'].removeprefix('Value error, ')}")[:200]
    return None
