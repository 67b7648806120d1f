"""The store that several machines share, at the URL of any file system that fsspec has a driver for.

An artifact is ``<url>/<stage>/<key>/manifest.json`` and, beside it, a folder with its files, named by their content.
The files are written first and the manifest last: what was sent halfway does not count, and what replaces an artifact
never mixes with it. Nothing is listed, so that a driver's cached listings cannot mislead.

fsspec is imported when a store is used. Credentials are the driver's affair, which finds them in its environment.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from rlhf.errors import ArtifactError, ConfigError, StorageError
from rlhf.store.artifacts import Manifest, digest_of, parse_manifest, parts_of, verify
from rlhf.store.disk import check_room
from rlhf.store.hashing import MANIFEST
from rlhf.store.locations import STORE_VARIABLE
from rlhf.store.retrying import error_code, http_status, may_pass, retry

T = TypeVar("T")

EXTRAS = {"s3": "rlhf-pipeline[s3]", "s3a": "rlhf-pipeline[s3]"}
READ_ONLY = frozenset({"http", "https", "github", "data"})


def check_url(url: str) -> None:
    """See that there is a driver for a URL, without loading it; and, for a folder of this machine, that it is there.

    Raises:
        ConfigError: saying what to install or to make.
    """
    from fsspec.registry import known_implementations, registry

    protocol, _, place = url.partition("://")
    option = f"--store ({STORE_VARIABLE}) {url!r}"
    if protocol in READ_ONLY or not (protocol in known_implementations or protocol in registry):
        why = "cannot be written to" if protocol in READ_ONLY else "is known to no driver of fsspec"
        raise ConfigError(f"{option}: {protocol}:// {why}; take s3://, gs://, abfs:// or file:///, for example")
    package = known_implementations.get(protocol, {"class": "fsspec"})["class"].partition(".")[0]
    if find_spec(package) is None:
        wanted = EXTRAS.get(protocol, package)
        raise ConfigError(f"{option}: the driver {package} is not installed: pip install '{wanted}'")
    if protocol in ("file", "local") and not (place.startswith("/") and Path(place).is_dir()):
        raise ConfigError(f"{option}: there is no folder {place}; is it mounted? If it is to be new, make it")


class SharedStore:
    """The artifacts at one URL. What can pass is tried again, see :mod:`rlhf.store.retrying`."""

    def __init__(self, url: str) -> None:
        self.url = url

    def manifest(self, stage: str, key: str) -> Manifest:
        """What an artifact is.

        Raises:
            ArtifactError: there is none, or its manifest is damaged.
            StorageError: the store cannot be read.
        """
        path = f"{self._root}/{stage}/{key}/{MANIFEST}"
        try:
            content: bytes = self._ask(partial(self._files.cat_file, path))
        except FileNotFoundError:
            raise ArtifactError("missing") from None
        manifest = parse_manifest(content, f"{self.url}/{stage}/{key}/{MANIFEST}")
        try:
            whole = (digest_of(manifest.files), parts_of(manifest.files)) == (manifest.digest, manifest.parts)
            named = all(_is_plain(name) for name in manifest.files) and manifest.size >= 0
        except (AttributeError, KeyError, TypeError, ValueError):
            whole = named = False
        if not (whole and named) or (manifest.stage, manifest.key) != (stage, key):
            raise ArtifactError(f"corrupt: {MANIFEST} does not describe {stage}/{key}")
        return manifest

    def download(self, manifest: Manifest, to: Path) -> None:
        """Fetch the files of an artifact into an empty folder, and its manifest; every file is hashed.

        Raises:
            ArtifactError: a file is missing or differs.
            StorageError: the store cannot be read, or the files do not fit on the disk.
        """
        check_room(to, manifest.size, f"fetching {manifest.stage}/{manifest.key} from {self.url}")
        for name in manifest.files:
            source, target = f"{self._folder(manifest)}/{name}", to / name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._ask(partial(self._files.get_file, source, str(target)))
            except FileNotFoundError:
                raise ArtifactError(f"corrupt: {name} is missing") from None
        (to / MANIFEST).write_text(json.dumps(asdict(manifest)), "utf-8")
        verify(to, thorough=True)  # which also gives the files their recorded times

    def upload(self, folder: Path, manifest: Manifest, *, again: bool = False) -> None:
        """Send an artifact, unless the store has one with this digest; it replaces one with another.

        Args:
            folder: where its files are.
            manifest: what it is.
            again: send it in any case, since what the store has is damaged.

        Raises:
            StorageError: the store cannot be read or written.
        """
        if not again:
            try:
                if self.manifest(manifest.stage, manifest.key).digest == manifest.digest:
                    return
            except ArtifactError:
                pass
        try:
            for name in manifest.files:
                source, target = str(folder / name), f"{self._folder(manifest)}/{name}"
                self._ask(partial(self._put, source, target))
            content = json.dumps(asdict(manifest), indent=1, sort_keys=True).encode()
            path = f"{self._root}/{manifest.stage}/{manifest.key}/{MANIFEST}"
            self._ask(partial(self._write_whole, path, content))
        except FileNotFoundError as error:
            raise self._explained(error) from error

    @cached_property
    def _place(self) -> tuple[Any, str]:
        """The file system, and the path of the store in it."""
        from fsspec.core import url_to_fs

        try:
            files, root = url_to_fs(self.url)
        except Exception as error:  # whatever a driver finds wrong with the URL or with its environment
            raise ConfigError(f"--store ({STORE_VARIABLE}) {self.url!r} cannot be used: {error}") from error
        return files, str(root).rstrip("/")

    @property
    def _files(self) -> Any:
        return self._place[0]

    @property
    def _root(self) -> str:
        return self._place[1]

    def _folder(self, manifest: Manifest) -> str:
        """Where the files of an artifact are: by the content of all of them, the journal too, which has no digest."""
        listing = sorted((name, file["sha256"]) for name, file in manifest.files.items())
        content = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
        return f"{self._root}/{manifest.stage}/{manifest.key}/{content}"

    def _put(self, source: str, target: str) -> None:
        if not self._files.async_impl:  # where objects have names only, there is no folder to be made
            self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
        self._files.put_file(source, target)

    def _write_whole(self, path: str, content: bytes) -> None:
        """Write a small file so that others see all of it or nothing. An object is like that; a file is renamed."""
        if self._files.async_impl:
            self._files.pipe_file(path, content)
            return
        self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
        temporary = f"{path}.{uuid.uuid4().hex}"
        self._files.pipe_file(temporary, content)
        self._files.mv(temporary, path)

    def _ask(self, request: Callable[[], T]) -> T:
        """Make a request, several times if need be.

        Raises:
            FileNotFoundError: what is asked for is not there.
            StorageError: whatever else went wrong, in words.
        """
        try:
            return retry(request)
        except FileNotFoundError as error:
            if error_code(error) == "NoSuchBucket":
                raise self._explained(error) from error
            raise
        except Exception as error:
            raise self._explained(error) from error

    def _explained(self, error: Exception) -> StorageError:
        """The error with what to do about it."""
        said = " ".join(f"{type(error).__name__}: {error}".split())
        code = error_code(error)
        said += f" ({code})" if code and code not in said else ""
        if may_pass(error):
            todo = (
                "it was tried several times. When it answers, the same run goes on from here; without "
                f"{STORE_VARIABLE} and --store it goes on without the other machines"
            )
            return StorageError(f"the shared store {self.url} does not answer: {said}; {todo}")
        if isinstance(error, FileNotFoundError):
            return StorageError(f"the shared store {self.url} is not there: {said}; make the bucket, or name another")
        denied = isinstance(error, PermissionError) or http_status(error) in (401, 403)
        if denied or "Credential" in type(error).__name__:
            return StorageError(
                f"the shared store {self.url} refuses: {said}; the driver's credentials (for S3: AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or a role) must be there, and be allowed to list, read and write"
            )
        return StorageError(f"the shared store {self.url} failed: {said}")


def _is_plain(name: str) -> bool:
    """Whether a name from a manifest stays within the folder that it is to lie in."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\\" not in name
