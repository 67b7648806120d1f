"""Whatever data and configuration are given, ``rlhf validate`` ends well, or with exit code 2 and one clear message."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, event, example, given, settings, strategies as st

from rlhf.config.fields import Section
from rlhf.config.pipeline import PipelineConfig

Rlhf = Callable[..., tuple[int, str, str]]
# What draws from it is a thread of Prefect's, which a test before this one has started.
# Hypothesis warns of it, and, where it has to print a large strategy for that, of the size, too.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies"),
    pytest.mark.filterwarnings("ignore:Generating overly large repr"),
]
FUZZ = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
KINDS: dict[str, tuple[str, ...]] = {
    "demonstrations": ("prompt", "response"),
    "prompts": ("prompt", "reference"),
    "preferences": ("prompt", "chosen", "rejected"),
    "ratings": ("prompt", "response", "score"),
    "labelled": ("text", "label"),
}
ODD_TEXTS = (
    "", " ", "\n", "a\nb", "a\r\nb", 'say "hi"', "a, b", "\U0001f642\u200d\U0001f467", "שלום עולם", "مرحبا", "日本語",
    "\u2028", "\ufeffx", "\x00", "\ud83d", "1", "007", "nan", "null", "{prompt}", "=1+1", "x" * 1_000_000,
)  # fmt: skip
TEXTS = st.sampled_from(ODD_TEXTS) | st.text(max_size=30)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "x"]), "content": TEXTS}), max_size=3
)
VALUES = TEXTS | st.none() | st.integers() | st.floats() | st.booleans() | MESSAGES | st.lists(TEXTS, max_size=3)
BASE = {
    **dict.fromkeys(("sft", "judge", "reward", "ppo", "evaluate"), "off"),
    "model": {"init": "random", "layers": 1, "width": 8, "heads": 2, "vocab_size": 300},
}


@st.composite
def data_files(draw: st.DrawFn) -> tuple[str, str, bytes, dict[str, Any]]:
    """A kind, a file name, its bytes, and settings of ``data``."""
    kind = draw(st.sampled_from(list(KINDS)))
    names = [*KINDS[kind], *draw(st.lists(st.sampled_from(["n", "extra", "messages", "responses", ""]), max_size=2))]
    plain = st.fixed_dictionaries(dict.fromkeys(names, st.text("abc ", min_size=1)))
    odd = st.dictionaries(st.sampled_from(names), VALUES)
    rows = draw(st.lists(plain | odd | plain, max_size=6))
    name = draw(st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.parquet", "a.ndjson", "a.txt"]))
    encoding = draw(st.sampled_from(["utf-8", "utf-8-sig", "latin-1", "utf-16", "cp1252"]))
    content = written(name, names, rows, encoding)
    if draw(st.integers(0, 3)) == 0 and content:  # damage
        at = draw(st.integers(0, len(content) - 1))
        content = content[:at] + draw(st.binary(max_size=3)) + content[at + draw(st.integers(0, 3)) :]
    options: dict[str, Any] = {
        "test_fraction": draw(st.sampled_from([0.0, 0.5])),
        "bad_rows": draw(st.sampled_from(["error", "skip"])),
        "duplicates": draw(st.sampled_from(["error", "drop"])),
        "too_long": draw(st.sampled_from(["error", "drop"])),
        "chat": draw(st.sampled_from(["auto", "simple"])),
        "encoding": draw(st.sampled_from(["utf-8", encoding, "utf-16"])),
    }
    return kind, name, content, options


def written(name: str, names: list[str], rows: list[dict[str, Any]], encoding: str) -> bytes:
    """Rows in the format that a name says."""
    if name.endswith(".parquet"):
        file = io.BytesIO()
        try:
            pq.write_table(pa.Table.from_pylist(rows), file)
        except (pa.ArrowException, UnicodeEncodeError, OverflowError):  # no such file can be
            return b"PAR1"
        return file.getvalue()
    if name.endswith(".csv"):
        cells = io.StringIO()
        writer = csv.writer(cells)
        writer.writerow(names)
        writer.writerows([[row.get(column) for column in names] for row in rows])
        text = cells.getvalue()
    else:
        text = json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows))
    return text.encode(encoding, errors="surrogatepass" if "16" in encoding else "replace")


def check(rlhf: Rlhf, path: Path) -> None:
    code, out, error = rlhf("validate", str(path))
    event(f"exit code {code}")
    assert code in (0, 2), out + error
    assert "Traceback" not in out + error
    assert (code == 2) == error.startswith("rlhf: "), error
    assert len(error) < 6000, error[:500]


@pytest.mark.slow
@FUZZ
@given(data_files())
def test_any_data(tmp_path: Path, rlhf: Rlhf, made: tuple[str, str, bytes, dict[str, Any]]) -> None:
    kind, name, content, options = made
    (tmp_path / name).write_bytes(content)
    config = BASE | {"data": options | {kind: name}}
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    check(rlhf, tmp_path / "c.yaml")


# ------------------------------------------------------------------------------------------------------ configurations
def fields(section: type[Section], prefix: str = "") -> list[str]:
    """The dotted names of all settings."""
    found = []
    for name, info in section.model_fields.items():
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            found += [f"{prefix}{name}", *fields(inner, f"{prefix}{name}.")]
        else:
            found.append(prefix + name)
    return found


SETTINGS = st.sampled_from(fields(PipelineConfig)) | st.text("abc._", min_size=1, max_size=12)
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS.filter(lambda text: len(text) < 100)
    | st.sampled_from(["off", "on", "pretrained", "random", "../x", "hub:a/b", "a:b", "x.py:f", "demo:x.parquet"])
)  # fmt: skip
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip


@pytest.mark.slow
@FUZZ
@given(st.dictionaries(SETTINGS, TREES, min_size=1, max_size=4), st.sampled_from(["demo", "none"]))
@example({"ppo.rewards": {"brevity": {"weight": "x"}}}, "demo")
@example({"data.computed": {"a": {"function": "word_count"}}}, "none")
@example({"data.rows": [{"": None}]}, "none")
def test_any_configuration(tmp_path: Path, rlhf: Rlhf, changes: dict[str, Any], base: str) -> None:
    tree: dict[str, Any] = {"preset": "demo"} if base == "demo" else dict(BASE)
    tree |= {"data": {"max_demonstrations": 60, "max_preferences": 60}} if base == "demo" else {}
    for name, value in changes.items():
        *sections, key = name.split(".")
        inner = tree
        for section in sections:
            below = inner.get(section)
            inner[section] = inner = dict(below) if isinstance(below, dict) else {}
        inner[key] = value
    try:
        text = yaml.safe_dump(tree, allow_unicode=True)
        (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    except UnicodeEncodeError:
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    check(rlhf, tmp_path / "c.yaml")
