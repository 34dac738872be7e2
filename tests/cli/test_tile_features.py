"""`tile --features`: a bag per slide of what a backbone says about its tiles."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import killed
from slide_files import write_tiff

import domainssl
from domainssl import export_backbone, load_backbone
from domainssl.backbones.vit import ViTBackbone
from domainssl.cli import main
from domainssl.errors import ConfigError
from domainssl.inference.outputs import encoder_name
from domainssl.io.slide import bag_hdf5, bag_zarr
from domainssl.io.slide.features import read_bag
from domainssl.io.slide.pyramid import Slide

HE = {
    "kind": "image", "channels": ("red", "green", "blue"), "value_unit": "rgb8", "size": (32, 32),
    "mpp_um": 1.0, "mean": (128.0,) * 3, "std": (64.0,) * 3,
}  # fmt: skip


@pytest.fixture
def slides(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        rgb = rng.integers(90, 220, (192, 256, 3)).astype(np.uint8)
        write_tiff(tmp_path / "slides" / f"{name}.tif", [rgb])
    torch.manual_seed(0)
    sizes = {"width": 24, "depth": 1, "heads": 2}
    export_backbone(ViTBackbone({"he": HE}, sizes, patch_size=16), tmp_path / "tiny")
    return tmp_path / "slides"


def _tile(slides: Path, *more: str) -> int:
    words = ["--mpp=1.0", "--size=32", "--min_tissue=0", "--jobs=0", "--ids=plain"]
    output = f"--output={slides.parent / 'out'}"
    return main(
        ["tile", str(slides), output, *words, f"--features={slides.parent / 'tiny'}", *more]
    )


def test_features_of_all_tiles_lie_in_tridents_layout(slides: Path) -> None:
    assert _tile(slides) == 0
    (path,) = (slides.parent / "out").glob("*_overlap/features_tiny/a.h5")
    bag = read_bag(path)
    assert bag.encoder == "tiny" and bag.mpp_um == 1.0 and bag.dtype == "float32"
    assert len(bag) == 12 and bag.patch_size_level0 == 64
    backbone = load_backbone(slides.parent / "tiny")
    with Slide(slides / "a.tif") as slide, torch.no_grad():
        for number in (0, 7):
            rgb, _ = slide.read(*map(float, bag.coords[number]), 32, 1.0)
            tile = torch.from_numpy(rgb.copy()).permute(2, 0, 1).unsqueeze(0).float()
            expected = backbone({"he": tile}).pooled["he"][0]
            torch.testing.assert_close(
                torch.from_numpy(bag.features[number]), expected, atol=1e-5, rtol=1e-5
            )


def test_python_writes_the_bags_of_the_command_line_and_in_int8_with_a_scale(slides: Path) -> None:
    tiny, out = slides.parent / "tiny", slides.parent
    words = ["embed", str(tiny), str(slides), "--format=zarr", "--ids=plain"]
    assert main([*words, f"--output={out / 'cli'}"]) == 0
    done = domainssl.embed(tiny, slides, out / "own", form="zarr", ids="plain")
    assert [path.name for path in done.outputs] == ["a.zarr", "b.zarr"]
    exact = read_bag(out / "cli" / "features_tiny" / "a.zarr")
    again = read_bag(done.outputs[0])
    np.testing.assert_array_equal(again.features, exact.features)
    np.testing.assert_array_equal(again.coords, exact.coords)
    assert domainssl.embed(tiny, slides, out / "own", form="zarr", ids="plain").resumed == 2
    assert main([*words, f"--output={out / 'small'}", "--dtype=int8"]) == 0
    small = read_bag(out / "small" / "features_tiny" / "a.zarr")
    scale = np.abs(exact.features).max(1, keepdims=True) / 127
    assert small.dtype == "int8" and small.features.dtype == np.float32
    assert (np.abs(small.features - exact.features) <= 0.55 * scale).all()  # float16 before
    with pytest.raises(ConfigError, match="another --dtype"):
        domainssl.embed(tiny, slides, out / "own", form="zarr", ids="plain", dtype="int8")
    with pytest.raises(ConfigError, match="add --format zarr"):
        domainssl.embed(tiny, slides, out / "new", dtype="int8")


def test_parts_leave_no_slide_without_features(slides: Path) -> None:
    """A part has the features of its own slides, whether the grids of others are there or not."""
    for name in ("c", "d"):
        (slides / f"{name}.tif").write_bytes((slides / "a.tif").read_bytes())
    for part in ("1/2", "2/2"):
        assert _tile(slides, f"--shard={part}") == 0
    bags = (slides.parent / "out").rglob("features_tiny/*.h5")
    assert sorted(path.name for path in bags) == [f"{name}.h5" for name in "abcd"]


def test_python_takes_what_is_said_of_the_resolution_of_slides(slides: Path) -> None:
    more = {"form": "zarr", "ids": "plain", "mpp_um": 0.25}
    done = domainssl.embed(slides.parent / "tiny", slides, slides.parent / "own", **more)
    bag = read_bag(done.outputs[0])
    assert bag.patch_size_level0 == 128 and bag.level0_mpp_um == 0.25


def test_what_is_there_is_not_computed_again_and_parts_do_their_share(
    slides: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _tile(slides, "--shard=1/2", "--layout=zarr") == 0
    folder = slides.parent / "out" / "features_tiny"
    assert [path.name for path in sorted(folder.glob("*.zarr"))] == ["a.zarr"]
    first = (folder / "a.zarr" / "zarr.json").stat().st_mtime_ns
    assert _tile(slides, "--layout=zarr", "--batch_size=5", "--autocast=bfloat16") == 0
    assert (folder / "a.zarr" / "zarr.json").stat().st_mtime_ns == first
    said = " ".join(capsys.readouterr().out.split())
    assert "features of 2 slides in" in said and "next: python -m domainssl inspect" in said
    kinds = [read_bag(path).attributes["computed_in"] for path in sorted(folder.glob("*.zarr"))]
    assert kinds == ["float32", "bfloat16"]


@pytest.mark.parametrize("layout", ["trident", "zarr"])
@pytest.mark.parametrize("moment", ["tile", "file"])
def test_features_that_were_killed_in_a_slide_go_on(slides: Path, layout: str, moment: str) -> None:
    """Killed at the 17th tile, the fifth of the second slide, or before its file has its name."""
    root = slides.parent / "out"

    def call() -> int:
        seen = iter(range(100))

        def die(function: Callable[..., Any], at: int) -> Callable[..., Any]:
            def maybe(*args: Any, **more: Any) -> Any:
                counts = moment == "tile" or "features_tiny" in str(args[-1])
                if counts and next(seen) == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **more)

            return maybe

        with pytest.MonkeyPatch.context() as patch:
            if moment == "tile":
                patch.setattr(Slide, "read", die(Slide.read, 16))
            elif layout == "trident":
                patch.setattr(bag_hdf5.os, "replace", die(os.replace, 1))
            else:
                patch.setattr(bag_zarr.os, "rename", die(os.rename, 1))
            return _tile(slides, f"--layout={layout}", "--batch_size=5")

    def bags() -> list[Path]:
        ends = "*.h5" if layout == "trident" else "*.zarr"
        return sorted(p for p in root.rglob(f"features_tiny/{ends}") if p.name[0] != ".")

    assert killed(call)
    (first,) = bags()
    before = first.stat().st_mtime_ns
    assert _tile(slides, f"--layout={layout}") == 0
    assert len(bags()) == 2 and bags()[0].stat().st_mtime_ns == before
    assert not list(root.rglob(".*.part-*"))
    features = [read_bag(path).features for path in bags()]
    assert [len(f) for f in features] == [12, 12]
    assert not np.array_equal(*features)


def test_a_backbone_of_other_images_is_refused(
    slides: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {"s2": {**HE, "value_unit": "dn"}}
    sizes = {"width": 24, "depth": 1, "heads": 2}
    export_backbone(
        ViTBackbone(other, sizes, patch_size=16), slides.parent / "tiny", overwrite=True
    )
    assert _tile(slides) == 2
    assert "takes s2 (image, dn)" in capsys.readouterr().err


def _export_other(slides: Path, **changes: object) -> None:
    torch.manual_seed(1)
    other = ViTBackbone(
        {"he": {**HE, **changes}}, {"width": 24, "depth": 1, "heads": 2}, patch_size=16
    )
    export_backbone(other, slides.parent / "tiny", overwrite=True)


def test_features_of_other_weights_are_not_taken_for_these(
    slides: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _tile(slides) == 0 and _tile(slides) == 0
    _export_other(slides)
    assert _tile(slides) == 2
    text = "holds features of other weights, or of another --dtype, as features_tiny"
    assert text in capsys.readouterr().err


def test_tiles_of_another_resolution_than_the_training_are_refused_before_slides_are_read(
    slides: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _export_other(slides, mpp_um=0.5)
    assert _tile(slides) == 2
    assert "was trained on tiles of 0.5 um per pixel" in capsys.readouterr().err
    assert not (slides.parent / "out").exists()
    assert _tile(slides, "--any_mpp") == 0


def test_features_older_than_their_grid_are_computed_again(slides: Path) -> None:
    assert _tile(slides) == 0
    assert _tile(slides, "--restart", "--overlap=16") == 0
    out = slides.parent / "out"
    bags = [read_bag(path) for path in out.glob("*_overlap/features_tiny/a.h5")]
    assert len(bags) == 2 and min(map(len, bags)) == 12 < max(map(len, bags))


def test_the_backbone_of_a_run_is_called_by_the_run(tmp_path: Path) -> None:
    for part in ("backbone", "checkpoints"):
        (tmp_path / "first" / part).mkdir(parents=True)
    (tmp_path / "first" / "checkpoints" / "last.ckpt").touch()
    first = tmp_path / "first"
    given = [first, first / "backbone", first / "checkpoints" / "last.ckpt"]
    assert [encoder_name(str(path)) for path in given] == ["first"] * 3
    assert encoder_name("uni") == "uni"


def test_embed_does_the_same_in_one_command_with_a_picture(slides: Path) -> None:
    assert _tile(slides) == 0
    words = ["embed", str(slides.parent / "tiny"), str(slides), "--ids=plain"]
    assert main([*words, f"--output={slides.parent / 'own'}"]) == 0
    (path,) = (slides.parent / "own").glob("*_overlap/features_tiny/a.h5")
    (other,) = (slides.parent / "out").glob("*_overlap/features_tiny/a.h5")
    found, expected = read_bag(path), {tuple(c): f for c, f in zip(
        read_bag(other).coords, read_bag(other).features, strict=True)}  # fmt: skip
    assert found.mpp_um == 1.0 and found.patch_size_level0 == 64 and len(found)
    for place, vector in zip(found.coords, found.features, strict=True):
        np.testing.assert_allclose(vector, expected[tuple(place)], atol=1e-6)
    assert len(list((slides.parent / "own").rglob("previews/*_tiny.png"))) == 2
