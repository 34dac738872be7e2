"""A prepared exam: its scans on one grid, in physical values, in the smallest exact type.

    exam = Prepared(values={"ct": compact(hu)}, valid={}, limits={"ct": window}, affine=affine)
    part = exam.crop((10, 20, 0), (96, 96, 32))

Values are what a batch holds before normalisation; nothing here is scaled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from domainssl.errors import ConfigError, DataError

__all__ = ["Prepared", "check_box", "compact", "halve", "shifted"]

Array = np.ndarray[Any, Any]
_WORD = re.compile(r"[^/\\]{0,32}")  # a text that goes to a cache: no path, no sentence
_EXACT = 2**24  # float32 has every whole number up to here


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """An exam, or a box cut out of one; all arrays have the axes X, Y, Z of one RAS grid.

    Attributes:
        values: Physical values (C, X, Y, Z) of every modality that the exam has.
        affine: Voxel to RAS in mm, (4, 4).
        valid: True where a voxel was measured, bool (X, Y, Z); a modality that is not named is
            valid everywhere.
        limits: Intensity limits of the whole exam, float32 (C, 2), of modalities that have them.
        mask: Class of every voxel, integer (X, Y, Z), if there is one.
        facts: Plain data that are kept with the exam: numbers, and words such as an orientation.
            They are written to disk, so that no path, name or date may be among them.
    """

    values: Mapping[str, Array]
    affine: Array
    valid: Mapping[str, Array] = field(default_factory=dict)
    limits: Mapping[str, Array] = field(default_factory=dict)
    mask: Array | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, array in self.values.items():
            if array.ndim != 4 or array.shape[1:] != self.shape:
                raise ValueError(f"values of {name!r}: {array.shape}, expected (C, *{self.shape})")
            if array.dtype.kind not in "iuf":
                raise ValueError(f"values of {name!r}: {array.dtype}, expected numbers")
        others = {**self.valid, **({} if self.mask is None else {"mask": self.mask})}
        for name, array in others.items():
            if array.shape != self.shape:
                raise ValueError(f"{name!r}: {array.shape}, expected {self.shape}")
        for name, limits in self.limits.items():
            if limits.shape != (self.values[name].shape[0], 2) or not np.isfinite(limits).all():
                raise ValueError(f"limits of {name!r}: {limits!r}, expected finite (C, 2)")
        if self.affine.shape != (4, 4) or not np.isfinite(self.affine).all():
            raise ValueError(f"affine: {self.affine!r}, expected finite (4, 4)")
        check_words(self.facts)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along X, Y, Z."""
        x, y, z = next(iter(self.values.values())).shape[1:]
        return x, y, z

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        arrays = [*self.values.values(), *self.valid.values()]
        return sum(a.nbytes for a in arrays) + (0 if self.mask is None else self.mask.nbytes)

    def crop(self, start: Sequence[int], size: Sequence[int]) -> Prepared:
        """Return a copy of a box; `valid` then has every modality.

        Args:
            start: First voxel along X, Y, Z.
            size: Voxels along X, Y, Z.

        Raises:
            DataError: The box leaves the exam.
        """
        box = check_box(start, size, self.shape)
        return Prepared(
            values={name: np.array(v[(slice(None), *box)]) for name, v in self.values.items()},
            valid={
                name: np.array(self.valid[name][box])
                if name in self.valid
                else np.broadcast_to(True, tuple(size))
                for name in self.values
            },
            limits=dict(self.limits),
            mask=None if self.mask is None else np.array(self.mask[box]),
            affine=shifted(self.affine, start),
            facts=self.facts,
        )


def check_words(value: object) -> None:
    """Refuse texts that may name a file or a person: facts are written to disk.

    Raises:
        ValueError: There is one.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            check_words(key)
            check_words(item)
    elif isinstance(value, list | tuple):
        for item in value:
            check_words(item)
    elif isinstance(value, str) and not _WORD.fullmatch(value):
        raise ValueError("facts of an exam hold a path or a sentence; keep numbers and short words")


def check_box(
    start: Sequence[int], size: Sequence[int], shape: Sequence[int]
) -> tuple[slice, slice, slice]:
    """Return the slices of a box along X, Y, Z.

    Raises:
        DataError: It is empty or leaves the grid.
    """
    inside = all(
        first >= 0 and count >= 1 and first + count <= full
        for first, count, full in zip(start, size, shape, strict=True)
    )
    if not inside:
        raise DataError(
            f"a box of {tuple(size)} voxels from {tuple(start)} on leaves an exam of "
            f"{tuple(shape)} voxels; cut it at the border and pad it."
        )
    x, y, z = (slice(int(a), int(a) + int(n)) for a, n in zip(start, size, strict=True))
    return x, y, z


def shifted(affine: Array, start: Sequence[int]) -> Array:
    """Return the affine of a grid whose first voxel is `start`."""
    out = np.array(affine, np.float64)
    out[:3, 3] += out[:3, :3] @ np.asarray(start, np.float64)
    return out


def compact(values: Array, *, is_classes: bool = False) -> Array:
    """Return the values in the smallest type that keeps every one of them.

    Whole numbers stay whole: uint8, int16 where they fit, else float32 up to 2^24 and int32 beyond.
    Others become float32.

    Args:
        values: Numbers of any type.
        is_classes: They are classes of voxels, which never become float32.

    Raises:
        DataError: Whole numbers beyond 32 bit.
    """
    kind, size = values.dtype.kind, values.dtype.itemsize
    if kind not in "iub":
        return values.astype(np.float32, copy=False)
    if kind == "b" or (kind == "u" and size == 1):
        return values.astype(np.uint8, copy=False)
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    for dtype, least, most in (
        (np.int16, -(2**15), 2**15 - 1),
        (np.float32, -_EXACT, _EXACT),
        (np.int32, -(2**31), 2**31 - 1),
    ):
        if least <= low and high <= most and not (is_classes and dtype is np.float32):
            return values.astype(dtype, copy=False)
    raise DataError(
        f"values from {low} to {high} do not fit into 32 bit; convert the scan to float."
    )


def halve(values: Array, precision: float | None, name: str) -> Array:
    """Return float values as float16 where that changes none of them noticeably.

    Args:
        values: Values in the type of `compact`; integers are returned as they are.
        precision: Largest change, in the unit of the values: half a step of their statistics. None
            for 1/1024 of each value, half a class of statistics that have no fixed step.
        name: Modality, for the message.

    Raises:
        ConfigError: A value would change more, or overflow.
    """
    if values.dtype.kind in "iu":
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        half = values.astype(np.float16)
        change = np.abs(half.astype(np.float32) - values)
        allowed = np.abs(values) / 1024 if precision is None else np.float32(precision)
        bad = ~((change <= allowed) | (np.isnan(values) & np.isnan(half)))
    if bad.any():
        worst = float(values[bad].flat[np.argmax(np.nan_to_num(change[bad], nan=np.inf))])
        limit = "1/1024 of itself" if precision is None else f"{precision:g}"
        raise ConfigError(
            f"float16 would change values of {name!r} by more than {limit}, which their statistics "
            f"resolve: {worst:.6g} for one. Set data.init_args.preparation.cache_half: false."
        )
    return half
