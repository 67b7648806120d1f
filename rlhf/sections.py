"""What the sections of the configuration are made of."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator

NUMBERS_SAME: dict[str, JsonValue] = {"in_cache_key": False}
BY_CONTENT: dict[str, JsonValue] = {"in_cache_key": False}  # a path: what lies there is hashed into the key instead


def _as_tuple(value: Any) -> Any:
    """One path may be written without a list."""
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else value


Files = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base of every section: immutable, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class OptionalStage(Section):
    """A stage that can be left out: ``sft: off`` is short for ``sft: {enabled: false}``."""

    enabled: bool = Field(True, description="Whether the stage is part of the pipeline.")

    @model_validator(mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        if value is False or value == "off":  # YAML 1.1 reads a bare `off` as false
            return {"enabled": False}
        if value is True or value == "on":
            return {}
        return value
