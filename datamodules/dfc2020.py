"""DFC2020 (as SEN12MS): Sentinel-1, Sentinel-2 and land cover of ten metre, as a torch data set.

data:
class_path: DatasetDataModule
init_args:
root: /data/dfc2020
dataset: {name: domainssl.datamodules.dfc2020.DFC2020}
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from domainssl.datamodules.dataset import DatasetModality
from domainssl.errors import ConfigError, DataError, nearest
from domainssl.io.raster.patches import measured_or_nan, read_map, read_patch
from domainssl.io.ssl4eo.facts import PRODUCTS

__all__ = ["DFC2020"]

_SIDE = 256
# the larger part is trained on, as most papers do
_FOLDERS = {"train": "ROIs0000_test", "val": "ROIs0000_validation"}
_NUMBERS = {1: 0, 2: 1, 4: 2, 5: 3, 6: 4, 7: 5, 9: 6, 10: 7}  # 3 savanna and 8 snow: no class


class DFC2020:
    """Patches of 2560 m: VV and VH, 13 bands of L1C, and one of eight classes per pixel.

    Items hold `mask` (-1 where there is no class) and `label`, the class of most pixels.

    Args:
        root: Folder with `ROIs0000_test/` and `ROIs0000_validation/`, which hold `s1_0/`, `s2_0/`
            and `dfc_0/`.
        split: `train` (`ROIs0000_test`, 5,128 patches) or `val` (`ROIs0000_validation`, 986).

    Raises:
        DataError: The folder of the split is missing or empty.
    """

    classes: ClassVar[tuple[str, ...]] = (
        "forest", "shrubland", "grassland", "wetlands", "croplands", "urban", "barren", "water",
    )  # fmt: skip
    described: ClassVar[Mapping[str, DatasetModality]] = {
        key: DatasetModality(
            key=key, channels=PRODUCTS[name].bands, value_unit=PRODUCTS[name].value_unit,
            size=(_SIDE, _SIDE), gsd_m=10.0, mean=PRODUCTS[name].mean, std=PRODUCTS[name].std,
            wavelengths_nm=PRODUCTS[name].wavelengths_nm,
        )
        for key, name in (("s1", "S1GRD"), ("s2", "S2L1C"))
    }  # fmt: skip

    def __init__(self, root: str, split: str = "train") -> None:
        if split not in _FOLDERS:
            raise ConfigError(
                f"DFC2020: split {split!r} is not one of {', '.join(_FOLDERS)}."
                f"{nearest(split, _FOLDERS)}"
            )
        self.folder = os.path.join(root, _FOLDERS[split])
        radar = os.path.join(self.folder, "s1_0")
        pattern = re.compile(rf"{_FOLDERS[split]}_s1_0_p(\d+)\.tif")
        names = os.listdir(radar) if os.path.isdir(radar) else []
        numbers = sorted(int(match[1]) for name in names if (match := pattern.fullmatch(name)))
        self._stems = [f"{_FOLDERS[split]}_{{}}_0_p{number}" for number in numbers]
        if not self._stems:
            raise DataError(
                f"{radar}: no patch such as {_FOLDERS[split]}_s1_0_p0.tif; expected the folder of "
                "DFC2020 with ROIs0000_test/ and ROIs0000_validation/."
            )

    @property
    def item_names(self) -> list[str]:
        """What the patches are called."""
        return [stem.format("s1") for stem in self._stems]

    @property
    def item_files(self) -> list[str]:
        """The radar image of each patch."""
        return [self._path(index, "s1") for index in range(len(self))]

    def _path(self, index: int, kind: str) -> str:
        return os.path.join(self.folder, f"{kind}_0", f"{self._stems[index].format(kind)}.tif")

    def __len__(self) -> int:
        return len(self._stems)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `s1`, `s2`, `mask`, `label` and `id` of a patch."""

        def read(kind: str, bands: int, unit: str) -> np.ndarray[Any, Any]:
            return read_patch(self._path(index, kind), bands, _SIDE, unit)

        path = self._path(index, "dfc")
        stored = read_map(path, _SIDE)
        if (odd := stored[(stored < 0) | (stored > 10)]).size:
            raise DataError(f"{path}: holds the class {odd[0]}, expected 1 to 10.")
        mask = np.full(stored.shape, -1, np.int64)
        for number, position in _NUMBERS.items():
            mask[stored == number] = position
        counts = np.bincount(mask[mask >= 0], minlength=len(self.classes))
        return {
            "id": self._stems[index].format("s1"),
            "s1": measured_or_nan(read("s1", 2, "db"), "db"),
            "s2": measured_or_nan(read("s2", 13, "dn"), "dn"),
            "mask": mask,
            "label": int(counts.argmax()) if counts.any() else -1,
        }
