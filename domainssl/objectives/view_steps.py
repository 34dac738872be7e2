"""How a view is made: values in [0, 1], a crop with its changes, then the network's units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from domainssl.backbones.base import Backbone
from domainssl.errors import ConfigError
from domainssl.modality import key, present_mask, valid_mask
from domainssl.nn.normalization import Form
from domainssl.nn.views import View, Views, geometry, photometry

__all__ = ["check_photometric", "unit_values", "view_of"]

_BOUNDED_FORMS = ("mean2std", "mean2std8", "scale", "window", "item", "batch")


def check_photometric(views: Views, form: Form, where: str) -> None:
    """Refuse photometric changes of values that do not lie in [0, 1].

    Args:
        views: Which changes.
        form: Normalisation of the modality.
        where: Key below `model.init_args`, for the message.

    Raises:
        ConfigError: The form gives other values.
    """
    if views.is_photometric and form.name not in _BOUNDED_FORMS:
        raise ConfigError(
            f"model.init_args.{where}: photometric changes work on values in [0, 1], which "
            f"normalization {str(form)!r} does not give. Choose one of "
            f"{', '.join(_BOUNDED_FORMS)}, or set the probabilities to 0."
        )


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
    values = photometry(values, usable, view, views)
    if is_series:
        values, usable = values.unsqueeze(1), usable.unsqueeze(1)
    values = backbone.normalizer.standardize(values, name)
    values = torch.where(usable.unsqueeze(modality.channel_axis), values, 0.0)
    return {name: values, key(name, "valid"): usable, **found}
