"""What starts the processes of a stage: ``accelerate launch``, which says afterwards which of them failed.

python -m tasks.processes.launcher <process id of the pipeline> <folder> <arguments of accelerate launch>
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tasks.processes.lifetime import end_with
from tasks.processes.messages import EXIT_CODES, LAUNCHER


def main(arguments: Sequence[str]) -> int:
    """Launch and wait; 0 if all processes ended well, else 1, with ``EXIT_CODES`` written."""
    parent, place, *rest = arguments
    end_with(int(parent), signal.SIGKILL)  # and the ranks with it: the next run may be about to use their folders
    os.environ[LAUNCHER] = str(os.getpid())
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch_command(launch_command_parser().parse_args(rest))
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
    except subprocess.CalledProcessError as error:  # the only process, which accelerate starts without torch's agent
        codes = {0: error.returncode}
    except SignalException as error:  # the agent has ended the ranks; now as any program ends by that signal
        signal.signal(error.sigval, signal.SIG_DFL)
        os.kill(os.getpid(), error.sigval)
        raise
    else:
        return 0
    (Path(place) / EXIT_CODES).write_text(json.dumps(codes), encoding="utf-8")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
