"""The kinds of values that a recipe holds: strict models, units, shares, times.

In: plain values as YAML gave them. Out: checked ones. Must not know: which models there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema


@dataclass(frozen=True, slots=True)
class Unit:
    """What a number counts; it shows in `explain` and, as `x-unit`, in the JSON Schema."""

    name: str

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {**handler(schema), "x-unit": self.name}


Examples = Annotated[int, Unit("examples")]
Prompts = Annotated[int, Unit("prompts")]
Rows = Annotated[int, Unit("rows")]
Tokens = Annotated[int, Unit("tokens")]
Words = Annotated[int, Unit("words")]
Steps = Annotated[int, Unit("steps")]
Passes = Annotated[int, Unit("passes")]
Checkpoints = Annotated[int, Unit("checkpoints")]
Threads = Annotated[int, Unit("threads")]
Workers = Annotated[int, Unit("processes")]
Resamples = Annotated[int, Unit("resamples")]
Share = Annotated[float, Unit("share")]


class Strict(BaseModel):
    """Unknown keys are errors, nothing is coerced, nothing changes after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


def _percent(value: object) -> object:
    """`1%` means 0.01; everything else is left to the field's own check."""
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            return float(value.strip()[:-1]) / 100
        except ValueError:
            return value
    return value


Duration = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(s|m|h)$")]
"""A time such as 90s, 110m or 11.5h."""


def duration_seconds(text: str) -> float:
    """Seconds of a `Duration`."""
    return float(text[:-1]) * {"s": 1.0, "m": 60.0, "h": 3600.0}[text[-1]]


Percent = Annotated[float, BeforeValidator(_percent), Unit("share")]
