"""The committed demo data is what the generator writes and what data/README.md promises."""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf.demo import gold_score
from rlhf.store.locations import demo_data_directory

DATA = Path(__file__).parents[2] / "data"
FACTS = ("who", "what", "where", "when")
SIGMAS = 4.0


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_data_generator", DATA / "generate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generator = _load()


@pytest.fixture(scope="module")
def generated() -> dict[str, pa.Table]:
    return generator.generate()


@pytest.fixture(scope="module")
def demonstrations() -> list[dict[str, Any]]:
    return pq.read_table(DATA / "demonstrations.parquet").to_pylist()


@pytest.fixture(scope="module")
def preferences() -> list[dict[str, Any]]:
    return pq.read_table(DATA / "preferences.parquet").to_pylist()


@pytest.fixture(scope="module")
def rows(demonstrations: list[dict[str, Any]], preferences: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return demonstrations + preferences


def within_binomial_error(count: int, size: int, share: float) -> bool:
    return abs(count / size - share) <= SIGMAS * math.sqrt(share * (1 - share) / size)


def check_shares(values: Iterable[str], shares: Mapping[str, float]) -> None:
    counts = Counter(values)
    assert set(counts) == set(shares)
    assert sum(shares.values()) == pytest.approx(1)
    for value, share in shares.items():
        assert within_binomial_error(counts[value], counts.total(), share), (value, counts)


def gold(rows: list[dict[str, Any]], responses: list[str]) -> list[float]:
    facts = {fact: [row[fact] for row in rows] for fact in FACTS}
    return gold_score([row["prompt"] for row in rows], responses, **facts)


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def test_committed_files_are_what_the_generator_writes(generated: dict[str, pa.Table]) -> None:
    for name, table in generated.items():
        assert pq.read_table(DATA / name).equals(table), f"{name}: run `python data/generate.py`"


def test_generator_is_deterministic_and_depends_on_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "DEMONSTRATIONS", 50)
    monkeypatch.setattr(generator, "PREFERENCES", 50)
    name = "preferences.parquet"
    assert generator.generate()[name].equals(generator.generate()[name])
    assert not generator.generate(seed=1)[name].equals(generator.generate(seed=2)[name])


def test_check_tells_whether_files_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generator, "DEMONSTRATIONS", 20)
    monkeypatch.setattr(generator, "PREFERENCES", 20)
    where = ["--directory", str(tmp_path)]
    assert generator.main([*where, "--check"]) == 1
    assert generator.main(where) == 0
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert generator.main([*where, "--check"]) == 0
    assert generator.main(where) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first
    table = pq.read_table(tmp_path / "preferences.parquet")
    pq.write_table(table.slice(1), tmp_path / "preferences.parquet")
    capsys.readouterr()
    assert generator.main([*where, "--check"]) == 1
    message = capsys.readouterr().err
    assert "preferences.parquet" in message
    assert "demonstrations.parquet" not in message


def test_files_are_small_and_found() -> None:
    assert sum((DATA / name).stat().st_size for name in ("demonstrations.parquet", "preferences.parquet")) < 3_000_000
    assert demo_data_directory() == DATA


def test_notices_are_many_distinct_and_short(rows: list[dict[str, Any]]) -> None:
    assert len({row["prompt"] for row in rows}) == len(rows) >= 10_000
    for row in rows:
        notice, cue, rest = row["prompt"].partition("\n\n")
        assert 40 <= len(notice.split()) <= 90
        assert cue + rest == generator.CUE


def test_no_two_notices_share_their_facts(rows: list[dict[str, Any]]) -> None:
    assert len({tuple(row[fact] for fact in FACTS) for row in rows}) == len(rows)


def test_every_notice_states_its_facts(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        for fact in FACTS:
            assert row[fact].lower() in row["prompt"].lower(), (fact, row)


def test_there_are_at_least_eight_kinds_with_several_frames_each() -> None:
    assert len(generator.KINDS) >= 8
    for name, kind in generator.KINDS.items():
        assert len(kind.frames) + len(generator.FRAMES) >= 5, name
        for frame in kind.frames:
            assert all("{" + fact + "}" in frame for fact in FACTS), frame


def test_side_sentences_hold_no_fact() -> None:
    kinds = generator.KINDS.values()
    side = {*generator.SIDE, *(sentence for kind in kinds for sentence in kind.side)}
    facts = {*(who for kind in kinds for who in kind.who), *(what for kind in kinds for what in kind.what)}
    facts |= {*generator.PLACES, *generator.WEEKDAYS}
    for sentence in side:
        assert not [fact for fact in facts if fact in sentence], sentence
        assert not set(sentence.strip(".").split()) & set(generator.HOURS) - {"one", "two"}, sentence


def test_demonstration_flaws_have_the_documented_shares(demonstrations: list[dict[str, Any]]) -> None:
    check_shares((row["flaw"] for row in demonstrations), generator.DEMONSTRATION_FLAWS)


def test_preference_flaws_and_label_noise_have_the_documented_shares(preferences: list[dict[str, Any]]) -> None:
    check_shares((row["flaw"] for row in preferences), generator.PREFERENCE_FLAWS)
    flipped = sum(row["flipped"] for row in preferences)
    assert within_binomial_error(flipped, len(preferences), generator.LABEL_NOISE)


def test_flipped_says_which_side_is_better(preferences: list[dict[str, Any]]) -> None:
    chosen = gold(preferences, [row["chosen"] for row in preferences])
    rejected = gold(preferences, [row["rejected"] for row in preferences])
    for row, left, right in zip(preferences, chosen, rejected, strict=True):
        assert (right > left) == row["flipped"], row
        assert max(left, right) == 1, row


def test_annotators_err_as_documented(preferences: list[dict[str, Any]]) -> None:
    annotated = [row for row in preferences if row["annotator_a"] is not None]
    assert len(annotated) == generator.ANNOTATED
    assert all((row["annotator_a"] is None) == (row["annotator_b"] is None) for row in preferences)
    for annotator, share in generator.ANNOTATOR_ERRORS.items():
        assert {row[annotator] for row in annotated} == {"chosen", "rejected"}
        errors = sum((row[annotator] == "rejected") != row["flipped"] for row in annotated)
        assert within_binomial_error(errors, len(annotated), share), annotator


def test_gold_score_ranks_clean_above_every_flaw(
    demonstrations: list[dict[str, Any]], preferences: list[dict[str, Any]]
) -> None:
    scores = gold(demonstrations, [row["response"] for row in demonstrations])
    bad = gold(preferences, [row["chosen" if row["flipped"] else "rejected"] for row in preferences])
    for flaw in generator.DEMONSTRATION_FLAWS:
        got = mean(score for score, row in zip(scores, demonstrations, strict=True) if row["flaw"] == flaw)
        assert got == 1 if flaw == "none" else got < 0.7, (flaw, got)
    for flaw in generator.PREFERENCE_FLAWS:
        assert mean(score for score, row in zip(bad, preferences, strict=True) if row["flaw"] == flaw) < 0.75, flaw
