"""Which store a run works with: that of its home folder alone, or with one behind it that machines share.

Stages work and read in the home folder in both cases. What is not there, or is damaged there, is fetched; what was
computed is sent. Two machines that need the same stage at once both compute it, and the one that ends last counts.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from rlhf.errors import ArtifactError
from rlhf.store.artifacts import Found, Manifest, Store
from rlhf.store.locations import home_directory, shared_store_url
from rlhf.store.locks import lock, locked, try_lock, unlock
from rlhf.store.shared import SharedStore, check_url

log = logging.getLogger(__name__)

FETCHES = 2  # of an artifact that comes damaged, until it counts as not there
AGAIN = "again"  # in a mark: what the shared store has is damaged, so that an equal digest is no reason not to send


def open_store(home: str | None = None) -> Store:
    """The store of a home folder, with the shared store behind it if ``RLHF_STORE`` names one.

    Raises:
        ConfigError: ``RLHF_STORE`` cannot be used.
    """
    url = shared_store_url()
    if url is None:
        return Store(home_directory(home))
    check_url(url)
    return SharingStore(home_directory(home), SharedStore(url))


class SharingStore(Store):
    """A store that takes what it lacks from a shared one, and gives it what it gets.

    ``<home>/unsent/<stage>/<key>`` marks an artifact that is yet to be sent, from before it is published until it is
    sent, so that neither an error nor a kill forgets it.
    """

    def __init__(self, home: Path, shared: SharedStore) -> None:
        super().__init__(home)
        self.shared = shared
        self._damaged: set[tuple[str, str]] = set()  # what was found so in the shared store

    def open(self, stage: str, key: str) -> Manifest:
        """Verify an artifact, which is fetched if it is missing or damaged here; its manifest.

        Raises:
            ArtifactError: it is whole neither here nor there; says what is wrong here.
            StorageError: the shared store cannot be read, or the disk is full.
        """
        try:
            return super().open(stage, key)
        except ArtifactError as error:
            if not self._fetch(stage, key):
                raise
            log.info("%s/%s (%s) was fetched from %s", stage, key, error, self.shared.url)
        return super().open(stage, key)

    def find(self, stage: str, key: str) -> Found:
        """What an artifact is, here or in the shared store, whose manifest alone is read.

        Raises:
            ArtifactError: neither has it; says what is wrong here.
            StorageError: the shared store cannot be read.
        """
        try:
            return Found(super().open(stage, key))
        except ArtifactError:
            offered = self._offered(stage, key)
            if offered is None:
                raise
            return Found(offered, self.shared.url)

    def publish(self, out: Path, manifest: Manifest) -> Path:
        """Move a finished directory into the store of the home folder; ``send`` gives it to the others."""
        self._mark(manifest.stage, manifest.key)
        return super().publish(out, manifest)

    def send(self, stage: str, key: str) -> None:
        """Give an artifact to the other machines, unless that is done.

        Raises:
            StorageError: that failed; the artifact is here, and marked as one to be sent.
        """
        with locked(self._lock_path("send", stage, key)):
            self._send(stage, key)

    def send_unsent(self) -> None:
        """Give the others what an earlier run could not, but for what another process is sending now.

        Raises:
            StorageError: that failed again.
        """
        for stage, key in self.unsent():
            descriptor = try_lock(self._lock_path("send", stage, key))
            if descriptor is None:
                continue
            try:
                self._send(stage, key)
            finally:
                unlock(descriptor)

    def send_all(self) -> int:
        """Give the others every whole artifact of the home folder that they lack; how many there are here.

        Raises:
            StorageError: that failed.
        """
        artifacts = [(path.parent.name, path.name) for path in self.artifacts()]
        artifacts = [(stage, key) for stage, key in artifacts if self._is_here(stage, key)]
        for stage, key in artifacts:
            self._mark(stage, key)
        self.send_unsent()
        return len(artifacts)

    def _mark(self, stage: str, key: str) -> None:
        """Note that an artifact is to be sent."""
        marker = self._marker(stage, key)
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()  # what it says stays: the shared store's damage is still there
        if (stage, key) in self._damaged:
            marker.write_text(AGAIN, "utf-8")

    def _send(self, stage: str, key: str) -> None:
        """Send a marked artifact, and take the mark away; the caller holds the lock for that."""
        marker = self._marker(stage, key)
        if not marker.exists():
            return
        try:
            manifest = super().open(stage, key)
        except ArtifactError as error:
            log.warning("%s/%s cannot be sent to %s: %s", stage, key, self.shared.url, error)
        else:
            self.shared.upload(self.path(stage, key), manifest, again=marker.read_text("utf-8") == AGAIN)
        marker.unlink(missing_ok=True)

    def _fetch(self, stage: str, key: str) -> bool:
        """Fetch an artifact, and publish it here by one rename; whether it is here now.

        Processes that want the same one fetch it once.
        """
        descriptor = lock(self._lock_path("fetch", stage, key))
        assert descriptor is not None
        out = self.home / "work" / f"fetch-{stage}-{key}"  # garbage collection knows by the lock that it is in use
        try:
            if self._is_here(stage, key):
                return True
            for _ in range(FETCHES):
                manifest = self._offered(stage, key)
                if manifest is None:
                    return False
                shutil.rmtree(out, ignore_errors=True)
                out.mkdir(parents=True)
                try:
                    self.shared.download(manifest, out)
                except ArtifactError as error:
                    self._complain(stage, key, error)
                    continue
                super().publish(out, manifest)
                return True
            return False
        finally:
            shutil.rmtree(out, ignore_errors=True)
            unlock(descriptor)

    def _is_here(self, stage: str, key: str) -> bool:
        try:
            super().open(stage, key)
        except ArtifactError:
            return False
        return True

    def _offered(self, stage: str, key: str) -> Manifest | None:
        """What the shared store has; None if that is nothing, or damaged."""
        try:
            return self.shared.manifest(stage, key)
        except ArtifactError as error:
            if str(error) != "missing":
                self._complain(stage, key, error)
            return None

    def _complain(self, stage: str, key: str, error: ArtifactError) -> None:
        """Say that the shared store's artifact is damaged, and remember to replace it."""
        self._damaged.add((stage, key))
        log.warning("%s/%s in %s cannot be used: %s", stage, key, self.shared.url, error)

    def _marker(self, stage: str, key: str) -> Path:
        return self.home / "unsent" / stage / key

    def _lock_path(self, what: str, stage: str, key: str) -> Path:
        return self.home / "locks" / f"{what}-{stage}-{key}.lock"
