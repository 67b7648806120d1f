"""The report of a run: one HTML file for people, from what its stages left.

It needs no network, no server and no library; it can be sent by mail, printed, and read on a phone.
"""

from rlhf.report.model import Sources, sources_of
from rlhf.report.page import page

__all__ = ["Sources", "page", "sources_of"]
