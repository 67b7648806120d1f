"""The report of a run: one HTML file for people, which needs no network, no server and no library.

May import runs, cache and what lies below them; neither champions nor feedback.
"""

from typing import TYPE_CHECKING

from rlhf import lazily

if TYPE_CHECKING:
    from rlhf.report.files import write
    from rlhf.report.sources import Sources, sources_of
else:
    __getattr__ = lazily(__name__)
