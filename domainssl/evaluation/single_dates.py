"""Backbones of series on images: an image is a series of one date."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from domainssl.backbones.base import Backbone
from domainssl.modality import Modality, key

__all__ = ["as_series", "single_dates", "take_single_dates"]

_DATED = ("valid", "dates", "hours")  # companions that have an axis of dates


def single_dates(backbone: Backbone, modalities: Mapping[str, Modality]) -> tuple[str, ...]:
    """Return the modalities that are images in the data and series in the weights."""
    return tuple(
        name
        for name, found in modalities.items()
        if (found.kind, backbone.modalities[name].kind) == ("image", "series")
    )


def as_series(modalities: Mapping[str, Modality], names: Collection[str]) -> dict[str, Modality]:
    """Return modalities of which some are called series."""
    return {n: replace(m, kind="series") if n in names else m for n, m in modalities.items()}


def take_single_dates(backbone: Backbone, names: Collection[str]) -> None:
    """Let a backbone take images (B, C, H, W) of some modalities as series of one date."""
    if names:
        backbone.register_forward_pre_hook(lambda _, given: (_dated(given[0], names), *given[1:]))


def _dated(batch: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Add an axis of one date behind that of the items."""
    found = dict(batch)
    for name in names:
        for each in (name, *(key(name, part) for part in _DATED)):
            if each in found:
                found[each] = found[each].unsqueeze(1)
    return found
