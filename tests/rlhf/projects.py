"""A small project that is fine (``good``), and the ways to break one thing in it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

ROWS = 40
Made = tuple[Path | str, list[str]]  # the configuration (a file, or the name of a preset), the overrides

CONFIG = """\
name: tiny
data:
  demonstrations: demonstrations.jsonl
  prompts: prompts.json
  preferences: pairs.csv
  validation_fraction: 0.2
  test_fraction: 0.3
model:
  init: random
  layers: 1
  width: 8
  heads: 2
  context: 64
  vocab_size: 300
judge:
  annotators: [anna, ben]
ppo:
  max_new_tokens: 8
  episodes: 8
evaluate:
  max_new_tokens: 8
"""


class Case(NamedTuple):
    """``make`` writes a broken project into a folder; each of ``fragments`` must be in the message."""

    name: str
    make: Callable[[Path], Made]
    fragments: tuple[str, ...]


def good(folder: Path) -> Path:
    """A project with nothing wrong: demonstrations, prompts and pairs in three formats, and ``config.yaml``."""
    demonstrations = [{"prompt": f"What is {i} plus {i}?", "response": f"It is {2 * i}."} for i in range(ROWS)]
    prompts = [{"prompt": f"What is {i} times 2?", "reference": f"It is {2 * i}.", "n": i} for i in range(ROWS)]
    (folder / "demonstrations.jsonl").write_text("\n".join(map(json.dumps, demonstrations)) + "\n", "utf-8")
    (folder / "prompts.json").write_text("[\n" + ",\n".join(map(json.dumps, prompts)) + "\n]\n", "utf-8")
    cells = io.StringIO()
    writer = csv.writer(cells, lineterminator="\n")
    writer.writerow(["prompt", "chosen", "rejected", "anna", "ben"])
    for i in range(ROWS):
        verdicts = ["chosen", "rejected" if i % 3 else "chosen"] if i % 2 else ["", ""]
        writer.writerow([f"What is {i} minus 1?", f"It is {i - 1}.", f"It is {i}, perhaps.", *verdicts])
    (folder / "pairs.csv").write_text(cells.getvalue(), "utf-8")
    (folder / "config.yaml").write_text(CONFIG, "utf-8")
    return folder / "config.yaml"


def replace(path: Path, old: str, new: str) -> None:
    """Replace the one place in a file where ``old`` is."""
    text = path.read_text("utf-8")
    assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {path}"
    path.write_text(text.replace(old, new), "utf-8")


def edited(file: str, *edits: tuple[str, str], overrides: Sequence[str] = ()) -> Callable[[Path], Made]:
    """The good project with some text of one file replaced."""

    def make(folder: Path) -> Made:
        config = good(folder)
        for old, new in edits:
            replace(folder / file, old, new)
        return config, list(overrides)

    return make


def written(file: str, content: str | bytes) -> Callable[[Path], Made]:
    """The good project with one file overwritten."""

    def make(folder: Path) -> Made:
        config = good(folder)
        (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)
        return config, []

    return make


def overridden(*overrides: str) -> Callable[[Path], Made]:
    """The good project with overrides, in which ``HERE`` is its folder."""

    def make(folder: Path) -> Made:
        return good(folder), [text.replace("HERE", str(folder)) for text in overrides]

    return make


def configured(old: str, new: str) -> Callable[[Path], Made]:
    """The good project with some text of its configuration replaced."""
    return edited("config.yaml", (old, new))


def parquet(columns: dict[str, list[object]], setting: str = "demonstrations") -> Callable[[Path], Made]:
    """The good project, with a Parquet file of these columns for a setting."""

    def make(folder: Path) -> Made:
        config = good(folder)
        pq.write_table(pa.table(columns), folder / "made.parquet")
        return config, [f"data.{setting}={folder}/made.parquet"]

    return make


def duplicated_columns(folder: Path) -> Made:
    config = good(folder)
    table = pa.table([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], names=["prompt", "response", "response"])
    pq.write_table(table, folder / "made.parquet")
    return config, [f"data.demonstrations={folder}/made.parquet"]


def truncated_parquet(folder: Path) -> Made:
    config, overrides = parquet({"prompt": ["a"], "response": ["b"]})(folder)
    content = (folder / "made.parquet").read_bytes()
    (folder / "made.parquet").write_bytes(content[: len(content) // 2])
    return config, overrides


def fake_parquet(folder: Path) -> Made:
    config = good(folder)
    (folder / "fake.parquet").write_text("prompt,response\na,b\n")
    return config, [f"data.demonstrations={folder}/fake.parquet"]


def several_splits(folder: Path) -> Made:
    config = good(folder)
    for name in ("train", "test"):
        (folder / "saved" / name).mkdir(parents=True)
    (folder / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    return config, [f"data.demonstrations={folder}/saved"]


def broken_saved(folder: Path) -> Made:
    config = good(folder)
    (folder / "saved").mkdir()
    (folder / "saved" / "dataset_info.json").write_text("{}")
    return config, [f"data.demonstrations={folder}/saved"]


def other_columns(folder: Path) -> Made:
    config = good(folder)
    (folder / "more.jsonl").write_text('{"prompt": "a", "response": "b", "mood": "c"}\n')
    return config, [f"data.demonstrations=[{folder}/demonstrations.jsonl, {folder}/more.jsonl]"]


def other_types(folder: Path) -> Made:
    config = good(folder)
    (folder / "one.jsonl").write_text('{"prompt": "a", "response": "b", "n": 1}\n')
    (folder / "two.jsonl").write_text('{"prompt": "c", "response": "d", "n": "two"}\n')
    return config, [f"data.demonstrations=[{folder}/one.jsonl, {folder}/two.jsonl]"]


def repeated_elsewhere(folder: Path) -> Made:
    config = good(folder)
    (folder / "more.jsonl").write_text('{"prompt": "What is 7 plus 7?", "response": "It is 14."}\n')
    return config, [f"data.demonstrations=[{folder}/demonstrations.jsonl, {folder}/more.jsonl]"]


def no_model(folder: Path) -> Made:
    (folder / "empty").mkdir()
    return good(folder), ["model.init=pretrained", f"model.path={folder}/empty"]


def broken_model(folder: Path) -> Made:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{not json")
    return good(folder), ["model.init=pretrained", f"model.path={folder}/model"]


def only_one_pair(folder: Path) -> Made:
    config = good(folder)
    lines = (folder / "pairs.csv").read_text().splitlines()[:2]
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return config, []


DEMO, PROMPTS, PAIRS = "demonstrations.jsonl", "prompts.json", "pairs.csv"
LINE_8 = '{"prompt": "What is 7 plus 7?", "response": "It is 14."}'
ROW_8 = '{"prompt": "What is 7 times 2?", "reference": "It is 14.", "n": 7}'
CSV_9 = 'What is 7 minus 1?,It is 6.,"It is 7, perhaps.",chosen,rejected'


def line_8(new: str) -> Callable[[Path], Made]:
    return edited(DEMO, (LINE_8, new))


def row_8(new: str) -> Callable[[Path], Made]:
    return edited(PROMPTS, (ROW_8, new))


def csv_9(new: str) -> Callable[[Path], Made]:
    return edited(PAIRS, (CSV_9, new))


def preset(name: str, *overrides: str) -> Callable[[Path], Made]:
    return lambda folder: (name, list(overrides))
