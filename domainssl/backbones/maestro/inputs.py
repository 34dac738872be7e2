"""What MAESTRO is told about each modality, and the checks of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from domainssl.errors import ConfigError, DataError, nearest
from domainssl.modality import Modality, sides_of
from domainssl.nn.dates import DATE_CHANNELS
from domainssl.nn.patching import grid_of
from domainssl.options import as_dataclass

__all__ = [
    "Interpolation",
    "MAESTROInput",
    "band_order",
    "check_depth",
    "check_inputs",
    "check_width",
    "date_reference_of",
    "nominal_grid",
]


Interpolation = Literal["nearest", "bilinear"]


@dataclass(frozen=True, kw_only=True)
class MAESTROInput:
    """How one modality becomes tokens, and what its hidden tokens are compared with.

    Attributes:
        patch_size: Side of a patch in pixels or voxels, after resizing; one number or one per axis.
        group: Modalities of one group are encoded as one sequence; None is a group of its own.
        embedding: Modalities of one name share patch embedding and pixel head; None is its own.
        token_bands: Band groups by channel name, one token each per patch and date; None is one
            token for all bands in their order.
        target_bands: Sizes of the groups of consecutive bands that targets are standardised in,
            in the order of `token_bands`; None takes the token groups.
        image_size: Side that images and volumes are resized to, one number or one per axis; None
            keeps them.
        interpolation: How they are resized, `nearest` or `bilinear` (trilinear for volumes;
            without antialiasing); a pixel made of invalid ones is invalid.
        is_elevation: Channel 0 is a surface model: after resizing the others become 30 times their
            depth below it, in normalised units.
    """

    patch_size: int | tuple[int, ...]
    group: str | None = None
    embedding: str | None = None
    token_bands: list[list[str]] | None = None
    target_bands: list[int] | None = None
    image_size: int | tuple[int, ...] | None = None
    interpolation: Interpolation = "nearest"
    is_elevation: bool = False


def check_inputs(
    known: Mapping[str, Modality], inputs: Mapping[str, MAESTROInput | Mapping[str, Any]]
) -> dict[str, MAESTROInput]:
    """Return what is said about each modality, as MAESTROInput.

    Raises:
        ConfigError: Something is missing, unknown or of a kind that cannot be used.
    """
    for name in inputs:
        if name not in known:
            raise ConfigError(
                f"model.init_args.encoding.inputs.{name}: the data have no such modality."
                f"{nearest(name, known)} They have {', '.join(known)}."
            )
    dims = {name: m.spatial_dims for name, m in known.items() if m.spatial_dims}
    if len(set(dims.values())) > 1:
        raise ConfigError(
            f"MAESTRO: images and volumes share no footprint; the modalities have {dims} axes. "
            "Choose the ones of one kind in the DataModule."
        )
    chosen = {}
    for name, modality in known.items():
        if name not in inputs:
            raise ConfigError(
                f"model.init_args.encoding.inputs: nothing is said about {name!r}; give its "
                "patch_size, or "
                "leave the modality out of the DataModule."
            )
        if modality.spatial_dims == 0:
            raise ConfigError(
                f"MAESTRO: modality {name!r} is a {modality.kind}; expected images, volumes or "
                "series of them."
            )
        chosen[name] = as_dataclass(MAESTROInput, inputs[name])
        _check_sides(modality, chosen[name])
        if chosen[name].interpolation not in get_args(Interpolation):
            raise ConfigError(
                f"model.init_args.encoding.inputs.{name}.interpolation: got "
                f"{chosen[name].interpolation!r}, "
                f"expected one of {', '.join(get_args(Interpolation))}."
            )
    return chosen


def _check_sides(modality: Modality, given: MAESTROInput) -> None:
    where = f"model.init_args.encoding.inputs.{modality.name}"
    if min(sides_of(given.patch_size, modality.spatial_dims, f"{where}.patch_size")) < 1:
        raise ConfigError(f"{where}.patch_size: got {given.patch_size}, expected one or more.")
    if given.image_size is not None:
        sides_of(given.image_size, modality.spatial_dims, f"{where}.image_size")
    if given.is_elevation and modality.spatial_dims != 2:
        raise ConfigError(f"{where}.is_elevation: volumes hold no surface; set it to false.")


def check_depth(fusion: str, depth: int, shared_depth: int) -> None:
    """Refuse depths that no encoder can have."""
    if not 0 <= shared_depth < depth:
        raise ConfigError(
            f"MAESTRO: shared_depth {shared_depth} must lie in 0 .. depth - 1 = {depth - 1}."
        )
    if shared_depth and fusion in ("shared", "monotemp"):
        raise ConfigError(
            f"MAESTRO: fusion {fusion!r} encodes dates apart and takes no shared blocks; set "
            f"shared_depth: 0 (got {shared_depth}), or fusion: mod or group."
        )


def check_width(width: int, axes: int, name: str = "width") -> None:
    """Refuse a token width that holds no position of so many axes and a date."""
    least = DATE_CHANNELS + 4 * axes
    if width % 4 or width < least:
        raise ConfigError(f"MAESTRO: {name} {width} must be a multiple of 4 and at least {least}.")


def band_order(modality: Modality, given: MAESTROInput) -> list[list[str]]:
    """Return the channel names per token group."""
    groups = given.token_bands
    if groups is None:
        return [list(modality.channels)]
    for band in (band for group in groups for band in group):
        if band not in modality.channels:
            raise ConfigError(
                f"model.init_args.encoding.inputs.{modality.name}.token_bands: no channel {band!r}."
                f"{nearest(band, modality.channels)} There are {', '.join(modality.channels)}."
            )
    if not groups or not all(groups):
        raise ConfigError(
            f"model.init_args.encoding.inputs.{modality.name}.token_bands: an empty group."
        )
    return [list(group) for group in groups]


def date_reference_of(known: Mapping[str, Modality], given: str | None) -> str | None:
    """Return the modality that dates are counted from: the given one, or the first single date."""
    if given is not None and given not in known:
        raise ConfigError(
            "model.init_args.encoding.date_reference: no modality "
            f"{given!r}.{nearest(given, known)} "
            f"There are {', '.join(known)}."
        )
    return given or next((n for n, m in known.items() if m.kind != "series"), None)


def nominal_grid(modality: Modality, given: MAESTROInput) -> tuple[int, ...] | None:
    """Return the patches of the declared size, None where a modality declares none."""
    size = modality.size
    if given.image_size:
        size = sides_of(given.image_size, modality.spatial_dims)
    if not size:
        return None
    try:
        return grid_of(size, given.patch_size, f"model.init_args.encoding.inputs.{modality.name}")
    except DataError as error:
        raise ConfigError(f"{error} Set image_size or another patch_size.") from error
