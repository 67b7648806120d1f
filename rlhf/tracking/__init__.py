"""How a training is heard and stopped: its curves, its progress, and the wish that it ends.

May import errors alone; nothing in here shapes a number of a result.
"""

from typing import TYPE_CHECKING

from rlhf import lazily

if TYPE_CHECKING:
    from rlhf.tracking.stopping import Stop as Stop
    from rlhf.tracking.tracker import (
        Entry as Entry,
        JournalTracker as JournalTracker,
        Listener as Listener,
        NullTracker as NullTracker,
        Progress as Progress,
        Tracker as Tracker,
        read_journal as read_journal,
    )
else:
    __getattr__ = lazily(__name__)
