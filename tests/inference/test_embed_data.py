"""One vector per item that a DataModule reads."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from domainssl.backbones.card import export_backbone
from domainssl.backbones.vit import ViTBackbone
from domainssl.cli import main
from domainssl.datamodules import DatasetDataModule
from domainssl.errors import ConfigError, DataError
from domainssl.inference import data_rows
from domainssl.inference.data_rows import DataEmbedding
from domainssl.inference.dense import DenseOptions
from domainssl.inference.run import embed
from domainssl.loading.plan import Piece
from domainssl.loading.source import Loading, Rows
from domainssl.modality import Modality
from domainssl.pieces import Plan

geopandas = pytest.importorskip("geopandas")
S2 = Modality(
    name="s2", kind="image", channels=("B03", "B04"), value_unit="dn", size=(8, 8), gsd_m=10.0,
    mean=(900.0, 900.0), std=(300.0, 300.0),
)  # fmt: skip


@pytest.fixture
def backbone() -> ViTBackbone:
    torch.manual_seed(0)
    return ViTBackbone({"s2": S2}, {"width": 12, "depth": 1, "heads": 2}, 4).eval()


@dataclass
class Fields:
    """Three blocks, of which the second one cannot be read, and a bad item in the first."""

    is_sound: bool = False

    @property
    def sizes(self) -> list[int]:
        return [3, 1, 2]

    num_bytes = 1000

    def load(self, piece: Piece, epoch: int) -> Rows:
        if piece.block == 1 and not self.is_sound:
            raise DataError("/secret/b.tif: is damaged.")
        own = range(piece.block * 10, piece.block * 10 + piece.stop)
        values = torch.stack([torch.full((2, 8, 8), 800.0 + 100 * i) for i in own])
        geo = [
            {"crs": 32632, "a": 10.0, "b": 0.0, "c": 5e5, "d": 0.0, "e": -10.0, "f": 5e6}
            for _ in own
        ]
        data: dict[str, Any] = {
            "id": [f"field {i}" for i in own], "s2": values, "s2.geo": geo,
            "s2.valid": torch.ones(len(own), 8, 8, dtype=torch.bool),
            "s2.dates": torch.tensor([19_000 + i for i in own]),
            "label": torch.tensor([i % 3 - 1 for i in own]), "other": torch.zeros(len(own), 4),
        }  # fmt: skip
        data["s2.valid"][-1] = piece.block != 2
        bad = {} if self.is_sound or piece.block else {1: "/secret/a.tif: is damaged."}
        return Rows(data=data, count=len(own), bad=bad)


def work_of(backbone: ViTBackbone, target: Path, **more: Any) -> DataEmbedding:
    return DataEmbedding(
        target=target, feature="s2", backbone=backbone, options=DenseOptions(batch_size=2),
        modalities={"s2": S2}, classes=("wheat", "maize"), **{"source": Fields(), **more},
    )  # fmt: skip


def test_a_row_has_id_label_date_place_and_the_vector_of_its_item(
    backbone: ViTBackbone, tmp_path: Path
) -> None:
    work = work_of(backbone, tmp_path / "rows.parquet", source=Fields(is_sound=True))
    work.claim()
    for key in work.keys:
        work.make(key)
    table = geopandas.read_parquet(tmp_path / "rows.parquet")
    assert list(table["id"]) == [f"field {i}" for i in (0, 1, 2, 10, 20, 21)]
    labels = [name if isinstance(name, str) else None for name in table["label"]]
    assert labels == [None, "wheat", "maize", "wheat", "maize", None]
    assert table["date"][1] == str(np.datetime64(19_001, "D"))
    corner = table.to_crs(32632).geometry[0].bounds
    assert corner == pytest.approx((5e5, 5e6 - 80, 5e5 + 80, 5e6), abs=0.1)
    with torch.no_grad():
        wanted = backbone({"s2": torch.full((1, 2, 8, 8), 900.0)}).pooled["s2"][0]
    np.testing.assert_allclose(table["embedding"][1], wanted, atol=1e-5)
    assert np.isnan(table["embedding"][5]).all()  # nothing of it is valid


def test_bad_items_end_the_command_or_are_left_out_without_names_of_files(
    backbone: ViTBackbone, tmp_path: Path
) -> None:
    work = work_of(backbone, tmp_path / "rows.parquet")
    work.claim()
    with pytest.raises(DataError, match=r"a\.tif: is damaged\.$"):
        work.make("0")
    work.skip_bad = work.is_private = True
    work.make("0")
    table = geopandas.read_parquet(tmp_path / "rows.parquet")
    assert list(table["id"]) == ["field 0", "field 2", "field 20", "field 21"]
    assert set(work.left_out()) == {"item 1", "block 1"}
    written = (tmp_path / "rows.parquet.json").read_text()
    assert "secret" not in written and json.loads(written)["feature"] == "s2"


class Images(torch.utils.data.Dataset[Any]):
    """Six images of two classes."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": torch.full((2, 8, 8), 500.0 + 100 * index), "label": index % 2}


def data_of() -> DatasetDataModule:
    facts = {name: value for name, value in S2.to_dict().items() if value and name != "name"}
    return DatasetDataModule.of(
        {"train": Images(), "val": Images()}, modalities={"s2": facts}, global_batch_size=4
    )


def test_a_datamodule_is_embedded_as_a_path_is(backbone: ViTBackbone, tmp_path: Path) -> None:
    target = tmp_path / "val.parquet"
    done = embed(backbone, data_of(), target, split="val")
    assert done.outputs == [target] and (tmp_path / "val.parquet.png").is_file()
    again = embed(backbone, data_of(), target, split="val")
    assert again.resumed == again.pieces == done.pieces
    with pytest.raises(ConfigError, match="split: val then, train now|made from something else"):
        embed(backbone, data_of(), target, split="train")
    with pytest.raises(ConfigError, match="no 'odd' split"):
        embed(backbone, data_of(), tmp_path / "odd.parquet", split="odd")
    with pytest.raises(ConfigError, match="got a Images, expected a path or a DataModule"):
        embed(backbone, Images(), tmp_path / "odd.parquet")
    with pytest.raises(ConfigError, match="give a .parquet file"):
        embed(backbone, data_of(), tmp_path / "folder", plan=Plan(jobs=0))


def test_the_verb_takes_a_recipe_instead_of_a_path(tmp_path: Path, capsys: Any) -> None:
    torch.manual_seed(0)
    recipe = ["--config", "recipes/tiles_mae.yaml"]
    from domainssl.cli.run.train import build_data

    data = build_data(["--config=recipes/tiles_mae.yaml"])
    tiles = ViTBackbone(data.modalities, {"width": 12, "depth": 1, "heads": 2}, 8)
    export_backbone(tiles, tmp_path / "tiles")
    target = str(tmp_path / "tiles.parquet")
    assert main(["embed", str(tmp_path / "tiles"), *recipe, "--output", target]) == 0
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(target)
    data.prepare_data()
    data.setup("fit")
    assert table.num_rows == sum(data.source("val").sizes)
    assert set(table["label"].to_pylist()) <= set(data.classes or ()) | {None}
    words = ["embed", str(tmp_path / "tiles"), *recipe, "--output", target]
    assert main([*words, "--bands", "B02"]) == 2
    assert "embed --bands: is about files" in capsys.readouterr().err
    assert main([*words[:2], "--output", target]) == 2
    assert "embed: which data? Give a path, or --config" in capsys.readouterr().err


@pytest.mark.parametrize("first", [0, 1])
def test_workers_read_ahead_and_change_no_vector(
    backbone: ViTBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    monkeypatch.setattr(data_rows, "_GROUP", 3)  # parts: block 0, blocks 1 and 2
    tables = []
    for workers in (0, 2):
        work = work_of(
            backbone, tmp_path / f"{workers}.parquet", source=Fields(is_sound=True),
            loading=Loading(workers=workers, start_method="fork"), order=("0", "1"),
        )  # fmt: skip
        work.claim()
        for key in work.keys[first:]:  # the second call begins in the middle, as after a kill
            work.make(key)
        for key in work.keys[:first]:
            work.make(key)
        assert work._coming == []
        work.release()
        tables.append(geopandas.read_parquet(work.target))
    assert list(tables[0]["id"]) == list(tables[1]["id"]) and len(tables[0]) == 6
    np.testing.assert_array_equal(
        np.stack(tables[0]["embedding"]), np.stack(tables[1]["embedding"])
    )


@dataclass
class Ending(Fields):
    """Ends the process that reads it."""

    def load(self, piece: Piece, epoch: int) -> Rows:
        os._exit(3)


def test_the_end_of_a_worker_is_told_as_such(backbone: ViTBackbone, tmp_path: Path) -> None:
    loading = Loading(workers=1, start_method="fork")
    work = work_of(backbone, tmp_path / "a.parquet", source=Ending(), loading=loading, order=("0",))
    work.claim()
    with pytest.raises(DataError, match="worker process of the embedded data died while reading"):
        work.make("0")
    work.release()
