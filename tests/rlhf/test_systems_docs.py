"""What docs/systems.md shows can be loaded, and names every preset."""

from __future__ import annotations

import re
from pathlib import Path

from rlhf import settings

DOCS = Path(__file__).parents[2] / "docs" / "systems.md"


def test_the_configuration_starts_from_the_preset(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL)
    (tmp_path / "mine.yaml").write_text(block)
    config = settings.load(tmp_path / "mine.yaml")
    assert config.data.labelled == (str(tmp_path / "reviews.parquet"),)
    assert config.reward.path is None
    assert (config.ppo.kl_coef, config.ppo.missing_eos) == (0.1, "off")


def test_every_preset_is_in_the_table() -> None:
    text = DOCS.read_text("utf-8")
    for name in settings.presets():
        assert name == "demo" or f"| `{name}` |" in text
