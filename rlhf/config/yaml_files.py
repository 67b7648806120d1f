"""Reads the configuration: a preset or a YAML file, a size of it, and the command line's ``--set a.b=c``.

Layers are laid over each other in this order: the preset that a file starts from (``preset: demo``), the
file, the size of either, the overrides. Sections are merged key by key; anything else (a number, a list, the
dictionary ``ppo.rewards``) replaces what was there as a whole. An override may also set one entry of a
dictionary, ``ppo.rewards.model=0.5``, or a part of one: ``ppo.rewards.keywords.arguments.words=[yes, no]``.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

from pydantic import ValidationError

from rlhf.config.data import KINDS
from rlhf.config.explain import explain
from rlhf.config.fields import FunctionSpec, OptionalStage, Section, written
from rlhf.config.pipeline import PipelineConfig
from rlhf.config.yaml12 import Marks, read_mapping, write_value
from rlhf.errors import ConfigError, did_you_mean, show
from rlhf.store.locations import DEMO_PREFIX, HUB_PREFIX, expanded, named_by_argument

ABOUT = ("description", "needs", "sizes", "preset")  # keys of a file that are not part of the schema
PATH_LISTS = tuple(("data", kind) for kind in KINDS)
MODEL_PATHS = (("model", "path"), ("reward", "path"))
OTHER_PATHS = (("resources", "accelerate_config"),)
FUNCTIONS = tuple(
    tuple(name.split("."))
    for name in ("data.computed", "judge.rewards", "ppo.rewards", "ppo.judges", "evaluate.scorers", "evaluate.judges")
)


class Preset(NamedTuple):
    """What ``rlhf presets`` lists of a preset."""

    name: str
    description: str
    needs: str
    sizes: tuple[str, ...]


class Layer(NamedTuple):
    """A piece of configuration, and for each of its keys the place where it was written."""

    values: dict[str, Any]
    marks: Marks


class Document(NamedTuple):
    """A YAML file, taken apart."""

    layer: Layer
    sizes: dict[str, Layer]
    about: dict[str, Any]


def presets() -> dict[str, Preset]:
    """The presets that come with the package, by name."""
    found = {}
    for name in _preset_files():
        _, sizes, about = _read_preset(name)
        found[name] = Preset(name, about.get("description", ""), about.get("needs", ""), tuple(sizes))
    return found


def load(source: str | Path = "demo", *, size: str | None = None, overrides: Sequence[str] = ()) -> PipelineConfig:
    """The configuration of a run.

    Relative paths in a YAML file start at the file's folder; in a preset or an override, at the current
    folder. ``model.path``, ``reward.path`` and a function's argument ``model`` are paths if they begin with ``.``,
    ``~`` or ``/``, or if there is such a file or folder; else they are hub ids. Another argument is a path if it names
    a file, or has a slash and names a folder. ``demo:x`` stays as it is.

    Args:
        source: name of a preset, or a YAML file (a ``Path``, or text that has ``/`` or ends in ``.yaml``).
        size: one of the sizes that the preset or file offers.
        overrides: ``section.field=value``, the value in YAML; text needs no quotes; no value is null.

    Raises:
        ConfigError: it cannot be read or is not valid; the message lists every error with file and line.
    """
    document, name = _read(source)
    layers, sizes = [document.layer], dict(document.sizes)
    if "preset" in document.about:
        base = _read_preset(document.about["preset"], f"{document.layer.marks['preset',]}: ")
        layers.insert(0, base.layer)
        sizes = {key: _merge(base.sizes.get(key), sizes.get(key)) for key in base.sizes | sizes}
    if size is not None:
        if size not in sizes:
            known = f"its sizes: {', '.join(sizes)}" if sizes else "it has none, so leave --size out"
            raise ConfigError(f"{name} has no size {size!r} ({known}){did_you_mean(size, sizes)}")
        layers.append(sizes[size])
    merged = Layer({}, {})
    for layer in layers:
        merged = _merge(merged, layer)
    problems: list[str] = []
    for text in overrides:
        try:
            merged = _merge(merged, _override(text, merged.values))
        except ConfigError as error:
            problems.append(str(error))
    try:
        config = PipelineConfig.model_validate(merged.values)
    except ValidationError as error:
        problems += explain(error, merged.marks, name)
    if problems:
        head = f"{len(problems)} errors in the configuration {name}:\n  " if len(problems) > 1 else ""
        raise ConfigError(head + "\n  ".join(problems))
    return config


def dump(config: PipelineConfig) -> str:
    """The whole configuration as YAML, with descriptions; ``load`` of it gives an equal configuration."""
    return "\n".join(_lines(config, "")) + "\n"


def _lines(section: Section, indent: str) -> Iterator[str]:
    for key, value in section:
        if isinstance(value, Section):
            yield f"{indent}# {_first_paragraph(type(value).__doc__)}"
            yield f"{indent}{key}:"
            yield from _lines(value, f"{indent}  ")
        else:
            yield f"{indent}# {type(section).model_fields[key].description}"
            yield f"{indent}{key}: {write_value(written(value))}"


def _first_paragraph(text: str | None) -> str:
    return " ".join((text or "").split("\n\n")[0].split())


# --- sources


def _preset_files() -> dict[str, Traversable]:
    folder = resources.files("rlhf.config") / "presets"
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    return {name.removesuffix(".yaml"): folder / name for name in names}


def _read_preset(name: str, wanted_by: str = "") -> Document:
    files = _preset_files()
    if name not in files:
        near = [file for file in (Path(f"{name}.yaml"), Path(f"{name}.yml")) if file.is_file()]
        hint = f"; did you mean the file {near[0]}?" if near else did_you_mean(name, files)
        raise ConfigError(f"{wanted_by}there is no preset {name!r} (presets: {', '.join(files)}){hint}")
    return _parse(files[name].read_text("utf-8"), f"preset {name}", Path.cwd())


def _read(source: str | Path) -> tuple[Document, str]:
    """A preset or a file, and its name for messages."""
    text = str(source)
    is_file = isinstance(source, Path) or text.endswith((".yaml", ".yml")) or "/" in text or "\\" in text
    if not is_file:
        return _read_preset(text), f"preset {text}"
    path = expanded(text, "the configuration")
    if path.is_dir():
        raise ConfigError(f"{path} is a folder, not a YAML file; name a file in it")
    if not path.exists():
        here = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, here) or did_you_mean(path.stem, _preset_files(), "the preset ")
        raise ConfigError(f"there is no file {path}{hint or '; a preset is named without .yaml'}")
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        byte = error.object[error.start]
        raise ConfigError(f"{path}:{line}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    return _parse(content, str(path), path.resolve().parent), str(path)


def _parse(text: str, place: str, folder: Path) -> Document:
    """Takes a YAML file apart. Paths in it are made absolute against ``folder``."""
    values, marks = read_mapping(text, place)
    about = {key: values.pop(key) for key in ABOUT if key in values}
    for key in ("description", "needs", "preset"):
        if key in about and not isinstance(about[key], str):
            raise ConfigError(f"{marks[key,]}: {key} is {show(about[key])}; must be text")
    raw_sizes = about.pop("sizes", None) or {}
    if not isinstance(raw_sizes, dict) or not all(isinstance(size, dict) for size in raw_sizes.values()):
        raise ConfigError(f"{marks['sizes',]}: sizes must be a mapping from a name to a mapping of settings")
    sizes = {}
    for name, size in raw_sizes.items():
        size_marks = {path[2:]: mark for path, mark in marks.items() if path[:2] == ("sizes", name)}
        sizes[name] = _clean(Layer(size, size_marks), folder)
    return Document(_clean(Layer(values, marks), folder), sizes, about)


# --- layers


def _clean(layer: Layer, folder: Path) -> Layer:
    """The layer with ``sft: off`` written out, empty sections empty, and relative paths absolute."""
    values = {}
    for key, value in layer.values.items():
        section = _section(PipelineConfig, key)
        if section and value is None:
            value = {}
        elif section and issubclass(section, OptionalStage) and value in (True, False, "on", "off"):
            value = {"enabled": value in (True, "on")}
        values[key] = dict(value) if isinstance(value, dict) else value
    for section_name, key in (*PATH_LISTS, *MODEL_PATHS, *OTHER_PATHS):
        settings = values.get(section_name)
        if isinstance(settings, dict) and settings.get(key):
            maybe_hub = (section_name, key) in MODEL_PATHS
            settings[key] = _absolute(settings[key], folder, f"{section_name}.{key}", maybe_hub=maybe_hub)
    judge = values.get("judge")
    if isinstance(judge, dict):
        judge |= {"function": _function(judge["function"], folder, "judge.function")} if "function" in judge else {}
        model = judge.get("model")
        if isinstance(model, dict) and model.get("path"):
            judge["model"] = model | {"path": _absolute(model["path"], folder, "judge.model.path", maybe_hub=True)}
    marks = dict(layer.marks)
    for section_name, key in FUNCTIONS:
        settings = values.get(section_name)
        if isinstance(settings, dict) and isinstance(settings.get(key), dict):
            old, settings[key] = settings[key], {}
            for name, entry in old.items():
                where = f"{section_name}.{key}.{name}"
                absolute = _function(name, folder, where)
                settings[key][absolute] = _entry(entry, folder, where)
                marks |= {
                    (section_name, key, absolute, *path[3:]): mark
                    for path, mark in layer.marks.items()
                    if path[:3] == (section_name, key, name)
                }
    return Layer(values, marks)


def _absolute(value: Any, folder: Path, where: str, *, maybe_hub: bool) -> Any:
    if isinstance(value, list):
        return [_absolute(item, folder, where, maybe_hub=maybe_hub) for item in value]
    if not isinstance(value, str) or not value or value.startswith((DEMO_PREFIX, HUB_PREFIX)):
        return value
    path = folder / expanded(value, where)
    if maybe_hub and not value.startswith((".", "~", "/")) and not path.exists():
        return value
    if glob.has_magic(value) and not path.exists() and not Path(value).is_absolute():
        return str(Path(glob.escape(str(folder))) / value)  # the folder's own name may have brackets in it
    return str(path)


def _entry(entry: Any, folder: Path, where: str) -> Any:
    """An entry of the rewards or scorers with absolute paths."""
    if not isinstance(entry, dict):
        return _function(entry, folder, where)
    made = dict(entry)
    if "function" in made:
        made["function"] = _function(made["function"], folder, f"{where}.function")
    if isinstance(made.get("arguments"), dict):
        made["arguments"] = {
            name: _argument(value, folder)
            if name != "model"
            else _absolute(value, folder, f"{where}.arguments.model", maybe_hub=True)
            for name, value in made["arguments"].items()
        }
    return made


def _argument(value: Any, folder: Path) -> Any:
    """A function's argument, or a list of texts as one, with absolute paths."""
    if isinstance(value, list):
        return [_argument(item, folder) for item in value]
    return str(named_by_argument(value, folder) or value) if isinstance(value, str) else value


def _function(reference: Any, folder: Path, where: str) -> Any:
    """``file.py:function`` with an absolute file; anything else as it is."""
    if not isinstance(reference, str):
        return reference
    file, colon, name = reference.rpartition(":")
    return f"{folder / expanded(file, where)}:{name}" if colon and file.endswith(".py") else reference


def _merge(below: Layer | None, above: Layer | None) -> Layer:
    """``above`` laid over ``below``; neither is changed."""
    below, above = below or Layer({}, {}), above or Layer({}, {})
    return Layer(_merge_values(below.values, above.values, PipelineConfig), {**below.marks, **above.marks})


def _merge_values(below: dict[str, Any], above: dict[str, Any], model: type[Section]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        section = _section(model, key)
        old = merged.get(key)
        both = section and isinstance(old, dict) and isinstance(value, dict)
        merged[key] = _merge_values(old, value, section) if both else value  # type: ignore[arg-type]
    return merged


def _section(model: type[Section], key: str) -> type[Section] | None:
    """The section that a key of a section is, if it is one."""
    info = model.model_fields.get(key)
    kind = info.annotation if info else None
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _override(text: str, values: dict[str, Any]) -> Layer:
    """``a.b=c`` as a layer; ``values`` is what lies below."""
    name, equals, raw = text.partition("=")
    place, parts = f"--set {name.strip()}", name.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set {text!r}: expected KEY=VALUE, for example ppo.kl_coef=0.1")
    model: type[Section] = PipelineConfig
    path: list[str] = []
    while (section := _section(model, parts[0])) and len(parts) > 1:
        path.append(parts.pop(0))
        model = section
    info = model.model_fields.get(parts[0])
    kind: Any = info.annotation if info else None
    nested: Any
    full = (*path, *parts)
    marks = {full[:length]: place for length in range(len(path) + 1, len(full) + 1)}
    if info and get_origin(kind) is dict and len(parts) > 1:
        spec: type[Section] = get_args(kind)[1]
        entry, inner = _split_entry(parts[1:], spec)
        full = (*path, parts[0])
        marks |= {(*full, entry, *inner[:length]): place for length in range(len(inner) + 1)}
        present: Any = values
        for part in full:
            present = present.get(part) if isinstance(present, dict) else None
        nested = dict(present if isinstance(present, dict) else written(info.default))
        if inner:
            nested[entry] = _with_part(nested.get(entry), spec, inner, raw, place)
        else:
            nested[entry] = _value(raw, spec, place)
        if nested[entry] is None:  # `ppo.rewards.model=` takes the entry out
            del nested[entry]
    else:
        nested = _value(raw, kind if len(parts) == 1 else None, place)
    for part in reversed(full):
        nested = {part: nested}
    return _clean(Layer(nested, marks), Path.cwd())


def _split_entry(parts: list[str], spec: type[Section]) -> tuple[str, list[str]]:
    """The name of an entry, which may have dots, and the way to what is set in it: ``weight``, ``arguments.words``.

    A name ends at the first part that is a field, but not before the colon of a ``package.module:function``.
    """
    fields = getattr(spec, "model_fields", {})  # none where an entry is a plain text
    first = max((index for index, part in enumerate(parts) if ":" in part), default=0) + 1
    end = next((index for index in range(first, len(parts)) if parts[index] in fields), len(parts))
    inner = parts[end:]
    return ".".join(parts[:end]), [inner[0], ".".join(inner[1:])] if len(inner) > 1 else inner


def _with_part(present: Any, spec: type[Section], inner: list[str], raw: str, place: str) -> dict[str, Any]:
    """An entry with one field, or one argument, set anew; no value takes it out."""
    if isinstance(present, dict | None):
        entry = dict(present or {})
    elif issubclass(spec, FunctionSpec):
        entry = {spec.PLAIN: present}
    else:
        raise ConfigError(
            f"{place}: there is {show(present)}; must be a section with the keys {', '.join(spec.model_fields)}"
        )
    field, *argument = inner
    holder, key = entry, field
    if argument:
        arguments = entry.get(field)
        holder = entry[field] = dict(arguments) if isinstance(arguments, dict) else {}
        key = argument[0]
    value = _value(raw, None if argument else spec.model_fields[field].annotation, place)
    if value is None:
        holder.pop(key, None)
    else:
        holder[key] = value
    return entry


def _value(raw: str, kind: Any, place: str) -> Any:
    """The value of an override: YAML; for a text field what is written, unless quoted, empty or null."""
    text = raw.strip()
    if not text:
        return None
    if (kind is str or kind == (str | None)) and text[0] not in "'\"" and text not in ("null", "~"):
        return text
    try:
        return read_mapping(f"value: {text}", place)[0]["value"]
    except ConfigError:
        raise ConfigError(f"{place}: {show(text)} is not valid YAML; put quotes around text") from None
