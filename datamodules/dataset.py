"""Any torch map-style data set as data: those of torchgeo, MONAI and torchvision, or your own.

    data = DatasetDataModule(root="sample", global_batch_size=32)   # torchgeo's So2Sat
    data = DatasetDataModule.of({"train": mine, "val": other}, modalities={"ct": {…}})

`sources/dataset.py` turns items into batches; normalisation stays in the backbone.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, Literal, Self

import numpy as np
from lightning.pytorch import LightningDataModule
from torch.utils.data import Dataset, IterableDataset

from domainssl.arguments import class_name, plain
from domainssl.datamodules.base import DomainDataModule
from domainssl.datamodules.foreign import (
    ADVICE,
    called,
    class_names,
    constructed,
    datasets_of,
    imported,
    indexed,
    tested_dataset_of,
    transforms_of,
)
from domainssl.datamodules.statistics import statistics_of
from domainssl.errors import ConfigError, DataError, nearest, parsing
from domainssl.io.leaks import equal_files, repeated
from domainssl.io.storage.paths import is_folder
from domainssl.loading.plan import Piece
from domainssl.loading.source import Loading, Source
from domainssl.modality import Modality
from domainssl.sources.dataset import DatasetSource, Reads, SampleKeys
from domainssl.sources.held_out import HeldOut
from domainssl.sources.windows import Window
from domainssl.units import unit_change

__all__ = ["DatasetClass", "DatasetDataModule", "DatasetModality"]

_log = logging.getLogger(__name__)
_SPLITS = ("train", "val", "test", "predict")
_SO2SAT = "torchgeo.datasets.So2Sat"
_WHERE = "data.init_args"
_RESCALES = re.compile(r"(Normali[sz]e|Standardi[sz]e|ScaleIntensity|RescaleIntensity|ZNorm)\w*")


# a text such as "2" stays a text; with `Any` jsonargparse would make a number of it
_Plain = str | int | float | bool | None
_Value = _Plain | list[_Plain | list[Any] | dict[str, Any]] | dict[str, Any]


@dataclass(frozen=True)
class DatasetClass:
    """What makes the data set of a split.

    Attributes:
        name: Import path of a torch `Dataset`, a function that returns one, or a
            `LightningDataModule`, whose data sets are taken without its augmentations.
        arguments: Constructor arguments of all splits. A mapping with `class_path` and
            `init_args` is built first, such as a transform.
        splits: Arguments over those, by `train`, `val`, `test` and `predict`. Without `val`,
            `held_out` divides `train`. A `LightningDataModule` has its own splits.
        root: Name of the argument that takes `data.init_args.root`; null for none.
    """

    name: str = _SO2SAT
    arguments: dict[str, _Value] = field(default_factory=dict)
    splits: dict[str, dict[str, _Value]] = field(
        default_factory=lambda: {"train": {"split": "train"}, "val": {"split": "val"}}
    )
    root: str | None = "root"


@dataclass(frozen=True, kw_only=True)
class DatasetModality:
    """One sensor, contrast or stain of the items.

    Attributes:
        channels: Names, in the order of the channel axis, or of `positions`.
        value_unit: Unit in the batch: `dn`, `reflectance`, `db`, `hu`, `rgb8`, `arbitrary`, …
        size: Size in the items, (H, W) or (X, Y, Z).
        key: Key of the tensor in an item; a position where items are tuples.
        positions: Which channels of the tensor; empty takes all.
        kind: `image`, `series`, `volume`, `features` or `table`.
        stored_unit: Unit in the items where it is another: `dn`, `dn+1000`, `reflectance`,
            `linear` or `amplitude`.
        optional: Items may lack it: the key is missing, None or nothing but NaN.
        gsd_m: Ground sampling distance in metres.
        spacing_mm: Voxel spacing in millimetres, per axis.
        mpp_um: Microns per pixel.
        mean: Per channel, in `value_unit`.
        std: Per channel, in `value_unit`.
        nodata: Stored number that means nothing was measured.
        valid_range: Lowest and highest plausible value.
        wavelengths_nm: Per channel.
    """

    channels: tuple[str, ...]
    value_unit: str
    size: tuple[int, ...] = ()
    key: str = "image"
    positions: tuple[int, ...] = ()
    kind: Literal["image", "series", "volume", "features", "table"] = "image"
    stored_unit: str | None = None
    optional: bool = False
    gsd_m: float | None = None
    spacing_mm: tuple[float, ...] | None = None
    mpp_um: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    nodata: float | None = None
    valid_range: tuple[float, float] | None = None
    wavelengths_nm: tuple[float, ...] | None = None

    def modality(self, name: str) -> Modality:
        """Return what a backbone is built from, of the size in the items.

        Raises:
            ConfigError: The fields contradict each other.
        """
        own = {"key", "positions", "stored_unit", "optional"}
        facts = {k: v for k, v in vars(self).items() if k not in own}
        where = f"{_WHERE}.modalities.{name}"
        found = Modality(name=name, **facts)
        if len(found.size) != found.spatial_dims:
            raise ConfigError(
                f"{where}.size: got {list(found.size)}, expected {found.spatial_dims} numbers: "
                "height and width, or x, y and z, as the data set returns them."
            )
        if self.positions and len(self.positions) != len(self.channels):
            raise ConfigError(
                f"{where}: {len(self.positions)} positions for the channels {list(self.channels)}; "
                "give one per channel."
            )
        if unit_change(self.stored_unit or self.value_unit, self.value_unit) is None:
            raise ConfigError(
                f"{where}: there is no way from stored_unit {self.stored_unit!r} to value_unit "
                f"{self.value_unit!r}. Set stored_unit to dn, dn+1000, reflectance, linear or "
                "amplitude, or leave it out."
            )
        return found


class DatasetDataModule(DomainDataModule):
    """Items of any torch data set, by a mapping from modalities to keys and channels.

    Transforms of the data set run as they are; those that normalise are refused, and the
    augmentations of a `LightningDataModule` are not run.

    Args:
        root: `sample` (So2Sat, made on first use in the cache), or what the data set gets as root.
        dataset: Class or function and its arguments.
        modalities: What is read by modality key; None takes those of the sample, or those that
            the data set states (`domainssl.datamodules.bigearthnet.BigEarthNetV2` and others).
        global_batch_size: Items per optimiser step, over all devices and accumulation.
        window: Windows cut out of the items, flips and turns, the same for all modalities; None
            takes items whole, as they are.
        keys: Label, mask, name and dates of the items.
        held_out: Fraction held out where there is no `val` split.
        on_bad_sample: `raise`, or `replace` by the next good item.
        statistics: `published`, a YAML or JSON file, or `card` (those of the model's weights).
        seed: Seed of order, windows and random transforms.
        loading: Worker processes and memory.

    Raises:
        ConfigError: An argument cannot be used.
    """

    def __init__(
        self,
        root: str = "sample",
        dataset: DatasetClass | None = None,
        modalities: dict[str, DatasetModality] | None = None,
        global_batch_size: int = 64,
        window: Window | None = None,
        keys: SampleKeys | None = None,
        held_out: HeldOut | None = None,
        on_bad_sample: Literal["raise", "replace"] = "raise",
        statistics: str = "published",
        seed: int = 0,
        loading: Loading | None = None,
    ) -> None:
        super().__init__(
            global_batch_size=global_batch_size,
            seed=seed,
            on_bad_sample=on_bad_sample,
            loading=loading,
        )
        self.root = root
        self.dataset = dataset or so2sat_class()
        if unknown := [name for name in self.dataset.splits if name not in _SPLITS]:
            raise ConfigError(
                f"{_WHERE}.dataset.splits: got {unknown}, expected some of {', '.join(_SPLITS)}."
                f"{nearest(unknown[0], _SPLITS)}"
            )
        own = _stated(self.dataset.name)
        if modalities is None:
            modalities = getattr(own, "described", None)
        if modalities is None and self.dataset.name != _SO2SAT:
            raise ConfigError(
                f"{_WHERE}.modalities: name what is read of {self.dataset.name!r}, such as "
                "{s2: {key: image, channels: [B02, B03], value_unit: dn, size: [64, 64]}}."
            )
        self.described = dict(modalities or so2sat_modalities())
        self.keys = keys or SampleKeys(dates=getattr(own, "dates", None))
        self.held_out = (held_out or HeldOut()).of(("val_fraction", "seed"))
        self.statistics = statistics
        self._read = {name: found.modality(name) for name, found in self.described.items()}
        self.window = None if window is None else self._on_grid(window)
        self._given: Mapping[str, Any] | None = None
        self._module: LightningDataModule | None = None
        self._counts: dict[str, int] = {}
        self._problems: list[str] = []

    @classmethod
    def of(
        cls,
        datasets: Dataset[Any] | LightningDataModule | Mapping[str, Dataset[Any]],
        modalities: Mapping[str, DatasetModality | Mapping[str, Any]],
        **options: Any,
    ) -> Self:
        """Take data sets as they are, in Python.

        Args:
            datasets: One per split (`train`, `val`, `test`, `predict`), one that `held_out`
                divides, or a `LightningDataModule`.
            modalities: See the class.
            options: All other arguments of the class but `root` and `dataset`.
        """
        parts = datasets if isinstance(datasets, Mapping) else {"train": datasets}
        some = next(iter(parts.values()))
        data = cls(
            root="",
            dataset=DatasetClass(class_name(type(some)), splits={name: {} for name in parts}),
            modalities={
                name: v if isinstance(v, DatasetModality) else DatasetModality(**v)
                for name, v in modalities.items()
            },
            **options,
        )
        data._module = some if isinstance(some, LightningDataModule) else None
        data._given = datasets_of(some) if isinstance(some, LightningDataModule) else parts
        return data

    def _on_grid(self, window: Window) -> Window:
        """Return the window in pixels of the coarsest modality."""
        sizes = {name: m.size for name, m in self._read.items() if m.size}
        coarse = min(sizes.values(), default=())
        for name, size in sizes.items():
            times = size[0] // coarse[0]
            if size != tuple(side * times for side in coarse):
                raise ConfigError(
                    f"{_WHERE}.window: {name!r} has {list(size)} pixels where another modality has "
                    f"{list(coarse)}; windows need whole multiples. Leave window out to take items "
                    "whole."
                )
        if len(sizes) < len(self._read):
            raise ConfigError(f"{_WHERE}.window: features and tables have none; leave it out.")
        window.must_not_resize()
        fine, least = max(sizes.values()), min(sizes, key=lambda name: sizes[name])
        cell = self._read[least].steps[0] * (1e-3 if self._read[least].spacing_mm else 1.0)
        cell *= 1e-6 if self._read[least].mpp_um else 1.0
        found = window.on_grid(
            cell, px_m=cell * coarse[0] / fine[0], whole=coarse, axes=len(coarse),
            name="pixels of the coarsest modality",
        )  # fmt: skip
        found.check(coarse, f"{_WHERE}.modalities")
        return found

    @property
    def modalities(self) -> dict[str, Modality]:
        """The modalities as batches hold them; statistics as asked for."""
        found = {}
        for name, modality in self._read.items():
            size = modality.size
            if self.window is not None:
                coarse = min(m.size for m in self._read.values())
                size = tuple(side * (size[0] // coarse[0]) for side in self.window.shape)
            found[name] = statistics_of(replace(modality, size=size), self.statistics)
        return found

    def prepare_data(self) -> None:
        """Write the embedded sample, once per machine."""
        self._root()

    def _root(self) -> str:
        if self.root != "sample":
            return self.root
        if self.dataset.name != _SO2SAT:
            raise ConfigError(
                f"{_WHERE}.root: there is an embedded sample of {_SO2SAT}, none of "
                f"{self.dataset.name}. Name the folder of your data."
            )
        from domainssl.datamodules.samples.so2sat import sample_root

        return str(sample_root())

    def setup(self, stage: str | None = None) -> None:
        """Open the sources; the test data of a `LightningDataModule` only where they are tested."""
        super().setup(stage)
        if stage == "test" and self._module is not None and "test" not in self._sources:
            dataset = tested_dataset_of(self._module)
            if dataset is not None:
                self._sources["test"] = self._source("test", dataset)

    def open_sources(self) -> dict[str, Source]:
        """Build the data sets of the splits; predictions are made for the held-out one."""
        datasets = self._given if self._given is not None else self._built()
        sources = {n: self._source(n, one) for n, one in datasets.items()}
        self._tell(self._leaks(datasets))
        if "val" not in sources and "train" in sources and self.held_out.val_fraction:
            sources |= self._divided(sources["train"])
        if "val" not in sources:
            _log.warning("%s: nothing is held out for validation", self.dataset.name)
        sources.setdefault("predict", sources.get("val", next(iter(sources.values()))))
        self._counts = {name: sum(source.sizes) for name, source in sources.items()}
        return dict(sources)

    def _built(self) -> dict[str, Any]:
        """Import and call what makes the data sets."""
        root = self._root()
        make = imported(self.dataset.name)
        arguments = dict(constructed(self.dataset.arguments))
        if self.dataset.root is not None:
            if "://" not in root and not is_folder(root):
                raise DataError(
                    f"{_WHERE}.root: the folder {root!r} does not exist. Name the folder of "
                    f"{self.dataset.name}, or 'sample' for the embedded sample of {_SO2SAT}."
                )
            arguments[self.dataset.root] = root
        if isinstance(make, type) and issubclass(make, LightningDataModule):
            self._module = called(make, arguments, self.dataset.name)
            return datasets_of(self._module)
        return {
            split: called(make, arguments | dict(constructed(own)), self.dataset.name)
            for split, own in self.dataset.splits.items()
        }

    def _source(self, split: str, dataset: Any) -> DatasetSource:
        """Check a data set and wrap it."""
        self._tell(getattr(dataset, "problems", ()))
        dataset = indexed(dataset, self._read)
        where = f"{_WHERE}.dataset, split {split!r}"
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
            raise ConfigError(
                f"{where}: {type(dataset).__name__} gives items in its own order; expected a data "
                "set with a length and items by number. Wrap it, or load it into a list."
            )
        with parsing(f"{where}: the length of {type(dataset).__name__}", advice=ADVICE):
            count = len(dataset)
        if not count:
            raise DataError(f"{where}: {type(dataset).__name__} holds no item. {ADVICE}")
        self._refuse_normalisation(dataset)
        self.label_names = self.label_names or class_names(dataset)
        return DatasetSource(
            dataset=dataset,
            modalities=self.modalities,
            reads={
                name: Reads(one.key, tuple(one.positions), one.stored_unit, one.optional)
                for name, one in self.described.items()
            },
            seed=self.seed,
            is_training=split == "train",
            keys=self.keys,
            window=self.window,
            sizes_read={name: modality.size for name, modality in self._read.items()},
            prefix=f"{split}_",
        )

    def _tell(self, problems: Any) -> None:
        """Keep and log what a data set says of itself, each text once."""
        if not isinstance(problems, list) or not all(isinstance(text, str) for text in problems):
            return  # another library's attribute of this name
        for text in problems:
            if text not in self._problems:
                self._problems.append(text)
                _log.warning("%s", text)

    def _leaks(self, datasets: Mapping[str, Any]) -> list[str]:
        """Say which items are in two splits, or twice in one, and which splits are one data set."""
        measured = {split: one for split, one in datasets.items() if split != "predict"}
        names, files = (
            {split: _texts(one, about) for split, one in measured.items()}
            for about in ("item_names", "item_files")
        )
        where = self.root or self.dataset.name
        problems = repeated(names, where, "items") + equal_files(files, where)
        for first, second in combinations(measured, 2):
            own = [self.dataset.splits.get(split) for split in (first, second)]
            is_built = self._given is None and self._module is None
            if measured[first] is measured[second] or (is_built and own[0] == own[1]):
                problems.append(
                    f"{self.dataset.name}: {first!r} and {second!r} are the same items, so what is "
                    "measured on them tells nothing of others; set data.init_args.dataset.splits"
                )
        return problems

    def _divided(self, source: DatasetSource) -> dict[str, DatasetSource]:
        """Hold out a part of the only data set there is, the same in every run."""
        count = len(source.dataset)
        order = np.random.default_rng(self.held_out.seed).permutation(count)
        many = min(max(1, round(count * self.held_out.val_fraction)), count - 1)
        if not many:
            raise DataError(f"{_WHERE}.held_out: one item cannot be divided; set val_fraction: 0.")
        parts = {"val": order[:many], "train": order[many:]}
        return {
            name: replace(source, numbers=sorted(map(int, part)), is_training=name == "train")
            for name, part in parts.items()
        }

    def _refuse_normalisation(self, dataset: Any) -> None:
        """Refuse transforms that normalise physical values.

        Raises:
            ConfigError: There is one.
        """
        units = {one.value_unit for one in self.described.values()} - {"arbitrary"}
        found = next((n for n in transforms_of(dataset) if _RESCALES.fullmatch(n)), None)
        if found is not None and units:
            raise ConfigError(
                f"{_WHERE}.dataset: the data set applies {found}, but batches hold raw values in "
                f"{', '.join(sorted(units))}; the backbone normalises. Leave it out of the "
                "transforms, or declare value_unit: arbitrary for what it returns."
            )

    @property
    def problems(self) -> list[str]:
        """What the data sets left out or found odd: the texts of their `problems`."""
        return list(self._problems)

    @property
    def num_classes(self) -> int | None:
        """Number of classes where the data set names them; known after setup."""
        return len(self.label_names) if self.label_names is not None else None

    def identity(self) -> dict[str, Any]:
        """Return the class, its arguments, the number of items and a hash of each first one."""
        known = set(self._counts) & set(self._sources)
        return {
            "format": "torch Dataset",
            "dataset": plain(self.dataset),
            "root": self.root,
            "items": dict(self._counts),
            "first": {split: _digest(self._sources[split]) for split in sorted(known)},
        }

    def describe(self) -> list[str]:
        """Return lines that tell what was found."""
        lines = [f"{self.dataset.name} at {self._root()}" if self.root else self.dataset.name]
        lines += [f"problem: {text}" for text in self.problems]
        for name, modality in self.modalities.items():
            read = self.described[name]
            places = f" {list(read.positions)}" if read.positions else ""
            lines.append(
                f"{name}: {read.key!r}{places} ({modality.value_unit}), {modality.num_channels} "
                f"channels {' '.join(modality.channels)} of {' x '.join(map(str, modality.size))}"
            )
        names = self.label_names
        lines.append(f"labels: {', '.join(names)}" if names else "labels: without names")
        return lines + super().describe()


def _texts(dataset: Any, about: str) -> list[str]:
    """Return the texts that a data set tells of its items, [] where it tells none."""
    found = getattr(dataset, about, None)
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        return []
    texts: list[str] = found
    return texts


def _stated(name: str) -> Any:
    """Return a data set class of this package, which states its modalities; None for others."""
    return imported(name) if name.startswith("domainssl.datamodules.") else None


def so2sat_class() -> DatasetClass:
    """Return what builds the embedded sample."""
    splits: Any = {"train": {"split": "train"}, "val": {"split": "validation"}}
    return DatasetClass(_SO2SAT, {"version": "2", "checksum": False}, splits)


def so2sat_modalities() -> dict[str, DatasetModality]:
    """Return what is read of So2Sat: the filtered intensities of Sentinel-1, and Sentinel-2."""
    from domainssl.datamodules.samples.so2sat import STATISTICS

    bands = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
    (s1_mean, s1_std), (s2_mean, s2_std) = STATISTICS["s1"], STATISTICS["s2"]
    return {
        "s1": DatasetModality(
            channels=("VV", "VH"), positions=(5, 4), value_unit="db", stored_unit="linear",
            size=(32, 32), gsd_m=10.0, mean=s1_mean, std=s1_std,
        ),
        "s2": DatasetModality(
            channels=bands, positions=tuple(range(8, 18)), value_unit="dn",
            stored_unit="reflectance", size=(32, 32), gsd_m=10.0, mean=s2_mean, std=s2_std,
        ),
    }  # fmt: skip


def _digest(source: Source) -> str:
    """Return a hash of the first item of a source."""
    assert isinstance(source, DatasetSource)
    try:
        first = replace(source, is_training=False).load(Piece(0, 0, 1), 0).data
    except DataError:
        return "unreadable"  # who trains on it says why, or takes another item
    code = hashlib.sha256()
    for name in source.modalities:
        code.update(np.asarray(first[name]).tobytes())
    return code.hexdigest()[:16]
