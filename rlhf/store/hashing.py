"""Digests of files and folders, as artifacts and checkpoints record them in their ``manifest.json``."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TypedDict

MANIFEST = "manifest.json"


class FileDigest(TypedDict):
    """What a manifest says of one file: ``size`` in bytes, ``sha256`` in hexadecimal."""

    size: int
    sha256: str


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal. Reads in blocks, so the file may be larger than memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_of(directory: Path) -> dict[str, Path]:
    """Every file below a directory by its relative path with forward slashes, sorted; not its own manifest."""
    found = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    found.pop(MANIFEST, None)
    return dict(sorted(found.items()))


def manifest_of(directory: Path) -> dict[str, FileDigest]:
    """Size and digest of every file below a directory, by relative path; the manifest itself is left out."""
    return {
        name: FileDigest(size=path.stat().st_size, sha256=sha256_file(path))
        for name, path in files_of(directory).items()
    }
