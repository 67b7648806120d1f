"""Processes of one stage: how they are started, what they say, how they end, and what they cost.

May import rlhf; nothing else of tasks.
"""
