"""The types that weights are kept in, by the names that configurations give them; torch is not imported for it."""

from __future__ import annotations

from typing import Literal

Dtype = Literal["float32", "bfloat16", "float16"]
