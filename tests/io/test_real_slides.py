"""Real slides and tiles hold the values that the plain libraries read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from domainssl.errors import DataError
from domainssl.io.slide.grid import plan_grid
from domainssl.io.slide.picture import read_tile_picture
from domainssl.io.slide.pyramid import Slide, SlideReading, describe_slide

CMU = Path("pathology", "openslide_cmu1", "CMU-1-Small-Region.svs")
TCGA = Path("pathology", "histolab", "tcga-cr-7395-01a-01-ts1.svs")
HE = Path("pathology", "histolab", "tissue-level0-4302-10273-4814-10785.png")
IHC = Path("pathology", "skimage", "ihc.png")


def test_cmu_1_holds_its_facts_and_tiles(shared_data: Path) -> None:
    with Slide(shared_data / CMU) as slide:
        facts = slide.facts
        assert (facts.size, len(facts.levels)) == ((2220, 2967), 1)
        assert (facts.mpp, facts.objective_power) == ((0.499, 0.499), 20.0)
        for place, mean in (
            ((0, 0), (241.9688, 240.0626, 240.8737)),
            ((1024, 1024), (145.5311, 100.4872, 140.8858)),
            ((1500, 2000), (199.4749, 136.5603, 165.9529)),
        ):
            tile, valid = slide.read(*place, 256, 0.499)
            assert valid.all()
            assert tile.mean((0, 1)) == pytest.approx(mean, abs=1e-3)


def test_cmu_1_has_45_tissue_tiles(shared_data: Path) -> None:
    slide = Slide(shared_data / CMU)
    grid = plan_grid(slide, 256, 0.499)
    assert (grid.shape, len(grid)) == ((11, 8), 45)
    dark = [
        (x, y) for y in range(0, 2816, 256) for x in range(0, 2048, 256)
        if slide.read(x, y, 256, 0.499)[0].mean() < 220
    ]  # fmt: skip
    assert sorted(map(tuple, grid.coords.tolist())) == sorted(dark)


def test_cmu_1_at_half_a_micrometre_is_resampled(shared_data: Path) -> None:
    tile, valid = Slide(shared_data / CMU).read(1024, 1024, 256, 0.5)
    assert valid.all()
    assert tile.mean((0, 1)) == pytest.approx((145.5311, 100.4872, 140.8858), abs=1.0)


def test_tcga_slide_states_no_resolution_and_has_160_tissue_tiles(shared_data: Path) -> None:
    facts = describe_slide(shared_data / TCGA)
    assert facts.levels == ((4443, 3567), (2221, 1783))
    assert facts.downsamples[1] == pytest.approx(2.0005055500659967, abs=1e-12)
    assert (facts.mpp, facts.objective_power) == (None, None)
    with pytest.raises(DataError, match=r"tcga-cr-7395.*mpp_um"):
        Slide(shared_data / TCGA).read(0, 0, 256, 0.5)
    slide = Slide(shared_data / TCGA, SlideReading(mpp_um=0.25))
    tile, _ = slide.read(1024, 1024, 256, 0.25)
    assert tile.mean((0, 1)) == pytest.approx((200.7072, 102.2475, 152.1467), abs=1.0)
    assert len(plan_grid(slide, 256, 0.25)) == 160


def test_second_level_does_not_drift_over_the_slide(shared_data: Path) -> None:
    """Tiles of the level at the far corner show what level 0 shows there, to half a pixel."""
    slide = Slide(shared_data / TCGA, SlideReading(mpp_um=0.25))
    for x, y in ((600, 600), (3800, 2800)):
        coarse, _ = slide.read(x, y, 256, 0.5)
        fine, _ = slide.read(x, y, 512, 0.25)
        grey = fine.mean(-1).reshape(256, 2, 256, 2).mean((1, 3))
        errors = {
            shift: np.abs(np.roll(grey, shift, 1) - coarse.mean(-1))[:, 4:-4].mean()
            for shift in (-1, 0, 1)
        }
        assert min(errors, key=lambda shift: errors[shift]) == 0


def test_pictures_hold_their_values(shared_data: Path) -> None:
    ihc, _ = read_tile_picture(shared_data / IHC)
    assert ihc.mean((0, 1)) == pytest.approx((177.2539, 159.7675, 143.9543), abs=1e-3)
    he, valid = read_tile_picture(shared_data / HE)
    assert (he.shape, valid.all()) == ((512, 512, 3), True)
