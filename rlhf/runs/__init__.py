"""What finished runs left: their records, their figures in words, their policies, comparisons between them.

May import cache, the stages and what lies below them.
"""

from typing import TYPE_CHECKING

from rlhf import lazily

if TYPE_CHECKING:
    from rlhf.runs.compared import NO_INTERVAL as NO_INTERVAL, Change as Change, Compared as Compared, Row as Row
    from rlhf.runs.generate import Response as Response, Sampling as Sampling
    from rlhf.runs.headlines import duration as duration, figures as figures, sentences as sentences, value as value
    from rlhf.runs.policies import Place as Place, Trained as Trained
    from rlhf.runs.records import (
        OWNER as OWNER,
        REPORT as REPORT,
        RunRecord as RunRecord,
        read_runs as read_runs,
        report_of as report_of,
    )
else:
    __getattr__ = lazily(__name__)
