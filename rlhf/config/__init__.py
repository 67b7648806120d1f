"""One YAML's life: the sections of a configuration, reading and writing it, and what is said of what is wrong with it.

May import rewards (their names) and what lies below it; neither torch nor pyarrow come with it.
"""

from typing import TYPE_CHECKING

from rlhf import lazily

if TYPE_CHECKING:
    from rlhf.config.data import KINDS
    from rlhf.config.fields import written
    from rlhf.config.pipeline import PipelineConfig
    from rlhf.config.resources import Resources
    from rlhf.config.yaml12 import read_mapping, write_value
    from rlhf.config.yaml_files import Preset, dump, load, presets
else:
    __getattr__ = lazily(__name__)
