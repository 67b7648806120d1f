"""The store: published whole or not at all, and every damage is seen."""

import os
import shutil
import time
from pathlib import Path

import pytest

from rlhf.errors import ArtifactError
from rlhf.store.artifacts import JOURNAL, FileHashes, Manifest, Store, make_manifest, verify
from rlhf.store.locks import locked


def publish(store: Store, key: str = "k1", stage: str = "sft", content: str = "weights") -> Manifest:
    out = store.work_directory(stage, key) / "out"
    (out / "model").mkdir(parents=True)
    (out / "model" / "weights.bin").write_text(content)
    (out / "report.json").write_text("{}")
    (out / JOURNAL).write_text('{"t": 1}\n')
    manifest = make_manifest(out, stage=stage, key=key, ingredients={"a": 1}, pipeline="p", metrics={"sft/loss": 1.5})
    store.publish(out, manifest)
    return manifest


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


def test_what_is_published_opens_as_it_was(store: Store) -> None:
    manifest = publish(store)
    assert store.open("sft", "k1") == manifest
    assert manifest.size == len("weights") + len("{}") + len('{"t": 1}\n')
    assert not (store.work_directory("sft", "k1") / "out").exists()


def test_the_digest_is_that_of_the_content(store: Store) -> None:
    first = publish(store, "k1")
    same = publish(store, "k2")
    other = publish(store, "k3", content="other weights")
    assert first.digest == same.digest
    assert first.digest != other.digest
    assert first.parts["report.json"] == other.parts["report.json"]
    assert first.parts["model"] != other.parts["model"]


def test_the_journal_is_kept_and_no_part_of_the_digest(store: Store, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("1")
    before = make_manifest(tmp_path / "out", stage="s", key="k", ingredients={})
    (tmp_path / "out" / JOURNAL).write_text("points\n")
    after = make_manifest(tmp_path / "out", stage="s", key="k", ingredients={})
    assert before.digest == after.digest
    assert JOURNAL in after.files


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "model" / "weights.bin").unlink(), "model/weights.bin is missing"),
        (lambda path: (path / "model" / "weights.bin").write_text("weight"), "has 6 bytes, not 7"),
        (lambda path: (path / "model" / "weights.bin").write_text("weighty"), "model/weights.bin has changed"),
        (lambda path: (path / "model" / "more.bin").write_text("x"), "model/more.bin was added"),
        (lambda path: (path / JOURNAL).write_text('{"t": 2}\n'), "metrics.jsonl has changed"),
        (lambda path: (path / "manifest.json").write_text("{"), "unreadable"),
        (lambda path: (path / "manifest.json").unlink(), "missing"),
        (
            lambda path: (path / "manifest.json").write_text(
                (path / "manifest.json").read_text().replace("1.5", "1.6")
            ),
            "manifest.json has changed",
        ),
        (shutil.rmtree, "missing"),
    ],
)
def test_every_damage_is_seen(store: Store, damage: object, message: str) -> None:
    publish(store)
    damage(store.path("sft", "k1"))  # type: ignore[operator]
    with pytest.raises(ArtifactError, match=message):
        store.open("sft", "k1")


def test_a_change_that_keeps_size_and_time_is_found_by_the_thorough_check(store: Store) -> None:
    publish(store)
    path = store.path("sft", "k1") / "model" / "weights.bin"
    times = path.stat()
    path.write_text("weighty")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    verify(store.path("sft", "k1"))
    with pytest.raises(ArtifactError, match="has changed"):
        verify(store.path("sft", "k1"), thorough=True)


def test_a_copy_with_other_times_is_hashed_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = publish(store)
    os.utime(store.path("sft", "k1") / "model" / "weights.bin")
    assert verify(store.path("sft", "k1")) == manifest
    monkeypatch.setattr("rlhf.store.artifacts.sha256_file", lambda path: pytest.fail("hashed again"))
    assert verify(store.path("sft", "k1")) == manifest


def test_publishing_again_replaces(store: Store) -> None:
    publish(store)
    manifest = publish(store, content="new")
    assert store.open("sft", "k1") == manifest
    assert not any((store.home / "trash").glob("*"))


def test_the_ledger_outlives_the_artifact(store: Store) -> None:
    manifest = publish(store)
    shutil.rmtree(store.path("sft", "k1"))
    assert store.remembered("sft", "k1") == manifest
    assert store.latest("sft", "p") == manifest
    assert store.latest("sft", "another pipeline") is None


def test_latest_is_the_one_used_last(store: Store) -> None:
    publish(store, "k1")
    publish(store, "k2")
    os.utime(store.ledger / "sft" / "k2.json", (1, 1))
    store.touch("sft", "k1")
    latest = store.latest("sft", "p")
    assert latest is not None
    assert latest.key == "k1"


def test_garbage_collection_keeps_what_is_named_and_what_is_in_use(store: Store) -> None:
    for key in ("kept", "locked", "old"):
        publish(store, key)
    with locked(store.lock_path("sft", "locked")):
        would = store.collect_garbage([("sft", "kept")], dry_run=True)
        assert store.path("sft", "old").exists()
        deleted = store.collect_garbage([("sft", "kept")])
    assert {path for path, _ in would} == {path for path, _ in deleted} >= {store.path("sft", "old")}
    assert sorted(path.name for path in store.artifacts()) == ["kept", "locked"]


def test_garbage_collection_deletes_downloads_that_nobody_uses(store: Store) -> None:
    for name, age in (("used", 3_600), ("unused", 2 * 86_400)):
        (store.downloads / name).mkdir(parents=True)
        os.utime(store.downloads / name, (time.time() - age,) * 2)
    assert [path.name for path, _ in store.collect_garbage([])] == ["unused"]
    assert [path.name for path in store.downloads.iterdir()] == ["used"]


def test_file_hashes_are_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "data.csv"
    file.write_text("a")
    os.utime(file, (1_000_000, 1_000_000))
    hashes = FileHashes(tmp_path / "home")
    first = hashes.of(file)
    hashes.save()
    with monkeypatch.context() as patch:
        patch.setattr("rlhf.store.artifacts.sha256_file", lambda path: pytest.fail("hashed again"))
        assert FileHashes(tmp_path / "home").of(file) == first
    file.write_text("b")
    assert FileHashes(tmp_path / "home").of(file) != first
