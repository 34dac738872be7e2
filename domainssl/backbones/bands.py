"""Weights for other bands than those they were trained on: which are kept, dropped or averaged."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

from domainssl.arguments import Recorded
from domainssl.backbones.base import Backbone
from domainssl.errors import ConfigError, WeightsError, nearest
from domainssl.modality import Modality, as_modalities

__all__ = ["BandChange", "BandPolicy", "adapt_bands"]

logger = logging.getLogger(__name__)

BandPolicy = Literal["strict", "subset", "average", "wavelengths"]
_SAME_NM = 25.0  # up to which centres of a band differ between satellites and tables
_SAME_GSD = 0.1  # relative difference up to which pixels count as those of the weights
_Kind = TypeVar("_Kind", bound=Backbone)


@dataclass(frozen=True, kw_only=True)
class BandChange:
    """How the bands of one modality were fitted to the data.

    Attributes:
        modality: Its name.
        policy: `subset`, `average` or `wavelengths`.
        kept: Bands of the data whose weights and statistics are the published ones, in order.
        dropped: Bands of the weights that the data do not have.
        averaged: Bands of the data that the weights do not know, with the statistics of the data.
            Their weights are the mean over all bands of the weights, or, with `wavelengths`, those
            that serve every band.
        pixels_m: Side of a pixel of the weights and of the data, where the latter counts.
    """

    modality: str
    policy: BandPolicy
    kept: tuple[str, ...]
    dropped: tuple[str, ...]
    averaged: tuple[str, ...]
    pixels_m: tuple[float, float] | None = None

    def __str__(self) -> str:
        parts = [f"{self.modality} (bands: {self.policy}): kept {_shown(self.kept)}"]
        if self.dropped:
            parts.append(f"dropped {_shown(self.dropped)}")
        if self.averaged:
            how = (
                "are told by their wavelengths and have"
                if self.policy == "wavelengths"
                else "got the mean input weights of all published bands and"
            )
            parts.append(f"{_shown(self.averaged)} {how} the statistics of the data")
        if self.pixels_m:
            parts.append("pixels of {1:g} m in place of {0:g} m".format(*self.pixels_m))
        return "; ".join(parts)


def _shown(bands: tuple[str, ...]) -> str:
    return ", ".join(bands) or "none"


def adapt_bands(
    backbone: _Kind,
    modalities: Mapping[str, Modality | Mapping[str, Any]],
    policy: BandPolicy = "subset",
) -> _Kind:
    """Return a backbone for the bands of some data, made from one for other bands.

    `subset` selects input weights and statistics of the bands that the data have, in their order.
    The features are those of the whole backbone on a batch whose other bands are zero once they
    are normalised: their mean with `zscore`, the lower limit with the forms that end in [0, 1].
    `average` does the same, and gives bands that the weights do not know the mean of the input
    weights over all published bands; their statistics are those of the data. `wavelengths` is for
    encoders that tell bands by their wavelengths (LESS ViT): any bands, with their own statistics
    and their own pixels, as such encoders place patches by metres.

    What was done is logged, stands in `band_changes`, and in the provenance of exports.

    Args:
        backbone: Weights and the modalities they were trained on.
        modalities: The data; a subset of the modalities of the backbone.
        policy: `strict` compares and changes nothing.

    Returns:
        The same backbone where the bands are equal, else a new one in the same mode.

    Raises:
        WeightsError: Something else than bands differs, a band is unknown, statistics are missing,
            or the backbone has no input weights that can be selected.
    """
    check_policy(policy)
    known = as_modalities(modalities)
    if policy == "wavelengths" and not backbone.takes_wavelengths:
        raise WeightsError(
            "bands='wavelengths' is for encoders that tell bands by their wavelengths, such as "
            f"LESSBackbone; {type(backbone).__name__} has weights of its own for every band. "
            "Choose strict, subset or average."
        )
    moved = _moved(backbone, known, policy)
    pixels = _pixels(backbone, known, policy)
    if policy == "strict":
        backbone.check(known)
        return backbone
    changes = {
        name: change
        for name, found in known.items()
        if name in backbone.modalities
        and (
            change := _change(
                found, backbone.modalities[name], policy, moved.get(name, ()), pixels.get(name)
            )
        )
        is not None
    }
    as_if = {n: _like(found, backbone.modalities.get(n, found)) for n, found in known.items()}
    backbone.check({n: as_if[n] if n in changes else known[n] for n in known})
    if not changes:
        return backbone
    adapted = _rebuilt(backbone, known, changes)
    adapted.band_changes = tuple(changes.values())
    for change in changes.values():
        logger.warning("%s", change)
    return adapted


def _moved(
    backbone: Backbone, known: Mapping[str, Modality], policy: BandPolicy
) -> dict[str, tuple[str, ...]]:
    """Return the bands that lie elsewhere than those of their names in the weights.

    Raises:
        WeightsError: There is one, and the policy goes by names.
    """
    found = {}
    for name, modality in known.items():
        published = backbone.modalities.get(name)
        if not backbone.takes_wavelengths or published is None:
            continue
        own, given = (
            dict(zip(m.channels, m.wavelengths_nm or (), strict=False))
            for m in (published, modality)
        )
        found[name] = tuple(
            band for band in given if band in own and abs(given[band] - own[band]) > _SAME_NM
        )
        if found[name] and policy != "wavelengths":
            band = found[name][0]
            raise WeightsError(
                f"{name}: band {band!r} lies at {given[band]:g} nm, that of the weights at "
                f"{own[band]:g} nm. Correct wavelengths_nm or the name, or take bands by their "
                "wavelengths: bands='wavelengths'."
            )
    return found


def _pixels(
    backbone: Backbone, known: Mapping[str, Modality], policy: BandPolicy
) -> dict[str, tuple[float, float]]:
    """Return the pixels of the weights and of the data where these differ and places are metres.

    Raises:
        WeightsError: They differ, and the policy keeps those of the weights.
    """
    found = {}
    for name, modality in known.items():
        published = backbone.modalities.get(name)
        own = published.gsd_m if published is not None and backbone.takes_wavelengths else None
        given = modality.gsd_m
        if own is None or given is None or abs(given / own - 1) <= _SAME_GSD:
            continue
        if policy != "wavelengths":
            raise WeightsError(
                f"{name}: pixels of {given:g} m, those of the weights are {own:g} m, by which "
                f"they place patches. Read them at {own:g} m (gsd_m of the modality), or take them "
                "as they are: bands='wavelengths'."
            )
        found[name] = (own, given)
    return found


def check_policy(policy: object) -> None:
    """Refuse an unknown policy.

    Raises:
        ConfigError: It is none of `BandPolicy`.
    """
    if policy not in get_args(BandPolicy):
        raise ConfigError(
            f"bands: {policy!r} is not one of {', '.join(get_args(BandPolicy))}."
            f"{nearest(policy, get_args(BandPolicy))}"
        )


def _change(
    found: Modality,
    published: Modality,
    policy: BandPolicy,
    moved: tuple[str, ...],
    pixels: tuple[float, float] | None,
) -> BandChange | None:
    """Return what has to be done to one modality; None where the bands are equal.

    Bands that have `moved` are new ones in spite of their names.

    Raises:
        WeightsError: The policy does not allow it.
    """
    if found.channels == published.channels and not moved and pixels is None:
        return None
    repeated = sorted({band for band in found.channels if found.channels.count(band) > 1})
    if repeated:
        raise WeightsError(f"{found.name}: the data have the bands {repeated} more than once.")
    own = [band for band in published.channels if band not in moved]
    new = tuple(band for band in found.channels if band not in own)
    kept = tuple(band for band in found.channels if band in own)
    if policy == "subset" and new:
        raise WeightsError(
            f"{found.name}: bands='subset' selects bands of the weights, and {_shown(new)} "
            f"{'are' if len(new) > 1 else 'is'} none of them ({_shown(published.channels)})."
            f"{nearest(new[0], published.channels)} Leave them out in the DataModule, or give them "
            "averaged input weights with bands='average'."
        )
    return BandChange(
        modality=found.name,
        policy=policy,
        kept=kept,
        dropped=tuple(band for band in published.channels if band not in kept),
        averaged=new,
        pixels_m=pixels,
    )


def _like(found: Modality, published: Modality) -> Modality:
    """Return the data's description with the bands of the weights, to compare everything else."""
    return dataclasses.replace(
        found, channels=published.channels, mean=None, std=None, wavelengths_nm=None
    )


def _rebuilt(
    backbone: _Kind, known: Mapping[str, Modality], changes: Mapping[str, BandChange]
) -> _Kind:
    assert isinstance(backbone, Recorded)
    modalities = dict(backbone.modalities)
    state = dict(backbone.state_dict())
    for name, change in changes.items():
        published, found = backbone.modalities[name], known[name]
        layouts = backbone.band_tensors(name)  # refuses where it cannot be done
        order = [
            published.channels.index(band) if band in published.channels else None
            for band in found.channels
        ]
        for tensor, layout in layouts.items():
            state[tensor] = _selected(state[tensor], layout, published.num_channels, order)
        modalities[name], statistics = _described(backbone, published, found, change)
        state |= statistics
    adapted = type(backbone)(**{**backbone.arguments, "modalities": modalities})
    adapted.load_state_dict(state, strict=True)
    return adapted.train(backbone.training)


def _selected(weight: Tensor, layout: str, bands: int, order: list[int | None]) -> Tensor:
    """Return input weights for other bands.

    Args:
        weight: (E, C, *S) of a convolution, or (E, C·P) or (E, P·C) of a linear layer.
        layout: `convolution`, `bands first` or `bands last`.
        bands: C.
        order: Published band of every new one; None is the mean over all.
    """
    if layout == "bands last":
        parts = weight.unflatten(1, (-1, bands)).movedim(2, 1)
    else:
        parts = weight if layout == "convolution" else weight.unflatten(1, (bands, -1))
    mean = parts.mean(1)
    chosen = torch.stack([mean if band is None else parts[:, band] for band in order], 1)
    if layout == "convolution":
        return chosen
    return (chosen.movedim(1, 2) if layout == "bands last" else chosen).flatten(1)


def _described(
    backbone: Backbone, published: Modality, found: Modality, change: BandChange
) -> tuple[Modality, dict[str, Tensor]]:
    """Return the modality with its new bands, and the statistics that normalise it."""
    name = published.name
    sealed = backbone.normalizer.statistics(name)
    mean: Tensor | None = None
    std: Tensor | None = None
    if sealed is None and published.mean is not None and published.std is not None:
        mean, std = torch.tensor(published.mean), torch.tensor(published.std)
    elif sealed is not None:
        mean, std = (values.cpu() for values in sealed)
    if change.averaged and sealed is not None and (found.mean is None or found.std is None):
        raise WeightsError(
            f"{name}: normalisation {str(backbone.normalizer.forms[name])!r} needs mean and std of "
            f"the new bands {_shown(change.averaged)}, and the data have none. Set "
            "data.init_args.statistics, or give mean and std in modalities=…"
        )

    def values(own: Tensor | None, given: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if own is None or (change.averaged and given is None):
            return None
        return tuple(
            float(own[published.channels.index(band)]) if band in change.kept
            else (given or ())[index]
            for index, band in enumerate(found.channels)
        )  # fmt: skip

    waves = published.wavelengths_nm
    described = dataclasses.replace(
        published,
        channels=found.channels,
        gsd_m=change.pixels_m[1] if change.pixels_m else published.gsd_m,
        mean=values(mean, found.mean),
        std=values(std, found.std),
        wavelengths_nm=values(None if waves is None else torch.tensor(waves), found.wavelengths_nm),
    )
    if sealed is None:
        return described, {}
    return described, {
        f"normalizer.mean_{name}": torch.tensor(described.mean),
        f"normalizer.std_{name}": torch.tensor(described.std),
    }
