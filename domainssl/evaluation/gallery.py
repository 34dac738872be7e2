"""Pictures of a report: small views of items, and patch features as colours."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from domainssl.backbones.base import Backbone
from domainssl.evaluation.dense import patch_tokens
from domainssl.evaluation.features import restricted
from domainssl.evaluation.picture import planes_of, stretch_limits, to_rgb
from domainssl.modality import Modality, batch_to

__all__ = ["Gallery", "data_uri", "look", "panels_of", "principal"]

Array = NDArray[Any]
_SIDE = 40  # pixels of a small view
_ACROSS = 16  # views per row of the sheet
_MOST = 256
_EXAMPLES = 4
_LARGE = 160


@dataclass(kw_only=True)
class Gallery:
    """What a report shows of items.

    Attributes:
        sheet: All small views in one picture, as a data URI; empty without pictures.
        side: Pixels of a view.
        across: Views per row.
        places: Position in the sheet by id.
        examples: Per item its id and pictures by modality, and per backbone the patch maps.
        panels: Pictures of reconstructions by title.
    """

    sheet: str = ""
    side: int = _SIDE
    across: int = _ACROSS
    places: dict[str, int] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)
    panels: list[dict[str, str]] = field(default_factory=list)


def data_uri(picture: Image.Image, form: str = "PNG", **options: Any) -> str:
    """Return a picture that a page can hold without a file beside it."""
    out = io.BytesIO()
    picture.save(out, format=form, **options)
    kind = form.lower()
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"


def principal(x: Array, count: int) -> Array:
    """Return the first principal components, (N, count), zero beyond the rank.

    Signs are such that the largest loading of each component is positive.

    Args:
        x: (N, E).
        count: Components.
    """
    centred = x.astype(np.float64) - x.mean(0, dtype=np.float64)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes[:count]
    signs = np.sign(np.take_along_axis(axes, np.abs(axes).argmax(1)[:, None], 1))
    scores = centred @ (axes * np.where(signs == 0, 1, signs)).T
    out = np.zeros((len(x), count))
    out[:, : scores.shape[1]] = scores
    return out


def _views(batch: Mapping[str, Any], modality: Modality) -> Array | None:
    """Return (B, H, W, 3) uint8; None for what has no picture."""
    if modality.kind not in ("image", "series", "volume"):
        return None
    x: Tensor = batch[modality.name]
    planes = planes_of(x.float(), modality)
    if modality.value_unit == "rgb8":
        low = np.zeros((len(planes), planes.shape[1], 1, 1), np.float32)
        return to_rgb(planes, (low, low + 255))
    return to_rgb(planes, stretch_limits(planes))


def look(
    backbones: Mapping[str, tuple[Backbone, Mapping[str, Modality]]],
    batches: Iterable[Mapping[str, Any]],
    modalities: Mapping[str, Modality],
    device: torch.device,
) -> Gallery:
    """Make the pictures of the first items of a split.

    Args:
        backbones: By label, each with its modalities.
        batches: Raw physical values.
        modalities: Those of the data.
        device: Where the backbones run.
    """
    shown = _thumbnail_modality(modalities)
    views: list[Array] = []
    found = Gallery()
    for batch in batches:
        ids = [str(i) for i in batch.get("id") or []]
        if not found.examples and ids:
            found.examples = _examples(backbones, batch, ids, modalities, device)
        own = _views(batch, shown) if shown is not None and shown.name in batch else None
        if own is None:
            break
        for name, view in zip(ids, own):
            if name not in found.places and len(found.places) < _MOST:
                found.places[name] = len(views)
                views.append(np.asarray(_resized(view, _SIDE)))
        if len(views) >= _MOST:
            break
    if views:
        found.sheet = data_uri(_sheet(views), "WEBP", quality=70)
    return found


def _thumbnail_modality(modalities: Mapping[str, Modality]) -> Modality | None:
    """Return the modality that people know best: one with three colours, else the first."""
    usable = [m for m in modalities.values() if m.kind in ("image", "series", "volume")]
    return max(usable, key=lambda m: min(m.num_channels, 3), default=None)


def _resized(view: Array, side: int) -> Image.Image:
    return Image.fromarray(view).resize((side, side), Image.Resampling.BILINEAR)


def _sheet(views: list[Array]) -> Image.Image:
    rows = -(-len(views) // _ACROSS)
    sheet = np.zeros((rows * _SIDE, _ACROSS * _SIDE, 3), np.uint8)
    for place, view in enumerate(views):
        y, x = place // _ACROSS * _SIDE, place % _ACROSS * _SIDE
        sheet[y : y + _SIDE, x : x + _SIDE] = view
    return Image.fromarray(sheet)


def _examples(
    backbones: Mapping[str, tuple[Backbone, Mapping[str, Modality]]],
    batch: Mapping[str, Any],
    ids: list[str],
    modalities: Mapping[str, Modality],
    device: torch.device,
) -> list[dict[str, Any]]:
    count = min(_EXAMPLES, len(ids))
    examples: list[dict[str, Any]] = [
        {"id": name, "pictures": {}, "maps": {}} for name in ids[:count]
    ]
    for name, modality in modalities.items():
        views = _views(batch, modality) if name in batch else None
        for example, view in zip(examples, views if views is not None else ()):
            picture = _resized(view, min(_LARGE, max(view.shape[:2])))
            example["pictures"][name] = data_uri(picture, "WEBP", quality=80)
    for label, (backbone, own) in backbones.items():
        for name in own:
            if name not in batch:
                continue
            maps = _maps(backbone, restricted(batch, (name,)), name, device)
            for example, picture in zip(examples, maps[:count]):
                example["maps"].setdefault(label, {})[name] = data_uri(picture)
    return examples


def _maps(
    backbone: Backbone, batch: Mapping[str, Any], name: str, device: torch.device
) -> list[Image.Image]:
    """Return patch features of all items as colours: three components of all their patches."""
    here = batch_to(batch, device)
    here[name] = here[name].float()
    with torch.no_grad():
        found = patch_tokens(backbone(here), (name,), backbone.modalities)
    if found is None:
        return []
    tokens, _, grid = found
    if len(grid) == 3:  # the middle axial slice, laid out as views are
        tokens = tokens.unflatten(1, grid)[:, :, :, grid[2] // 2].transpose(1, 2).flip(1, 2)
        grid = grid[1], grid[0]
        tokens = tokens.flatten(1, 2)
    x = tokens.float().cpu().numpy()
    scores = principal(x.reshape(-1, x.shape[-1]), 3)
    low, high = np.percentile(scores, [2, 98], axis=0)
    colours = np.clip((scores - low) / np.maximum(high - low, 1e-9), 0, 1)
    pixels = np.rint(colours * 255).astype(np.uint8).reshape(len(x), *grid, 3)
    return [Image.fromarray(p) for p in pixels]


def panels_of(run: Path, label: str) -> list[dict[str, str]]:
    """Return the last reconstructions that a run has drawn, one per modality.

    Args:
        run: Folder of the run.
        label: Of the backbone, for the titles.
    """
    last: dict[str, Path] = {}
    for path in sorted((run / "panels").glob("step_*_*.png")):
        last[path.stem.split("_", 2)[2]] = path
    found = []
    for name, path in last.items():
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
        picture.thumbnail((640, 900))
        found.append(
            {"title": f"{label}: {name}", "picture": data_uri(picture, "WEBP", quality=70)}
        )
    return found
