"""Damage drawn from a seed: whatever a reader meets, the error is ours and names the file."""

from __future__ import annotations

import json
import random
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from domainssl import load_backbone
from domainssl.backbones.card import export_backbone
from domainssl.backbones.croma import CROMABackbone
from domainssl.errors import DomainSSLError
from domainssl.inspection.recognise import inspect_path
from domainssl.io.raster.zarr import open_cube
from domainssl.io.ssl4eo.labels import labels
from domainssl.modality import Modality

pytestmark = pytest.mark.slow
TRIES = 150


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Return bytes that are flipped, cut, doubled or overwritten somewhere."""
    raw = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 4, 32))):
        at = draw.randrange(len(raw) + 1)
        kind = draw.randrange(5)
        if kind == 0 and at < len(raw):
            raw[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del raw[at:]
        elif kind == 2:
            raw[at:at] = raw[: draw.randrange(64)]
        elif kind == 3:
            raw[at : at + 4] = draw.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"))
        else:
            del raw[at : at + draw.randrange(16)]
        if not raw:
            break
    return bytes(raw)


ODD: tuple[Any, ...] = (
    None,
    -1,
    0,
    2**63,
    10**30,
    1.5,
    "x",
    "",
    [],
    {},
    [[]],
    True,
    "\x1b",
    ["a"] * 40,
)


def twisted(tree: Any, draw: random.Random) -> Any:
    """Return JSON data of which one value is another, or missing."""
    if isinstance(tree, dict) and tree and draw.random() < 0.8:
        key = draw.choice(sorted(tree))
        rest = {k: v for k, v in tree.items() if k != key}
        return rest if draw.random() < 0.2 else {**rest, key: twisted(tree[key], draw)}
    if isinstance(tree, list) and tree and draw.random() < 0.7:
        at = draw.randrange(len(tree))
        return [*tree[:at], twisted(tree[at], draw), *tree[at + 1 :]]
    return draw.choice(ODD)


def survives(read: Callable[[], Any], name: str, what: object) -> None:
    try:
        read()
    except DomainSSLError as error:
        assert name in str(error), f"{what}: {error}"
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


def write_cube(path: Path, zarr_format: int) -> None:
    import zarr

    group = zarr.open_group(str(path), mode="w", zarr_format=zarr_format)  # type: ignore[arg-type]
    sizes = {"sample": 2, "time": 2, "band": 2, "y": 8, "x": 8}
    names: dict[str, Any] = {"dimension_names": list(sizes)} if zarr_format == 3 else {}
    bands = group.create_array(
        "bands", shape=tuple(sizes.values()), chunks=(1, 1, 2, 8, 8), dtype="int16", **names
    )
    bands[...] = np.arange(bands.size).reshape(bands.shape)
    bands.attrs.update({"scale_factor": 0.1, "_ARRAY_DIMENSIONS": list(sizes), "units": "1"})
    for axis in ("y", "x"):
        made = group.create_array(axis, shape=(8,), chunks=(8,), dtype="float64",
                                  **({"dimension_names": [axis]} if names else {}))  # fmt: skip
        made[...] = np.arange(8) * 10.0
        made.attrs.update({"_ARRAY_DIMENSIONS": [axis]})


def read_all(path: Path) -> None:
    cube = open_cube(path.read_bytes() if path.is_file() else str(path), path.name)
    for name in cube.arrays:
        cube.read(name)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("kind", ["bytes", "metadata"])
def test_damaged_cubes(tmp_path, zarr_format, kind):
    write_cube(tmp_path / "whole", zarr_format)
    files = {
        path.relative_to(tmp_path / "whole").as_posix(): path.read_bytes()
        for path in sorted((tmp_path / "whole").rglob("*"))
        if path.is_file()
    }
    texts = [name for name in files if name.rsplit("/", 1)[-1].startswith((".z", "zarr.json"))]
    for seed in range(TRIES):
        draw = random.Random(seed)
        path = tmp_path / f"odd{seed}.zarr.zip"
        changed = dict(files)
        if kind == "metadata":
            name = draw.choice(texts)
            changed[name] = json.dumps(twisted(json.loads(files[name]), draw)).encode()
        elif draw.random() < 0.5:
            name = draw.choice(sorted(files))
            changed[name] = damaged(files[name], draw)
        with zipfile.ZipFile(path, "w") as file:
            for name, content in changed.items():
                file.writestr(name, content)
        if changed == files:
            path.write_bytes(damaged(path.read_bytes(), draw))
        survives(lambda path=path: read_all(path), path.name, seed)  # type: ignore[misc]
        survives(lambda path=path: inspect_path(str(path)), path.name, seed)  # type: ignore[misc]
        path.unlink()


def test_damaged_geotiffs(tmp_path):
    import rasterio
    from rasterio.transform import from_origin

    with rasterio.open(
        tmp_path / "whole.tif", "w", driver="GTiff", height=64, width=64, count=2, dtype="uint16",
        crs="EPSG:32632", transform=from_origin(0, 0, 10, 10), tiled=True, blockxsize=16,
        blockysize=16, compress="deflate",
    ) as file:  # fmt: skip
        file.write(np.arange(2 * 64 * 64, dtype=np.uint16).reshape(2, 64, 64))
    whole = (tmp_path / "whole.tif").read_bytes()
    for seed in range(TRIES):
        path = tmp_path / f"odd{seed}.tif"
        path.write_bytes(damaged(whole, random.Random(seed)))
        survives(lambda path=path: inspect_path(str(path)), path.name, seed)  # type: ignore[misc]
        path.unlink()


def test_damaged_cards_and_tensors(tmp_path):
    facts = {"kind": "image", "channels": ("VV", "VH"), "value_unit": "db", "size": (16, 16),
             "gsd_m": 10.0, "mean": (-12.0, -19.0), "std": (5.0, 6.0)}  # fmt: skip
    both = {name: Modality(name=name, **facts) for name in ("s1", "s2")}  # type: ignore[arg-type]
    export_backbone(CROMABackbone(both, width=32, depth=2, heads=2), tmp_path)
    card, tensors = tmp_path / "backbone.json", tmp_path / "backbone.safetensors"
    whole, raw = json.loads(card.read_text()), card.read_bytes()
    for seed in range(TRIES):
        draw = random.Random(seed)
        if seed % 3:
            card.write_text(json.dumps(twisted(whole, draw)))
        else:
            card.write_bytes(damaged(raw, draw))
        survives(lambda: load_backbone(tmp_path), "", seed)
    card.write_bytes(raw)
    content = tensors.read_bytes()
    for seed in range(10):
        tensors.write_bytes(damaged(content, random.Random(seed)))
        survives(lambda: load_backbone(tmp_path), tensors.name, seed)


def test_damaged_series(tmp_path, monkeypatch):
    from domainssl.datamodules.samples.pastis import sample_root as pastis_root
    from domainssl.datamodules.samples.treesatai import sample_root as treesat_root
    from domainssl.io.series.pastis import read_pastis, scan_pastis
    from domainssl.io.series.treesatai import read_treesat, scan_treesat

    root = treesat_root()
    found = scan_treesat(str(root), "train", ["s2", "aerial"])
    assert found is not None
    tile = found.tiles[0]
    here = replace(found, root=str(tmp_path))
    for name in (f"aerial/{tile.aerial}", f"{found.folder}/{tile.sentinel}"):
        whole = (Path(root) / name).read_bytes()
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        other = (
            f"{found.folder}/{tile.sentinel}"
            if name.startswith("aerial")
            else f"aerial/{tile.aerial}"
        )
        (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / other).write_bytes((Path(root) / other).read_bytes())
        for seed in range(TRIES):
            target.write_bytes(damaged(whole, random.Random(seed)))
            survives(
                lambda: read_treesat(here, tile, ["s2", "s1_asc", "aerial"]), target.name, seed
            )
        target.write_bytes(whole)
    base = pastis_root()
    patches = scan_pastis(str(base), [1, 2, 3, 4, 5], ["s2"])
    assert patches is not None
    table = (Path(base) / "metadata.geojson").read_bytes()
    for seed in range(TRIES):
        draw = random.Random(seed)
        content = damaged(table, draw) if seed % 2 else json.dumps(
            twisted(json.loads(table), draw)).encode()  # fmt: skip
        (tmp_path / "metadata.geojson").write_bytes(content)
        survives(lambda: scan_pastis(str(tmp_path), [1], ["s2"]), "", seed)
    patch = patches.patches[0]
    name = f"DATA_S2/S2_{patch.id}.npy"
    whole = (Path(base) / name).read_bytes()[:4096]
    (tmp_path / "DATA_S2").mkdir()
    here_too = replace(patches, root=str(tmp_path))
    for seed in range(TRIES):
        (tmp_path / name).write_bytes(damaged(whole, random.Random(seed)))
        survives(lambda: read_pastis(here_too, patch, ["s2"]), f"S2_{patch.id}.npy", seed)


def test_damaged_labels(tmp_path):
    (tmp_path / "labels").mkdir()
    whole = (
        "sample,label,name,factor\n" + "".join(f"s{i},{i % 3},c,0.5\n" for i in range(50))
    ).encode()
    for seed in range(TRIES):
        (tmp_path / "labels" / "train.csv").write_bytes(damaged(whole, random.Random(seed)))
        survives(lambda: labels(str(tmp_path), "train"), "train.csv", seed)


@pytest.mark.parametrize("part", ["trident", "patches", "tensor", "zarr.json", "features/c/0/0"])
def test_damaged_feature_bags_are_refused_by_name_or_read(tmp_path, part):
    from bag_files import clam, trident

    from domainssl.io.slide.features import read_bag, to_grid, write_bag

    opened = trident(tmp_path / "t")
    path = opened
    if part == "patches":
        opened = clam(tmp_path / "c")
        path = opened.parents[1] / "patches" / opened.name
    elif part == "tensor":
        write_bag(tmp_path / "p", read_bag(opened), "clam")
        path = opened = tmp_path / "p" / "pt_files" / "slide.pt"
    elif part != "trident":
        opened = write_bag(tmp_path / "z", read_bag(opened), "zarr")
        path = opened / part
    raw, draw = path.read_bytes(), random.Random(1)
    for _ in range(TRIES):
        path.write_bytes(damaged(raw, draw))
        try:
            to_grid(read_bag(opened))
        except DomainSSLError as error:
            assert "slide" in str(error)
