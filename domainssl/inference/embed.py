"""Features of a backbone for many items: the tiles of slides, in pieces that survive a kill.

    for vectors in embed_batches(backbone, batches, "he"):      # any batches, (B, D) each
        ...

`embed_batches` knows nothing about slides, so that rasters and volumes can use it too.
`SlideEmbedding` reads the tiles that `tile` has kept and writes a bag per slide.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from domainssl.backbones.base import Backbone
from domainssl.backbones.card import weights_digest
from domainssl.errors import ConfigError, DataError
from domainssl.files import read_json, remove_parts, write_json
from domainssl.inference.preview import write_tile_preview
from domainssl.inference.tokens import Autocast, autocast_context
from domainssl.io.slide.bag import cells_of
from domainssl.io.slide.bag_folders import has_bag
from domainssl.io.slide.features import Bag, Layout, read_places, write_bag
from domainssl.io.slide.pyramid import Slide
from domainssl.io.slide.tiling import SlideTiling
from domainssl.modality import Batch, batch_to, key

__all__ = ["Autocast", "SlideEmbedding", "embed_batches"]

Array = np.ndarray[Any, Any]


def embed_batches(
    backbone: Backbone,
    batches: Iterable[Batch],
    name: str,
    *,
    device: str = "cpu",
    autocast: Autocast | None = None,
) -> Iterator[Tensor]:
    """Yield the pooled features of every batch, float32 (B, D), on the CPU.

    Args:
        backbone: In evaluation mode; it is moved to the device.
        batches: Raw physical values and companions.
        name: Which feature, a modality or `joint`.
        device: Where to compute.
        autocast: Type of the matrix products; None computes in float32.

    Raises:
        ConfigError: There is no such feature.
    """
    if name not in backbone.embed_dim:
        raise ConfigError(
            f"embed: the backbone has no feature {name!r}, only {', '.join(backbone.embed_dim)}."
        )
    backbone = backbone.to(device).eval()
    for batch in batches:
        with torch.inference_mode(), autocast_context(device, autocast):
            found = backbone(batch_to(batch, device)).pooled[name]
        yield found.float().cpu()


@dataclass(frozen=True, kw_only=True)
class SlideEmbedding:
    """The features of the tiles of some slides: entries that are made one by one.

    Attributes:
        grids: The slides and their grids; features go into the same folder.
        backbone: What computes.
        encoder: Name of the features.
        batch_size: Tiles at once.
        device: Where to compute.
        autocast: See `embed_batches`.
        layout: Of the bags.
        dtype: Of the features as stored; None is the layout's own.
    """

    grids: SlideTiling
    backbone: Backbone
    encoder: str
    batch_size: int = 64
    device: str = "cpu"
    autocast: Autocast | None = None
    layout: Layout = "trident"
    dtype: str | None = None

    @property
    def folder(self) -> Path:
        """Where grids and features lie."""
        return self.grids.folder

    @property
    def keys(self) -> Sequence[str]:
        """Ids of the slides."""
        return self.grids.keys

    @property
    def _root(self) -> Path:
        """Folder of the bags: TRIDENT's layout makes its own folders below."""
        return self.folder / f"features_{self.encoder}" if self.layout == "zarr" else self.folder

    @property
    def outputs(self) -> list[Path]:
        """Bags that are there, in the order of the slides."""
        pattern = f"**/features_{self.encoder}/{{}}.h5"
        if self.layout == "zarr":
            pattern = f"features_{self.encoder}/{{}}.zarr"
        return [path for key in self.keys for path in self.folder.glob(pattern.format(escape(key)))]

    @property
    def name(self) -> str:
        """Modality that the tiles are."""
        return next(iter(self.backbone.modalities))

    def claim(self) -> None:
        """Write which weights the name of the features stands for, or compare it.

        Raises:
            ConfigError: Features of other weights lie there under this name.
        """
        path = self.folder / "encoders" / f"{self.encoder}.json"
        wanted = {"weights": weights_digest(self.backbone)}
        if self.dtype == "int8":  # never beside exact ones
            wanted["dtype"] = "int8"
        if path.is_file() and read_json(path) != wanted:
            raise ConfigError(
                f"{self.folder}: holds features of other weights, or of another --dtype, as "
                f"features_{self.encoder}. Choose another --output, or give the file or folder of "
                "the weights another name."
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, wanted)

    def is_ready(self, key: str) -> bool:
        """Tell whether the features of a slide are there, and no older than its grid."""
        if not self.grids.is_ready(key):
            return False
        grid = self._places(key).stat().st_mtime_ns
        return has_bag(self._root, self.layout, key, self.encoder, since_ns=grid)

    def _places(self, key: str) -> Path:
        return self.folder / "patches" / f"{key}_patches.h5"

    def make(self, key: str) -> None:
        """Compute the features of a slide; the file takes its name when it is complete.

        Tiles without a valid pixel, beyond the slide or damaged, have none and are left out.

        Raises:
            DataError: The slide has no grid, it or its tiles cannot be read, or the features not
                written.
        """
        if not self.grids.is_ready(key):
            raise DataError(
                f"{key}: no grid of tiles in {self.folder}, so that it has no features."
            )
        places = read_places(self._places(key))
        assert places.coords is not None
        if not places.patch_size or not places.mpp_um:
            raise DataError(f"{places.path}: no patch_size and target_magnification of the tiles.")
        for folder in self._root.glob(f"**/features_{self.encoder}"):
            remove_parts(folder, key)
        remove_parts(self._root, key)
        kept = list[int]()
        with self.grids.open(key) as slide:
            batches = self._tiles(slide, places, kept)
            found = [
                vectors.numpy()
                for vectors in embed_batches(
                    self.backbone, batches, self.name, device=self.device, autocast=self.autocast
                )
            ]
        dim = self.backbone.embed_dim[self.name]
        features = np.concatenate(found) if found else np.zeros((0, dim), np.float32)
        bag = Bag(
            slide=key,
            features=features,
            coords=places.coords[kept],
            patch_size_level0=places.patch_size_level0,
            aspect=places.aspect,
            overlap_level0=places.overlap_level0,
            patch_size=places.patch_size,
            mpp_um=places.mpp_um,
            level0_mpp_um=places.level0_mpp_um,
            level0_size=places.level0_size,
            encoder=self.encoder,
            attributes={
                "computed_in": self.autocast or "float32",
                "left_out": len(places) - len(kept),
            },
        )
        write_bag(self._root, bag, self.layout, dtype=self.dtype)
        if len(bag) and bag.patch_size_level0:
            cells = cells_of(bag)
            picture = self.folder / "previews" / f"{key}_{self.encoder}.png"
            picture.parent.mkdir(exist_ok=True)
            write_tile_preview(picture, features, np.stack([cells.rows, cells.columns], 1))

    def _tiles(self, slide: Slide, places: Bag, kept: list[int]) -> Iterator[Batch]:
        """Read tiles in batches; `kept` collects which have a valid pixel."""
        assert places.coords is not None and places.patch_size and places.mpp_um
        pictures: list[Array] = []
        masks: list[Array] = []
        for number, (x, y) in enumerate(places.coords):
            rgb, valid = slide.read(float(x), float(y), places.patch_size, places.mpp_um)
            if valid.any():
                kept.append(number)
                pictures.append(rgb)
                masks.append(valid)
            if len(pictures) == self.batch_size:
                yield self._batch(pictures, masks)
                pictures, masks = [], []
        if pictures:
            yield self._batch(pictures, masks)

    def _batch(self, pictures: Sequence[Array], masks: Sequence[Array]) -> Batch:
        values = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)  # (B, H, W, 3) uint8
        return {
            self.name: values.float(),
            key(self.name, "valid"): torch.from_numpy(np.stack(masks)),
        }
