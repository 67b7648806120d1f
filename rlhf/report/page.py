"""The page: everything in one HTML file, which loads nothing and runs only its own script."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib import resources

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

import rlhf
from rlhf.report import frontier, provenance, results, training
from rlhf.report.people import people
from rlhf.report.samples import samples
from rlhf.report.sources import Section, Sources
from rlhf.report.verdict import verdict
from rlhf.report.words import moment, visible
from rlhf.runs import headlines


def page(sources: Sources) -> str:
    """The report of a run as one HTML text; the same sources give the same text. What was not measured is left out."""
    style, script = _part("style.css"), _part("script.js")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(visible=_visible)
    record = sources.record
    return environment.from_string(_part("page.html")).render(
        record=record,
        began=moment(record.started),
        took=headlines.duration(record.ended - record.started) if record.ended else "",
        verdict=verdict(sources),
        found=_present(results.metrics(sources), results.comparisons(sources), people(sources),
                       frontier.overoptimisation(sources), results.distributions(sources), results.lengths(sources)),
        samples=samples(sources),
        made=_present(training.data(sources), *training.curves(sources), training.reward_model(sources),
                      training.models(sources), training.cost(sources), provenance.config(sources),
                      provenance.versions(sources), provenance.lineage(sources)),
        style=Markup(style),  # both are files of this package
        script=Markup(script),
        policy="; ".join((f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}",
                          "base-uri 'none'; form-action 'none'")),
        version=rlhf.__version__,
    )  # fmt: skip


def _present(*sections: Section | None) -> list[Section]:
    return [section for section in sections if section is not None]


def _visible(value: str) -> str:
    return value if isinstance(value, Markup) else visible(str(value))


@cache
def _part(name: str) -> str:
    return resources.files("rlhf.report").joinpath(name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    """How a content security policy names what may run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
