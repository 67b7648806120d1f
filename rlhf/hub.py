"""Which commit of a hub model a name stands for now."""

from __future__ import annotations

import os
import re

from rlhf.errors import ModelError

TIMEOUT_SECONDS = 5.0


def resolve_commit(name: str, revision: str | None) -> str:
    """The commit that a hub id and revision name: asked of the hub, else read from the local hub cache.

    Raises:
        ModelError: neither knows it.
    """
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    wanted = revision or "main"
    why: Exception | str = "HF_HUB_OFFLINE is set"
    if not (constants.HF_HUB_OFFLINE or os.environ.get("TRANSFORMERS_OFFLINE")):
        try:
            commit = HfApi().model_info(name, revision=revision, timeout=TIMEOUT_SECONDS).sha
            if commit:
                return commit
        except HFValidationError as error:
            why = error
        except (HfHubHTTPError, OSError, RuntimeError) as error:  # refused, unreachable, no such model
            why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        except Exception as error:  # the hub client's HTTP library has its own tree of connection errors
            if "httpx" not in type(error).__module__:
                raise
            why = f"{type(error).__name__}: {error}"
    folder = f"models--{name.replace('/', '--')}"
    reference = os.path.join(constants.HF_HUB_CACHE, folder, "refs", wanted)
    if os.path.isfile(reference):
        with open(reference, encoding="utf-8") as file:
            return file.read().strip()
    raise ModelError(
        f"model {name!r} (revision {wanted}) is neither a local directory (looked in {os.path.abspath(name)}), nor on "
        f"the hub ({why}), nor in the hub cache {constants.HF_HUB_CACHE}; set model.path to a local directory"
    )
