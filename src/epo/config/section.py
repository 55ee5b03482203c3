"""What every section of a recipe has in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Decay = Annotated[float, Field(ge=0, lt=1)]

FOLDER_NAME = r"^[^/\\.\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*$"
"""What may name a folder in a folder of ours: it leads nowhere else, is not hidden, and a terminal can show it."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False)


def refuse_idle(section: Section, options: tuple[str, ...], *, idle: bool, without: str, mend: str) -> None:
    """An option that was given and does nothing is a mistake that costs a run."""
    for option in options if idle else ():
        value = getattr(section, option)
        if value != type(section).model_fields[option].default:
            raise ValueError(f"{option}={value} does nothing with {without}: leave it out, or {mend}")
