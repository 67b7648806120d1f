"""The content-addressed store: what a stage made lies at ``<home>/store/<stage>/<key>/``, with a manifest.

An artifact is written elsewhere and published by one rename, so that it is there whole or not at all. Opening it
verifies it: a file whose size differs is damaged; one whose modification time differs is hashed again. A copy of each
manifest stays in the ledger (``<home>/ledger``) when the artifact goes: it explains why a stage runs again and
predicts what it will give. ``rlhf.store.opening`` puts a store that machines share behind it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.errors import ArtifactError
from rlhf.store.hashing import MANIFEST, files_of, sha256_file
from rlhf.store.locks import try_lock, unlock

JOURNAL = "metrics.jsonl"  # a stage's curves with the time of each point: kept, but no part of the digest
FORMAT = 1
UNUSED_SECONDS = 86_400.0  # after which a downloaded model is deleted by garbage collection


@dataclass(frozen=True)
class Manifest:
    """What an artifact is and how it came to be.

    ``files`` gives size (bytes), sha256 and modification time (ns) of every file; ``digest`` is over names and
    hashes of all files but the journal; ``parts`` is the same for each top-level file or folder, which is what
    a later stage's key sees. ``ingredients`` is what the key was made of, flat. ``cost`` is what computing it took, as
    far as the machine tells: ``peak_memory_bytes``, ``gpu_peak_memory_bytes``, ``energy_joules``.
    """

    stage: str
    key: str
    digest: str
    parts: dict[str, str]
    files: dict[str, dict[str, Any]]
    ingredients: dict[str, Any]
    pipeline: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    run_id: str = ""
    device: str = ""
    started: float = 0.0  # unix seconds
    seconds: float = 0.0
    cost: dict[str, float] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(int(file["size"]) for file in self.files.values())


def digest_of(files: Mapping[str, Mapping[str, Any]]) -> str:
    """One digest for a set of files, by their names and sha256; where and when they were written is no part of it."""
    listing = sorted((name, file["sha256"]) for name, file in files.items() if name != JOURNAL)
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def parts_of(files: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The digest of each top-level file or folder; the journal has none."""
    tops = sorted({name.split("/")[0] for name in files if name != JOURNAL})
    return {top: digest_of({n: f for n, f in files.items() if n.split("/")[0] == top}) for top in tops}


def make_manifest(directory: Path, **about: Any) -> Manifest:
    """Describe a finished directory; ``about`` gives the fields that are not read off the files."""
    files = {
        name: {"size": path.stat().st_size, "sha256": sha256_file(path), "mtime_ns": path.stat().st_mtime_ns}
        for name, path in files_of(directory).items()
    }
    return Manifest(digest=digest_of(files), parts=parts_of(files), files=files, **about)


def read_manifest(path: Path) -> Manifest:
    """Read a manifest.

    Raises:
        ArtifactError: it is missing, not JSON, or not of this format.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ArtifactError(f"missing: {path}") from None
    except OSError as error:
        raise ArtifactError(f"unreadable: {path}: {error}") from None
    return parse_manifest(content, str(path))


def parse_manifest(content: bytes, where: str) -> Manifest:
    """Read a manifest from the bytes of a file; ``where`` is what an error calls it. Raises ArtifactError."""
    try:
        manifest = Manifest(**json.loads(content))
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"unreadable: {where}: {error}") from None
    if manifest.format != FORMAT:
        raise ArtifactError(f"{where} has format {manifest.format}; this version reads format {FORMAT}")
    return manifest


def verify(directory: Path, *, thorough: bool = False) -> Manifest:
    """Open an artifact, checking that nothing of it is missing, added or changed.

    With ``thorough`` every file is hashed, otherwise those whose modification time moved (a copy, a restored
    backup); a file that proves unchanged gets its recorded time back, so that it is hashed once.

    Raises:
        ArtifactError: naming the first file that is wrong, and how.
    """
    if not directory.is_dir():
        raise ArtifactError("missing")
    manifest = read_manifest(directory / MANIFEST)
    found = files_of(directory)
    for name in sorted(found.keys() - manifest.files.keys()):
        raise ArtifactError(f"corrupt: {name} was added")
    for name, expected in manifest.files.items():
        if name not in found:
            raise ArtifactError(f"corrupt: {name} is missing")
        status = found[name].stat()
        if status.st_size != expected["size"]:
            raise ArtifactError(f"corrupt: {name} has {status.st_size} bytes, not {expected['size']}")
        if thorough or status.st_mtime_ns != expected["mtime_ns"]:
            if sha256_file(found[name]) != expected["sha256"]:
                raise ArtifactError(f"corrupt: {name} has changed")
            os.utime(found[name], ns=(status.st_atime_ns, expected["mtime_ns"]))
    return manifest


class Found(NamedTuple):
    """An artifact that need not be computed; ``place`` says where it has to be fetched from, empty if it is here."""

    manifest: Manifest
    place: str = ""


class Store:
    """All artifacts below one home folder."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.root = home / "store"
        self.ledger = home / "ledger"
        self.downloads = home / "models"  # of a model registry, by digest; modified at their last use

    def path(self, stage: str, key: str) -> Path:
        """Where the artifact of a stage and key lies, or would lie."""
        return self.root / stage / key

    def lock_path(self, stage: str, key: str) -> Path:
        """The lock file that whoever computes this artifact holds."""
        return self.home / "locks" / f"{stage}-{key}.lock"

    def work_directory(self, stage: str, key: str) -> Path:
        """Where an attempt at this artifact works; its checkpoints survive there until it is published."""
        return self.home / "work" / f"{stage}-{key}"

    def open(self, stage: str, key: str) -> Manifest:
        """Verify an artifact and return its manifest. Raises ArtifactError like :func:`verify`."""
        manifest = verify(self.path(stage, key))
        if (manifest.stage, manifest.key) != (stage, key):
            raise ArtifactError(f"corrupt: {MANIFEST} is that of {manifest.stage}/{manifest.key}")
        if (self.remembered(stage, key) or manifest) != manifest:
            raise ArtifactError(f"corrupt: {MANIFEST} has changed")
        return manifest

    def find(self, stage: str, key: str) -> Found:
        """What an artifact is, without fetching it. Raises ArtifactError if it has to be computed."""
        return Found(self.open(stage, key))

    def publish(self, out: Path, manifest: Manifest) -> Path:
        """Move a finished directory into the store by one rename; what was there goes to the trash first."""
        target = self.path(manifest.stage, manifest.key)
        write_json(out / MANIFEST, asdict(manifest))
        target.parent.mkdir(parents=True, exist_ok=True)
        trash = self.home / "trash" / uuid.uuid4().hex
        if target.exists():
            trash.parent.mkdir(parents=True, exist_ok=True)
            target.rename(trash)
        out.rename(target)
        write_json(self._ledger_path(manifest.stage, manifest.key), asdict(manifest))
        shutil.rmtree(trash, ignore_errors=True)
        return target

    def send(self, stage: str, key: str) -> None:
        """Give an artifact to the other machines, if there is a store for that; nothing here."""

    def send_unsent(self) -> None:
        """Give the others what an earlier run could not; nothing here."""

    def unsent(self) -> list[tuple[str, str]]:
        """The stages and keys of artifacts that the other machines have yet to get."""
        return sorted((path.parent.name, path.name) for path in (self.home / "unsent").glob("*/*"))

    def remembered(self, stage: str, key: str) -> Manifest | None:
        """The manifest that this key had when it was computed, also if the artifact is gone since."""
        try:
            return read_manifest(self._ledger_path(stage, key))
        except ArtifactError:
            return None

    def touch(self, stage: str, key: str) -> None:
        """Remember that the artifact was used now."""
        path = self._ledger_path(stage, key)
        if path.exists():
            os.utime(path)

    def latest(self, stage: str, pipeline: str) -> Manifest | None:
        """What this stage of a pipeline computed or reused last: what a plan compares with."""
        paths = sorted((self.ledger / stage).glob("*.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
        for path in paths:
            try:
                manifest = read_manifest(path)
            except ArtifactError:
                continue
            if manifest.pipeline == pipeline:
                return manifest
        return None

    def artifacts(self) -> Iterator[Path]:
        """Every artifact directory, by stage and key."""
        yield from sorted(path for path in self.root.glob("*/*") if path.is_dir())

    def last_used(self, stage: str, key: str) -> float:
        """When the artifact was last computed or reused, in unix seconds; 0 if that is not known."""
        path = self._ledger_path(stage, key)
        return path.stat().st_mtime if path.exists() else 0.0

    def collect_garbage(self, keep: Iterable[tuple[str, str]], *, dry_run: bool = False) -> list[tuple[Path, int]]:
        """Delete artifacts and abandoned work that no kept (stage, key) names, and downloads of which nobody has made
        use for a day. What is being computed or sent stays.

        Returns the deleted directories with their sizes in bytes. The ledger keeps their manifests.
        """
        kept = {place for pair in (*keep, *self.unsent()) for place in (self.path(*pair), self.work_directory(*pair))}
        recent = time.time() - UNUSED_SECONDS
        candidates = [
            *self.artifacts(),
            *(self.home / "work").glob("*"),
            *(self.home / "trash").glob("*"),
            *(path for path in self.downloads.glob("*") if path.stat().st_mtime < recent),
        ]
        deleted = []
        for path in candidates:
            if path in kept:
                continue
            name = f"{path.parent.name}-{path.name}" if path.parent.parent == self.root else path.name
            descriptor = try_lock(self.home / "locks" / f"{name}.lock")
            if descriptor is None:
                continue
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            deleted.append((path, size))
            if not dry_run:
                shutil.rmtree(path)
            unlock(descriptor)
        return deleted

    def _ledger_path(self, stage: str, key: str) -> Path:
        return self.ledger / stage / f"{key}.json"


class FileHashes:
    """Hashes of the user's own files, remembered by size and modification time, so that a plan need not read them."""

    def __init__(self, home: Path) -> None:
        self._path = home / "hashes.json"
        try:
            self._known: dict[str, list[Any]] = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._known = {}
        self._changed = False

    def of(self, path: Path) -> str:
        """sha256 of a file, or of the names and hashes of all files of a folder."""
        if path.is_dir():
            files = {name: {"sha256": self.of(file)} for name, file in files_of(path).items()}
            return digest_of(files)
        status = path.stat()
        known = self._known.get(str(path.resolve()))
        fresh = time.time_ns() - status.st_mtime_ns < 2_000_000_000  # may still change within the clock's resolution
        if known and known[:2] == [status.st_size, status.st_mtime_ns] and not fresh:
            return str(known[2])
        digest = sha256_file(path)
        self._known[str(path.resolve())] = [status.st_size, status.st_mtime_ns, digest]
        self._changed = True
        return digest

    def save(self) -> None:
        """Write what was learnt; failing to is no error, it only costs time later."""
        if self._changed:
            try:
                write_json(self._path, self._known)
            except OSError:
                return
            self._changed = False


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
