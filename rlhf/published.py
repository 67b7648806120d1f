"""Columns of published datasets, in the shapes that they have on the hub: functions for ``data.computed``.

OpenAI's summaries of Reddit posts come as ``openai/summarize_from_feedback`` (a post in ``info``, two ``summaries`` and
a ``choice``) and flat, as ``trl-lib/tldr-preference`` (``prompt``, ``chosen``, ``rejected``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

POST, END = "POST:", "TL;DR:"


def tldr_post(**columns: Sequence[Any]) -> list[str]:
    """The text of each post."""
    if "info" in columns:
        return [info["post"] for info in columns["info"]]
    return [_between(prompt) for prompt in columns["prompt"]]


def tldr_chosen(**columns: Sequence[Any]) -> list[str]:
    """The summary of each post that people preferred."""
    return _summaries(columns, preferred=True)


def tldr_rejected(**columns: Sequence[Any]) -> list[str]:
    """The other summary of each post."""
    return _summaries(columns, preferred=False)


def _summaries(columns: dict[str, Sequence[Any]], preferred: bool) -> list[str]:
    if "summaries" not in columns:
        return list(columns["chosen" if preferred else "rejected"])
    return [
        summaries[choice if preferred else 1 - choice]["text"].strip()
        for summaries, choice in zip(columns["summaries"], columns["choice"], strict=True)
    ]


def _between(prompt: str) -> str:
    """The post in a prompt such as ``SUBREDDIT: r/x TITLE: y POST: z TL;DR:``; all of it where it is not like that."""
    return prompt.partition(POST)[2].rpartition(END)[0].strip() or prompt
