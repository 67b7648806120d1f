"""Lengths in tokens: what is too long goes, the rest is written to the files of its kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rlhf.config.data import Data
from rlhf.errors import ConfigError
from rlhf.prepare.output import (
    LABELLED_PAIRS,
    SplitFiles,
    pairs_of_rankings,
    pairs_of_texts,
    pairs_schema,
    plain_schema,
)
from rlhf.prepare.problems import BadRows
from rlhf.prepare.settle import REFERENCES, Settled, count_splits
from rlhf.prepare.sources import SPLITS
from rlhf.prepare.spool import ROW, SPLIT, Written
from rlhf.prepare.tokens import Lengths, Limit, statistics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf.config.pipeline import PipelineConfig

Sizes = NDArray[np.int64]
RESPONSES = ("response", "chosen", "rejected", "responses", "text")  # texts that end with end-of-sequence
FOR_POLICIES = ("demonstrations", "prompts")  # kinds; of the others, a reward model reads each row as one text


class Sized:
    """The rows of one kind that are in its files: how many, how long, and how many went on the way."""

    def __init__(self, settled: Settled, folder: str) -> None:
        self.kind, self.where, self.folder = settled.kind, settled.where, folder
        self.places, self.read, self.lost = settled.places, settled.read, Counter(settled.lost)
        self.splits: Counter[str] = Counter(dict.fromkeys(SPLITS, 0))
        self.files: list[str] = []
        self.kept = 0
        self.rows: Written | None = None
        self.numbers: list[Sizes] = []  # of rows in the input, in the order of the files
        self.lengths: dict[str, list[Sizes]] = {}

    @property
    def tokens(self) -> dict[str, dict[str, float]]:
        """Lengths in tokens by column. A response counts its end-of-sequence token."""
        return {name: statistics(np.concatenate(sizes)) for name, sizes in self.lengths.items() if sizes}

    def report(self) -> dict[str, Any]:
        """What ``report.json`` says: how many rows came in, and where each of them went."""
        assert self.read == self.kept + self.lost.total(), f"{self.where}: a row is not accounted for"
        return {
            "rows": self.read,
            "lost": dict(self.lost),
            "kept": self.kept,
            "written_to": self.folder,
            "splits": {split: self.splits[split] for split in SPLITS},
            "tokens": self.tokens,
        }


def write(settled: Settled, tokenizer: PreTrainedTokenizerBase, data: Data, limit: Limit | None, folder: Path) -> Sized:
    """Write the rows that are not too long to ``folder/out/<kind>/<split>.parquet``; ``limit`` is the model's context.

    Raises:
        DataError: there are rows that are too long, and ``data.too_long`` is `error`.
    """
    sized = Sized(settled, "preferences" if settled.kind == "labelled" else settled.kind)
    sized.lost["too_long"] = 0
    if limit is not None and settled.kind not in FOR_POLICIES:
        limit = Limit(limit.tokens)
    bad = BadRows(settled.where, "too long")
    fitting = Written(folder / f"{settled.kind}.fitting", settled.rows.schema)
    for table in settled.rows.tables():
        lengths = Lengths(tokenizer, encoder=limit is not None and limit.halves)
        texts = [name for name in settled.texts if name != "references" and _is_text(table, name)]
        sizes = {name: _sizes(table, name, lengths) for name in texts}
        fits = _fits(table, sizes, sized, data, limit, bad)
        for name, column in sizes.items():
            if name != "reference":
                sized.lengths.setdefault(name, []).append(column[fits])
            else:
                sized.lengths.setdefault(name, []).append(column[fits & (column > 0)])
        sized.numbers.append(table[ROW].to_numpy()[fits])
        fitting.add(table if fits.all() else table.filter(pa.array(fits)))
    fitting.close()
    if data.too_long == "error":
        bad.check("Shorten these rows, raise the limit, or set data.too_long: drop.")
    sized.rows, sized.kept = fitting, fitting.rows
    _write_files(sized, folder)
    return sized


def _is_text(table: pa.Table, name: str) -> bool:
    return table.schema.field(name).type in (pa.string(), pa.list_(pa.string()))


def _sizes(table: pa.Table, name: str, lengths: Lengths) -> Sizes:
    """Tokens of a column's texts, of a list's longest one. (N,)"""
    column = table[name]
    if name == "prompt":
        return lengths.of_prompts(column.to_pylist())
    if column.type == pa.string():
        texts = column.to_pylist()
        found = lengths.of_responses([text or "" for text in texts])
        return np.where([text is None for text in texts], 0, found)
    lists = column.to_pylist()
    flat = lengths.of_responses(list(chain.from_iterable(lists)))
    ends = np.cumsum([len(texts) for texts in lists])
    return np.maximum.reduceat(flat, np.concatenate([[0], ends[:-1]])) if len(lists) else flat


def _fits(
    table: pa.Table, sizes: dict[str, Sizes], sized: Sized, data: Data, limit: Limit | None, bad: BadRows
) -> NDArray[np.bool_]:
    """Which rows are within ``data.max_*_tokens``, and can be read by the model as a whole."""
    none = np.zeros(table.num_rows, np.int64)
    prompts = sizes.get("prompt", none)
    responses = {name: sizes[name] for name in RESPONSES if name in sizes}
    longest = np.max(list(responses.values()), axis=0) if responses else none + 1
    limits = [("prompt", prompts, data.max_prompt_tokens, "data.max_prompt_tokens")]
    limits += [(name, size, data.max_response_tokens, "data.max_response_tokens") for name, size in responses.items()]
    if limit is not None:
        halves = [("prompt", prompts), *responses.items()]
        texts = halves if limit.halves else [("prompt and response", prompts + longest)]
        limits += [(what, size, limit.tokens, "the model's context") for what, size in texts]
    problems: dict[int, list[str]] = {}
    for what, found, most, setting in limits:
        for index in np.flatnonzero(found > most) if most is not None else ():
            problems.setdefault(int(index), []).append(f"{what}: {found[index]} tokens, but {setting} is {most}")
    rows = table[ROW].to_numpy()
    for row, words in problems.items():
        bad.add(sized.places.place(int(rows[row])), "; ".join(words), order=int(rows[row]))
    sized.lost["too_long"] += len(problems)
    fits = np.ones(table.num_rows, bool)
    fits[list(problems)] = False
    return fits


def _write_files(sized: Sized, folder: Path) -> None:
    """The rows in the form that later stages read."""
    assert sized.rows is not None
    rows, out = sized.rows, folder / "out" / sized.folder
    if sized.kind == "labelled":
        files = SplitFiles(out, plain_schema(LABELLED_PAIRS))
        paired = 2 * _write_labelled(rows, files, folder)
        sized.lost["unpaired"] = sized.kept - paired
        sized.kept = paired
    elif "responses" in rows.schema.names:
        files = SplitFiles(out, plain_schema(pairs_schema(rows.schema)))
        start = sized.lost["tied"] = 0
        for table in rows.tables():
            pairs = pairs_of_rankings(table, start)
            files.add(pairs)
            sized.lost["tied"] += table.num_rows - len(pairs["ranking"].unique())
            start += table.num_rows
        sized.kept -= sized.lost["tied"]
    else:
        files = SplitFiles(out, plain_schema(rows.schema))
        for table in rows.tables():
            files.add(table)
    files.close()
    sized.splits.update(files.counts)


def _write_labelled(rows: Written, files: SplitFiles, folder: Path) -> int:
    """Pair the texts with one label with those of the other, in each split; how many pairs there are."""
    sides = {
        (split, preferred): Written(folder / f"labelled.{split}.{preferred}", rows.schema)
        for split in range(len(SPLITS))
        for preferred in (True, False)
    }
    for table in rows.tables():
        splits, preferred = table[SPLIT].to_numpy(), table["preferred"].to_numpy(zero_copy_only=False)
        for (split, side), written in sides.items():
            written.add(table.filter(pa.array((splits == split) & (preferred == side))))
    for written in sides.values():
        written.close()
    for split in range(len(SPLITS)):
        for pairs in pairs_of_texts(sides[split, True], sides[split, False], split):
            files.add(pairs)
    return sum(files.counts.values())


def prompts_of(demonstrations: Sized, data: Data, folder: Path) -> Settled:
    """The prompts of the demonstrations, each once, with the first response as reference.

    Where some prompt has several responses, all of them are in the column ``references``.
    """
    rows = demonstrations.rows
    assert rows is not None
    fields = [pa.field("prompt", pa.string()), pa.field("reference", pa.string())]
    if several := any(len(group) > 1 for table in _whole_prompts(rows) for group in _groups(table)):
        fields.append(pa.field("references", pa.list_(pa.string())))
    fields += [field for field in rows.schema if field.name not in ("prompt", "response", *REFERENCES)]
    schema = pa.schema(fields)
    written = Written(folder / "prompts.settled", schema)
    settled = Settled("prompts", demonstrations.places, ("prompt", "reference"), written, rows.rows)
    settled.where = "data.prompts"
    settled.lost.update({"duplicate": 0, "over_limit": 0})
    for table in _whole_prompts(rows):
        groups = _groups(table)
        settled.lost["duplicate"] += table.num_rows - len(groups)
        left = len(groups) if data.max_prompts is None else max(0, data.max_prompts - written.rows)
        settled.lost["over_limit"] += max(0, len(groups) - left)
        groups = groups[:left]
        responses = table["response"].to_pylist()
        made = table.take(pa.array([group[0] for group in groups], pa.int64()))
        made = made.drop_columns([name for name in REFERENCES if name in made.column_names])
        made = made.append_column("reference", made["response"])
        if several:
            references = [[responses[row] for row in group] for group in groups]
            made = made.append_column("references", pa.array(references, pa.list_(pa.string())))
        made = made.select(schema.names)
        written.add(made)
        count_splits(settled.splits, made)
    written.close()
    return settled


def _whole_prompts(rows: Written) -> Iterator[pa.Table]:
    """The rows in tables that each have all rows of their prompts."""
    waiting: pa.Table | None = None
    for table in rows.tables():
        waiting = table if waiting is None else pa.concat_tables([waiting, table])
        last = _groups(waiting)[-1].start
        if last:
            yield waiting.slice(0, last)
            waiting = waiting.slice(last)
    if waiting is not None:
        yield waiting


def _groups(table: pa.Table) -> list[range]:
    """The rows of each prompt, which are neighbours."""
    prompts = table["prompt"].to_pylist()
    starts = [row for row in range(len(prompts)) if not row or prompts[row] != prompts[row - 1]]
    return [range(start, end) for start, end in pairwise([*starts, len(prompts)])]


def check_room(prompts: Sized, config: PipelineConfig, limit: Limit) -> None:
    """Raise where a prompt leaves too little of the model's context for the responses that are sampled.

    These are never dropped: which rows there are must not depend on settings of later stages. In an encoder-decoder
    they leave all of the decoder's.

    Raises:
        DataError: a prompt does.
        ConfigError: a decoder reads less than such a response.
    """
    rooms = {f"{name}.max_new_tokens": getattr(config, name) for name in ("ppo", "evaluate")}
    on = {setting: stage.max_new_tokens for setting, stage in rooms.items() if stage.enabled}
    if not on or not prompts.numbers:
        return
    setting = max(on, key=lambda name: on[name])
    if limit.halves:
        if on[setting] > limit.tokens:
            raise ConfigError(f"{setting} is {on[setting]}, but the model's context is {limit.tokens}; lower it")
        return
    most = limit.tokens - on[setting]
    bad = BadRows(prompts.where, "too long")
    sizes, numbers = np.concatenate(prompts.lengths["prompt"]), np.concatenate(prompts.numbers)
    for index in np.flatnonzero(sizes > most):
        bad.add(
            prompts.places.place(int(numbers[index])),
            f"prompt: {sizes[index]} tokens, but {most} are left of the model's context {limit.tokens} after "
            f"{setting} {on[setting]}",
            order=int(numbers[index]),
        )
    bad.check(f"Shorten them, lower {setting}, or set data.max_prompt_tokens: {most} and data.too_long: drop.")
