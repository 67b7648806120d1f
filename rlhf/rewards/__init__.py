"""What scores a response: Python functions, built-in rules, a trained reward model, a weighted sum; see
docs/rewards.md.

May import models, metrics, store and what lies below them.

A reward function takes the texts of a batch and gives one number a row::

    def brevity(prompts, responses, **columns) -> list[float]:
        return [-len(response.split()) for response in responses]

``columns`` are the other columns of the prompt files, as lists; a function that names just some of them gets just
these. Responses have no special tokens.
"""

from typing import TYPE_CHECKING

from rlhf import lazily

if TYPE_CHECKING:
    from rlhf.rewards.functions import FunctionScorer, RewardFunction, Scorer, call_reward, load_function, make_scorer
    from rlhf.rewards.model import RewardModel
    from rlhf.rewards.weighted import Rewards, make_rewards
else:
    __getattr__ = lazily(__name__)
