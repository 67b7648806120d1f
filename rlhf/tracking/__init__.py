"""How a training is heard and stopped: its curves, its progress, and the wish that it ends.

May import errors alone; nothing in here shapes a number of a result.
"""

from typing import TYPE_CHECKING

from rlhf import lazily

if TYPE_CHECKING:
    from rlhf.tracking.stopping import Stop
    from rlhf.tracking.tracker import Entry, JournalTracker, Listener, NullTracker, Progress, Tracker, read_journal
else:
    __getattr__ = lazily(__name__)
