"""What the sources of a DataModule say: described, listed as problems, and measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from domainssl.datamodules.base import DomainDataModule
from domainssl.inspection.data import inspect_data, subject_of
from domainssl.inspection.recognise import inspect_path, recognise
from domainssl.inspection.statistics import Plan, measure
from domainssl.loading.plan import Piece
from domainssl.loading.source import Rows
from domainssl.modality import Modality
from domainssl.pieces import Shard


@dataclass
class _Source:
    """Blocks of four items: an image with cloud, a series with padding, and nothing but holes."""

    sizes: tuple[int, ...] = (4, 4, 3)
    num_bytes: int = 3000

    def load(self, piece: Piece, epoch: int) -> Rows:
        rng = np.random.default_rng([piece.block, epoch])
        n = len(piece)
        present = np.array([True, False, True, True])[:n]
        frames = np.array([[True, True], [True, False]] * 2)[:n]
        data: dict[str, Any] = {
            "s2": torch.from_numpy(rng.integers(1, 5000, (n, 2, 8, 8)).astype(np.int16)),
            "s2.valid": torch.from_numpy(rng.random((n, 8, 8)) < 0.3),
            "s2.present": present,
            "s2.dates": np.array([18_000, 0, 18_100, 18_200], np.int32)[:n],
            "heat": torch.from_numpy(rng.normal(300, 9, (n, 2, 1, 4, 4)).astype(np.float32)),
            "heat.frames": frames,
            "dem": torch.zeros(n, 1, 8, 8),
            "dem.valid": torch.zeros(n, 8, 8, dtype=torch.bool),
            "dem.dates": np.zeros(n, np.int32),
        }
        return Rows(data=data, count=n)


class _Data(DomainDataModule):
    root = "/data"
    timeless = ("dem",)

    @property
    def modalities(self) -> dict[str, Modality]:
        size = (8, 8)
        return {
            "s2": Modality(
                name="s2", kind="image", channels=("B02", "B03"), value_unit="dn", size=size
            ),
            "heat": Modality(
                name="heat", kind="series", channels=("T",), value_unit="arbitrary", size=(4, 4)
            ),
            "dem": Modality(
                name="dem", kind="image", channels=("height",), value_unit="arbitrary", size=size
            ),
        }

    def open_sources(self) -> dict[str, Any]:
        return {"train": _Source()}

    def identity(self) -> dict[str, Any]:
        return {"made": 1}

    @property
    def problems(self) -> list[str]:
        return ["site b has no partner"]


@pytest.fixture
def data() -> _Data:
    found = _Data(global_batch_size=4)
    found.setup("fit")
    return found


def test_statistics_of_any_source_are_those_of_its_valid_pixels(
    data: _Data, tmp_path: Path
) -> None:
    subject = subject_of(data, "train")
    subject.described = {n: m for n, m in data.modalities.items() if n != "dem"}
    measure(subject, tmp_path / "stats.yaml", Plan(jobs=0))
    report = yaml.safe_load((tmp_path / "stats.yaml").read_text())
    assert report["data"]["root"] == "/data" and report["data"]["split"] == "train"
    rows = [_Source().load(Piece(i, 0, n), 0).data for i, n in enumerate(_Source().sizes)]
    kept = [r["s2"].numpy().swapaxes(0, 1)[:, r["s2.valid"].numpy()
            & r["s2.present"][:, None, None]] for r in rows]  # fmt: skip
    values = np.concatenate(kept, axis=1)
    entry = report["modalities"]["s2"]
    np.testing.assert_allclose(entry["mean"], values.mean(1), rtol=1e-12)
    np.testing.assert_allclose(entry["std"], values.std(1), rtol=1e-12)
    assert entry["valid_pixels"] == values.shape[1] and entry["pixels"] == 11 * 64
    heat = np.concatenate([r["heat"].numpy()[r["heat.frames"]].ravel() for r in rows])
    found = report["modalities"]["heat"]
    np.testing.assert_allclose(found["mean"], [heat.mean(dtype=float)], rtol=1e-12)
    assert found["min"] == [heat.min()] and found["max"] == [heat.max()]
    exact = np.percentile(heat, 50, method="inverted_cdf")
    assert found["percentiles"]["50"][0] == pytest.approx(exact, rel=1e-3)


def test_small_blocks_are_measured_in_pieces_and_shards_give_one_file(
    data: _Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("domainssl.inspection.items._PIECE_BYTES", 2000)
    subject = subject_of(data, "train")
    subject.described = {"s2": data.modalities["s2"]}
    assert subject.keys == ["blocks 0 to 1", "blocks 2 to 2"]
    measure(subject, tmp_path / "one.yaml", Plan(jobs=0))
    for number in (2, 1):
        measure(subject, tmp_path / "two.yaml", Plan(jobs=0, shard=Shard(number, 2)))
    assert (tmp_path / "one.yaml").read_bytes() == (tmp_path / "two.yaml").read_bytes()


def test_whatever_is_missing_or_odd_is_listed(data: _Data) -> None:
    report = inspect_data(data)
    text = "\n".join(report["problems"])
    assert "site b has no partner" in text
    assert "train: dem: not one pixel of 11 items is valid" in text
    assert "train: s2: 3 of 11 acquisitions have no known date" in text
    assert "dem: 11 of 11 acquisitions" not in text  # terrain has no date to miss
    assert "of the pixels are not valid" in text
    notes = "\n".join(report["notes"])  # no fault of the data
    assert "train: s2: 27% of the items lack it" in notes
    assert "nothing is held out" in notes
    found = report["splits"]["train"]
    assert found["items"] == 11 and found["items_looked_at"] == 11
    assert found["modalities"]["s2"]["dates"] == ["2019-04-14", "2019-10-31"]
    assert found["modalities"]["heat"]["statistics"].startswith("not known")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("train.csv", "aerial/a.tif", "sentinel-ts/b.h5"), "treesatai"),
        (("test_filenames.lst", "aerial/a.tif", "sentinel/b.h5"), "treesatai"),
        (("metadata.geojson", "DATA_S2/S2_1.npy"), "pastis"),
        (("s1/a.tif", "s2/a.tif"), "cubes"),
        (("thermal/a.tif", "dem/a.tif"), "layers"),
        (("a.tif", "b.tif"), "geotiff"),
    ],
)
def test_roots_are_recognised_by_their_layout(
    names: tuple[str, ...], expected: str, tmp_path: Path
) -> None:
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    assert recognise(str(tmp_path))[0].name == expected


def test_an_incomplete_treesatai_folder_is_no_longer_without_problems(tmp_path: Path) -> None:
    for folder in ("aerial", "sentinel-ts"):
        (tmp_path / folder).mkdir()
    (tmp_path / "train.csv").write_text(
        "aerial_name,sen_name,aerial_date,Abies\na.tif,a.h5,20200101,1\n"
    )
    report = inspect_path(str(tmp_path))
    assert report["kind"] == "data" and report["data"] == "TreeSatAIDataModule"
    assert "1 of 1 tiles have no file in 'aerial/'" in " ".join(report["problems"])
