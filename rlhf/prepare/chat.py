"""Conversations as text: lists of messages, each with ``role`` and ``content``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from rlhf.errors import ConfigError, did_you_mean, show

Message = dict[str, str]
Template = Callable[[Sequence[Message]], str]  # messages that wait for an answer -> the text before it
ROLES = ("system", "user", "assistant", "tool")
NAMES = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}


class Exchange(NamedTuple):
    """What is said before an answer (messages, or text that stays as it is), and the answers to it."""

    before: str | list[Message] | None
    answers: list[str]


def simple_template(messages: Sequence[Message]) -> str:
    """``User: ...``, ``Assistant: ...``, one paragraph for each message, and ``Assistant:`` in a line at the end."""
    said = [f"{NAMES[message['role']]}: {message['content'].strip()}\n\n" for message in messages]
    return "".join(said) + "Assistant:\n"


def make_template(chat: str, tokenizer: PreTrainedTokenizerBase | None) -> Template:
    """The template that ``data.chat`` asks for; ``tokenizer`` is None for a model from random weights.

    Raises:
        ConfigError: the model's own template is asked for, and it has none.
    """
    has_one = tokenizer is not None and tokenizer.chat_template is not None
    if chat == "model" and not has_one:
        raise ConfigError(
            "data.chat is `model`, but the model's tokenizer has no chat template; set data.chat to `simple`, or "
            "choose a model that was trained on conversations"
        )
    if chat == "simple" or not has_one:
        return simple_template
    assert tokenizer is not None

    def template(messages: Sequence[Message]) -> str:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return text

    return template


def problem(value: Any) -> str | None:
    """What is wrong with a list of messages."""
    if not value:
        return "holds no message; must be a list of messages"
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            return f"{show(message)}, message {number}, is not of the form {{'role': ..., 'content': ...}}"
        role, content = message["role"], message["content"]
        if role not in ROLES:
            hint = did_you_mean(role, ROLES) if isinstance(role, str) else ""
            return f"message {number} has the role {show(role)}; must be one of {', '.join(ROLES)}{hint}"
        if not isinstance(content, str) or not content.strip():
            return f"message {number} has the content {show(content)}; must be text"
    return None


def exchange(prompt: str | list[Message] | None, answers: Sequence[str | list[Message]]) -> Exchange:
    """Take conversations apart: what all of them have before the last message, and these last messages.

    Raises:
        ValueError: they differ before their last message, or it is not one of the assistant.
    """
    before, texts = prompt, []
    for answer in answers:
        if isinstance(answer, str):
            texts.append(answer)
            continue
        *context, last = answer
        if last["role"] != "assistant":
            raise ValueError(f"the last message is of the {last['role']}; must be of the assistant")
        texts.append(last["content"])
        if context and isinstance(before, list) and [_key(m) for m in before] != [_key(m) for m in context]:
            raise ValueError("the conversations differ before their last message")
        before = context or before
    if isinstance(before, list) and before[-1]["role"] == "assistant":
        raise ValueError("two messages of the assistant follow each other at the end")
    return Exchange(before, texts)


def _key(message: Message) -> tuple[str, str]:
    return message["role"], message["content"]
