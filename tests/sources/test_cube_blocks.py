"""Held-out blocks are kept apart, however many sites show one place."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from domainssl.io.raster.grid import Bounds
from domainssl.sources.cube_blocks import Block, overlapping


def test_blocks_of_many_sites_at_one_place_are_each_kept_apart():
    rng = np.random.default_rng(0)
    corners = [(4e5, 5e6)] * 200 + rng.uniform((3e5, 4.9e6), (5e5, 5.1e6), (300, 2)).tolist()
    sites = [SimpleNamespace(crs=f"EPSG:{32632 + i % 2}", metres=1.0) for i in range(500)]
    blocks = [Block(i, Bounds(x, y - 2560, x + 2560, y), 2, 2) for i, (x, y) in enumerate(corners)]
    ours, others = blocks[::3], [block for i, block in enumerate(blocks) if i % 3]

    def meets(one: Block, other: Block) -> bool:
        shared = one.bounds.shared(other.bounds)
        is_one_zone = (one.site - other.site) % 2 == 0
        return is_one_zone and shared.width > 0 and shared.height > 0

    expected = [any(meets(one, other) for other in others) for one in ours]
    assert overlapping(sites, ours, others).tolist() == expected
    assert 60 < sum(expected) < len(ours)
