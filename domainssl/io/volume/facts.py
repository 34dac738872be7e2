"""What is asked of a scan, what is known of it, and the scan itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

from domainssl.errors import ConfigError, DataError, nearest
from domainssl.io.volume.geometry import axis_codes, ras_affine, ras_axes, spacing_of, to_ras

__all__ = [
    "Header",
    "Reading",
    "Scan",
    "ScanFacts",
    "chosen_volume",
    "finish",
    "in_words",
    "reading_of_words",
]

Array = np.ndarray[Any, Any]
SPACES = ("LPS", "RAS", "LAS")
_COLUMN = 64  # voxels
_ORIENTATIONS = ("header", "assume_pixdim")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a user says about scans that their files leave open.

    Attributes:
        orientation: `header`; or `assume_pixdim`: files that state no orientation are read by
            their voxel sizes, the stored axes taken for right, anterior, superior.
        volume: Index of the volume in files that hold several; `split` takes each as an item of
            its own, None refuses them.
        space: World axes of NRRD files that name none: LPS, RAS or LAS.
        series: Key of the series in DICOM folders that hold several, as `inspect` shows it.
    """

    orientation: Literal["header", "assume_pixdim"] = "header"
    volume: int | Literal["split"] | None = None
    space: str | None = None
    series: str | None = None

    def __post_init__(self) -> None:
        if self.orientation not in _ORIENTATIONS:
            raise ConfigError(
                f"orientation: got {self.orientation!r}, expected 'header' or 'assume_pixdim'."
                + nearest(self.orientation, _ORIENTATIONS)
            )
        if self.space is not None and self.space not in SPACES:
            raise ConfigError(
                f"space: got {self.space!r}, expected one of {', '.join(SPACES)}."
                + nearest(self.space, SPACES)
            )
        is_index = isinstance(self.volume, int) and not isinstance(self.volume, bool)
        if self.volume not in (None, "split") and not (is_index and int(self.volume) >= 0):
            raise ConfigError(
                f"volume: got {self.volume!r}, expected an index from 0 on, 'split', or null."
                f"{nearest(self.volume, ('split',))}"
            )


def in_words(option: str) -> str:
    """Return how embed and predict take an option of `Reading`, for messages."""
    return (
        " It stands under `reading` of a modality in a configuration; embed and predict take "
        f"`--scan {option}`."
    )


def reading_of_words(words: Sequence[str]) -> dict[str, Any]:
    """Return fields of `Reading` from words such as `space=LPS`.

    Raises:
        ConfigError: A word is none of them, or a value cannot be used.
    """
    given: dict[str, Any] = {}
    names = [field.name for field in fields(Reading)]
    for word in words:
        name, sign, value = word.partition("=")
        if not sign or name not in names:
            raise ConfigError(
                f"--scan {word}: expected KEY=VALUE with one of {', '.join(names)}."
                f"{nearest(name, names)}"
            )
        given[name] = int(value) if name == "volume" and value.isdigit() else value
        if given[name] == "split":
            raise ConfigError(
                "--scan volume=split: one volume is read at a time here; give its index."
            )
    Reading(**given)
    return given


@dataclass(frozen=True, kw_only=True)
class ScanFacts:
    """What is known of a scan without its values.

    Attributes:
        path: Path as given.
        format: `nifti`, `nrrd`, `metaimage`, `mgh`, `dicom` or `dicom-seg`.
        shape: Voxels (X, Y, Z) in RAS axis order.
        stored_shape: Voxels in the order of the file's axes.
        channels: Values per voxel of one volume.
        volumes: Volumes in the file, such as dates or contrasts.
        dtype: Type of the stored numbers.
        affine: Voxel (of the RAS array) to RAS mm, (4, 4).
        orientation: Directions of the stored axes, such as `LPS`.
        is_oriented: False where the orientation was assumed because the file states none.
        spacing: Voxel size in mm, in RAS axis order.
        modality: `CT`, `MR` or `PT` where the file says so.
        warnings: What is odd.
        left_out: Files of a DICOM folder that are not part of the scan, with the reason.
    """

    path: str
    format: str
    shape: tuple[int, int, int]
    stored_shape: tuple[int, int, int]
    channels: int
    volumes: int
    dtype: str
    affine: Array
    orientation: str
    is_oriented: bool
    spacing: tuple[float, float, float]
    modality: Literal["CT", "MR", "PT"] | None = None
    warnings: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Scan:
    """One volume in RAS axis order.

    Attributes:
        values: (C, X, Y, Z), contiguous: integers as stored, or float32 where the file scales them.
        valid: Which voxels are measured, (X, Y, Z) bool; None where all are. Padding and values
            that are not finite are False, and hold a finite filler.
        affine: Voxel to RAS mm, (4, 4) float64.
        facts: What is known of the file.
    """

    values: Array
    valid: Array | None
    affine: Array
    facts: ScanFacts


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a format finds out before it reads values; sizes and affine are of the stored axes."""

    path: str
    format: str
    sizes: tuple[int, int, int]
    affine: Array
    dtype: np.dtype[Any]
    channels: int = 1
    volumes: int = 1
    is_oriented: bool = True
    modality: Literal["CT", "MR", "PT"] | None = None
    warnings: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def facts(self) -> ScanFacts:
        """Return the facts of the RAS array.

        Raises:
            DataError: The affine is singular or not finite.
        """
        axes = ras_axes(self.affine, self.path)
        affine = ras_affine(self.affine, self.sizes, axes)
        x, y, z = (self.sizes[axis] for axis, _ in axes)
        spacing = spacing_of(affine)
        return ScanFacts(
            path=self.path,
            format=self.format,
            shape=(x, y, z),
            stored_shape=self.sizes,
            channels=self.channels,
            volumes=self.volumes,
            dtype=self.dtype.name,
            affine=affine,
            orientation=axis_codes(axes),
            is_oriented=self.is_oriented,
            spacing=spacing,
            modality=self.modality,
            warnings=(*self.warnings, *_implausible(self.path, spacing)),
            left_out=self.left_out,
        )


def _implausible(path: str, spacing: Sequence[float]) -> Iterator[str]:
    if max(spacing) > 100 or min(spacing) < 1e-3:
        sizes = " × ".join(f"{size:.6g}" for size in spacing)
        yield f"{path}: voxels of {sizes} mm are hardly a scan's: check the units of the file"


def chosen_volume(path: str, volumes: int, reading: Reading) -> int:
    """Return the index of the volume that is read.

    Raises:
        DataError: There are several and none is chosen, or the chosen one does not exist.
    """
    index = None if reading.volume == "split" else reading.volume
    if index is None and volumes > 1:
        raise DataError(
            f"{path}: holds {volumes} volumes (4D), expected one. Choose one with "
            f"`volume: <index>` (0 to {volumes - 1}), or take each as an item of its own with "
            "`volume: split`." + in_words("volume=<index>")
        )
    index = index or 0
    if index >= volumes:
        raise DataError(
            f"{path}: `volume: {index}` asks for a volume that is not there; the file holds "
            f"{volumes}, counted from 0."
        )
    return index


def _copy(source: Array, target: Array) -> None:
    """Copy in columns of a few voxels, which takes half the time where axes change places."""
    for x in range(0, len(source), _COLUMN):
        for y in range(0, source.shape[1], _COLUMN):
            box = slice(x, x + _COLUMN), slice(y, y + _COLUMN)
            target[box] = source[box]


def finish(
    header: Header, channels: Sequence[Array], valid: Array | None = None, *, filler: float | None
) -> Scan:
    """Put the channels of one volume into RAS axis order and mark what is not finite.

    Args:
        header: What the format found out.
        channels: One array (I, J, K) per channel, in the stored order of axes; integers or float32.
        valid: Which voxels are measured, (I, J, K); all if None.
        filler: Value of the others; None takes the least valid value.
    """
    facts = header.facts()
    axes = ras_axes(header.affine, header.path)
    dtype = channels[0].dtype.newbyteorder("=")
    values = np.empty((len(channels), *facts.shape), dtype)
    for target, source in zip(values, channels, strict=True):
        _copy(to_ras(source, axes), target)
    kept = None if valid is None else np.ascontiguousarray(to_ras(valid, axes))
    if dtype.kind == "f":
        finite = np.isfinite(values[0])
        for channel in values[1:]:
            finite &= np.isfinite(channel)
        kept = finite if kept is None else kept & finite
    if kept is not None and kept.all():
        kept = None
    if kept is not None:
        if filler is None:
            filler = float(values[:, kept].min()) if kept.any() else 0.0
        values[:, ~kept] = filler
    return Scan(values=values, valid=kept, affine=facts.affine, facts=facts)
