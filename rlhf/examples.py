"""The rows of one kind of data, from reading the files to the rows of a split.

Rows are in the order of a hash of their texts, and the split of a prompt is decided by a hash of its text.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pyarrow as pa

from rlhf.data import Column, Rows, read_rows
from rlhf.errors import ConfigError
from rlhf.explain import show
from rlhf.formats import BadRows

if TYPE_CHECKING:
    from rlhf.config import Data, PipelineConfig

SPLITS = ("train", "validation", "test")
RESPONSES = {"demonstrations": ("response",), "prompts": (), "preferences": ("chosen", "rejected")}


@dataclass
class Examples:
    """The rows of one kind: demonstrations, prompts or preferences.

    ``texts`` holds the columns that the pipeline works with (prompt, response...), by row as it was read;
    ``kept`` the rows that are still in play, in the order of their hash; ``lost`` how many went, by reason.
    """

    kind: str
    rows: Rows
    texts: dict[str, list[str]]
    used: frozenset[str]  # columns of the user's files that ``texts`` was made from
    kept: list[int]
    lost: dict[str, int] = field(default_factory=dict)
    read: int = 0
    tokens: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """The setting that names the files."""
        return f"data.{self.kind}"

    def keep(self, rows: list[int], reason: str) -> None:
        """Go on with these rows; count the others under ``reason``."""
        self.lost[reason] = len(self.kept) - len(rows)
        self.kept = rows

    def column(self, name: str) -> list[str]:
        """A text of each row in play."""
        values = self.texts[name]
        return [values[row] for row in self.kept]

    def splits(self, data: Data) -> dict[str, list[int]]:
        """The rows in play by split."""
        found: dict[str, list[int]] = {split: [] for split in SPLITS}
        for row in self.kept:
            found[split_of(self.texts["prompt"][row], data.validation_fraction, data.test_fraction)].append(row)
        return found

    def table(self, rows: list[int]) -> pa.Table:
        """These rows: first the columns of ``texts``, then the user's other columns."""
        columns = {name: pa.array([values[row] for row in rows], pa.string()) for name, values in self.texts.items()}
        others = [name for name in self.rows.table.column_names if name not in self.used | columns.keys()]
        rest = self.rows.table.select(others).take(pa.array(rows, pa.int64())).combine_chunks()
        for name in others:
            columns[name] = rest[name]
        return pa.table(columns)


def split_of(prompt: str, validation_fraction: float, test_fraction: float) -> str:
    """The split of a prompt: ``train``, ``validation`` or ``test``, by the sha256 of its text.

    Whether a prompt is in ``test`` does not depend on ``validation_fraction``.
    """
    point = int.from_bytes(_digest(prompt)[:8], "big") / 2**64
    if point < test_fraction:
        return "test"
    return "validation" if point < test_fraction + validation_fraction else "train"


def _digest(*texts: str) -> bytes:
    return hashlib.sha256("\0".join(texts).encode()).digest()


def read_examples(kind: str, config: PipelineConfig) -> Examples:
    """The rows of the files of one kind, in the order of their hash."""
    data, names = config.data, config.data.columns
    fields = template_fields(data.prompt_template)
    roles = {"prompt": names.prompt} if "prompt" in fields else {}
    roles |= {role: getattr(names, role) for role in RESPONSES[kind]}
    columns = [Column(name, f"data.columns.{role}") for role, name in roles.items()]
    columns += [Column(name, "data.prompt_template", "value") for name in fields if name != "prompt"]
    if kind == "prompts":
        optional = names.reference == "reference"
        columns.append(Column(names.reference, "data.columns.reference", required=not optional))
    if kind == "preferences" and config.judge.enabled:
        columns += [Column(name, "judge.annotators", "verdict") for name in config.judge.annotators]
    _check_roles(kind, columns)
    rows = read_rows(getattr(data, kind), columns, f"data.{kind}")
    if kind == "prompts" and names.reference in rows.table.column_names:
        roles["reference"] = names.reference
    read = {role: rows.table[name].to_pylist() for role, name in roles.items()}
    prompts = _prompts(rows, fields, read, data, f"data.{kind}")
    texts = {"prompt": prompts, **{role: values for role, values in read.items() if role != "prompt"}}
    examples = Examples(kind, rows, texts, frozenset(roles.values()), _in_order(texts), read=len(prompts))
    if kind == "preferences":
        _check_sides(examples)
    return examples


def template_fields(template: str) -> list[str]:
    """The columns that a prompt template names, in their order.

    Raises:
        ConfigError: it is malformed, names no column, or has a field that is not just a name.
    """
    here = f"data.prompt_template {show(template)}"
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ConfigError(f"{here} is malformed: {error}; write a brace of the text as two") from None
    for name in fields:
        if not name or name.isdigit() or "." in name or "[" in name:
            raise ConfigError(f"{here}: {{{name}}} is not the name of a column; write one such as {{prompt}}")
    if not fields:
        raise ConfigError(f"{here} names no column, so all prompts would be the same; write one such as {{prompt}}")
    return list(dict.fromkeys(fields))


def _check_roles(kind: str, columns: list[Column]) -> None:
    setting_of: dict[str, str] = {}
    for column in columns:
        other = setting_of.setdefault(column.name, column.setting)
        if other != column.setting and "data.prompt_template" not in (other, column.setting):
            raise ConfigError(f"{other} and {column.setting} are both {column.name!r} in data.{kind}; name two columns")


def _prompts(rows: Rows, fields: list[str], read: Mapping[str, list[str]], data: Data, where: str) -> list[str]:
    """The prompt of each row by ``data.prompt_template``."""
    if data.prompt_template == "{prompt}":
        return read["prompt"]
    values = {name: read[name] if name == "prompt" else rows.table[name].to_pylist() for name in fields}
    bad, prompts = BadRows(where), []
    for row in range(rows.table.num_rows):
        try:
            prompts.append(data.prompt_template.format(**{name: column[row] for name, column in values.items()}))
        except (ValueError, TypeError) as error:
            bad.add(
                rows.place(row),
                f"data.prompt_template {show(data.prompt_template)} cannot be filled: {error}",
            )
    bad.check("Correct the template, or these rows.")
    return prompts


def _in_order(texts: Mapping[str, list[str]]) -> list[int]:
    """The rows in the order of their hash; rows with the same prompt are neighbours."""
    prompts, others = texts["prompt"], [values for name, values in texts.items() if name != "prompt"]
    return sorted(
        range(len(prompts)),
        key=lambda row: (_digest(prompts[row])[8:], _digest(*(values[row] for values in others)), row),
    )


def _check_sides(examples: Examples) -> None:
    bad = BadRows(examples.where)
    for row, (chosen, rejected) in enumerate(zip(examples.texts["chosen"], examples.texts["rejected"], strict=True)):
        if chosen == rejected:
            bad.add(examples.rows.place(row), f"'chosen' and 'rejected' are the same text {show(chosen)}")
    bad.check("A pair must be two different responses; correct these rows, or take them out.")
