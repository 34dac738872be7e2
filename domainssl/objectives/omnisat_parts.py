"""Parts of OmniSat that only pretraining needs: sizes, decoder of series, names, checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from torch import Tensor, nn

from domainssl.backbones.omnisat import SeriesArchitecture
from domainssl.errors import ConfigError, nearest
from domainssl.modality import Modality
from domainssl.nn.calendar import Calendar
from domainssl.options import as_dataclass, named_sizes

__all__ = [
    "OmniSatArchitecture",
    "OmniSatEncoding",
    "SeriesDecoder",
    "Size",
    "check_shares",
    "decoder_name",
    "patch_grid",
    "patch_sizes",
    "sizes_of",
]

Size = Literal["tiny", "base"]


@dataclass(frozen=True)
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
        patch_size: Side of a patch in pixels per modality, over `patch_m`.
        grid: Patches along rows and columns; None takes them from the sizes of the modalities.
        calendar: How days are counted, one for all or one per series.
        normalization: Form for all modalities, or one per modality.
        weights: Start from an export, a checkpoint, or a checkpoint of the published code.
    """

    size: Size = "base"
    architecture: OmniSatArchitecture = OmniSatArchitecture()
    patch_m: float = 10.0
    patch_size: dict[str, int] | None = None
    grid: tuple[int, int] | None = None
    calendar: Calendar | dict[str, Calendar] = Calendar()
    normalization: str | dict[str, str] = "zscore"
    weights: str | None = None


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


def patch_sizes(
    known: Mapping[str, Modality], patch_m: float, given: Mapping[str, int]
) -> dict[str, int]:
    """Return the side of a patch in pixels, from its side on the ground."""
    for name in given:
        if name not in known:
            raise ConfigError(
                f"model.init_args.encoding.patch_size: no modality {name!r}.{nearest(name, known)} "
                f"The data have {list(known)}."
            )
    sides = {}
    for name, modality in known.items():
        if name in given:
            continue
        pixels = patch_m / modality.gsd_m if modality.gsd_m else 0.0
        if pixels < 1 - 1e-6 or abs(pixels - round(pixels)) > 1e-3:
            raise ConfigError(
                f"model.init_args.encoding.patch_m: {patch_m:g} m are {pixels:g} pixels of "
                f"{name!r} "
                f"({modality.gsd_m} m); expected a whole number. Set "
                f"model.init_args.encoding.patch_size.{name}."
            )
        sides[name] = round(pixels)
    return sides


def patch_grid(
    known: Mapping[str, Modality], sides: Mapping[str, int], given: tuple[int, int] | None
) -> tuple[int, int]:
    """Return the patch grid, the same for all modalities."""
    if given is not None:
        return (int(given[0]), int(given[1]))
    grids = {
        name: tuple(length / sides[name] for length in modality.size)
        for name, modality in known.items()
        if modality.size
    }
    found = set(grids.values())
    whole = all(n == int(n) for grid in found for n in grid)
    if len(found) != 1 or not whole:
        raise ConfigError(
            f"OmniSat needs one patch grid for all modalities; sizes and patch_size {dict(sides)} "
            f"give {grids}. Set model.init_args.encoding.patch_size or encoding.grid, or crop "
            "in the DataModule."
        )
    rows, columns = next(iter(found))
    return (int(rows), int(columns))


def check_shares(**shares: float) -> None:
    """Refuse what is not at least 0 and less than 1."""
    for name, share in shares.items():
        if not 0 <= share < 1:
            raise ConfigError(
                f"model.init_args: {name} gives a share of {share!r}; expected 0 <= share < 1."
            )
