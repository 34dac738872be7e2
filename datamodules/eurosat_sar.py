"""EuroSAT-SAR: Sentinel-1 of the EuroSAT patches, with Sentinel-2 where EuroSAT lies beside.

data:
class_path: DatasetDataModule
init_args:
root: /data/eurosat_sar
dataset: {name: domainssl.datamodules.eurosat_sar.EuroSATSAR}
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from domainssl.datamodules.dataset import DatasetModality
from domainssl.errors import ConfigError, DataError, nearest
from domainssl.io.raster.patches import folders_in, measured_or_nan, read_patch
from domainssl.io.ssl4eo.facts import PRODUCTS
from domainssl.sensors import L1C_BANDS

__all__ = ["EuroSATPairs", "EuroSATSAR"]

_SIDE = 64
_SPLITS = ("train", "val", "test")
_FIFTH = {3: "val", 4: "test"}  # of the patches of a class, by their number
_STORED = (*L1C_BANDS[:8], "B09", "B10", "B11", "B12", "B8A")  # the order of EuroSAT
_NAME = re.compile(r"(\w+)_(\d+)\.tiff?")
_Patches = dict[str, dict[int, str]]  # file by class and number


class EuroSATSAR:
    """Patches of 640 m in ten classes: VV and VH, and 13 bands of L1C from EuroSAT.

    Classes without patches are told, and so are patches of one sensor alone, which are left out.
    There is no published split of the radar patches: of each class, three fifths are for training,
    one is held out and one is for tests, by the number in the file's name.

    Args:
        root: Folder with a folder per class, such as `AnnualCrop/AnnualCrop_1.tif`.
        split: `train`, `val` or `test`.
        optical: Folder of EuroSAT (MS) with the same names; None reads radar alone.

    Attributes:
        problems: What was left out or is missing.

    Raises:
        DataError: There is no folder of a class, no patch of the split, or none in both sensors.
    """

    classes: ClassVar[tuple[str, ...]] = (
        "AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture",
        "PermanentCrop", "Residential", "River", "SeaLake",
    )  # fmt: skip
    described: ClassVar[Mapping[str, DatasetModality]] = {
        "s1": DatasetModality(
            key="s1", channels=PRODUCTS["S1GRD"].bands, value_unit="db", size=(_SIDE, _SIDE),
            gsd_m=10.0, mean=PRODUCTS["S1GRD"].mean, std=PRODUCTS["S1GRD"].std,
        ),
    }  # fmt: skip

    def __init__(self, root: str, split: str = "train", optical: str | None = None) -> None:
        if split not in _SPLITS:
            raise ConfigError(
                f"EuroSATSAR: split {split!r} is not one of {', '.join(_SPLITS)}."
                f"{nearest(split, _SPLITS)}"
            )
        self.root, self.optical = root, optical
        found, self.problems = _patches(root, self.classes)
        if not found:
            raise DataError(
                f"{root}: none of the ten folders of classes, such as AnnualCrop/; it holds "
                f"{', '.join(folders_in(root)[:8]) or 'no folder'}."
            )
        if optical is not None:
            found = self._paired(found, optical)
        self._rows: list[tuple[str, str, int]] = [
            (name, own[n], self.classes.index(name))
            for name, own in found.items()
            for n in sorted(own)
            if _FIFTH.get(n % 5, "train") == split
        ]
        if not self._rows:
            raise DataError(f"{root}: no patch of the split {split!r}, such as AnnualCrop_1.tif.")

    def _paired(self, radar: Mapping[str, dict[int, str]], optical: str) -> _Patches:
        """Return the radar patches that have a partner of the same name, and tell of the others."""
        partners, odd = _patches(optical, self.classes)
        self.problems += odd
        ours, theirs = ({(c, f) for c, own in side.items() for f in own.values()}
                        for side in (radar, partners))  # fmt: skip
        if not ours & theirs:
            named = [os.path.join(*min(names)) if names else "nothing" for names in (ours, theirs)]
            raise DataError(
                f"{optical}: no patch has the name of one in {self.root}; it holds {named[1]}, "
                f"that of the radar {named[0]}. Expected the folder of EuroSAT (MS), with the same "
                "folders and names."
            )
        for place, lone in ((self.root, ours - theirs), (optical, theirs - ours)):
            if lone:
                self.problems.append(
                    f"{place}: {len(lone)} patches without a partner are left out, such as "
                    f"{os.path.join(*min(lone))}"
                )
        return {
            name: {n: file for n, file in own.items() if (name, file) in theirs}
            for name, own in radar.items()
        }

    @property
    def targets(self) -> list[int]:
        """Class of each patch."""
        return [number for _, _, number in self._rows]

    @property
    def item_names(self) -> list[str]:
        """What the patches are called."""
        return [os.path.splitext(file)[0] for _, file, _ in self._rows]

    @property
    def item_files(self) -> list[str]:
        """The radar image of each patch."""
        return [os.path.join(self.root, folder, file) for folder, file, _ in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `s1`, `s2` where there is EuroSAT, `label` and `id` of a patch."""
        folder, file, label = self._rows[index]
        radar = read_patch(os.path.join(self.root, folder, file), 2, _SIDE, "db")
        item: dict[str, Any] = {
            "id": os.path.splitext(file)[0],
            "s1": measured_or_nan(radar, "db"),
            "label": label,
        }
        if self.optical is not None:
            path = os.path.join(self.optical, folder, file)
            values = read_patch(path, len(_STORED), _SIDE, "dn")
            order = [_STORED.index(band) for band in L1C_BANDS]
            item["s2"] = measured_or_nan(values[order], "dn")
        return item


class EuroSATPairs(EuroSATSAR):
    """Patches of EuroSAT-SAR with those of EuroSAT; `optical` names the folder of the latter."""

    described: ClassVar[Mapping[str, DatasetModality]] = {
        **EuroSATSAR.described,
        "s2": DatasetModality(
            key="s2", channels=L1C_BANDS, value_unit="dn", size=(_SIDE, _SIDE), gsd_m=10.0,
            mean=PRODUCTS["S2L1C"].mean, std=PRODUCTS["S2L1C"].std,
            wavelengths_nm=PRODUCTS["S2L1C"].wavelengths_nm,
        ),
    }  # fmt: skip

    def __init__(self, root: str, optical: str, split: str = "train") -> None:
        super().__init__(root, split, optical)


def _patches(root: str, classes: Sequence[str]) -> tuple[_Patches, list[str]]:
    """Return the patches of the classes whose folders are there, and which are missing."""
    folders = folders_in(root)
    found: _Patches = {}
    problems = []
    for name in classes:
        alike = [folder for folder in folders if folder.lower() == name.lower()]
        if name in folders:
            found[name] = {
                int(match[2]): file
                for file in os.listdir(os.path.join(root, name))
                if (match := _NAME.fullmatch(file)) and match[1] == name
            }
            if not found[name]:
                problems.append(
                    f"{os.path.join(root, name)}: no patch such as {name}_1.tif, so the class has "
                    "none"
                )
        elif alike:
            problems.append(
                f"{os.path.join(root, alike[0])}: not read, the class is called {name}; rename the "
                "folder and its files"
            )
        else:
            problems.append(f"{root}: no folder {name}/, so the class has no patches")
    return found, problems
