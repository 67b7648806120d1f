"""What the sections of the schema are made of: their base, types of fields, and how a function is named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from rlhf.rewards import registry

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


class FunctionSpec(Section):
    """A function by name, and what it is given beside the texts and the columns that it takes."""

    PLAIN: ClassVar[str]  # the field that may be written in place of the whole mapping
    KINDS: ClassVar[tuple[type, ...]]  # what it is then

    function: str = Field(
        "",
        description="A built-in, `module:function` or `file.py:function`; of a reward also `model`, the trained one. "
        "Default: the name that it has here.",
    )
    arguments: dict[str, JsonValue] = Field({}, description="Keyword arguments of the function.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.function == "model" and self.arguments:
            raise ValueError("arguments: the trained reward model takes none; leave them out")
        if self.function != "model" and ":" not in self.function:  # a user's function is not imported here
            _check_builtin(self.function, self.arguments)
        return self

    def written(self, name: str) -> JsonValue:
        """As one would write it under a name: without what is the default."""
        default = {"function": name, "arguments": {}}
        rest = {key: value for key, value in self if key == self.PLAIN or value != default.get(key)}
        return rest[self.PLAIN] if len(rest) == 1 else rest


class RewardSpec(FunctionSpec):
    """One reward: its function, and its weight in the sum. A plain number is the weight."""

    PLAIN, KINDS = "weight", (int, float)

    weight: Finite = Field(1.0, description="Weight in the sum of the rewards.")


class ScorerSpec(FunctionSpec):
    """A score that nothing is trained on. A plain text is the function."""

    PLAIN, KINDS = "function", (str,)

    @model_validator(mode="after")
    def _check_model(self) -> Self:
        if self.function == "model":
            raise ValueError("function `model`: the reward model scores every text anyway, as `reward`; leave it out")
        return self


def written(value: Any) -> Any:
    """A value of a setting as one would write it: the entries of a mapping of functions as short as they may be."""
    if not isinstance(value, Mapping):
        return value
    return {name: _written(name, item) for name, item in value.items()}


def _written(name: str, item: Any) -> Any:
    if isinstance(item, FunctionSpec):
        return item.written(name)
    return item.model_dump(mode="json", exclude_defaults=True) if isinstance(item, Section) else item


def _check_builtin(name: str, arguments: Mapping[str, JsonValue]) -> None:
    builtin = registry.find(name)
    builtin.check_names(arguments)
    for argument, kind in builtin.types.items():
        if argument in arguments:
            try:
                TypeAdapter(kind).validate_python(arguments[argument], strict=True)
            except ValidationError as error:
                allowed = error.errors()[0]["msg"].removeprefix("Input ")
                raise ValueError(f"arguments.{argument} is {arguments[argument]!r}; it {allowed}") from None
    if builtin.check:
        builtin.check(**arguments)


def _named(kind: type[FunctionSpec], accepted: Any) -> BeforeValidator:
    """Writes the entries of a mapping out; what is no entry at all is left for the schema to refuse.

    ``accepted`` is the type that the JSON schema shows for what may be written.
    """

    def write_out(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        entries = {}
        for name, entry in value.items():
            plain = isinstance(entry, kind.KINDS) and not isinstance(entry, bool)
            whole = {kind.PLAIN: entry} if plain else entry
            entries[name] = {"function": name, **whole} if isinstance(whole, Mapping) else whole
        return entries

    return BeforeValidator(write_out, json_schema_input_type=accepted)


Rewards = Annotated[dict[str, RewardSpec], _named(RewardSpec, dict[str, float | RewardSpec])]
Scorers = Annotated[dict[str, ScorerSpec], _named(ScorerSpec, dict[str, str | ScorerSpec])]
