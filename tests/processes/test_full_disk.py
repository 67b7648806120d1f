"""A disk that is really full, in the middle of a training: said by its name, nothing lost, and the same run goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rlhf.projects import good

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FILLING = """
import os, pathlib
def filling(prompts, responses):
    calls = pathlib.Path({folder!r}) / "calls"
    calls.write_text(calls.read_text() + "x" if calls.exists() else "x")
    if len(calls.read_text()) == 4:
        with open(os.path.join(os.environ["RLHF_HOME"], "ballast"), "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 16))
            except OSError:
                pass
    return [float(len(set(response))) for response in responses]
"""
SHORT = ("judge=off", "reward=off", "sft.max_steps=2", "sft.batch_size=4", "ppo.updates=6", "ppo.checkpoint_every=1")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 60 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system, as root has it")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def run(folder: Path, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    settings = [word for setting in (*SHORT, *arguments) for word in ("--set", setting)]
    own = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
    return subprocess.run(
        [sys.executable, "-m", "flows.commands.cli", "run", str(folder / "config.yaml"), *settings],
        env={**own, "RLHF_HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[2])},
        cwd=folder,
        capture_output=True,
        text=True,
    )


def test_the_disk_is_full_in_the_middle_of_ppo(tmp_path: Path, small_disk: Path) -> None:
    good(tmp_path)
    (tmp_path / "mine.py").write_text(FILLING.format(folder=str(tmp_path)))
    home, rewards = small_disk / "home", "ppo.rewards={mine:filling: 1.0}"
    done = run(tmp_path, home, rewards)
    assert done.returncode == 1
    assert f"StorageError: the disk of {home} is full" in done.stderr
    assert "Traceback" not in done.stderr
    (home / "ballast").unlink()
    again = run(tmp_path, home, rewards)
    assert again.returncode == 0, again.stderr
    assert "sft: from the cache" in again.stdout
    # Six updates, the fourth of them twice; then the evaluation of base, SFT and PPO policies and of the references.
    assert (tmp_path / "calls").read_text() == "x" * (7 + 4)


def test_a_training_that_has_no_room_is_refused_before_it_begins(tmp_path: Path, small_disk: Path) -> None:
    good(tmp_path)
    done = run(tmp_path, small_disk / "home", "model.width=512", "model.layers=4", "ppo.rewards={brevity: 1.0}")
    assert done.returncode == 1
    assert "StorageError: sft, with its checkpoints, needs" in done.stderr
    assert f"in {small_disk / 'home'}" in done.stderr
