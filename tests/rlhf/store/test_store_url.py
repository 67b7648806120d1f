"""What RLHF_STORE may say: the URL of a folder or bucket; what it may not is bad input, before anything is done."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.errors import ConfigError
from rlhf.store import shared as shared_store
from rlhf.store.artifacts import Store
from rlhf.store.opening import open_store
from tests.rlhf.store.test_shared import PLACE, compute


def test_a_shared_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = tmp_path / "shared folder"
    shared.mkdir()
    monkeypatch.setenv("RLHF_STORE", f"file://{shared}/")
    a, b = (open_store(str(tmp_path / name)) for name in "ab")
    manifest = compute(a)
    assert b.find(*PLACE) == (manifest, f"file://{shared}")
    assert b.open(*PLACE) == manifest
    assert sorted(path.name for path in (shared / "sft" / "k1").iterdir())[-1:] == ["manifest.json"]
    assert len(list((shared / "sft" / "k1").iterdir())) == 2  # no temporary file is left
    shutil.rmtree(shared)
    with pytest.raises(ConfigError, match="is it mounted"):
        open_store()


@pytest.mark.parametrize("url", ["", "  "])
def test_without_a_url_there_is_no_shared_store(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("RLHF_STORE", url)
    assert type(open_store()) is Store


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("bucket/prefix", "is not a URL of a folder, such as s3://bucket/prefix"),
        ("s3:bucket", "is not a URL"),
        ("s3://", "is not a URL"),
        ("://x", "is not a URL"),
        ("simplecache::s3://bucket", "is not a URL"),
        ("s4://bucket", "s4:// is known to no driver"),
        ("https://example.org/x", "https:// cannot be written to"),
        ("file://relative", "no folder relative"),
        ("file:///no/such/folder", "no folder /no/such/folder; is it mounted"),
        ("gs://bucket/x", "the driver gcsfs is not installed: pip install 'gcsfs'"),
        ("s3://KEY:hidden@bucket/x", "holds a password"),
        ("s3://KEY:hid/den@bucket/x", "holds a password"),
        ("s3://bucket/x?secret=hidden", "holds a password"),
    ],
)
def test_a_bad_url_is_bad_input(monkeypatch: pytest.MonkeyPatch, url: str, message: str) -> None:
    monkeypatch.setenv("RLHF_STORE", url)
    monkeypatch.setattr(shared_store, "find_spec", lambda name: None if name == "gcsfs" else object())
    with pytest.raises(ConfigError, match=r"--store \(RLHF_STORE\)") as caught:
        open_store()
    assert message in str(caught.value)
    assert "hid" not in str(caught.value)


def test_the_driver_of_s3_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_STORE", "s3://bucket/x")
    monkeypatch.setattr(shared_store, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'rlhf-pipeline\[s3\]'"):
        open_store()


@pytest.mark.parametrize(("url", "loaded"), [("", set()), ("s3://bucket/x", {"fsspec"})])
def test_nothing_is_imported_before_it_is_used(monkeypatch: pytest.MonkeyPatch, url: str, loaded: set[str]) -> None:
    monkeypatch.setenv("RLHF_STORE", url)
    code = (
        "import sys; from flows.commands import cli; from rlhf.store.opening import open_store; open_store();"
        "print(*sorted({'fsspec', 's3fs', 'botocore', 'aiohttp', 'torch', 'prefect'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == loaded
