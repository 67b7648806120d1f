"""The stage `prepare`: data of any format into checked rows, split by prompt, in Parquet; and a tokenizer and random
weights.

May import config, models and what lies below them; no other stage.
"""

from typing import TYPE_CHECKING

from rlhf import lazily

if TYPE_CHECKING:
    from rlhf.prepare.stage import check, run
else:
    __getattr__ = lazily(__name__)
