"""Runs and `inspect` tell where nothing says whether Sentinel-2 numbers carry the offset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cube_files import LEFT, TIMES, coded, write_cube, write_geotiff

from domainssl.datamodules.cubes import SentinelCubeDataModule
from domainssl.inspection.files import inspect_geotiffs
from domainssl.inspection.layers import inspect_layers
from domainssl.io.raster.bands import open_store
from domainssl.sources.cube_options import Layer
from domainssl.sources.held_out import HeldOut
from domainssl.sources.windows import Window

BANDS = ("B02", "B03", "B04")


def problems(root: Path, **options: Any) -> list[str]:
    data = SentinelCubeDataModule(
        root=str(root),
        modalities={"s2": Layer(bands=BANDS, **options)},
        global_batch_size=2,
        window=Window(size=320, unit="m"),
        held_out=HeldOut(val_fraction=0.0),
    )
    data.setup("fit")
    return data.problems


def test_a_run_tells_numbers_that_may_carry_the_offset(tmp_path: Path) -> None:
    for site in range(3):
        values = coded(4, 3, 64).astype(np.uint16) + 1000
        place = LEFT + 10_000 * site
        write_cube(tmp_path / "s2" / f"{site}.zarr", values, BANDS, times=TIMES, left=place)
    [text] = problems(tmp_path)
    assert "offset of +1000" in text and "0.zarr" in text
    assert "Set data.init_args.modalities.s2.stored_unit to dn" in text and "as dn." in text
    for unit in ("dn", "dn+1000"):
        assert problems(tmp_path, stored_unit=unit) == []
    late = TIMES + np.timedelta64(600, "D")  # of which nothing before says anything
    dark = coded(4, 3, 64).astype(np.uint16)
    write_cube(tmp_path / "s2" / "3.zarr", dark, BANDS, times=TIMES, left=LEFT - 10_000)
    assert problems(tmp_path) == []
    write_cube(tmp_path / "s2" / "4.zarr", dark + 1000, BANDS, times=late, left=LEFT - 20_000)
    [text] = problems(tmp_path)
    assert f"numbers of {str(late[0])[:10]}" in text


def test_a_run_tells_late_baselines_without_their_offset(tmp_path: Path) -> None:
    name = "S2A_MSIL2A_20230508T100041_N0509_R122_T32TQM_20230508T122613.tif"
    values = coded(1, 3, 64)[0].astype(np.uint16)
    path = write_geotiff(tmp_path / "s2" / name, values, BANDS)
    [text] = problems(tmp_path)
    assert "baseline 05.09" in text and "stored_unit to dn+1000 (still in)" in text
    [note] = inspect_geotiffs([str(path)])["notes"]
    assert "baseline 05.09" in note and "--stored_unit of embed and predict" in note


@pytest.mark.parametrize("added", [0, 1000])
def test_inspect_tells_it_of_files_and_stores(tmp_path: Path, added: int) -> None:
    values = coded(1, 3, 64).astype(np.uint16) + added
    tiff = write_geotiff(tmp_path / "a.tif", values[0], BANDS)
    store = write_cube(tmp_path / "a.zarr", values, BANDS, times=TIMES[:1])
    for report in (inspect_geotiffs([str(tiff)]), inspect_layers(open_store(str(store)))):
        assert report["problems"] == []
        assert len(report["notes"]) == (1 if added else 0)
        assert all("offset of +1000" in note for note in report["notes"])
