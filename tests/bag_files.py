"""Feature files as CLAM and TRIDENT leave them: one slide at 40x, tiles of 256 at 20x."""

from __future__ import annotations

import numpy as np

D = 8
SIZE = 512  # of a tile at level 0
LATTICE = [
    (x, y)
    for x in range(1024, 3584, SIZE)
    for y in range(2048, 4096, SIZE)
    if (x, y) != (2048, 2560)
]
OTHER = [(5000, 700), (5000, 1212), (5512, 700)]  # tiles of a second contour, on its own lattice
CLAM = {
    "patch_size": 256, "patch_level": 1, "downsample": np.array([2.0, 2.0]),
    "downsampled_level_dim": np.array([6000, 5000]), "level_dim": np.array([6000, 5000]),
    "name": "slide", "save_path": "somewhere",
}  # fmt: skip
TRIDENT = {
    "patch_size": 256, "patch_size_level0": SIZE, "level0_magnification": 40,
    "target_magnification": 20, "overlap": 0, "name": "slide", "savetodir": "somewhere",
    "level0_width": 12000, "level0_height": 10000, "mpp": "None", "more": '{"a": [1, 2]}',
}  # fmt: skip


def feature(x, y):
    return (np.arange(D) + x / SIZE + 10 * (y / SIZE)).astype("float32")


def write(path, coords, dtype="float32", attrs=None, features=True, facts=None):
    import h5py

    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        found = file.create_dataset("coords", data=np.array(coords, "int64").reshape(-1, 2))
        found.attrs.update(attrs or {})
        if features:
            values = np.stack([feature(*place) for place in coords]).astype(dtype)
            made = file.create_dataset("features", data=values, chunks=(1, D))
            made.attrs.update(facts or {})
    return path


def clam(root, coords=(*LATTICE, *OTHER)):
    write(root / "patches" / "slide.h5", coords, attrs=CLAM, features=False)
    return write(root / "h5_files" / "slide.h5", coords)


def trident(root, dtype="float16"):
    rows = sorted(LATTICE, key=lambda place: (place[1], place[0]))
    facts = {"encoder": "uni_v1", "name": "slide", "savetodir": "somewhere"}
    return write(root / "features_uni_v1" / "slide.h5", rows, dtype, TRIDENT, facts=facts)
