"""Bytes and where they lie: artifacts, checkpoints, the store that machines share, locks, digests, the hub.

May import errors alone; nothing in here shapes a number of a result.
"""

from typing import TYPE_CHECKING

from rlhf import lazily

if TYPE_CHECKING:
    from rlhf.store.artifacts import (
        JOURNAL as JOURNAL,
        Manifest as Manifest,
        Store as Store,
        digest_of as digest_of,
        make_manifest as make_manifest,
    )
    from rlhf.store.disk import named_if_full as named_if_full
    from rlhf.store.hashing import manifest_of as manifest_of
    from rlhf.store.locations import (
        DEMO_PREFIX as DEMO_PREFIX,
        HUB_PREFIX as HUB_PREFIX,
        STORE_VARIABLE as STORE_VARIABLE,
        home_directory as home_directory,
    )
    from rlhf.store.locks import (
        POLL_SECONDS as POLL_SECONDS,
        is_locked as is_locked,
        lock as lock,
        locked as locked,
        try_lock as try_lock,
        unlock as unlock,
    )
    from rlhf.store.opening import SharingStore as SharingStore, open_store as open_store
    from rlhf.store.retrying import retry as retry
else:
    __getattr__ = lazily(__name__)
