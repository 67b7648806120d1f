"""The folder of a worker's machine that has data, configurations and functions of one's own.

Prefect's worker starts every run in an empty folder, where relative paths mean nothing.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from rlhf.errors import ConfigError

PROJECT = "RLHF_PROJECT"


def enter_project() -> None:
    """Work in the folder that ``RLHF_PROJECT`` names, and find functions there, in a process that a worker has started.

    Elsewhere, and without the variable, nothing changes. The folder comes last in ``sys.path``: it hides nothing.

    Raises:
        ConfigError: there is no such folder, or it cannot be entered.
    """
    folder = os.environ.get(PROJECT)
    if not folder or "PREFECT__FLOW_RUN_ID" not in os.environ:
        return
    if not Path(folder).is_absolute():
        raise ConfigError(f"{PROJECT}={folder}: must be an absolute path, as /srv/project, in the worker's environment")
    try:
        os.chdir(folder)
    except OSError as error:
        raise ConfigError(
            f"{PROJECT}={folder}: {error.strerror}; make this folder on the worker's machine, or name another one in "
            "the worker's environment"
        ) from None
    if folder not in sys.path:
        sys.path.append(folder)
