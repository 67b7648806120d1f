"""The section ``data`` of the configuration."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, JsonValue, model_validator

from rlhf.config.fields import BY_CONTENT, Count, Files, Fraction, Section

KINDS = ("demonstrations", "prompts", "preferences", "ratings", "labelled")
Kind = Literal["demonstrations", "prompts", "preferences", "ratings", "labelled"]


class Columns(Section):
    """Names of the columns in the user's files. Texts may also be lists of messages with ``role`` and ``content``."""

    prompt: str = Field("prompt", min_length=1, description="Column with the prompt.")
    response: str = Field("response", min_length=1, description="Column with a demonstrated or rated response.")
    messages: str = Field(
        "messages", min_length=1, description="Column of demonstrations with whole conversations, if they have one."
    )
    chosen: str = Field("chosen", min_length=1, description="Column with the preferred response of a pair.")
    rejected: str = Field("rejected", min_length=1, description="Column with the other response of a pair.")
    margin: str | None = Field(None, description="Column that says how much better the preferred response is.")
    responses: str = Field(
        "responses",
        min_length=1,
        description="Column with a ranking of several responses, best first, if there is one.",
    )
    ranks: str | None = Field(
        None, description="Column with the ranks of these responses, where they are not sorted; equal ranks are ties."
    )
    score: str = Field("score", min_length=1, description="Column with the score of a rated response.")
    text: str = Field("text", min_length=1, description="Column of labelled texts with the text.")
    label: str = Field("label", min_length=1, description="Column of labelled texts with the label.")
    reference: str = Field(
        "reference",
        min_length=1,
        description="Column of the prompt files with a reference response, or a list of several, if there is one.",
    )


class Labels(Section):
    """Which labels of texts are preferred to which, for pairs of one of each."""

    chosen: tuple[JsonValue, ...] = Field((1,), min_length=1, description="Labels of the preferred texts.")
    rejected: tuple[JsonValue, ...] = Field((0,), min_length=1, description="Labels of the other texts.")


class Computed(Section):
    """A column that is computed from the others."""

    function: str = Field(
        description="`word_count`, `first_words`, `draw`, or `module:function` or `file.py:function` of your own."
    )
    column: str | None = Field(None, description="Column that a built-in function reads.")
    count: Count | None = Field(None, description="How many words `first_words` takes.")
    values: tuple[JsonValue, ...] = Field(
        (), description="What `draw` draws from, evenly; the row's text decides, so that it is always the same."
    )

    @model_validator(mode="after")
    def _check(self) -> Computed:
        needs = {"word_count": ("column",), "first_words": ("column", "count"), "draw": ("column", "values")}
        if ":" not in self.function and self.function not in needs:
            raise ValueError(
                f"function {self.function!r} is neither built in ({', '.join(needs)}) nor of the form `module:function`"
            )
        for name in ("column", "count", "values"):
            given, wanted = bool(getattr(self, name)), name in needs.get(self.function, ())
            if given != wanted:
                raise ValueError(f"{name} {'must be given for' if wanted else 'is not for'} function {self.function!r}")
        return self

    @property
    def libraries(self) -> tuple[str, ...]:
        """The libraries that shape what a built-in function gives."""
        return ("spacy",) if self.function == "word_count" else ()


class Data(Section):
    """Where the data is and how it is split. Relative paths start at the folder of the YAML file."""

    demonstrations: Files = Field(
        (), description="Files of prompts with demonstrated responses, for SFT.", json_schema_extra=BY_CONTENT
    )
    prompts: Files = Field(
        (),
        description="Files of prompts for PPO and evaluation; without any, those of the demonstrations.",
        json_schema_extra=BY_CONTENT,
    )
    preferences: Files = Field(
        (),
        description="Files of preferences: pairs (prompt, chosen, rejected), or rankings (prompt, responses).",
        json_schema_extra=BY_CONTENT,
    )
    ratings: Files = Field(
        (), description="Files of rated responses: prompt, response, score.", json_schema_extra=BY_CONTENT
    )
    labelled: Files = Field(
        (), description="Files of labelled texts, for pairs of texts with two labels.", json_schema_extra=BY_CONTENT
    )
    rows: tuple[dict[str, JsonValue], ...] = Field(
        (), description="Rows written here; their columns say what they are.", json_schema_extra=BY_CONTENT
    )
    encoding: str = Field("utf-8", description="Encoding of JSON and CSV files.")
    columns: Columns = Columns()
    computed: dict[str, Computed] = Field({}, description="Further columns by name, and how they are computed.")
    labels: Labels = Labels()
    prompt_template: str = Field(
        "{prompt}", description="How a prompt is built from the columns of its row, in Python format syntax."
    )
    chat: Literal["auto", "model", "simple"] = Field(
        "auto",
        description="How messages become text: by the model's chat template or, where it has none, a simple one. "
        "`model` and `simple` also make one message of each prompt that is plain text.",
    )
    validation_fraction: Fraction = Field(0.05, description="Share of the prompts kept for validation.")
    test_fraction: Fraction = Field(0.1, description="Share of the prompts kept for the final evaluation.")
    bad_rows: Literal["error", "skip"] = Field(
        "error", description="What to do with a row that is not as it must be: refuse, or keep it in bad_rows.jsonl."
    )
    duplicates: Literal["error", "drop"] = Field(
        "error", description="What to do with a row that repeats an earlier one: refuse it, or drop and count it."
    )
    max_prompt_tokens: Count | None = Field(None, description="Longest prompt allowed, in tokens.")
    max_response_tokens: Count | None = Field(None, description="Longest response allowed, in tokens.")
    too_long: Literal["error", "drop"] = Field(
        "error",
        description="What to do with a row over those limits or the model's context: refuse, or drop and count.",
    )
    max_demonstrations: Count | None = Field(None, description="Use only this many demonstrations (rows).")
    max_prompts: Count | None = Field(None, description="Use only this many prompts (rows).")
    max_preferences: Count | None = Field(None, description="Use only this many preferences (rows).")
    max_ratings: Count | None = Field(None, description="Use only this many ratings (rows).")
    max_labelled: Count | None = Field(None, description="Use only this many labelled texts (rows).")

    @model_validator(mode="after")
    def _check(self) -> Data:
        if self.validation_fraction + self.test_fraction >= 1.0:
            raise ValueError(
                f"validation_fraction {self.validation_fraction} and test_fraction {self.test_fraction} leave nothing "
                "to train on; their sum must be below 1"
            )
        try:
            "".encode(self.encoding)
        except (LookupError, ValueError):
            raise ValueError(
                f"encoding {self.encoding!r} is not a text encoding of Python; examples are utf-8, latin-1 and utf-16"
            ) from None
        for number, row in enumerate(self.rows, start=1):
            if self.kind_of(row) is None:
                raise ValueError(
                    f"rows: row {number} has the columns {', '.join(map(repr, row)) or '(none)'}, which are those of "
                    "no kind of data; examples are prompt; prompt, response; prompt, chosen, rejected"
                )
        if self.has("preferences") and self.has("labelled"):
            raise ValueError("labelled and preferences are both given, and both make pairs; give one of them")
        both = [label for label in self.labels.chosen if label in self.labels.rejected]
        if both:
            raise ValueError(f"labels: {both[0]!r} is both chosen and rejected")
        return self

    def has(self, kind: str) -> bool:
        """Whether there is data of a kind, in files or in ``rows``."""
        return bool(getattr(self, kind)) or any(self.kind_of(row) == kind for row in self.rows)

    def kind_of(self, row: dict[str, Any]) -> Kind | None:
        """The kind of data that a row of ``rows`` is, by its columns."""
        names, computed = self.columns, set(self.computed)
        there = row.keys() | computed
        if {names.chosen, names.rejected} <= there or names.responses in there:
            return "preferences"
        if names.response in there:
            return "ratings" if names.score in there else "demonstrations"
        if names.messages in there:
            return "demonstrations"
        if {names.text, names.label} <= there:
            return "labelled"
        return "prompts" if row else None
