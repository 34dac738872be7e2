"""Opening many files: what is read once, and what is looked at again when it changes."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from cube_files import coded, write_cube

from domainssl.io.raster.bands import describe_zarr, open_store
from domainssl.io.raster.zarr import Cube
from domainssl.io.storage import handles
from domainssl.io.storage.handles import names_in

BANDS = ["B02", "B03", "B04", "B08"]


def test_coordinates_are_read_once_for_all_bands_of_a_grid(tmp_path, monkeypatch):
    path = write_cube(tmp_path / "a.zarr", coded(4, 4, 64), BANDS, as_variables=True)
    reads: Counter[str] = Counter()
    read = Cube.read

    def counted(self: Cube, name: str, *args, **options):
        reads[name] += 1
        return read(self, name, *args, **options)

    monkeypatch.setattr(Cube, "read", counted)
    bands = describe_zarr(str(path), BANDS).bands
    assert reads == {"x": 1, "y": 1, "time": 1}
    assert all(band.grid is bands[0].grid for band in bands)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_metadata_are_found_without_looking_below_arrays(tmp_path, monkeypatch, zarr_format):
    path = write_cube(
        tmp_path / "a.zarr", coded(4, 4, 64), BANDS, as_variables=True, zarr_format=zarr_format,
        group="measurements",
    )  # fmt: skip
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: listed.append(folder) or scandir(folder))
    arrays = open_store(str(path)).arrays
    assert {f"measurements/{band}" for band in BANDS} <= set(arrays)
    assert {Path(folder).name for folder in listed} <= {"a.zarr", "measurements"}


def test_a_folder_is_listed_anew_as_soon_as_it_may_have_changed(tmp_path, monkeypatch):
    (tmp_path / "A.tif").touch()
    assert names_in(str(tmp_path)) == {"a.tif": "A.tif"}
    (tmp_path / "A.tif.MSK").touch()
    assert names_in(str(tmp_path))["a.tif.msk"] == "A.tif.MSK"

    monkeypatch.setattr(handles, "is_settled", lambda facts, now: True)
    listed = []
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: listed.append(folder) or listdir(folder))
    assert names_in(str(tmp_path)) is names_in(str(tmp_path))
    assert len(listed) == 1
    os.utime(tmp_path, ns=(0, 10**18))
    assert len(names_in(str(tmp_path))) == 2
    assert len(listed) == 2
