"""Where the mean and standard deviation of a modality come from: published, a file, the card."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from domainssl.errors import ConfigError, nearest
from domainssl.files import read_small
from domainssl.modality import Modality

__all__ = ["statistics_of"]

_LIMIT = 10_000_000  # bytes of a file of statistics


def statistics_of(modality: Modality, choice: str, alias: str = "") -> Modality:
    """Return the modality with the statistics that the argument `statistics` asks for.

    Args:
        modality: With the published values.
        choice: `published`; `card`, which leaves them out, so that the model must have its own;
            or a YAML or JSON file that holds `mean` and `std` (and optionally `channels` and
            `value_unit`) under the modality's key or product, or under `modalities`, as the card
            beside exported weights does. With `channels`, it may hold more than the modality has.
        alias: Product; the file may list the modality under it, or under a key of its own with
            this `product`.

    Raises:
        ConfigError: The file is missing or does not fit the modality.
    """
    if choice == "published":
        return modality
    if choice == "card":
        return replace(modality, mean=None, std=None)
    where = f"data.init_args.statistics={choice!r}"
    path = Path(choice)
    if not path.is_file():
        raise ConfigError(
            f"{where} is neither 'published' nor 'card' nor a file."
            + nearest(choice, ("published", "card"))
        )
    try:
        text = read_small(path, limit=_LIMIT, kind=ConfigError)
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise ConfigError(f"{where}: aliases (*name) are not read in statistics.")
        content = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where}: not readable as YAML or JSON ({error}).") from error
    entry = _some_channels(_entry(content, modality.name, alias, where), modality.channels)
    for name, own in (("channels", modality.channels), ("value_unit", modality.value_unit)):
        given = entry.get(name)
        given = tuple(given) if isinstance(given, list) else given
        if given is not None and given != own:
            raise ConfigError(
                f"{where}: {name} of {modality.name!r} is {given!r} in the file, but the data "
                f"have {own!r}. Compute the statistics on these data."
            )
    try:
        return replace(modality, mean=_numbers(entry["mean"]), std=_numbers(entry["std"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{where}: {modality.name!r} needs 'mean' and 'std' with {modality.num_channels} "
            f"numbers each, in the order {' '.join(modality.channels)}, "
            f"all finite and no 'std' of 0; got mean {entry.get('mean')!r}, "
            f"std {entry.get('std')!r}."
        ) from error


def _entry(content: Any, name: str, alias: str, where: str) -> Mapping[str, Any]:
    table = content.get("modalities", content) if isinstance(content, Mapping) else None
    if isinstance(table, Mapping):
        for title in (name, alias):
            if isinstance(table.get(title), Mapping):
                return table[title]
        for entry in table.values():  # what `stats` has written under another key
            if isinstance(entry, Mapping) and alias and entry.get("product") == alias:
                return entry
    found = sorted(map(str, table)) if isinstance(table, Mapping) else type(content).__name__
    raise ConfigError(f"{where}: no entry {name!r}{f' or {alias!r}' if alias else ''} in {found}.")


def _some_channels(entry: Mapping[str, Any], channels: tuple[str, ...]) -> Mapping[str, Any]:
    """Return the statistics of `channels`, of an entry that lists these and more."""
    there = entry.get("channels")
    if not isinstance(there, list) or not set(channels) < set(map(str, there)):
        return entry
    chosen: dict[str, Any] = {"channels": list(channels)}
    for name in ("mean", "std"):
        values = entry.get(name)
        if isinstance(values, list) and len(values) == len(there):
            chosen[name] = [values[there.index(channel)] for channel in channels]
    return {**entry, **chosen}


def _numbers(values: Any) -> tuple[float, ...]:
    found = tuple(float(v) for v in values)
    if not all(map(math.isfinite, found)):
        raise ValueError("not finite")
    return found
