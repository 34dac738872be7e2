"""What is doubtful about the planes of a DICOM volume that can be read: scales, acquisitions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

from domainssl.io.volume.dicom_file import Plane
from domainssl.io.volume.dicom_stack import names_of

__all__ = ["doubts"]

_HU = ("", "HU", "HU_MOD")
_KINDS = ("EchoTime", "TemporalPositionIdentifier", "AcquisitionNumber", "ImageType")


def doubts(path: str, modality: str, planes: Sequence[Plane]) -> Iterator[str]:
    """Yield what is doubtful.

    Args:
        path: Path as given.
        modality: As the series states it.
        planes: Those of one volume, in the order of their places, without modality tables.
    """
    if modality == "CT":
        yield from _scales(path, planes)
    for kind in _KINDS:
        yield from _mixed(path, kind, planes)


def _scales(path: str, planes: Sequence[Plane]) -> Iterator[str]:
    """Say where numbers of a CT may be no Hounsfield units."""
    bare = [plane for plane in planes if not plane.is_scaled]
    if bare:
        yield (
            f"{path}: {len(bare)} of {len(planes)} images state no RescaleSlope or "
            f"RescaleIntercept, such as {bare[0].name}: their stored numbers count as Hounsfield "
            "units, which they hardly are"
        )
    others = [plane for plane in planes if plane.scale_type not in _HU]
    if others:
        yield (
            f"{path}: {len(others)} of {len(planes)} images state the unit "
            f"{others[0].scale_type} (RescaleType), such as {others[0].name}: they are read as "
            "Hounsfield units, which they may not be"
        )
    scaled = [plane for plane in planes if plane.is_scaled]
    scales = Counter((plane.slope, plane.intercept) for plane in scaled)
    if len(scales) > 1:
        usual, count = scales.most_common(1)[0]
        odd = [plane for plane in scaled if (plane.slope, plane.intercept) != usual]
        yield (
            f"{path}: {len(odd)} images of a CT have another scale than {count} of slope "
            f"{usual[0]:g} and intercept {usual[1]:g}: {names_of(odd)}; each is read by its own"
        )


def _mixed(path: str, kind: str, planes: Sequence[Plane]) -> Iterator[str]:
    """Say that planes of several acquisitions alternate, which may be volumes of their own."""
    values = [dict(plane.phases).get(kind, "") for plane in planes]
    counts = Counter(values)
    runs = 1 + sum(a != b for a, b in pairwise(values))
    if runs > len(counts) > 1 and min(counts.values()) > 1:
        yield (
            f"{path}: images of {len(counts)} kinds by {kind} alternate along the volume, such as "
            f"{names_of(planes[:3])}: read as one volume, which they are if none of them covers "
            "it alone"
        )
