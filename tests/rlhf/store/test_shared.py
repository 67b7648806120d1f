"""The store that machines share: what one publishes the others have, and no fault leaves something half there."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from rlhf.errors import ArtifactError, StorageError
from rlhf.store import shared as shared_store
from rlhf.store.artifacts import JOURNAL, Manifest, Store, make_manifest
from rlhf.store.locks import locked
from rlhf.store.opening import SharingStore

PLACE = ("sft", "k1")


class Unsteady(MemoryFileSystem):
    """A file system in memory; ``faults`` is asked before every request and may raise."""

    protocol = "unsteady"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    requests: ClassVar[list[tuple[str, str]]] = []
    faults: ClassVar[list[Callable[[str, str], None]]] = []

    def _ask(self, verb: str, path: str) -> None:
        self.requests.append((verb, path.rpartition("/")[2].partition(".json.")[0]))
        for fault in self.faults:
            fault(verb, path)

    def cat_file(self, path: str, *args: Any, **options: Any) -> bytes:
        self._ask("read", path)
        return bytes(super().cat_file(path, *args, **options))

    def get_file(self, rpath: str, lpath: str, *args: Any, **options: Any) -> None:
        self._ask("get", rpath)
        super().get_file(rpath, lpath, *args, **options)

    def put_file(self, lpath: str, rpath: str, *args: Any, **options: Any) -> None:
        self._ask("put", rpath)
        super().put_file(lpath, rpath, *args, **options)

    def pipe_file(self, path: str, value: bytes, *args: Any, **options: Any) -> None:
        self._ask("write", path)
        super().pipe_file(path, value, *args, **options)


class Machines(NamedTuple):
    """Homes that share a store; ``slept`` has the pauses between tries."""

    folder: Path
    url: str
    slept: list[float]

    def __call__(self, name: str) -> SharingStore:
        """The store of a machine, in a process of its own."""
        return SharingStore(self.folder / name, shared_store.SharedStore(self.url))


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machines]:
    fsspec.register_implementation("unsteady", Unsteady, clobber=True)
    for state in (Unsteady.store, Unsteady.requests, Unsteady.faults):
        state.clear()
    slept: list[float] = []
    again = shared_store.retry
    monkeypatch.setattr(shared_store, "retry", lambda request: again(request, sleep=slept.append))
    yield Machines(tmp_path, "unsteady://bucket/prefix", slept)
    Unsteady.faults.clear()


def compute(store: Store, content: str = "weights", journal: str = "1", place: tuple[str, str] = PLACE) -> Manifest:
    """Publish an artifact and give it to the others, as a stage's task does."""
    out = store.work_directory(*place) / "out"
    shutil.rmtree(out, ignore_errors=True)
    (out / "model").mkdir(parents=True)
    (out / "model" / "weights.bin").write_text(content)
    (out / "model" / "empty").touch()
    (out / "report.json").write_text("{}")
    (out / JOURNAL).write_text(journal)
    manifest = make_manifest(
        out, stage=place[0], key=place[1], ingredients={"a": 1}, pipeline="p", metrics={"sft/loss": 1.5}
    )
    store.publish(out, manifest)
    store.send(*place)
    return manifest


def fails(verb: str, error: BaseException, *, times: int = 99, name: str = "") -> None:
    """Let some requests fail."""
    left = [times]

    def fault(asked: str, path: str) -> None:
        if asked == verb and name in path and left[0] > 0:
            left[0] -= 1
            raise error

    Unsteady.faults.append(fault)


def damage(name: str, content: bytes) -> None:
    """Replace the content of the shared file of that name."""
    [path] = [path for path in Unsteady.store if path.endswith(name)]
    fsspec.filesystem("unsteady").store[path].seek(0)
    Unsteady.store[path].truncate()
    Unsteady.store[path].write(content)


# --- what one machine publishes, the others have


def test_another_machine_opens_what_one_published(machines: Machines) -> None:
    manifest = compute(machines("a"))
    b = machines("b")
    assert b.open(*PLACE) == manifest
    for name in manifest.files:
        ours, theirs = machines("a").path(*PLACE) / name, b.path(*PLACE) / name
        assert theirs.read_bytes() == ours.read_bytes()
        assert theirs.stat().st_mtime_ns == ours.stat().st_mtime_ns  # so that it is not hashed at every opening
    assert b.latest("sft", "p") == manifest
    assert list((b.home / "work").iterdir()) == []


def test_what_is_here_needs_no_network(machines: Machines) -> None:
    store = machines("a")
    compute(store)
    Unsteady.requests.clear()
    assert store.open(*PLACE) == store.find(*PLACE).manifest
    assert store.find(*PLACE).place == ""
    assert Unsteady.requests == []


def test_finding_reads_the_manifest_alone(machines: Machines) -> None:
    manifest = compute(machines("a"))
    Unsteady.requests.clear()
    b = machines("b")
    assert b.find(*PLACE) == (manifest, "unsteady://bucket/prefix")
    assert Unsteady.requests == [("read", "manifest.json")]
    assert not b.root.exists()


def test_what_nobody_has_is_missing(machines: Machines) -> None:
    for ask in (machines("b").open, machines("b").find):
        with pytest.raises(ArtifactError, match=r"^missing$"):
            ask(*PLACE)
    assert machines.slept == []


def test_a_damaged_artifact_is_fetched(machines: Machines) -> None:
    manifest = compute(machines("a"))
    b = machines("b")
    b.open(*PLACE)
    (b.path(*PLACE) / "model" / "weights.bin").write_text("wrong")
    assert b.find(*PLACE).place == machines.url
    assert b.open(*PLACE) == manifest
    assert (b.path(*PLACE) / "model" / "weights.bin").read_text() == "weights"


def test_what_the_others_have_is_not_sent_again(machines: Machines) -> None:
    compute(machines("a"))
    Unsteady.requests.clear()
    compute(machines("b"), journal="of another run")
    assert Unsteady.requests == [("read", "manifest.json")]


def test_a_new_result_replaces_the_shared_one_and_mixes_with_nothing(machines: Machines) -> None:
    old = compute(machines("a"))
    new = compute(machines("b"), content="other weights")
    assert machines("c").open(*PLACE) == new != old
    assert machines("a").open(*PLACE) == old  # who has one keeps it
    shared_store.SharedStore(machines.url).download(old, _made(machines.folder / "someone who was fetching it"))


def test_all_that_is_here_can_be_sent(machines: Machines) -> None:
    before = Store(machines.folder / "a")
    for key in ("k1", "k2", "damaged"):
        compute(before, place=("sft", key))
    (before.path("sft", "damaged") / "report.json").unlink()
    assert Unsteady.requests == []
    assert machines("a").send_all() == 2
    assert [machines("b").find("sft", key).place for key in ("k1", "k2")] == [machines.url] * 2


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


# --- faults


@pytest.mark.parametrize("killed_at", [("put", "report.json"), ("put", JOURNAL), ("write", "manifest.json")])
def test_an_upload_that_was_killed_does_not_count_and_is_made_good(
    machines: Machines, killed_at: tuple[str, str]
) -> None:
    fails(killed_at[0], KeyboardInterrupt(), name=killed_at[1])
    with pytest.raises(KeyboardInterrupt):
        compute(machines("a"))
    Unsteady.faults.clear()
    with pytest.raises(ArtifactError, match="missing"):
        machines("b").open(*PLACE)
    next_run = machines("a")
    assert next_run.unsent() == [PLACE]
    next_run.send_unsent()
    assert next_run.unsent() == []
    assert machines("b").open(*PLACE) == next_run.open(*PLACE)


def test_an_artifact_killed_before_its_publishing_is_not_sent(machines: Machines) -> None:
    store = machines("a")
    store._mark(*PLACE)
    store.send_unsent()
    assert store.unsent() == []
    assert Unsteady.store == {}


def test_a_flaky_server_costs_time_only(machines: Machines) -> None:
    for verb in ("read", "put", "write", "get"):
        fails(verb, ConnectionResetError("by peer"), times=2)
    manifest = compute(machines("a"))
    assert machines("b").open(*PLACE) == manifest
    assert len(machines.slept) == 8


def test_a_server_that_stays_away_is_an_error_and_nothing_is_lost(machines: Machines) -> None:
    fails("put", TimeoutError("timed out"))
    store = machines("a")
    with pytest.raises(StorageError, match=r"unsteady://bucket/prefix does not answer: .*timed out.*several times"):
        compute(store)
    assert len(machines.slept) == 4
    assert store.open(*PLACE).digest
    assert store.unsent() == [PLACE]
    assert store.collect_garbage([]) == []  # it is still to be sent
    Unsteady.faults.clear()
    store.send_unsent()
    assert store.path(*PLACE) in [path for path, _ in store.collect_garbage([])]


def test_a_marked_artifact_that_someone_else_is_sending_is_left_to_them(machines: Machines) -> None:
    store = machines("a")
    fails("put", PermissionError("no"))
    with pytest.raises(StorageError):
        compute(store)
    Unsteady.faults.clear()
    with locked(store.home / "locks" / "send-sft-k1.lock"):
        store.send_unsent()
    assert store.unsent() == [PLACE]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError("Access Denied"), r"refuses: .*Access Denied.*AWS_ACCESS_KEY_ID"),
        (
            type("NoCredentialsError", (Exception,), {})("Unable to locate credentials"),
            "refuses: .*to locate.*or a role",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "failed: .*No space left"),
    ],
)
def test_what_cannot_pass_is_said_at_once(machines: Machines, error: Exception, words: str) -> None:
    for verb in ("read", "put"):
        Unsteady.faults.clear()
        fails(verb, error)
        with pytest.raises(StorageError, match=r"unsteady://bucket/prefix " + words):
            compute(machines("a"), content=verb)
    assert machines.slept == []


def test_no_bucket(machines: Machines) -> None:
    missing, cause = FileNotFoundError("The specified bucket does not exist"), Exception()
    cause.response = {"Error": {"Code": "NoSuchBucket"}}  # type: ignore[attr-defined]
    missing.__cause__ = cause
    fails("read", missing)
    with pytest.raises(StorageError, match=r"is not there: .*NoSuchBucket.*make the bucket"):
        machines("a").find(*PLACE)
    Unsteady.faults.clear()
    fails("put", FileNotFoundError("bucket/prefix"))
    with pytest.raises(StorageError, match="is not there"):
        compute(machines("a"))


def test_a_flipped_byte_in_the_shared_copy_is_computed_again_and_repaired(
    machines: Machines, caplog: pytest.LogCaptureFixture
) -> None:
    compute(machines("a"))
    damage("weights.bin", b"weightz")
    b = machines("b")
    with caplog.at_level(logging.WARNING), pytest.raises(ArtifactError, match=r"^missing$"):
        b.open(*PLACE)
    reason = "sft/k1 in unsteady://bucket/prefix cannot be used: corrupt: model/weights.bin has changed"
    assert [record.message for record in caplog.records] == [reason, reason]
    assert Unsteady.requests.count(("get", "weights.bin")) == 2
    assert not b.path(*PLACE).exists()
    manifest = compute(b, journal="2")  # the same digest, and yet it is sent
    assert machines("c").open(*PLACE) == manifest


def test_the_repair_is_not_forgotten_when_it_cannot_be_sent(machines: Machines) -> None:
    compute(machines("a"))
    damage("weights.bin", b"weightz")
    b = machines("b")
    with pytest.raises(ArtifactError):
        b.open(*PLACE)
    fails("put", PermissionError("no"))
    with pytest.raises(StorageError):
        compute(b, journal="2")
    Unsteady.faults.clear()
    machines("b").send_unsent()
    assert machines("c").open(*PLACE).digest


def test_a_download_that_was_damaged_on_its_way_is_fetched_again(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = compute(machines("a"))
    get_file, first = Unsteady.get_file, [True]

    def damaged_once(self: Unsteady, rpath: str, lpath: str) -> None:
        get_file(self, rpath, lpath)
        if rpath.endswith("weights.bin") and first.pop():
            Path(lpath).write_text("half")
            first.append(False)

    monkeypatch.setattr(Unsteady, "get_file", damaged_once)
    assert machines("b").open(*PLACE) == manifest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest.clear(), "unreadable"),
        (lambda manifest: manifest.update(format=99), "format 99"),
        (lambda manifest: manifest.update(key="another"), "does not describe"),
        (lambda manifest: manifest.update(digest="0" * 64), "does not describe"),
        (lambda manifest: manifest["parts"].update(model="0" * 64), "does not describe"),
        (lambda manifest: manifest["files"]["report.json"].pop("sha256"), "does not describe"),
        (lambda manifest: manifest.update(files=[1]), "does not describe"),
    ],
)
def test_a_damaged_shared_manifest_counts_as_none(
    machines: Machines, caplog: pytest.LogCaptureFixture, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    content = json.loads(json.dumps(vars(compute(machines("a")))))
    change(content)
    damage("manifest.json", json.dumps(content).encode())
    with pytest.raises(ArtifactError, match=r"^missing$"):
        machines("b").find(*PLACE)
    assert message in caplog.text
    manifest = compute(machines("b"))
    assert machines("c").open(*PLACE) == manifest


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped", "model/../../escaped", "..\\escaped", ""])
def test_a_name_that_leaves_its_folder_is_refused(machines: Machines, name: str) -> None:
    files = {name: {"size": 1, "sha256": "0" * 64, "mtime_ns": 0}}
    about = {"stage": "sft", "key": "k1", "ingredients": {}, "files": files}
    manifest = Manifest(digest=shared_store.digest_of(files), parts=shared_store.parts_of(files), **about)  # type: ignore[arg-type]
    compute(machines("a"))
    damage("manifest.json", json.dumps(vars(manifest)).encode())
    with pytest.raises(ArtifactError, match="does not describe"):
        shared_store.SharedStore(machines.url).manifest(*PLACE)


def test_a_full_disk_is_said_before_the_download(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = compute(machines("a"))
    usage = shutil.disk_usage(machines.folder)._replace(free=5)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    b = machines("b")
    words = rf"fetching sft/k1 .* \({manifest.size} bytes\) in {b.home}/work/fetch-sft-k1, where only 5 B are free"
    with pytest.raises(StorageError, match=words):
        b.open(*PLACE)
    assert not [request for request in Unsteady.requests if request[0] == "get"]


def test_those_who_want_the_same_at_once_fetch_it_once(machines: Machines) -> None:
    manifest = compute(machines("a"))
    with ThreadPoolExecutor(4) as threads:
        opened = list(threads.map(lambda store: store.open(*PLACE), [machines("b") for _ in range(4)]))
    assert opened == [manifest] * 4
    assert Unsteady.requests.count(("get", "weights.bin")) == 1
