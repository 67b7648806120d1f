"""What the run was asked, with which versions, and what came from what."""

from __future__ import annotations

import json
from collections.abc import Iterator

from rlhf.config.fields import Section as ConfigSection, written
from rlhf.config.yaml12 import write_value
from rlhf.config.yaml_files import dump
from rlhf.report import charts
from rlhf.report.sources import Figure, Folded, Section, Sources, Table
from rlhf.report.words import DASH
from rlhf.store import disk

SHORT = 12  # characters of a digest or key


def config(sources: Sources) -> Section:
    """The settings that differ from their defaults, then all of them."""
    if sources.config is None:
        whole = json.dumps(sources.record.config, indent=1, ensure_ascii=False)
        words = ["This configuration is of an older version, so that defaults are unknown."]
        return Section("config", "Configuration", words, folded=[Folded("The whole configuration", code=whole)])
    rows = list(_changed(sources.config, ""))
    table = Table("What differs from the defaults", ("Setting", "value", "default"), rows, frozenset({1, 2}))
    folded = [Folded("The whole configuration", code=dump(sources.config))]
    return Section("config", "Configuration", (), [table], folded=folded)


def _changed(section: ConfigSection, prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, value in section:
        key, info = f"{prefix}{name}", type(section).model_fields[name]
        if isinstance(value, ConfigSection):
            yield from _changed(value, f"{key}.")
        elif info.is_required():
            yield key, write_value(written(value)), DASH
        elif value != (default := info.get_default(call_default_factory=True)):
            yield key, write_value(written(value)), write_value(written(default))


def versions(sources: Sources) -> Section | None:
    """The libraries whose versions shaped the numbers, as each stage was computed with them."""
    found: dict[str, dict[str, list[str]]] = {}
    for stage, manifest in sources.manifests.items():
        for name, version in manifest.ingredients.items():
            if name.startswith("library "):
                found.setdefault(name.removeprefix("library "), {}).setdefault(str(version), []).append(stage)
    if not found:
        return None
    rows = [
        (library, version, ", ".join(stages)) for library, of in sorted(found.items()) for version, stages in of.items()
    ]
    mixed = [library for library, of in found.items() if len(of) > 1]
    words = [f"Stages were computed with different versions of {', '.join(sorted(mixed))}."] if mixed else []
    table = Table("Libraries that shape numbers", ("Library", "version", "stages"), rows, frozenset({1, 2}))
    return Section("versions", "Versions", words, folded=[Folded(f"{len(found)} libraries", [table])])


def lineage(sources: Sources) -> Section | None:
    """Which artifact came from which, and which run computed it."""
    if not sources.manifests:
        return None
    edges, names, rows = [], [], []
    for stage, manifest in sources.manifests.items():
        reads: dict[str, list[str]] = {}
        for ingredient in manifest.ingredients:
            source, _, part = ingredient.removeprefix("input ").partition("/")
            if ingredient.startswith("input ") and source in sources.manifests:
                reads.setdefault(source, []).append(part)
        edges += [(source, stage) for source in reads]
        cached = bool(sources.record.stages.get(stage, {}).get("cached"))
        became = "cached" if cached else "computed"
        names.append((stage, f"{became}, {disk.size(manifest.size)}, {manifest.digest[:SHORT]}"))
        read = "; ".join(f"{source}: {', '.join(parts)}" for source, parts in reads.items())
        short = (manifest.key[:SHORT], manifest.digest[:SHORT])
        rows.append((stage, "cache" if cached else "computed", read or DASH, *short, manifest.run_id or DASH))
    head = ("Stage", "", "reads", "key", "digest", "computed by run")
    table = Table("Artifacts", head, rows, frozenset({1, 2, 3, 4, 5}))
    data = [(name, str(digest)[:64]) for m in sources.manifests.values() for name, digest in m.ingredients.items()
            if name.startswith("data.")]  # fmt: skip
    folded = (
        [Folded("Data files", [Table("Data files and their sha256", ("File", "sha256"), data, frozenset({1}))])]
        if data
        else []
    )
    legend = [("ran", "computed in this run"), ("cached", "from the cache")]
    figure = Figure("Which stage read which", charts.lineage(names, edges, "Lineage"), (), legend, keys="dot")
    words = ["A key is what an artifact was made of, a digest what came out; equal digests are equal bytes."]
    return Section("lineage", "Lineage", words, [table], [figure], folded)
