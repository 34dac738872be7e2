"""Tell, where a run starts, that nothing says whether Sentinel-2 numbers carry the offset."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from domainssl.errors import UnreadableError
from domainssl.io.raster.layer import LayerFile
from domainssl.io.raster.offset import is_before_offset, unsettled
from domainssl.io.raster.read import MaskRule
from domainssl.sources.cube_options import Layer
from domainssl.sources.cube_sites import Site

__all__ = ["untold_offsets"]

_LOOKED = 4  # dates that are looked at on each side of the first products of baseline 04.00


def untold_offsets(sites: Sequence[Site], layers: Mapping[str, Layer]) -> list[str]:
    """Return a sentence per layer whose whole numbers may carry the offset of +1000 or not.

    `embed` and `predict` refuse such rasters; a run takes them as without it, and says so. A few
    dates of sites that are spread evenly are looked at; one that shows dark pixels settles those
    of its side of the change of baselines.

    Args:
        sites: Where the files are.
        layers: What was asked of them.

    """
    found = []
    for name, layer in layers.items():
        option = f"data.init_args.modalities.{name}.stored_unit"
        rule = layer.mask.rule if layer.mask else MaskRule()
        for group in _groups(sites, name):
            told = (_unsettled(file, date, layer, rule, option) for file, date in group)
            reasons = (text for text in told if text is not None)
            reason = next(reasons, "")
            if reason and all(reasons):
                found.append(f"{reason} The run takes them as dn.")
                break
    return found


def _unsettled(file: LayerFile, date: int, layer: Layer, rule: MaskRule, option: str) -> str | None:
    """Return what `unsettled` says, None of a part that cannot be read: reading says why."""
    try:
        return unsettled(file, [date], layer.stored_unit, layer.value_unit, rule, option=option)
    except UnreadableError:
        return None


def _groups(sites: Sequence[Site], name: str) -> Iterator[list[tuple[LayerFile, int]]]:
    """Yield dates from before the first products with the offset, and from after it."""
    files = [file for site in sites for file in site.layers[name].files]
    for is_before in (True, False):
        picked = [
            (file, fitting[0])
            for file in files
            if (
                fitting := [d for d, t in enumerate(file.times) if is_before_offset(t) == is_before]
            )
        ]
        if picked:
            yield picked[:: -(-len(picked) // _LOOKED)]
