"""What finished runs left: their records, their figures in words, their policies, comparisons between them.

May import cache, the stages and what lies below them.
"""

from typing import TYPE_CHECKING

from rlhf import lazily

if TYPE_CHECKING:
    from rlhf.runs.comparison import NO_INTERVAL, Change, Compared, Row
    from rlhf.runs.generate import Response, Sampling
    from rlhf.runs.headlines import duration, figures, sentences, value
    from rlhf.runs.policies import Place, Trained
    from rlhf.runs.records import OWNER, REPORT, RunRecord, read_runs, report_of
else:
    __getattr__ = lazily(__name__)
