"""Strict, frozen configuration objects."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Base of every configuration table: values never change, unknown keys are refused, types are not coerced from text."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
