"""The command line ``rlhf``: a module of this package a command. Exit codes: 0 done, 1 a stage failed, 2 bad input, 130
interrupted.

Nothing heavy is imported before it is needed: planning, and a run of which all is up to date, load neither torch nor
Prefect nor MLflow.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from rich.console import Console

from rlhf.errors import InputError, RlhfError
from rlhf.store import STORE_VARIABLE

# Each is a module of this package with ABOUT, add_arguments(parser) and command(options, console), which may return an
# exit code.
COMMANDS = (
    "run", "plan", "sweep", "presets", "show", "validate", "generate", "runs", "diff", "compare", "report", "champion",
    "sheet", "up", "deploy", "cache",
)  # fmt: skip
DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


class _Console(Console):
    """Rich's own ends the program with exit code 1 when the reader of its output has gone."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser(arguments[:1]).parse_args(arguments)
    console, errors = _Console(), Console(stderr=True)
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # the user's reward functions live there; last, so that nothing is hidden
    if getattr(options, "store", None) is not None:
        os.environ[STORE_VARIABLE] = options.store  # for this process's flows and for its children
    try:
        return int(options.command(options, console) or DONE)
    except InputError as error:
        errors.print(f"rlhf: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return BAD_INPUT
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except (RlhfError, OSError, RuntimeError) as error:
        errors.print(
            f"rlhf: {type(error).__name__}: {error}", style="red", markup=False, highlight=False, soft_wrap=True
        )
        if os.environ.get("RLHF_TRACEBACK"):
            raise
        errors.print("RLHF_TRACEBACK=1 shows where.", style="dim")
        return FAILED
    except KeyboardInterrupt:
        errors.print("rlhf: interrupted; the next run goes on from the last checkpoint")
        return INTERRUPTED


def _parser(first: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of all commands; where the first argument names one, of that one alone, and no other is imported."""
    parser = argparse.ArgumentParser(
        prog="rlhf", description="RLHF as a cached pipeline: prepare, sft, judge, reward, ppo, evaluate."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name in [name for name in COMMANDS if name in first] or COMMANDS:
        module = import_module(f"flows.commands.{name}")
        command = commands.add_parser(name, help=module.ABOUT, description=module.ABOUT)
        command.set_defaults(command=module.command)
        module.add_arguments(command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
