"""Resources: in how many processes, and which files of `accelerate config` are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig

from rlhf.cache.plan import Planner, key_of
from rlhf.config.accelerate_file import check_file
from rlhf.config.resources import Resources
from rlhf.config.yaml_files import load
from rlhf.errors import ConfigError
from rlhf.store.artifacts import Store
from tests.rlhf.projects import good

FILE = "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_machines: 1\nnum_processes: 2\n"


def check(path: Path, text: str | None = FILE, processes: int = 2) -> None:
    if text is not None:
        path.write_text(text)
    check_file(Resources(processes=processes, accelerate_config=str(path)))


def test_what_accelerate_config_writes_is_taken(tmp_path: Path) -> None:
    kind = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "mixed_precision": "bf16"}
    written = ClusterConfig(num_processes=2, use_cpu=False, debug=False, **kind)
    written.to_yaml_file(str(tmp_path / "file.yaml"))
    assert "distributed_type: MULTI_GPU" in (tmp_path / "file.yaml").read_text()
    check(tmp_path / "file.yaml", text=None)
    check_file(Resources(processes=7))
    with pytest.raises(ConfigError, match=r"num_processes is 2, but resources.processes is 7"):
        check(tmp_path / "file.yaml", text=None, processes=7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (FILE.replace("MULTI_GPU", "FSDP"), r"distributed_type is FSDP; .* one of MULTI_GPU, MULTI_CPU, NO"),
        (FILE.replace("MULTI_GPU", "DEEPSPEED"), r"distributed_type is DEEPSPEED; .* model.lora_rank"),
        (FILE.replace("machines: 1", "machines: 2"), r"num_machines is 2; all processes run on this machine: 1"),
        (FILE.replace("processes: 2", "processes: 4"), r"num_processes is 4, but resources.processes is 2"),
        (FILE.replace("MULTI_GPU", "[a"), r"not valid YAML"),
        ("- a\n", r"file.yaml:1: must be lines such as"),
        (None, r"resources.accelerate_config: .*file.yaml: there is no such file; `accelerate config"),
    ],
)
def test_files_that_are_refused(text: str | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        check(tmp_path / "file.yaml", text)


def test_the_file_lies_beside_the_configuration_and_changes_no_key(tmp_path: Path) -> None:
    path = good(tmp_path)
    before = Planner(load(path), Store(tmp_path / "home")).plan()
    path.write_text(path.read_text() + "resources:\n  processes: 2\n  accelerate_config: ours/file.yaml\n")
    config = load(path)
    assert config.resources.accelerate_config == str(tmp_path / "ours/file.yaml")
    with pytest.raises(ConfigError, match="there is no such file"):
        Planner(config, Store(tmp_path / "home")).plan()
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours/file.yaml").write_text(FILE)
    after = Planner(config, Store(tmp_path / "home")).plan()
    assert [plan.key for plan in before] == [plan.key for plan in after]
    assert before[0].key == key_of(after[0].ingredients)


def test_stages_that_are_off_share_nothing_out(tmp_path: Path) -> None:
    path = good(tmp_path)
    with pytest.raises(ConfigError, match=r"sft.batch_size 32 must be a multiple of resources.processes 3"):
        load(path, overrides=["resources.processes=3"])
    rest = ["resources.processes=3", "reward.batch_size=30", "ppo.episodes=9"]
    assert load(path, overrides=[*rest, "sft=off"]).resources.processes == 3
