"""Which run is in use: the record of champions, the contest of a candidate with one, and the gate.

May import runs, cache and what lies below them; neither report nor feedback.
"""

from typing import TYPE_CHECKING

from rlhf import lazily

if TYPE_CHECKING:
    from rlhf.champions.gate import Verdict
    from rlhf.champions.ledger import (
        CHAMPION,
        Change,
        Considered,
        Contender,
        artifacts_in_use,
        champion,
        consider,
        considered,
        find_run,
        history,
        news,
        person,
        pipelines,
        promote,
        registered_names,
        roll_back,
    )
else:
    __getattr__ = lazily(__name__)
