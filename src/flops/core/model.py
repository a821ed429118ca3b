"""The base of the value types that are stored and that cross process boundaries."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Value(BaseModel):
    """An immutable value; equal when its fields are equal.

    Unknown fields are ignored when read, so that an older process understands a newer one.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="null")


class StrictValue(BaseModel):
    """An immutable value that people write by hand: unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)
