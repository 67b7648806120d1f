"""Names of sources of rows: files and patterns, and datasets of the hub. Nothing is read here."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs

from rlhf.errors import ConfigError, DataError, did_you_mean
from rlhf.store.locations import HUB_PREFIX as HUB, matching_files

SPLITS = ("train", "validation", "test")
HUB_OPTIONS = ("config", "split", "revision")


class HubDataset(NamedTuple):
    """A dataset of the Hugging Face hub: ``hub:owner/name?config=x&split=train&revision=main``."""

    name: str
    config: str | None
    split: str
    revision: str | None


class Source(NamedTuple):
    """One file or dataset that a setting names, and the split that all of its rows are in, if that is said."""

    place: Path | HubDataset
    split: str | None

    @property
    def shown(self) -> str:
        """Its name for messages."""
        return str(self.place) if isinstance(self.place, Path) else f"{HUB}{self.place.name} {self.place.split}"


def sources(names: tuple[str, ...], where: str) -> list[Source]:
    """The files and datasets that a setting names; a name may end in ``#train``, ``#validation`` or ``#test``.

    Raises:
        DataError: there is none, or one is named twice.
        ConfigError: the name of a dataset of the hub is malformed.
    """
    found: list[Source] = []
    for name in names:
        plain, mark, split = name.rpartition("#")
        plain, given = (plain, split) if mark and split in SPLITS else (name, None)
        if plain.startswith(HUB):
            found.append(Source(hub_dataset(plain, where), given))
        else:
            found += [Source(path, given) for path in matching_files(plain, where)]
    places = [source.place.resolve() if isinstance(source.place, Path) else source.place for source in found]
    for place, count in Counter(places).items():
        if count > 1:
            raise DataError(f"{where}: {found[places.index(place)].shown} is named {count} times; name it once")
    return found


def hub_dataset(text: str, where: str) -> HubDataset:
    """What a name such as ``hub:stanfordnlp/imdb?split=train`` says.

    Raises:
        ConfigError: it is malformed.
    """
    name, _, query = text.removeprefix(HUB).partition("?")
    options = {key: values[-1] for key, values in parse_qs(query, keep_blank_values=True).items()}
    for key, value in options.items():
        if key not in HUB_OPTIONS or not value:
            raise ConfigError(
                f"{where}: {text!r} has the option {key!r}{' without a value' if not value else ''}; known are config, "
                f"split and revision, as in hub:owner/name?config=x&split=train{did_you_mean(key, HUB_OPTIONS)}"
            )
    if not name or name.count("/") > 1 or name != name.strip():
        raise ConfigError(f"{where}: {text!r} names no dataset of the hub; write hub:owner/name?split=train")
    return HubDataset(name, options.get("config"), options.get("split", "train"), options.get("revision"))
