"""BigEarthNet v2 (reBEN): Sentinel-1 and Sentinel-2 patches with 19 classes, as a torch data set.

data:
class_path: DatasetDataModule
init_args:
root: /data/bigearthnet
dataset: {name: domainssl.datamodules.bigearthnet.BigEarthNetV2}
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from domainssl.datamodules.dataset import DatasetModality
from domainssl.errors import ConfigError, DataError, nearest, parsing, require
from domainssl.io.raster.patches import folders_in, measured_or_nan, read_map, read_patch, repeated
from domainssl.io.ssl4eo.facts import PRODUCTS

__all__ = ["BigEarthNetV2"]

_SIDE = 120
_NATIVE = dict.fromkeys(("B02", "B03", "B04", "B08"), 120) | dict.fromkeys(("B01", "B09"), 20)
_SPLITS = {"train": "train", "val": "validation", "test": "test"}
_MAP = "Reference_Maps"
_LEAST_CODE = 111
# class of each code of CORINE Land Cover; others, such as mines and roads, are of no class
_CODES = (
    (111, 112), (121,), (211, 212, 213), (221, 222, 223, 241), (231,), (242,), (243,), (244,),
    (311,), (312,), (313,), (321, 333), (322, 323), (324,), (331,), (411, 412), (421, 422),
    (511, 512), (521, 522, 523),
)  # fmt: skip


_Row = tuple[str, str, tuple[int, ...]]  # patch, its radar, numbers of its classes


class BigEarthNetV2:
    """Patches of 1200 m: 12 bands of Sentinel-2 L2A, VV and VH of Sentinel-1, classes present.

    Bands of 20 and 60 m are repeated to 10 m. Items hold `label` (0 and 1 per class) and, where the
    reference maps lie beside, `mask`.

    Args:
        root: Folder with `metadata.parquet`, `BigEarthNet-S2/` and `BigEarthNet-S1/`.
        split: `train`, `val` or `test`, as the table says.
        clear_only: Leave out patches with seasonal snow, clouds or shadow.

    Raises:
        DataError: The table is missing, cannot be read, or names no patch of the split.
    """

    classes: ClassVar[tuple[str, ...]] = (
        "Urban fabric", "Industrial or commercial units", "Arable land", "Permanent crops",
        "Pastures", "Complex cultivation patterns",
        "Land principally occupied by agriculture, with significant areas of natural vegetation",
        "Agro-forestry areas", "Broad-leaved forest", "Coniferous forest", "Mixed forest",
        "Natural grassland and sparsely vegetated areas",
        "Moors, heathland and sclerophyllous vegetation", "Transitional woodland, shrub",
        "Beaches, dunes, sands", "Inland wetlands", "Coastal wetlands", "Inland waters",
        "Marine waters",
    )  # fmt: skip
    described: ClassVar[Mapping[str, DatasetModality]] = {
        key: DatasetModality(
            key=key, channels=PRODUCTS[name].bands, value_unit=PRODUCTS[name].value_unit,
            size=(_SIDE, _SIDE), gsd_m=10.0, mean=PRODUCTS[name].mean, std=PRODUCTS[name].std,
            wavelengths_nm=PRODUCTS[name].wavelengths_nm,
        )
        for key, name in (("s1", "S1GRD"), ("s2", "S2L2A"))
    }  # fmt: skip

    def __init__(self, root: str, split: str = "train", clear_only: bool = False) -> None:
        if split not in _SPLITS:
            raise ConfigError(
                f"BigEarthNetV2: split {split!r} is not one of {', '.join(_SPLITS)}."
                f"{nearest(split, _SPLITS)}"
            )
        self.root = root
        columns = ["patch_id", "labels", "split", "s1_name"]
        flags = ["contains_seasonal_snow", "contains_cloud_or_shadow"] if clear_only else []
        path = os.path.join(root, "metadata.parquet")
        parquet = require("pyarrow.parquet", "geo")
        if not os.path.isfile(path):
            raise DataError(
                f"{root}: no metadata.parquet; expected the folder of BigEarthNet v2 with it, "
                "BigEarthNet-S2/ and BigEarthNet-S1/."
            )
        with parsing(f"{path}: the table"):
            table = parquet.read_table(path, columns=[*columns, *flags]).to_pydict()
        rows = zip(*(table[name] for name in columns), *(table[f] for f in flags), strict=True)
        numbers = {name: number for number, name in enumerate(self.classes)}
        self._rows: list[_Row] = []
        for patch, labels, part, radar, *hidden in rows:
            if part != _SPLITS[split] or any(hidden):
                continue
            if not isinstance(labels, list) or not all(map(_is_name, (patch, radar))):
                raise DataError(
                    f"{path}: a row of patch_id {patch!r:.80}, s1_name {radar!r:.80} and labels "
                    f"{labels!r:.80}; expected two names of folders and a list of classes."
                )
            if odd := [name for name in labels if name not in numbers]:
                raise DataError(f"{path}: patch {patch} has the class {odd[0]!r}, none of the 19.")
            self._rows.append((str(patch), str(radar), tuple(numbers[name] for name in labels)))
        if not self._rows:
            there = sorted({str(part) for part in table["split"]})
            others = "" if _SPLITS[split] in there else f" It has {', '.join(there[:5]) or 'none'}."
            raise DataError(f"{path}: names no patch of the split {_SPLITS[split]!r}.{others}")
        self._must_be_there("BigEarthNet-S2", lambda row: (_tile(row[0]), row[0]), path)
        self._must_be_there("BigEarthNet-S1", lambda row: (_scene(row[1]), row[1]), path)

    def _must_be_there(
        self, folder: str, place: Callable[[_Row], tuple[str, str]], path: str
    ) -> None:
        """Refuse a table of which no patch has a folder; the first one that has ends the look."""
        base = os.path.join(self.root, folder)
        if any(os.path.isdir(os.path.join(base, *place(row))) for row in self._rows):
            return
        inside = [os.path.join(n, m) for n in folders_in(base)[:1]
                  for m in folders_in(os.path.join(base, n))[:2]]  # fmt: skip
        raise DataError(
            f"{path}: none of its {len(self._rows)} patches of the split is in {base}: it names "
            f"{os.path.join(*place(self._rows[0]))}, there is {', '.join(inside) or 'nothing'}. "
            f"Unpack {folder} there, of the release that the table is of."
        )

    @property
    def item_names(self) -> list[str]:
        """What the patches are called."""
        return [patch for patch, _, _ in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `s1`, `s2`, `label`, `mask` where it is there, and `id` of a patch."""
        patch, radar, labels = self._rows[index]
        tile, scene = _tile(patch), _scene(radar)
        folder = os.path.join(self.root, "BigEarthNet-S2", tile, patch)
        bands = [
            repeated(read_patch(os.path.join(folder, f"{patch}_{band}.tif"), 1,
                                _NATIVE.get(band, 60), "dn"), _SIDE)
            for band in PRODUCTS["S2L2A"].bands
        ]  # fmt: skip
        folder = os.path.join(self.root, "BigEarthNet-S1", scene, radar)
        echoes = [
            read_patch(os.path.join(folder, f"{radar}_{band}.tif"), 1, _SIDE, "db")
            for band in PRODUCTS["S1GRD"].bands
        ]
        label = np.zeros(len(self.classes), np.int64)
        label[list(labels)] = 1
        item: dict[str, Any] = {
            "id": patch,
            "s1": measured_or_nan(np.concatenate(echoes), "db"),
            "s2": measured_or_nan(np.concatenate(bands), "dn"),
            "label": label,
        }
        path = os.path.join(self.root, _MAP, tile, patch, f"{patch}_reference_map.tif")
        if os.path.isdir(os.path.join(self.root, _MAP)):
            item["mask"] = _classes(read_map(path, _SIDE), path)
        return item


def _tile(patch: str) -> str:
    return patch.rsplit("_", 2)[0]


def _scene(radar: str) -> str:
    return radar.rsplit("_", 3)[0]


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value == os.path.basename(value) and value.strip(".") != ""


def _classes(codes: np.ndarray[Any, Any], path: str) -> np.ndarray[Any, Any]:
    """Return the class of each code (H, W), -1 where it is of none.

    Raises:
        DataError: A number is no code of CORINE Land Cover.
    """
    odd = codes[(codes != 0) & (codes < _LEAST_CODE)]  # above stand codes, and 999 for none
    if odd.size:
        raise DataError(
            f"{path}: holds {odd[0]}, which is no code of CORINE Land Cover; expected codes of "
            "three digits, such as 111 and 523, not numbers of classes."
        )
    out = np.full(codes.shape, -1, np.int64)
    for number, group in enumerate(_CODES):
        out[np.isin(codes, group)] = number
    return out
