"""How the page writes numbers, and how it shows text that a model or a stranger wrote."""

from __future__ import annotations

import math
import time
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.metrics.labels import label

DASH, MINUS, NBSP = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{NO-BREAK SPACE}"
KEPT = "\n\t"  # control characters that a page can show
# They reorder what follows them, also beyond the text that they are in.
_REORDERING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def visible(text: str) -> str:
    """A text in which everything can be seen and written: what would reorder the page, end a line unseen, or is no
    character at all is shown as ``⟨U+202E⟩``."""
    return "".join(f"\N{MATHEMATICAL LEFT ANGLE BRACKET}U+{ord(character):04X}\N{MATHEMATICAL RIGHT ANGLE BRACKET}"
                   if _hidden(character) else character for character in text.replace("\r\n", "\n"))  # fmt: skip


def _hidden(character: str) -> bool:
    if character in KEPT:
        return False
    kind = unicodedata.category(character)
    return kind in ("Cc", "Cs", "Zl", "Zp") or character in _REORDERING or (ord(character) & 0xFFFE) == 0xFFFE


def shortened(text: str, limit: int) -> str:
    """The beginning of a text, and how much is missing."""
    if len(text) <= limit:
        return text
    return f"{text[:limit].rstrip()} \N{HORIZONTAL ELLIPSIS} [{len(text) - limit:,} more characters]"


def number(value: Any, digits: int = 3, *, sign: bool = False) -> str:
    """A number for people; a dash where there is none."""
    if not isinstance(value, int | float) or math.isnan(value):
        return DASH
    digits = digits if abs(value) < 1e5 else 0
    written = f"{value:{'+' if sign else ''},.{digits}f}".replace("-", MINUS)
    return written if written.strip("+0.\N{MINUS SIGN}") else written.lstrip("+\N{MINUS SIGN}")  # no sign of a zero


def significant(value: Any) -> str:
    """A number of any size, to four digits."""
    if not isinstance(value, int | float) or math.isnan(value):
        return DASH
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.3e}".replace("-", MINUS)
    return f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}".replace("-", MINUS) if value else "0"


def percent(value: Any, digits: int = 0) -> str:
    """A share as a percentage; a dash where there is none."""
    return DASH if not isinstance(value, int | float) or math.isnan(value) else f"{100 * value:.{digits}f}{NBSP}%"


def p_value(value: Any) -> str:
    """A p-value; no more digits than it has."""
    if not isinstance(value, int | float) or math.isnan(value):
        return DASH
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def interval(estimate: Mapping[str, Any] | None, digits: int = 3, *, sign: bool = False) -> str:
    """``0.251 [0.19, 0.31]``: an estimate, with its interval where it has one."""
    if estimate is None:
        return DASH
    value = number(estimate.get("value"), digits, sign=sign)
    bounds = [number(estimate.get(end), digits, sign=sign) for end in ("low", "high")]
    return value if DASH in bounds or value == DASH else f"{value} [{bounds[0]}, {bounds[1]}]"


def percents(estimate: Mapping[str, Any] | None) -> str:
    """``69 % [66, 73]``: a share, with its interval where it has one."""
    if estimate is None or number(estimate.get("value")) == DASH:
        return DASH
    low, high = (estimate.get(end) for end in ("low", "high"))
    if number(low) == DASH or number(high) == DASH:
        return percent(estimate["value"])
    return f"{percent(estimate['value'])} [{percent(low)[:-2]}, {percent(high)[:-2]}]"


def value_of(figure: Any) -> Any:
    """The value of an estimate, or the number itself."""
    return figure.get("value") if isinstance(figure, Mapping) else figure


def policy(name: str) -> str:
    """What a policy is called in a sentence."""
    return {"base": "the base model", "reference": "the references"}.get(name, name.upper())


def score_name(metric: str) -> str:
    """What people call a score or a metric."""
    return label(metric).name


def in_sentence(name: str) -> str:
    """A name in the middle of a sentence: acronyms stay as they are."""
    known = {"Reward": "the reward model", "Held-out reward": "the held-out reward model"}
    return known.get(name) or (name if name[:2].isupper() else f"{name[:1].lower()}{name[1:]}")


def listed(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return "".join(names) if len(names) < 2 else f"{', '.join(names[:-1])} and {names[-1]}"


def moment(seconds: float) -> str:
    """A time, in UTC."""
    return time.strftime("%d %B %Y, %H:%M UTC", time.gmtime(seconds))


def energy(joules: float) -> str:
    """Joules as people pay for them."""
    return f"{joules / 3.6e6:.2f} kWh" if joules >= 3.6e5 else f"{joules / 3600:.2f} Wh"
