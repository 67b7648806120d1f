"""Bytes and where they lie: artifacts, checkpoints, the store that machines share, locks, digests, the hub.

May import errors alone; nothing in here shapes a number of a result.
"""

from typing import TYPE_CHECKING

from rlhf import lazily

if TYPE_CHECKING:
    from rlhf.store.artifacts import JOURNAL, Manifest, Store, digest_of, make_manifest
    from rlhf.store.disk import named_if_full
    from rlhf.store.hashing import manifest_of
    from rlhf.store.locations import DEMO_PREFIX, HUB_PREFIX, STORE_VARIABLE, home_directory
    from rlhf.store.locks import POLL_SECONDS, is_locked, lock, locked, try_lock, unlock
    from rlhf.store.opening import SharingStore, open_store
    from rlhf.store.retrying import retry
else:
    __getattr__ = lazily(__name__)
