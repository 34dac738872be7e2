"""What a sensor is, what a batch is, and the checks at the edge between data and model.

A batch is a plain dict keyed by modality name; companions hang on the name with a dot:

===================  ==========================================================================
key                  value
===================  ==========================================================================
`s2`                 raw physical values, (B, C, H, W) image, (B, T, C, H, W) series,
                     (B, C, X, Y, Z) volume, (B, N, C) features, (B, C) table
`s2.valid`           bool, the shape without C; False on nodata, padding, NaN
`s2.frames`          bool (B, T); False on padded dates
`s2.present`         bool (B,); False where the item lacks the modality (the filler is finite)
`s2.dates`           int32 (B,) or (B, T), days since 1970-01-01
`s2.hours`           float32, the shape of `s2.dates`: hour of the day in UTC, where it is known
`s2.window`          float32 (B, C, 2), scaling limits measured on the whole item
`s2.coords`          float32 (B, N, D), positions of features
`s2.geo`, `s2.affine`  list of plain values
`label`, `mask`, `index` (int64), `id` (list of str)
===================  ==========================================================================
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor

from domainssl.arguments import plain
from domainssl.errors import ConfigError, DataError, nearest

__all__ = [
    "COMPANIONS",
    "Batch",
    "Modality",
    "as_modalities",
    "batch_to",
    "check_batch",
    "check_shape",
    "collate",
    "key",
    "plain",
    "present_mask",
    "sides_of",
    "valid_mask",
    "zero_batch",
]

Batch = dict[str, Any]
Kind = Literal["image", "series", "volume", "features", "table"]

COMPANIONS = (
    "valid", "frames", "present", "dates", "hours", "window", "coords", "source", "geo", "affine",
)  # fmt: skip
_LISTS = ("id",)  # besides the companions `geo` and `affine`
_NAME = re.compile(r"[a-z][a-z0-9_]*\Z")
_AXES: dict[str, str] = {
    "image": "B C H W",
    "series": "B T C H W",
    "volume": "B C X Y Z",
    "series of volumes": "B T C X Y Z",
    "features": "B N C",
    "table": "B C",
}
_CHANNEL_AXIS = {"image": 1, "series": 2, "volume": 1, "features": 2, "table": 1}
_SPATIAL_DIMS = {"image": 2, "series": 2, "volume": 3, "features": 0, "table": 0}


@dataclass(frozen=True, kw_only=True)
class Modality:
    """One sensor, contrast or stain: the facts that data own and backbones are built from.

    Attributes:
        name: Key in the batch, `[a-z][a-z0-9_]*`.
        kind: `image`, `series`, `volume`, `features` or `table`. A series is one of volumes where
            `size` has three numbers or `spacing_mm` is given: exams of one patient over time.
        channels: Band or channel names, in the order of the channel axis.
        value_unit: `dn` (Sentinel-2 digital numbers without offset), `reflectance`, `db`,
            `linear`, `hu`, `rgb8`, `arbitrary`, ...
        size: Spatial size of an item, (H, W) or (X, Y, Z); empty where it varies.
        gsd_m: Ground sampling distance in metres.
        spacing_mm: Voxel spacing in millimetres, one number per axis.
        mpp_um: Microns per pixel.
        mean: Mean per channel, in `value_unit`.
        std: Standard deviation per channel, in `value_unit`.
        valid_range: Lowest and highest physically plausible value.
        nodata: Stored value that means nothing was measured, if there is one.
        wavelengths_nm: Central wavelength per channel.

    Raises:
        ConfigError: A field contradicts another one, or is not one of the accepted values.
    """

    name: str
    kind: Kind
    channels: tuple[str, ...]
    value_unit: str
    size: tuple[int, ...] = ()
    gsd_m: float | None = None
    spacing_mm: tuple[float, ...] | None = None
    mpp_um: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    valid_range: tuple[float, float] | None = None
    nodata: float | None = None
    wavelengths_nm: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
        if not _NAME.match(self.name):
            raise ConfigError(
                f"Modality name {self.name!r}: expected lower-case letters, digits and "
                "underscores, starting with a letter, such as 's1' or 't1c'."
            )
        if self.kind not in get_args(Kind):
            raise ConfigError(
                f"Modality {self.name!r}: kind {self.kind!r} is not one of {get_args(Kind)}."
                f"{nearest(self.kind, get_args(Kind))}"
            )
        if not self.channels:
            raise ConfigError(f"Modality {self.name!r}: 'channels' is empty; name every channel.")
        for name in ("mean", "std", "wavelengths_nm"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.channels):
                raise ConfigError(
                    f"Modality {self.name!r}: {len(values)} values in {name!r} for "
                    f"{len(self.channels)} channels {list(self.channels)}; give one per channel."
                )
        if self.std is not None and min(self.std) <= 0:
            raise ConfigError(
                f"Modality {self.name!r}: 'std' holds {min(self.std)!r}; "
                "every standard deviation must be positive."
            )
        resolutions = [n for n in ("gsd_m", "spacing_mm", "mpp_um") if getattr(self, n) is not None]
        if len(resolutions) > 1:
            raise ConfigError(
                f"Modality {self.name!r}: {resolutions} are all given; a modality has one of them."
            )
        spacing = self.spacing_mm
        if spacing is not None and (len(spacing) != 3 or min(spacing) <= 0):
            raise ConfigError(
                f"Modality {self.name!r}: 'spacing_mm' is {list(spacing)}; expected three positive "
                "numbers, the distances between voxels along x, y and z."
            )

    @classmethod
    def of(cls, value: Modality | Mapping[str, Any]) -> Modality:
        """Return `value` as a Modality; mappings are read as constructor arguments.

        Raises:
            ConfigError: The mapping has an unknown or lacks a necessary field.
        """
        if isinstance(value, Modality):
            return value
        known = [field.name for field in fields(cls)]
        for name in value:
            if name not in known:
                raise ConfigError(
                    f"Unknown field {name!r} of a modality.{nearest(name, known)} "
                    f"Accepted: {', '.join(known)}."
                )
        try:
            return cls(**value)
        except TypeError as error:
            raise ConfigError(
                f"A modality cannot be built from {dict(value)!r}: {error}."
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return {field.name: plain(getattr(self, field.name)) for field in fields(self)}

    @property
    def num_channels(self) -> int:
        """Length of the channel axis."""
        return len(self.channels)

    @property
    def spatial_dims(self) -> int:
        """2 for images and their series, 3 for volumes and theirs, 0 without a grid."""
        if self.kind == "series" and (len(self.size) == 3 or self.spacing_mm is not None):
            return 3
        return _SPATIAL_DIMS[self.kind]

    @property
    def steps(self) -> tuple[float, ...]:
        """Length of a pixel or voxel along each axis: m, mm or um, and 1 where it is unknown."""
        if self.spacing_mm is not None:
            return self.spacing_mm
        return (self.gsd_m or self.mpp_um or 1.0,) * self.spatial_dims

    @property
    def axes(self) -> str:
        """Names of the batch tensor's axes, such as `B C H W`."""
        if self.kind == "series" and self.spatial_dims == 3:
            return _AXES["series of volumes"]
        return _AXES[self.kind]

    @property
    def channel_axis(self) -> int:
        """Position of the channel axis in the batch tensor."""
        return _CHANNEL_AXIS[self.kind]


def as_modalities(values: Mapping[str, Modality | Mapping[str, Any]]) -> dict[str, Modality]:
    """Return a dict of Modality objects keyed by their name.

    Raises:
        ConfigError: A key differs from the name of its modality, or nothing is given.
    """
    if not values:
        raise ConfigError("No modality is given; expected at least one, such as {'s2': {...}}.")
    result = {}
    for name, value in values.items():
        if not isinstance(value, Modality):
            value = Modality.of({"name": name, **value})
        if value.name != name:
            raise ConfigError(
                f"Modality {value.name!r} stands under the key {name!r}; "
                "use the name itself as the key."
            )
        result[name] = value
    return result


def sides_of(size: int | Sequence[int], axes: int, name: str = "size") -> tuple[int, ...]:
    """Return a size with one number per axis, in order; one number stands for all axes.

    Raises:
        ConfigError: There are numbers for another number of axes.
    """
    sides = (size,) * axes if isinstance(size, int) else tuple(int(side) for side in size)
    if len(sides) != axes:
        raise ConfigError(
            f"{name}: got {list(sides)}, expected one number, or {axes}: one per axis."
        )
    return sides


def key(name: str, companion: str) -> str:
    """Return the batch key of a companion, such as `s2.valid`."""
    assert companion in COMPANIONS, companion
    return f"{name}.{companion}"


def valid_mask(batch: Mapping[str, Any], modality: Modality) -> Tensor:
    """Return `<m>.valid`, all True where the batch does not carry it; channels removed."""
    found = batch.get(key(modality.name, "valid"))
    if found is not None:
        return cast(Tensor, found)
    x: Tensor = batch[modality.name]
    return torch.ones_like(x.select(modality.channel_axis, 0), dtype=torch.bool)


def present_mask(batch: Mapping[str, Any], name: str) -> Tensor:
    """Return `<m>.present`, (B,) bool, all True where the batch does not carry it."""
    found = batch.get(key(name, "present"))
    if found is not None:
        return cast(Tensor, found)
    x: Tensor = batch[name]
    return torch.ones(x.shape[0], dtype=torch.bool, device=x.device)


def check_shape(x: Tensor, axes: str, *, name: str, **sizes: int) -> None:
    """Check the rank of `x` and the sizes of the axes given by name.

    Args:
        x: Tensor to check.
        axes: Axis names separated by blanks, such as `B C H W`.
        name: What the tensor is called in the message.
        sizes: Expected size per axis name, such as `C=12`.

    Raises:
        DataError: The rank or a size differs.
    """
    letters = axes.split()
    wanted = " ".join(f"{a}={sizes[a]}" if a in sizes else a for a in letters)
    if x.ndim != len(letters) or any(
        sizes.get(letter, size) != size for letter, size in zip(letters, x.shape, strict=True)
    ):
        raise DataError(f"{name}: got shape {tuple(x.shape)}, expected ({wanted}).")


def _pad_first(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack tensors whose first axis varies; also return (B, T) with True on real entries."""
    length = max(len(t) for t in tensors)
    out = tensors[0].new_zeros((len(tensors), length, *tensors[0].shape[1:]))
    real = torch.zeros(len(tensors), length, dtype=torch.bool)
    for i, t in enumerate(tensors):
        out[i, : len(t)] = t
        real[i, : len(t)] = True
    return out, real


def _tensor(value: Any) -> Any:
    """Return tensors and arrays as plain contiguous tensors, everything else as it is."""
    if isinstance(value, Tensor):
        return value.as_subclass(Tensor)  # strips MONAI's MetaTensor
    if isinstance(value, np.ndarray):
        native = value.astype(value.dtype.newbyteorder("="), copy=False)
        return torch.from_numpy(np.ascontiguousarray(native))
    if isinstance(value, bool | np.bool_):
        return torch.tensor(bool(value))
    if isinstance(value, int | np.integer):
        return torch.tensor(int(value), dtype=torch.int64)
    if isinstance(value, float | np.floating):
        return torch.tensor(float(value), dtype=torch.float32)
    return value


def _flatten(samples: Sequence[Any]) -> list[Batch]:
    """Lay several crops per item (a list of samples) out as items."""
    flat: list[Batch] = []
    for sample in samples:
        flat.extend(sample if isinstance(sample, list | tuple) else [sample])
    return flat


def batch_to(batch: Mapping[str, Any], device: str | torch.device) -> Batch:
    """Return the batch with its tensors on a device; lists stay as they are."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def zero_batch(
    modalities: Mapping[str, Modality],
    sizes: Mapping[str, Sequence[int]],
    frames: int = 1,
    device: str | torch.device = "cpu",
) -> Batch:
    """Return one item of zeros with the companions that backbones need, to learn shapes from.

    Args:
        modalities: Of images, series or volumes.
        sizes: Pixels or voxels along each axis, by name.
        frames: Dates of a series.
        device: Where.
    """
    batch: Batch = {}
    for name, modality in modalities.items():
        lead = (1, frames) if modality.kind == "series" else (1,)
        batch[name] = torch.zeros(*lead, modality.num_channels, *sizes[name], device=device)
        dates = torch.arange(lead[-1], dtype=torch.int32, device=device)
        batch[key(name, "dates")] = dates.expand(lead)
        limits = torch.tensor([0.0, 1.0], device=device)  # of the form `item`
        batch[key(name, "window")] = limits.expand(1, modality.num_channels, 2)
    return batch


def collate(samples: Sequence[Any]) -> Batch:
    """Join samples into one batch.

    Every sample is a dict with the keys of the module's table, without the batch axis; a list
    of dicts counts as several items. T and N are padded to the longest (`frames`, or `valid`
    of a feature set, mark what is real); a modality that only some items have is filled with
    zeros and marked by `present`; `id`, `geo` and `affine` stay lists.

    Raises:
        DataError: Items differ in a shape that cannot be padded.
    """
    items = _flatten(samples)
    names: dict[str, None] = {}
    for item in items:
        names.update(dict.fromkeys(item))
    batch: Batch = {}
    for name in names:
        values = [_tensor(item.get(name)) for item in items]
        modality, _, companion = name.partition(".")
        if name in _LISTS or companion in ("geo", "affine"):
            batch[name] = values
            continue
        have = [v is not None for v in values]
        example = values[have.index(True)]
        if not isinstance(example, Tensor):
            batch[name] = values
            continue
        if not all(have):
            if companion == "" and name in ("label", "mask", "index"):
                raise DataError(f"{name!r} is in some items of the batch and missing in others.")
            values = [torch.zeros_like(example) if v is None else v for v in values]
            if companion == "":
                batch.setdefault(key(name, "present"), torch.tensor(have))
        batch[name] = _stack(name, modality, companion, values, batch)
    return batch


def _stack(name: str, modality: str, companion: str, values: list[Tensor], batch: Batch) -> Tensor:
    """Stack the values of one key, padding the axis that may vary."""
    shapes = {tuple(v.shape) for v in values}
    if len(shapes) == 1:
        return torch.stack(values)
    if len({shape[1:] for shape in shapes}) > 1 or not all(shapes):
        raise DataError(
            f"{name!r}: items of one batch have the shapes {sorted(shapes)}; only the number of "
            "dates or features may differ. Crop or resize them to one size in the DataModule."
        )
    padded, real = _pad_first(values)
    if companion == "":
        ragged = "valid" if values[0].ndim == 2 else "frames"
        batch.setdefault(key(modality, ragged), real)
    return padded


def check_batch(
    batch: Mapping[str, Any],
    modalities: Mapping[str, Modality],
    *,
    training: bool = False,
) -> None:
    """Check that a batch is what `modalities` declare.

    Args:
        batch: The batch.
        modalities: Expected modalities by name.
        training: Demand every modality; otherwise any non-empty subset will do.

    Raises:
        DataError: A modality is missing or unknown, or a shape or dtype differs.
    """
    found = [name for name in modalities if name in batch]
    missing = [name for name in modalities if name not in batch]
    if not found or (training and missing):
        raise DataError(
            f"batch: expected {'all' if training else 'some'} of the modalities "
            f"{list(modalities)}, got the keys {sorted(batch)}."
            + (nearest(missing[0], batch) if missing else "")
        )
    size: int | None = None
    for name in found:
        modality, x = modalities[name], batch[name]
        if not isinstance(x, Tensor):
            raise DataError(f"batch.{name}: got {type(x).__name__}, expected a tensor.")
        axes = modality.axes
        if x.ndim == len(axes.split()) and x.shape[modality.channel_axis] != modality.num_channels:
            raise DataError(
                f"batch.{name}: got shape {tuple(x.shape)}, expected ({axes}) with "
                f"C={modality.num_channels} channels in the order {' '.join(modality.channels)}."
            )
        check_shape(x, axes, name=f"batch.{name}", C=modality.num_channels)
        if size is not None and x.shape[0] != size:
            raise DataError(f"batch.{name}: {len(x)} items, but {found[0]!r} has {size}.")
        size = x.shape[0]  # `len` would fix it in exported graphs
        items = axes.replace(" C", "")
        expected = {a: s for a, s in zip(axes.split(), x.shape, strict=True) if a != "C"}
        for companion, letters in (("valid", items), ("present", "B"), ("frames", "B T")):
            mask = batch.get(key(name, companion))
            if mask is None:
                continue
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                raise DataError(f"batch.{name}.{companion}: expected a bool tensor, got {mask!r}.")
            sizes = {a: s for a, s in expected.items() if a in letters.split()}
            check_shape(mask, letters, name=f"batch.{name}.{companion}", **sizes)
