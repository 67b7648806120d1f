"""The options that several commands have, and what they mean."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from rlhf.cache import Selection
from rlhf.config import PipelineConfig, load
from rlhf.stages import STAGES

DEFAULT_SOURCE = "demo"


def add_source(parser: argparse.ArgumentParser) -> None:
    """Which configuration."""
    parser.add_argument(
        "source", nargs="?", default=DEFAULT_SOURCE, metavar="PRESET|FILE", help="preset or YAML file (default: demo)"
    )
    parser.add_argument("--size", help="a size that the preset offers, such as smoke")
    parser.add_argument("--set", action="append", metavar="K=V", help="override one value: --set ppo.kl_coef=0.1")


def add_selection(parser: argparse.ArgumentParser) -> None:
    """Which stages."""
    stages: dict[str, Any] = {"choices": tuple(STAGES), "metavar": "STAGE"}
    parser.add_argument("--only", **stages, help="compute this stage anew and nothing else")
    parser.add_argument("--from", dest="start", **stages, help="compute this stage and all after it anew")
    parser.add_argument("--until", **stages, help="nothing after this stage")
    parser.add_argument("--refresh", action="append", **stages, help="compute this stage anew, the others as needed")


def add_store(parser: argparse.ArgumentParser) -> None:
    """The store that machines share."""
    parser.add_argument("--store", metavar="URL", help="store that machines share (default: $RLHF_STORE, else none)")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Output for a program."""
    parser.add_argument("--json", action="store_true", help="print JSON, for a program to read")


def add_home(parser: argparse.ArgumentParser) -> None:
    """The folder of all state."""
    parser.add_argument("--home", help="folder of all state (default: $RLHF_HOME, else .rlhf)")


def count(text: str) -> int:
    """The type of an option that counts something: 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of 1 or more")
    return int(text)


def config_of(options: argparse.Namespace) -> PipelineConfig:
    """The configuration that is meant.

    Raises:
        ConfigError: it cannot be read, or cannot work.
    """
    return load(options.source, size=options.size, overrides=options.set or [])


def selection_of(options: argparse.Namespace) -> Selection:
    """The stages that are meant."""
    return Selection(options.only, options.start, options.until, frozenset(options.refresh or ()))


def words_of(options: argparse.Namespace) -> str:
    """What says on a command line which configuration this is, and where its artifacts are."""
    given = [] if options.source == DEFAULT_SOURCE else [options.source]
    for name in ("size", "store", "home"):
        given += [f"--{name}", getattr(options, name)] if getattr(options, name) else []
    return shlex.join([*given, *(word for text in options.set or [] for word in ("--set", text))])
