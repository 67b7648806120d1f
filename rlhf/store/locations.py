"""Where things lie: the home folder of a pipeline's state, the shared store, and the embedded demo data."""

from __future__ import annotations

import os
from pathlib import Path

from rlhf.errors import ConfigError, DataError, did_you_mean

DEMO_PREFIX, HUB_PREFIX = "demo:", "hub:"
STORE_VARIABLE = "RLHF_STORE"


def home_directory(given: str | None = None) -> Path:
    """The folder of all state (artifacts, runs, databases): ``given``, else ``RLHF_HOME``, else ``./.rlhf``."""
    return expanded(given or os.environ.get("RLHF_HOME") or ".rlhf", "--home (RLHF_HOME)").resolve()


def shared_store_url() -> str | None:
    """The URL of the store that machines share, ``RLHF_STORE``, without a slash at its end; None if there is none.

    Raises:
        ConfigError: it is no URL, or it holds what nobody should see. The message does not repeat that.
    """
    url = os.environ.get(STORE_VARIABLE, "").strip().rstrip("/")
    if not url:
        return None
    protocol, separator, place = url.partition("://")
    if ":" in place.rpartition("@")[0] or "?" in place:
        raise ConfigError(
            f"--store ({STORE_VARIABLE}) {protocol}://...: holds a password or options, which others could read; the "
            "driver takes them from its environment, as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if not separator or not protocol or not place or "::" in url:
        raise ConfigError(
            f"--store ({STORE_VARIABLE}) {url!r} is not a URL of a folder, such as s3://bucket/prefix, "
            "gs://bucket/prefix or file:///mnt/rlhf"
        )
    return url


def expanded(path: str, where: str) -> Path:
    """A path with the home folder that ``~`` or ``~user`` at its beginning stands for.

    Raises:
        ConfigError: there is no such user; ``where`` is the setting that names the path.
    """
    try:  # a Path of ./~50 would be ~50
        return Path(path).expanduser() if path.startswith("~") else Path(path)
    except RuntimeError:
        user = Path(path).parts[0]
        raise ConfigError(
            f"{where}: {path!r} begins with {user!r}, the home folder of a user that is not known here; for a file or "
            f"folder of this name write ./{path}"
        ) from None


def demo_data_directory() -> Path:
    """Where the demo data lies: inside the installed package, or in ``data/`` of a checkout."""
    package = Path(__file__).parents[1]
    packaged = package / "demo_data"
    return packaged if packaged.is_dir() else package.parent / "data"


def data_path(name: str, where: str) -> Path:
    """The path that a file name in the configuration stands for; ``demo:x`` is a file of the demo data.

    Raises:
        ConfigError: it begins with the home folder of an unknown user.
    """
    if name.startswith(DEMO_PREFIX):
        return demo_data_directory() / name.removeprefix(DEMO_PREFIX)
    return expanded(name, where)


def matching_files(name: str, where: str) -> list[Path]:
    """The files that one entry of the configuration names; a pattern with ``*`` may name many.

    Raises:
        DataError: there is none.
        ConfigError: the pattern is malformed, or begins with the home folder of an unknown user.
    """
    path = data_path(name, where)
    if path.exists():
        return [path]
    if any(character in name for character in "*?["):
        try:
            found = sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor) if path.anchor else path)))
        except ValueError as error:
            raise ConfigError(
                f"{where}: the pattern {name!r} is malformed: {error}; write data/*.jsonl for the files of a folder, "
                "data/**/*.jsonl for those of the folders in it too"
            ) from None
        if found:
            return found
        raise DataError(f"{where}: no file matches {name!r} (looked in {path.parent.resolve()})")
    raise DataError(f"{where}: there is no file {path.resolve()}{_hint(path)}")


def named_by_argument(value: str, folder: Path) -> Path | None:
    """The file or folder that a function's argument names, or None if it is just a text.

    A relative path starts at ``folder``. A folder counts only where a slash shows that one is meant: a label may have
    the name of a folder by chance.
    """
    if not value or len(value) >= 1000 or "\n" in value:
        return None
    try:
        path = folder / expanded(value, "arguments")
        return path if path.is_file() or ("/" in value and path.is_dir()) else None
    except (OSError, ValueError):  # too long for a name, with a null byte, or of an unknown user
        return None


def _hint(path: Path) -> str:
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    return did_you_mean(path.name, names)
