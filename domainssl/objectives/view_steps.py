"""How a view is made: values in [0, 1], a crop with its changes, then the network's units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from domainssl.backbones.base import Backbone
from domainssl.errors import ConfigError
from domainssl.modality import Modality, key, present_mask, valid_mask
from domainssl.nn.normalization import Form
from domainssl.nn.stain import hed_jitter
from domainssl.nn.views import View, Views, geometry, photometry

__all__ = ["check_photometric", "unit_values", "view_of"]

_BOUNDED_FORMS = ("mean2std", "mean2std8", "scale", "window", "item", "batch")


def check_photometric(views: Views, form: Form, modality: Modality, where: str) -> None:
    """Refuse photometric changes of values outside [0, 1], and of stains in other than colours.

    Args:
        views: Which changes.
        form: Normalisation of the modality.
        modality: What is changed.
        where: Key below `model.init_args`, for the message.

    Raises:
        ConfigError: The form gives other values.
    """
    if views.stain_probability > 0:
        _check_stain(modality, form, where)
    if views.is_photometric and form.name not in _BOUNDED_FORMS:
        raise ConfigError(
            f"model.init_args.{where}: photometric changes work on values in [0, 1], which "
            f"normalization {str(form)!r} does not give. Choose one of "
            f"{', '.join(_BOUNDED_FORMS)}, or set the probabilities to 0."
        )


def _check_stain(modality: Modality, form: Form, where: str) -> None:
    """Refuse changes of stains of what is not 8-bit colours."""
    if modality.value_unit != "rgb8" or modality.num_channels != 3 or _white(form) is None:
        raise ConfigError(
            f"model.init_args.{where}.stain_probability: dyes absorb light of colours, red, green "
            f"and blue of 8 bit, and normalization has to leave white where it is; "
            f"{modality.name!r} has {modality.num_channels} channels of the unit "
            f"{modality.value_unit!r}, normalised by {str(form)!r}. Choose zscore, identity, "
            "scale(255) or window(0,255), or set stain_probability to 0."
        )


def _white(form: Form) -> float | None:
    """Return what white of 255 is after `to_unit`; None where black is not 0."""
    if form.name in ("identity", "zscore"):
        return 255.0
    if form.name == "scale":
        return 255.0 / form.numbers[0]
    return 1.0 if form.name == "window" and form.numbers == (0.0, 255.0) else None


def unit_values(backbone: Backbone, batch: Mapping[str, Any], name: str) -> tuple[Tensor, Tensor]:
    """Return a modality's values before `standardize`, and which are measured, without channels."""
    values = backbone.normalizer.to_unit(batch, name)
    usable = valid_mask(batch, backbone.modalities[name])
    present = present_mask(batch, name).view(-1, *[1] * (usable.ndim - 1))
    return values, usable & present


def view_of(
    backbone: Backbone,
    batch: Mapping[str, Any],
    name: str,
    values: Tensor,
    usable: Tensor,
    view: View,
    views: Views,
    size: tuple[int, ...],
) -> dict[str, Tensor]:
    """Apply one view; a series becomes one of one date.

    Args:
        backbone: Whose normalisation holds.
        batch: Where the dates of a series are.
        name: The modality.
        values: From `unit_values`.
        usable: From `unit_values`.
        view: Which crop and changes.
        views: What they were drawn from.
        size: Size of the view.

    Returns:
        The modality and its companions `valid` and, of a series with dates, `dates`, ready for
        `encode`; values that are not valid are zero.
    """
    modality = backbone.modalities[name]
    found: dict[str, Tensor] = {}
    is_series = modality.kind == "series"
    if is_series:
        items = torch.arange(len(values), device=values.device)
        values, usable = values[items, view.date], usable[items, view.date]
        if key(name, "dates") in batch:
            found[key(name, "dates")] = batch[key(name, "dates")][items, view.date].unsqueeze(1)
    values, usable = geometry(values, usable, view, size)
    if views.stain_probability > 0:
        white = _white(backbone.normalizer.forms[name])
        assert white is not None  # checked at the start
        values = white * hed_jitter(values / white, view.stain[:, 0], view.stain[:, 1])
    values = photometry(values, usable, view, views)
    if is_series:
        values, usable = values.unsqueeze(1), usable.unsqueeze(1)
    values = backbone.normalizer.standardize(values, name)
    values = torch.where(usable.unsqueeze(modality.channel_axis), values, 0.0)
    return {name: values, key(name, "valid"): usable, **found}
