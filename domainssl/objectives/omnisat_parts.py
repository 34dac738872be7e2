"""Parts of OmniSat that only pretraining needs: sizes, decoder of series, names, checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from torch import Tensor, nn

from domainssl.backbones.bands import BandPolicy
from domainssl.backbones.omnisat import SeriesArchitecture
from domainssl.errors import ConfigError, nearest
from domainssl.modality import Modality, sides_of
from domainssl.nn.calendar import Calendar
from domainssl.options import as_dataclass, named_sizes

__all__ = [
    "OmniSatArchitecture",
    "OmniSatEncoding",
    "SeriesDecoder",
    "backbone_sizes",
    "Size",
    "check_shares",
    "decoder_name",
    "patch_grid",
    "patch_sizes",
    "sizes_of",
]

Size = Literal["tiny", "base"]


@dataclass(frozen=True, kw_only=True)
class OmniSatArchitecture:
    """Sizes; None takes the value of the named size.

    Attributes:
        width: Token width.
        depth: Self-attention blocks of the fusion.
        heads: Attention heads of the fusion.
        ffn_ratio: Width of feed-forward layers over the token width.
        groups: Groups of the normalisations of the image encoder.
        dropout: Of the fusion.
        attention_dropout: Of the attention weights of the fusion.
        drop_path: Rate of dropped branches of the last fusion block.
        series: Sizes of the temporal encoders.
        decoder_widths: Hidden widths of the decoders of series, none as published.
    """

    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    ffn_ratio: float = 4
    groups: int = 4
    dropout: float = 0.2
    attention_dropout: float = 0.2
    drop_path: float = 0.2
    series: SeriesArchitecture | None = None
    decoder_widths: tuple[int, ...] = ()


_SIZES: dict[Size, OmniSatArchitecture] = {
    "tiny": OmniSatArchitecture(
        width=32,
        depth=2,
        heads=4,
        series=SeriesArchitecture(heads=4, widths_in=(16, 32), widths_out=(32, 32)),
    ),
    "base": OmniSatArchitecture(width=256, depth=6, heads=16, series=SeriesArchitecture()),
}


@dataclass(frozen=True, kw_only=True)
class OmniSatEncoding:
    """What encodes the modalities.

    Attributes:
        size: Named size, `tiny` (tests) or `base` (published).
        architecture: Explicit sizes over the named one.
        patch_m: Side of a patch on the ground; with the modalities' resolution it decides
            `patch_size`.
        patch_mm: The same of volumes, with their spacing.
        patch_size: Side of a patch in pixels or voxels per modality, one number or one per axis,
            over `patch_m` and `patch_mm`.
        grid: Patches along each axis; None takes them from the sizes of the modalities.
        calendar: How days are counted, one for all or one per series.
        normalization: Form for all modalities, or one per modality.
        weights: Start from an export, a checkpoint, or a checkpoint of the published code.
        bands: Where the bands differ from those of the weights: `strict` refuses, `subset` keeps
            the weights of the bands that are there, `average` gives new ones averaged weights.
    """

    size: Size = "base"
    architecture: OmniSatArchitecture = OmniSatArchitecture()
    patch_m: float = 10.0
    patch_mm: float = 16.0
    patch_size: dict[str, int | tuple[int, ...]] | None = None
    grid: tuple[int, ...] | None = None
    calendar: Calendar | dict[str, Calendar] = Calendar()
    normalization: str | dict[str, str] = "zscore"
    weights: str | None = None
    bands: BandPolicy = "strict"


class SeriesDecoder(nn.Module):
    """Linear layers from a fused token plus a date code to the values of a patch."""

    def __init__(self, width: int, outputs: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for a, b in zip([width, *hidden], [*hidden, outputs], strict=True):
            layers += [nn.Linear(a, b), nn.ReLU()]
        self.decode = nn.Sequential(*layers[:-1])

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        out: Tensor = self.decode(tokens)
        return out


def decoder_name(own: str, state: Mapping[str, Tensor]) -> str:
    """Translate a name of the decoders to the published pretraining network."""
    same = f"decoder.{own}"
    if same in state:
        return same
    projector, rest = own.split(".", 1)
    name = projector.removeprefix("projector_").replace("_", "-")
    return f"decoder.projector_{name}.{rest}"


def sizes_of(encoding: OmniSatEncoding) -> OmniSatArchitecture:
    """Return the sizes of a name with explicit ones laid over them."""
    sizes = named_sizes(_SIZES, encoding.size, encoding.architecture, "OmniSat")
    series = as_dataclass(SeriesArchitecture, cast(Any, sizes.series))
    return replace(sizes, series=series)


def backbone_sizes(sizes: OmniSatArchitecture, layout: str | None) -> dict[str, Any]:
    """Return the sizes as the backbone takes them, those of its fusion in a group."""
    given = {name: value for name, value in vars(sizes).items() if name != "decoder_widths"}
    own = {name: given.pop(name) for name in ("width", "groups", "series")}
    return {**own, "fusion": {**given, "rpe_layout": layout}}


def patch_sizes(
    known: Mapping[str, Modality],
    patch_m: float,
    patch_mm: float,
    given: Mapping[str, int | tuple[int, ...]],
) -> dict[str, int | tuple[int, ...]]:
    """Return the sides of a patch in pixels or voxels, from its side on the ground or in the body.

    Args:
        known: The modalities.
        patch_m: Side in metres, of images and their series.
        patch_mm: Side in millimetres, of volumes and their series.
        given: Sides in pixels that are not computed, per modality.

    Raises:
        ConfigError: A side is no whole number of pixels.
    """
    for name in given:
        if name not in known:
            raise ConfigError(
                f"model.init_args.encoding.patch_size: no modality {name!r}.{nearest(name, known)} "
                f"The data have {list(known)}."
            )
    sides: dict[str, int | tuple[int, ...]] = {}
    for name, modality in known.items():
        if name in given:
            continue
        option, length, unit = "patch_m", patch_m, "m"
        if modality.spatial_dims == 3:
            option, length, unit = "patch_mm", patch_mm, "mm"
        is_known = modality.gsd_m if unit == "m" else modality.spacing_mm
        pixels = [length / step if is_known else 0.0 for step in modality.steps]
        if any(n < 1 - 1e-6 or abs(n - round(n)) > 1e-3 for n in pixels):
            shown = " x ".join(f"{n:g}" for n in dict.fromkeys(pixels))
            raise ConfigError(
                f"model.init_args.encoding.{option}: {length:g} {unit} are {shown} pixels of "
                f"{name!r} ({is_known} {unit}); expected a whole number. Set "
                f"model.init_args.encoding.patch_size.{name}."
            )
        whole = [round(n) for n in pixels]
        sides[name] = whole[0] if len(set(whole)) == 1 else tuple(whole)
    return sides


def patch_grid(
    known: Mapping[str, Modality],
    sides: Mapping[str, int | tuple[int, ...]],
    given: tuple[int, ...] | None,
) -> tuple[int, ...]:
    """Return the patch grid, the same for all modalities.

    Raises:
        ConfigError: Sizes and patches give several grids, or none.
    """
    if given is not None:
        return tuple(int(n) for n in given)
    grids = {
        name: tuple(
            length / side
            for length, side in zip(m.size, sides_of(sides[name], len(m.size)), strict=True)
        )
        for name, m in known.items()
        if m.size
    }
    found = set(grids.values())
    whole = all(n == int(n) for grid in found for n in grid)
    if len(found) != 1 or not whole:
        raise ConfigError(
            f"OmniSat needs one patch grid for all modalities; sizes and patch_size {dict(sides)} "
            f"give {grids}. Set model.init_args.encoding.patch_size or encoding.grid, or crop "
            "in the DataModule."
        )
    return tuple(int(n) for n in next(iter(found)))


def check_shares(**shares: float) -> None:
    """Refuse what is not at least 0 and less than 1."""
    for name, share in shares.items():
        if not 0 <= share < 1:
            raise ConfigError(
                f"model.init_args: {name} gives a share of {share!r}; expected 0 <= share < 1."
            )
