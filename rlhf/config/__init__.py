"""One YAML's life: the sections of a configuration, reading and writing it, and what is said of what is wrong with it.

May import rewards (their names) and what lies below it; neither torch nor pyarrow come with it.
"""

from typing import TYPE_CHECKING

from rlhf import lazily

if TYPE_CHECKING:
    from rlhf.config.data import KINDS as KINDS
    from rlhf.config.fields import written as written
    from rlhf.config.files import Preset as Preset, dump as dump, load as load, presets as presets
    from rlhf.config.pipeline import PipelineConfig as PipelineConfig
    from rlhf.config.resources import Resources as Resources
    from rlhf.config.yaml12 import read_mapping as read_mapping, write_value as write_value
else:
    __getattr__ = lazily(__name__)
