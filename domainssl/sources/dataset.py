"""Any torch `Dataset` as a source: those of torchgeo and MONAI, or your own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from domainssl.errors import DataError, nearest, parsing
from domainssl.loading.plan import Piece, generator
from domainssl.loading.source import Rows
from domainssl.missing import marks, tell
from domainssl.modality import Batch, Modality, collate
from domainssl.sources.items import companions
from domainssl.sources.windows import Cut, Window
from domainssl.units import unit_change

__all__ = ["DatasetSource", "Reads", "SampleKeys"]

_ITEM, _WINDOW = 41, 42  # tags that keep the streams of random numbers apart
_KEPT = (torch.uint8, torch.int16, torch.float16, torch.float32)
_ADVICE = "The data set itself raised this; try dataset[number] in Python."


@dataclass(frozen=True)
class Reads:
    """Where a modality lies in the items of a data set.

    Attributes:
        key: Key of a tensor (C, ...) in the item, such as `image`; a position, such as `0`, where
            items are tuples.
        channels: Positions of its channels; empty takes all.
        stored_unit: What the data set returns, if it is not the unit of the modality: `dn`,
            `dn+1000`, `reflectance`, `linear` or `amplitude`.
        optional: The key may be missing, None or nothing but NaN: the modality is not present.
    """

    key: str = "image"
    channels: tuple[int, ...] = ()
    stored_unit: str | None = None
    optional: bool = False


@dataclass(frozen=True, kw_only=True)
class SampleKeys:
    """Keys of what items hold besides modalities; `auto` takes them where they are there.

    Attributes:
        label: Class number, or 0 and 1 per class (`label_multi`); null for none.
        mask: Class per pixel, (H, W) or (X, Y, Z), cut as the modalities are; null for none.
        target: Number to predict, or (R,) of them; (H, W), (X, Y, Z) or one map per number in
            front, cut as the modalities are; NaN where it is not known; null for none.
        id: Name of the item. The default counts: names of files may be names of persons.
        dates: Days since 1970-01-01 of each modality that has them, by modality.
    """

    label: str | None = "auto"
    mask: str | None = "auto"
    target: str | None = "auto"
    id: str | None = None
    dates: Mapping[str, str] | None = None


@dataclass(kw_only=True)
class DatasetSource:
    """Gives out the items of a data set whose items are mappings or tuples of tensors.

    Random transforms that use torch's global generator give the same item for the same seed and
    epoch. An item that cannot be used is marked as bad, with the reason.

    Attributes:
        dataset: Has `__len__` and `__getitem__`; pickled to workers.
        modalities: What batches hold.
        reads: Where each modality lies in an item.
        seed: Seed of random transforms and windows.
        is_training: Draw anew in every epoch.
        per_block: Items that are read together.
        keys: What items hold besides.
        window: Windows cut out of items, in pixels of the coarsest modality; None takes items
            whole.
        sizes_read: Size of each modality in the data set; only with a window.
        numbers: Items that belong to this split; None takes all.
        prefix: Stands before the number in ids of items without a name.
    """

    dataset: Any
    modalities: Mapping[str, Modality]
    reads: Mapping[str, Reads]
    seed: int = 0
    is_training: bool = False
    per_block: int = 32
    keys: SampleKeys = SampleKeys()
    window: Window | None = None
    sizes_read: Mapping[str, tuple[int, ...]] | None = None
    numbers: Sequence[int] | None = None
    prefix: str = ""

    @property
    def sizes(self) -> Sequence[int]:
        """Items per block."""
        full, rest = divmod(self._count, self.per_block)
        return [self.per_block] * full + [rest] * (rest > 0)

    @property
    def unit_labels(self) -> Sequence[int] | None:
        """Class per item, where the data set tells it as those of torchvision do, by `targets`."""
        found = getattr(self.dataset, "targets", None)
        if self.keys.label is None or found is None or len(found) != len(self.dataset):
            return None
        labels = np.asarray(found)
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            return None
        chosen = labels if self.numbers is None else labels[np.asarray(self.numbers, np.int64)]
        return [int(label) for label in chosen]

    @property
    def _count(self) -> int:
        return len(self.dataset) if self.numbers is None else len(self.numbers)

    @property
    def num_bytes(self) -> int:
        """Bytes of all items as float32, roughly."""
        item = sum(
            modality.num_channels * torch.Size(self._size_read(name)).numel()
            for name, modality in self.modalities.items()
        )
        return 4 * item * self._count

    def _size_read(self, name: str) -> tuple[int, ...]:
        return (self.sizes_read or {}).get(name, self.modalities[name].size)

    def load(self, piece: Piece, epoch: int) -> Rows:
        """Read the items of a piece."""
        first = piece.block * self.per_block
        epoch = epoch if self.is_training else 0
        items: list[Batch] = []
        bad: dict[int, str] = {}
        for at, index in enumerate(range(first + piece.start, first + piece.stop)):
            try:
                items.append(self._item(index, epoch))
            except DataError as error:
                bad[at] = str(error)
                items.append({})
        good = next((item for item in items if item), None)
        if good is None:
            raise DataError(bad[0])
        return Rows(data=collate([item or good for item in items]), count=len(items), bad=bad)

    def _item(self, index: int, epoch: int) -> Batch:
        number = index if self.numbers is None else self.numbers[index]
        where = f"item {number} of {type(self.dataset).__name__}"
        found = self._sample(where, number, index, epoch)
        name = f"{self.prefix}{number}"
        if self.keys.id is not None or "id" in found:
            name = str(_entry(found, self.keys.id or "id", where, "data.init_args.keys.id"))
        item: Batch = {"index": index, "id": name}
        cut = self._cut(index, epoch)
        for modality in self.modalities.values():
            item |= self._modality(where, found, modality, cut)
        item |= self._labels(where, found) | self._mask(where, found, cut)
        return item | self._target(where, found, cut)

    def _sample(self, where: str, number: int, index: int, epoch: int) -> Mapping[str, Any]:
        """Return an item as a mapping."""
        with torch.random.fork_rng(devices=[]), parsing(where, advice=_ADVICE):
            draw = generator(self.seed, epoch, _ITEM, index)
            torch.default_generator.manual_seed(int(draw.integers(2**63)))  # of the CPU alone
            found = self.dataset[number]
        if isinstance(found, list | tuple):
            if found and all(isinstance(part, Mapping) for part in found):
                raise DataError(
                    f"{where} is a list of {len(found)} items. One number stands for one item here:"
                    " set num_samples of the transform that draws crops to 1, or leave it out and "
                    "set data.init_args.window."
                )
            found = {str(at): part for at, part in enumerate(found)}
        if not isinstance(found, Mapping):
            found = {"0": found}
        return found

    def _cut(self, index: int, epoch: int) -> Cut | None:
        """Return the window of an item in pixels of the coarsest modality."""
        if self.window is None:
            return None
        room = self._room
        if not self.is_training:
            return self.window.middle(room)
        return self.window.draw(generator(self.seed, epoch, _WINDOW, index), room)

    @property
    def _room(self) -> tuple[int, ...]:
        return min(self._size_read(name) for name in self.modalities)

    # Modalities -----------------------------------------------------------------------------

    def _modality(
        self, where: str, found: Mapping[str, Any], modality: Modality, cut: Cut | None
    ) -> Batch:
        """Return a modality of an item and its companions; a filler where it is not present."""
        name, reads = modality.name, self.reads[modality.name]
        values = self._values(where, found, reads, modality)
        dates = self._dates(where, found, name, values)
        frames = None
        if modality.kind == "series":
            frames = 1 if values is None else len(values)
        axis = modality.channel_axis - 1
        if values is None:
            lead = [1] * axis  # one date, one feature
            filler = torch.zeros(*lead, modality.num_channels, *modality.size)
            valid = torch.zeros(*lead, *modality.size, dtype=torch.bool)
            nothing = None if frames is None else np.zeros(1, bool)
            return companions(
                name, filler, valid, present=False, frames=frames, dates=dates, frame_mask=nothing
            )
        affine = getattr(values, "affine", None)  # MONAI's MetaTensor has one
        values, valid = _measured(values.as_subclass(Tensor), axis, reads, modality, where)
        if cut is not None and modality.size:
            own = cut.scaled(self._size_read(name)[0] // self._room[0])
            values = torch.from_numpy(own.view(values.numpy()).copy())
            valid = torch.from_numpy(own.view(valid.numpy()).copy())
            if affine is not None and modality.kind == "volume":
                affine = torch.as_tensor(affine, dtype=torch.float64) @ torch.from_numpy(
                    own.to_source()
                )
        if affine is not None and modality.kind == "volume":
            affine = torch.as_tensor(affine).tolist()
        else:
            affine = None
        return companions(name, values, valid, frames=frames, dates=dates, affine=affine)

    def _values(
        self, where: str, found: Mapping[str, Any], reads: Reads, modality: Modality
    ) -> Tensor | None:
        """Return the values as they are stored, None where the modality is not present."""
        name = f"data.init_args.modalities.{modality.name}"
        if reads.optional and found.get(reads.key) is None:
            return None
        values = _tensor(_entry(found, reads.key, where, f"{name}.key"), reads.key, where)
        axis = modality.channel_axis - 1
        if reads.channels:
            if values.ndim <= axis or max(reads.channels) >= values.shape[axis]:
                raise DataError(
                    f"{where}: {reads.key!r} has the shape {tuple(values.shape)}, and {name} takes "
                    f"the channels {list(reads.channels)} of its axis {axis}. Count channels from "
                    "0, and name those that are there."
                )
            values = values.index_select(axis, torch.tensor(reads.channels))
        size = self._size_read(modality.name)
        expected = (*values.shape[:axis], modality.num_channels, *size)
        if tuple(values.shape) != expected or values.ndim != axis + 1 + len(size):
            shape = ", ".join([*["any"] * axis, *map(str, (modality.num_channels, *size))])
            raise DataError(
                f"{where}: {reads.key!r} has the shape {tuple(values.shape)}, but modality "
                f"{modality.name!r} says ({shape}) (channels, then size). Set channels, positions "
                f"and size of {name} to what the data set returns, or crop and resize in its "
                "transforms."
            )
        if not values.isfinite().any():
            if reads.optional:
                return None
            raise DataError(
                f"{where}: {reads.key!r} holds no finite value. Mend or leave out the item; set "
                f"{name}.optional: true if items may lack {modality.name!r}."
            )
        return values

    def _dates(self, where: str, found: Mapping[str, Any], name: str, values: Tensor | None) -> Any:
        """Return days since 1970-01-01, or None where the data set has none."""
        wanted = (self.keys.dates or {}).get(name)
        if wanted is None:
            return None
        if values is None:
            return 0
        given = np.asarray(_entry(found, wanted, where, f"data.init_args.keys.dates.{name}"))
        if given.dtype.kind in "MUSO":
            with parsing(f"{where}: {wanted!r}", advice="Dates are days or ISO dates."):
                given = given.astype("datetime64[D]").astype(np.int64)
        expected = (len(values),) if self.modalities[name].kind == "series" else ()
        if given.dtype.kind not in "iu" or given.shape not in (expected, (1, *expected)):
            raise DataError(
                f"{where}: {wanted!r} is {given.dtype} of shape {given.shape}; expected whole days "
                f"since 1970-01-01 or ISO dates, of shape {expected}."
            )
        return given.reshape(expected)

    # Labels ---------------------------------------------------------------------------------

    def _labels(self, where: str, found: Mapping[str, Any]) -> Batch:
        wanted = self.keys.label
        if wanted is None or (wanted == "auto" and not self._is_free("label", found)):
            return {}
        key = "label" if wanted == "auto" else wanted
        label = _tensor(_entry(found, key, where, "data.init_args.keys.label"), key, where)
        if not label.isfinite().all() or (label != label.round()).any():
            raise DataError(
                f"{where}: {key!r} is {label.tolist()!r}; a label is a whole number, -1 if it is "
                "not known. Set data.init_args.keys.label: null if these are no classes."
            )
        if label.numel() == 1:
            return {"label": label.reshape(()).long()}
        if label.ndim == 1 and ((label == 0) | (label == 1)).all():
            return {"label_multi": label.bool()}
        raise DataError(
            f"{where}: {key!r} has the shape {tuple(label.shape)}; a label is one number, or 0 and "
            "1 per class. Set data.init_args.keys.label: null, or keys.mask to it if it is a map."
        )

    def _mask(self, where: str, found: Mapping[str, Any], cut: Cut | None) -> Batch:
        wanted = self.keys.mask
        if wanted is None or (wanted == "auto" and not self._is_free("mask", found)):
            return {}
        key = "mask" if wanted == "auto" else wanted
        mask = _tensor(_entry(found, key, where, "data.init_args.keys.mask"), key, where)
        if mask.ndim == len(self._room) + 1 and mask.shape[0] == 1:
            mask = mask[0]
        if mask.ndim != len(self._room) or not self._times(mask):
            raise DataError(
                f"{where}: {key!r} has the shape {tuple(mask.shape)}; expected one class per pixel "
                f"of {list(self._room)}, or a multiple. Set data.init_args.keys.mask: null to "
                "leave it out."
            )
        if not mask.isfinite().all():
            raise DataError(f"{where}: {key!r} holds NaN; a mask holds whole numbers.")
        return {"mask": self._cut_map(mask, cut).long()}

    def _is_free(self, name: str, found: Mapping[str, Any]) -> bool:
        """Tell whether `auto` takes an entry: it is there and not named as the target."""
        return found.get(name) is not None and self.keys.target != name

    def _times(self, values: Tensor) -> int:
        """Return how many pixels of a map (..., *S) lie on one of the coarsest; 0 if it differs."""
        axes = len(self._room)
        sides = tuple(values.shape[values.ndim - axes :])
        if self.window is None and sides in [self._size_read(name) for name in self.modalities]:
            return 1  # items are taken whole, and the map is that of a modality
        times = sides[0] // self._room[0] if axes and values.ndim >= axes else 0
        return times if sides == tuple(side * times for side in self._room) else 0

    def _cut_map(self, values: Tensor, cut: Cut | None) -> Tensor:
        """Return the window of a map (..., *S)."""
        if cut is None:
            return values
        own = cut.scaled(self._times(values))
        return torch.from_numpy(own.view(values.numpy()).copy())

    def _target(self, where: str, found: Mapping[str, Any], cut: Cut | None) -> Batch:
        wanted, setting = self.keys.target, "data.init_args.keys.target"
        if wanted is None or (wanted == "auto" and not _is_number(found.get("target"))):
            return {}
        key = "target" if wanted == "auto" else wanted
        target = _tensor(_entry(found, key, where, setting), key, where).float()
        if target.isinf().any():
            raise DataError(
                f"{where}: {key!r} holds infinite numbers; expected finite ones, NaN where a "
                f"number is not known. Set {setting}: null to leave it out."
            )
        axes = len(self._room)
        if target.ndim < 2 or not axes:
            if target.ndim > 1:
                raise DataError(
                    f"{where}: {key!r} has the shape {tuple(target.shape)}; expected one number, "
                    f"or (R,) of them. Set {setting}: null to leave it out."
                )
            return {"target": target.reshape(()) if target.numel() == 1 else target}
        if target.ndim == axes + 1 and target.shape[0] == 1:
            target = target[0]
        if target.ndim not in (axes, axes + 1) or not self._times(target):
            raise DataError(
                f"{where}: {key!r} has the shape {tuple(target.shape)}; expected numbers per pixel "
                f"of {list(self._room)} or a multiple, or one map per number in front. Set "
                f"{setting}: null to leave it out."
            )
        return {"target": self._cut_map(target, cut)}


def _is_number(value: Any) -> bool:
    """Tell whether an entry can be numbers, unlike the boxes and texts of other data sets."""
    if isinstance(value, Tensor):
        return True
    return isinstance(value, int | float | np.number | np.ndarray)


def _entry(found: Mapping[str, Any], key: str, where: str, setting: str) -> Any:
    """Return an entry of an item."""
    if found.get(key) is not None:
        return found[key]
    names = [str(name) for name in found]
    what = "is None there" if key in found else f"only {', '.join(names)}"
    raise DataError(
        f"{where} has no {key!r}, {what}.{nearest(key, names)} Set {setting} to one of them."
    )


def _tensor(value: Any, key: str, where: str) -> Tensor:
    """Return an entry as a tensor of numbers."""
    try:
        found: Tensor = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError, RuntimeError) as error:
        kind = f"{type(value).__module__}.{type(value).__name__}"
        raise DataError(
            f"{where}: {key!r} is a {kind}, expected a tensor or array of numbers. Convert it in "
            "the transforms of the data set."
        ) from error
    if found.is_complex() or found.is_quantized or found.layout != torch.strided:
        raise DataError(
            f"{where}: {key!r} has the type {found.dtype} ({found.layout}), expected real numbers. "
            "Convert it in the transforms of the data set."
        )
    return found.detach().cpu()


def _measured(
    values: Tensor, axis: int, reads: Reads, modality: Modality, where: str
) -> tuple[Tensor, Tensor]:
    """Return finite values in the modality's unit, and bool without channels, True = valid."""
    valid = values.isfinite().all(axis)
    if modality.nodata is not None:
        valid &= (values != modality.nodata).all(axis)
    change = unit_change(reads.stored_unit or modality.value_unit, modality.value_unit)
    if change is None:
        raise DataError(
            f"{where}: there is no way from stored {reads.stored_unit!r} to "
            f"{modality.value_unit!r}. Set data.init_args.modalities.{modality.name}.stored_unit "
            "to dn, dn+1000, reflectance, linear or amplitude."
        )
    kind, factor, addition = change
    if kind == "linear" and values.dtype is not torch.bfloat16:
        stored = values.numpy()
        hidden = marks(stored, factor, addition * factor, modality.value_unit)
        if hidden is not None:
            tell(f"{modality.name} of the data set", stored[hidden])
            valid &= ~torch.from_numpy(hidden).any(axis)
    if change != ("linear", 1.0, 0.0):
        values = (values.double() + addition) * factor
        if kind != "linear":
            valid &= (values > 0).all(axis)
            values = (10 if kind == "power" else 20) * values.clamp(min=1e-30).log10()
    if values.dtype not in _KEPT:
        values = values.float()
        valid &= values.isfinite().all(axis)
    if values.is_floating_point():
        values = values.masked_fill(~valid.unsqueeze(axis), 0)
    return values.contiguous(), valid
