"""Which columns of the user's files play which role, and the texts that they make."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rlhf.config.data import Data
from rlhf.config.pipeline import PipelineConfig
from rlhf.errors import ConfigError, show
from rlhf.prepare import chat
from rlhf.prepare.columns import Column, Holds
from rlhf.prepare.formats import Part

Texts = dict[str, Any]  # of one row: what the pipeline works with, by the name that it has in the artifacts


class Roles(NamedTuple):
    """How the rows of a file become texts: role -> column, and what may be in these and in other columns."""

    of: dict[str, str]
    columns: list[Column]


def template_fields(template: str) -> list[str]:
    """The columns that a prompt template names, in their order.

    Raises:
        ConfigError: it is malformed, names no column, or has a field that is not just a name.
    """
    here = f"data.prompt_template {show(template)}"
    try:
        fields = [(name, form or "") for _, name, form, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ConfigError(f"{here} is malformed: {error}; write a brace of the text as two") from None
    for name, form in fields:
        if not name or name.isdigit() or "." in name or "[" in name:
            raise ConfigError(f"{here}: {{{name}}} is not the name of a column; write one such as {{prompt}}")
        if "{" in form:
            raise ConfigError(f"{here}: the format {form!r} of {{{name}}} names a column; write the format out")
    if not fields:
        raise ConfigError(f"{here} names no column, so all prompts would be the same; write one such as {{prompt}}")
    return list(dict.fromkeys(name for name, _ in fields))


def roles_of(kind: str, part: Part, computed: Sequence[str], config: PipelineConfig) -> Roles:
    """The roles of a file's columns, by its first part."""
    data, names = config.data, config.data.columns
    there = {*part.names, *computed}
    holds: dict[str, Holds] = {}
    match kind:
        case "demonstrations" if names.response not in there and names.messages in there:
            holds = {"messages": "talk"}
        case "demonstrations":
            holds = {"response": "talk"}
        case "preferences" if names.chosen not in there and names.responses in there:
            holds = {"responses": "texts"}
            if names.ranks:
                holds["ranks"] = "ranks"
        case "preferences":
            holds = {"chosen": "talk", "rejected": "talk"}
            if names.margin:
                holds["margin"] = "number"
        case "ratings":
            holds = {"response": "talk", "score": "number"}
        case "labelled":
            holds = {"text": "text", "label": "value"}
        case "prompts":
            if names.reference in there or names.reference != "reference":
                holds = {"reference": "answers" if _has_lists(part, names.reference) else "text"}
    answers = [Column(getattr(names, role), f"data.columns.{role}", what) for role, what in holds.items()]
    talks = [getattr(names, role) for role, what in holds.items() if what == "talk"]
    whole = "messages" in holds or any(_is_conversation(part, name) for name in talks if part.names.count(name) == 1)
    columns: list[Column] = []
    if kind != "labelled":
        for field in template_fields(data.prompt_template):
            if field != "prompt":
                columns.append(Column(field, "data.prompt_template", "value"))
            elif names.prompt in there or not whole:
                columns.append(Column(names.prompt, "data.columns.prompt", "talk"))
    columns += answers
    if kind == "preferences" and config.judge.enabled:
        columns += [Column(name, "judge.annotators", "verdict") for name in config.judge.annotators]
    _check_roles(kind, columns)
    return Roles({role: getattr(names, role) for role in holds}, columns)


def _is_conversation(part: Part, name: str) -> bool:
    """Whether a column has conversations with something before the answer."""
    first = _first(part, name)
    return isinstance(first, list) and len(first) > 1


def _has_lists(part: Part, name: str) -> bool:
    """Whether a column has several references for a prompt."""
    return part.names.count(name) == 1 and isinstance(_first(part, name), list)


def _first(part: Part, name: str) -> Any:
    return next((value for value in part.values(name) if value is not None), None)


def _check_roles(kind: str, columns: list[Column]) -> None:
    setting_of: dict[str, str] = {}
    for column in columns:
        other = setting_of.setdefault(column.name, column.setting)
        if other != column.setting and "data.prompt_template" not in (other, column.setting):
            raise ConfigError(f"{other} and {column.setting} are both {column.name!r} in data.{kind}; name two columns")


class Maker:
    """Makes the texts of a row from its columns."""

    def __init__(self, kind: str, data: Data, template: Callable[[], chat.Template]) -> None:
        self._kind, self._data = kind, data
        self.fields = template_fields(data.prompt_template)
        self._template = template

    def texts(self, row: dict[str, Any], roles: Roles) -> Texts:
        """The texts of a row whose columns are checked.

        Raises:
            ValueError: they do not go together.
        """
        made: Texts = {role: row[name] for role, name in roles.of.items()}
        if isinstance(made.get("reference"), list):  # of several, the first one is the text that rewards get
            made |= {"reference": made["reference"][0], "references": made["reference"]}
        if self._kind == "labelled":
            return self._labelled(made)
        answers = {role: made[role] for role in ("messages", "response", "chosen", "rejected") if role in made}
        talk = chat.exchange(self._prompt(row), list(answers.values()))
        if talk.before is None:
            raise ValueError("there is no prompt, neither in a column nor before the answer")
        made = {"prompt": self._rendered(talk.before)} | made
        made |= dict(zip(answers, talk.answers, strict=True))
        if "messages" in made:
            made["response"] = made.pop("messages")
        if self._kind == "preferences" and made.get("chosen", 0) == made.get("rejected", 1):
            raise ValueError(f"'chosen' and 'rejected' are the same text {show(made['chosen'])}")
        if "ranks" in made and len(made["ranks"]) != len(made["responses"]):
            raise ValueError(f"has {len(made['responses'])} responses and {len(made['ranks'])} ranks")
        return made

    def _labelled(self, made: Texts) -> Texts:
        labels = self._data.labels
        label = made.pop("label")
        for chosen, values in ((True, labels.chosen), (False, labels.rejected)):
            if any(_same_label(label, value) for value in values):
                return made | {"preferred": chosen}
        known = ", ".join(map(show, (*labels.chosen, *labels.rejected)))
        raise ValueError(f"the label {show(label)} is neither in data.labels.chosen nor rejected ({known})")

    def _prompt(self, row: dict[str, Any]) -> str | list[chat.Message] | None:
        """The prompt of a row by ``data.prompt_template``; None where it is in a conversation."""
        name = self._data.columns.prompt
        if self._data.prompt_template == "{prompt}":
            return row.get(name)
        values = {field: row.get(name if field == "prompt" else field) for field in self.fields}
        try:
            return self._data.prompt_template.format(**values)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"data.prompt_template {show(self._data.prompt_template)} cannot be filled: {error}"
            ) from None

    def _rendered(self, before: str | list[chat.Message]) -> str:
        if isinstance(before, str):
            if self._data.chat == "auto":
                return before
            before = [{"role": "user", "content": before}]
        try:
            return self._template()(before)
        except Exception as error:  # a template is a program of the model's makers
            if isinstance(error, ConfigError):
                raise
            raise ValueError(f"the chat template refuses the messages: {error}") from None


def _same_label(label: Any, value: Any) -> bool:
    """Whether a label is the one of the configuration; a cell of a CSV file is text."""
    return bool(label == value) or (isinstance(label, str) and not isinstance(value, str) and label == str(value))
