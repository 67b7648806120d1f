"""Where a model or dataset of the hub is: which commit a name stands for now, and whether the hub answers.

The hub is asked once, with a short timeout. What is in the local cache is loaded from there where the hub does
not answer: the hub's own client would try each file again for minutes.
"""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

from rlhf.errors import DataError, ModelError

Kind = Literal["model", "dataset"]

TIMEOUT_SECONDS = 5.0


class Found(NamedTuple):
    """A commit, in 40 hexadecimal digits, and whether the hub gave it; if not, the local cache did."""

    commit: str
    online: bool


def resolve_commit(name: str, revision: str | None, option: str = "model.path", kind: Kind = "model") -> str:
    """The commit that a hub id and revision name. ``option`` is the setting that the name is of, for the error.

    Raises:
        ModelError or DataError: as ``find``.
    """
    if revision and _is_commit(revision):
        return revision
    find.cache_clear()  # a process may live for many runs, and the hub move on between them
    return find(name, revision, option, kind).commit


@cache
def find(name: str, revision: str | None, option: str = "model.path", kind: Kind = "model") -> Found:
    """The commit that a hub id and revision name: asked of the hub, else read from the local hub cache.

    Raises:
        ModelError or DataError: neither knows it. It says where it was looked for.
    """
    wanted = revision or "main"
    commit, why = _ask(name, revision, kind)
    if commit is not None:
        return Found(commit, online=True)
    folder = cache_folder(name, kind)
    reference = folder / "refs" / wanted
    if reference.is_file():
        return Found(reference.read_text(encoding="utf-8").strip(), online=False)
    if _is_commit(wanted) and (folder / "snapshots" / wanted).is_dir():
        return Found(wanted, online=False)
    nowhere = f"it is not in the hub's cache folder {folder}; and {_url(name, kind)} was {why}"
    if kind == "dataset":
        raise DataError(
            f"{option}: dataset {name!r} (revision {wanted}) cannot be fetched: {nowhere}. Name local files with the "
            "same columns, or see to it that the hub can be reached"
        )
    raise ModelError(
        f"model {name!r} (revision {wanted}) is not here, and cannot be fetched: there is no local directory "
        f"{Path(name).expanduser().absolute()}; {nowhere}. Set {option} to a local directory with config.json, "
        "model.safetensors and a tokenizer, or see to it that the hub can be reached"
    )


def cache_folder(name: str, kind: Kind = "model") -> Path:
    """Where the hub's client keeps a model or dataset on this machine."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}"


def snapshot(name: str, commit: str) -> Path:
    """The folder of a commit's files in the hub's cache."""
    return cache_folder(name) / "snapshots" / commit


def _ask(name: str, revision: str | None, kind: Kind) -> tuple[str | None, str]:
    """The commit if the hub gives it, else why not, to follow `was`."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if constants.HF_HUB_OFFLINE or os.environ.get("TRANSFORMERS_OFFLINE"):
        return None, "not asked, because HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set"
    try:
        info = HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=TIMEOUT_SECONDS)
        return info.sha, "without a commit of it"
    except HFValidationError as error:
        return None, f"not asked, as this is no hub id ({error})"
    except (HfHubHTTPError, OSError, RuntimeError) as error:  # refused, unreachable, no such model
        return None, f"asked in vain ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    except Exception as error:  # the hub client's HTTP library has its own tree of connection errors
        if "httpx" not in type(error).__module__:
            raise
        return None, f"not reachable ({type(error).__name__}: {error})"


def _url(name: str, kind: Kind) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"


def _is_commit(revision: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{40}", revision) is not None
