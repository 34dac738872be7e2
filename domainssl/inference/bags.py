"""Slides as bags of the features of tiles: what is found at a path, and batches of whole slides."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from domainssl.backbones.base import Backbone
from domainssl.errors import ConfigError, DataError, require
from domainssl.files import write_whole
from domainssl.inference.inputs import find_inputs
from domainssl.inference.outputs import file_states
from domainssl.io.ids import ids_of, is_hashed
from domainssl.io.slide.bag import Bag, places_of, unlike_features
from domainssl.io.slide.bag_folders import BagFile, find_bags
from domainssl.io.slide.features import read_bag
from domainssl.modality import Batch, Modality, key

__all__ = ["BagItem", "bag_items"]

_log = logging.getLogger(__name__)
Array = np.ndarray[Any, Any]
_MPP_TOLERANCE = 0.1
_ENDINGS = (".h5", ".hdf5", ".pt", ".zarr")


def bag_items(
    source: str, backbone: Backbone, most: int | None = None, ids: str = "plain"
) -> list[BagItem]:
    """Return the slides of an input.

    Args:
        source: A bag (`.h5`, `.pt`, `.zarr`), a folder of CLAM, TRIDENT or of our own, or a
            manifest with `id` and `path`.
        backbone: Of one set of features.
        most: Tiles of a slide at most, evenly spread; None takes all.
        ids: `hashed`, or `plain` for names that may be public. Names of bags that are hashes, as
            `tile` writes them, stay.

    Raises:
        ConfigError: The backbone takes several sets of features, or `most` is no number of tiles.
        DataError: There are none.
    """
    (modality, *others) = backbone.modalities.values()
    if others:
        raise ConfigError(
            f"The backbone takes features of {', '.join(backbone.modalities)}; bags are read for "
            "those of one tile encoder."
        )
    if most is not None and most < 1:
        raise ConfigError(f"--tiles: got {most}, expected 1 or more.")
    files: list[BagFile]
    if os.path.isdir(source) and not source.rstrip("/").endswith(".zarr"):
        files = list(find_bags(source).files)
    else:
        found = find_inputs(source, [modality.name], _is_bag, "a bag of features")
        files = [
            BagFile(f.name, f.files if isinstance(f.files, str) else next(iter(f.files.values())))
            for f in found
        ]
    names = [file.slide for file in files]
    hashed = [
        name if is_hashed(name) else own
        for name, own in zip(names, ids_of(names, ids), strict=True)
    ]
    encoders: dict[str, None] = {}
    return [
        BagItem(name=name, file=file, modality=modality, most=most, encoders=encoders)
        for name, file in zip(hashed, files, strict=True)
    ]


def _is_bag(path: str) -> bool:
    return path.lower().rstrip("/").endswith(_ENDINGS)


@dataclass(kw_only=True)
class BagItem:
    """The tiles of one slide as one batch.

    Attributes:
        name: Id of the slide.
        file: Where the features lie.
        modality: What the backbone expects.
        most: Tiles at most.
        encoders: Encoders of the bags that were read, first one first; shared by the items of one
            input.
    """

    name: str
    file: BagFile
    modality: Modality
    most: int | None = None
    encoders: dict[str, None] = field(default_factory=dict)
    when_empty: ClassVar[str] = "a bag of no tile whose features are finite"
    _shown: tuple[Bag, Array] | None = field(default=None, init=False, repr=False)

    @property
    def facts(self) -> dict[str, Any]:
        """What a result rests on."""
        return {"files": file_states([self.file.path]), "tiles": self.most}

    def described(self) -> dict[str, Any]:
        """Return the tiles of the slide, and how many of them were shown."""
        assert self._shown is not None
        bag, chosen = self._shown
        return {"tiles": len(bag), "shown": len(chosen)}

    def batches(self) -> Iterator[tuple[float, Batch]]:
        """Yield the one batch, weighing 1; none of a slide without a tile.

        Raises:
            DataError: The bag cannot be read, has other features, or does not say where tiles lie.
        """
        bag = read_bag(self.file.path, patches=self.file.patches)
        self._check(bag)
        if odd := unlike_features(bag.features):
            _log.warning("%s: %s", bag.path, "; ".join(odd))
        finite = np.flatnonzero(np.isfinite(bag.features).all(1))
        count = len(finite) if self.most is None else min(self.most, len(finite))
        chosen = finite[np.arange(count) * len(finite) // max(count, 1)]
        self._shown = (bag, chosen)
        if not count:
            return
        places, _, _ = places_of(bag)
        values = torch.from_numpy(bag.features[chosen].astype(np.float32))
        yield (
            1.0,
            {
                self.modality.name: values.unsqueeze(0),
                key(self.modality.name, "coords"): torch.from_numpy(places[chosen]).unsqueeze(0),
                key(self.modality.name, "valid"): torch.ones(1, count, dtype=torch.bool),
            },
        )

    def _check(self, bag: Bag) -> None:
        path, wanted = bag.path or self.file.path, self.modality.num_channels
        if len(bag) and bag.dim != wanted:
            raise DataError(
                f"{path}: features of {bag.dim} numbers, the backbone was trained on {wanted}. "
                "Give the features of the same tile encoder."
            )
        trained = self.modality.mpp_um
        if bag.mpp_um and trained and abs(bag.mpp_um / trained - 1) > _MPP_TOLERANCE:
            raise DataError(
                f"{path}: tiles of {bag.mpp_um:g} um per pixel, the backbone was trained on "
                f"{trained:g}. Give the features of tiles of that resolution."
            )
        if not bag.encoder:
            return
        first = next(iter(self.encoders), bag.encoder)
        if bag.encoder not in self.encoders and bag.encoder != first:
            _log.warning(
                "%s: features of the encoder %r, and of %r before: vectors of two encoders do not "
                "compare. Give those that the weights were trained on, the others in a folder of "
                "their own.", path, bag.encoder, first,
            )  # fmt: skip
        self.encoders[bag.encoder] = None

    def keep_weights(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write how much every tile counted, as CLAM does: `attention_scores` beside `coords`.

        Scores are float32 (N,) in the order of the bag, NaN of tiles that were not shown.

        Args:
            folder: Where `attention/<slide>.h5` goes.
            weights: (1, N) by name; nothing is written without any.
        """
        if not weights or self._shown is None:
            return
        h5py: Any = require("h5py", "pathology")
        bag, chosen = self._shown
        content = io.BytesIO()
        with h5py.File(content, "w") as file:
            places = file.create_dataset("coords", data=bag.coords)
            for name, value in {
                "patch_size_level0": bag.patch_size_level0,
                "overlap_level0": bag.overlap_level0,
                "patch_size": bag.patch_size,
                "mpp_um": bag.mpp_um,
            }.items():
                if value is not None:
                    places.attrs[name] = value
            for name, own in weights.items():
                scores = np.full(len(bag), np.nan, np.float32)
                scores[chosen] = own[0].float().cpu().numpy()
                only = len(weights) == 1
                file.create_dataset(
                    "attention_scores" if only else f"attention_scores_{name}", data=scores
                )
        (folder / "attention").mkdir(exist_ok=True)
        write_whole(folder / "attention" / f"{self.name}.h5", content.getbuffer())
