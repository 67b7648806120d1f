"""Which run is in use: the record of champions, the contest of a candidate with one, and the gate.

May import runs, cache and what lies below them; neither report nor feedback.
"""

from typing import TYPE_CHECKING

from rlhf import lazily

if TYPE_CHECKING:
    from rlhf.champions.gate import Verdict as Verdict
    from rlhf.champions.record import (
        CHAMPION as CHAMPION,
        Change as Change,
        Considered as Considered,
        Contender as Contender,
        artifacts_in_use as artifacts_in_use,
        champion as champion,
        consider as consider,
        considered as considered,
        find_run as find_run,
        history as history,
        news as news,
        person as person,
        pipelines as pipelines,
        promote as promote,
        registered_names as registered_names,
        roll_back as roll_back,
    )
else:
    __getattr__ = lazily(__name__)
