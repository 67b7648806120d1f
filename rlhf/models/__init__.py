"""Models of torch and transformers: loading and saving them, LoRA, and how a reward model reads a text.

May import metrics, store and what lies below them.
"""

from typing import TYPE_CHECKING

from rlhf import lazily

if TYPE_CHECKING:
    from rlhf.models.adapt import add_lora
    from rlhf.models.dtypes import Dtype
    from rlhf.models.loading import load_policy, load_reward_model, load_tokenizer, prompt_token_ids, save
else:
    __getattr__ = lazily(__name__)
