"""The sample of tiles: what is shared, what is not, and what statistics must not tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from domainssl.datamodules.samples.tiles import PER_SLIDE, SIDE, build, draw_slide
from domainssl.datamodules.samples.tissue_scene import KINDS, STAINS
from domainssl.evaluation.probes import linear_probe_accuracy


def _held_out() -> tuple[torch.Tensor, dict[str, np.ndarray[Any, Any]]]:
    drawn = [draw_slide("val", number) for number in range(24)]
    kinds = torch.from_numpy(np.concatenate([kinds for kinds, _ in drawn]))
    return kinds, {s: np.concatenate([pictures[s] for _, pictures in drawn]) for s in STAINS}


def _statistics(pictures: np.ndarray[Any, Any]) -> torch.Tensor:
    """Mean, deviation and five percentiles per colour, (N, 21)."""
    pixels = pictures.reshape(len(pictures), -1, 3).astype(np.float32)
    marks = np.percentile(pixels, (5, 25, 50, 75, 95), axis=1)
    found = [pixels.mean(1), pixels.std(1), *marks]
    return torch.from_numpy(np.concatenate(found, axis=1).astype(np.float32))


def test_statistics_of_colours_do_not_tell_the_classes_apart() -> None:
    kinds, pictures = _held_out()
    assert torch.bincount(kinds).tolist() == [24] * len(KINDS)
    for stain in STAINS:
        assert linear_probe_accuracy(_statistics(pictures[stain]), kinds) < 0.35  # chance: 0.25


def test_colours_that_change_together_tell_the_classes_apart() -> None:
    """At the scale of glands, in each stain: the signal is there, and in both of them."""
    kinds, pictures = _held_out()
    for stain in STAINS:
        pixels = pictures[stain].astype(np.float64)
        spectrum = np.fft.rfft2(pixels - pixels.mean((1, 2), keepdims=True), axes=(1, 2))
        frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None])
        ring = (frequency > 1 / 30) & (frequency < 1 / 12)
        coarse = spectrum[:, ring]  # (N, F, 3)
        cross = np.einsum("nfi,nfj->nij", coarse, coarse.conj()).real
        pairs = np.stack([cross[:, i, j] for i, j in ((0, 1), (0, 2), (1, 2))], 1)
        signs = torch.from_numpy(np.sign(pairs).astype(np.float32))
        assert linear_probe_accuracy(signs, kinds) > 0.8


def test_stains_of_a_place_share_amounts_of_dye() -> None:
    _, pictures = _held_out()
    red = {s: pictures[s][..., 0].mean((1, 2)) for s in STAINS}
    assert np.corrcoef(red["he"], red["ihc"])[0, 1] > 0.7
    assert abs(np.corrcoef(red["he"], np.roll(red["ihc"], 5))[0, 1]) < 0.4


def test_files_are_what_the_table_says_and_the_same_every_time(tmp_path: Path) -> None:
    build(tmp_path)
    lines = (tmp_path / "manifest.csv").read_text().splitlines()
    assert lines[0] == "id,patient,slide,split,he,ihc,label"
    rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    assert len(rows) == 480 and sum(not row["ihc"] for row in rows) == 6
    splits: dict[str, set[str]] = {}
    for row in rows:
        splits.setdefault(row["patient"], set()).add(row["split"])
    assert len(splits) == 80 and all(len(found) == 1 for found in splits.values())
    kinds, pictures = draw_slide("val", 3)
    own = [row for row in rows if row["slide"] == "v03"]
    assert [row["label"] for row in own] == [KINDS[kind] for kind in kinds]
    for place, row in enumerate(own):
        for stain in STAINS:
            with Image.open(tmp_path / row[stain]) as picture:
                assert np.array_equal(np.asarray(picture), pictures[stain][place])
    assert len(own) == PER_SLIDE and own[3]["id"] == f"v03/{SIDE}_{SIDE}"
