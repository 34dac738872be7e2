"""Frozen features of the items of a split, for every subset of modalities, kept in one file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from domainssl.backbones.base import Backbone, Features
from domainssl.errors import WeightsError, parsing
from domainssl.evaluation.dense import patch_labels, patch_tokens
from domainssl.evaluation.raw import band_statistics
from domainssl.files import write_whole
from domainssl.modality import Modality, batch_to, present_mask
from domainssl.modality import key as companion

__all__ = ["Items", "extract", "load_items", "representation", "restricted", "save_items"]

Array = NDArray[Any]


@dataclass(kw_only=True)
class Items:
    """Features and labels of the items of one split, one row per item.

    Attributes:
        ids: As the DataModule names them.
        labels: int64 (N,), -1 where unknown; None without labels.
        multi: float32 (N, K), 0 or 1 per label and NaN where unknown; None where items have none
            or one each.
        persons: int64 (N,); items of one number are of one person.
        present: bool (N,) per modality.
        sources: int64 (N,) per modality that several scanners make, -1 where unknown.
        pooled: float32 (N, E) per representation, such as `s2` or `s1+s2`.
        patches: float32 (M, E) per representation, sampled from the items where they have maps.
        patch_labels: int64 (M,) per representation.
        patch_items: int64 (M,) per representation, the row of the item.
        notes: Why something is left out, once each.
    """

    ids: list[str]
    labels: Array | None = None
    multi: Array | None = None
    persons: Array
    present: dict[str, Array] = field(default_factory=dict)
    sources: dict[str, Array] = field(default_factory=dict)
    pooled: dict[str, Array] = field(default_factory=dict)
    patches: dict[str, Array] = field(default_factory=dict)
    patch_labels: dict[str, Array] = field(default_factory=dict)
    patch_items: dict[str, Array] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def rows(self, subset: Iterable[str]) -> Array:
        """Return the items that have all these modalities, bool (N,)."""
        return np.logical_and.reduce([self.present[name] for name in subset])


def restricted(batch: Mapping[str, Any], subset: tuple[str, ...]) -> dict[str, Any]:
    """Return what the batch holds of some modalities, with their companions."""
    return {key: value for key, value in batch.items() if key.partition(".")[0] in subset}


def representation(features: Features, subset: tuple[str, ...]) -> Tensor:
    """Return one vector per item, (B, E): the fused one where there is one, else side by side."""
    pooled: dict[str, Tensor] = features.pooled
    if len(subset) > 1 and "joint" in pooled:
        return pooled["joint"]
    return torch.cat([pooled[name] for name in subset], dim=1)


def extract(
    backbone: Backbone | None,
    batches: Iterable[Mapping[str, Any]],
    modalities: Mapping[str, Modality],
    subsets: Iterable[tuple[str, ...]],
    *,
    persons: Mapping[str, int],
    device: torch.device,
    patches_per_item: int = 64,
    most: int | None = None,
    seen: Callable[[int], None] = lambda count: None,
) -> Items:
    """Run a backbone over a split; without one, take statistics per channel instead.

    Several windows of one item (equal ids) become one row, their mean.

    Args:
        backbone: In evaluation mode, on `device`; None for raw statistics.
        batches: Raw physical values.
        modalities: Those that data and backbone share.
        subsets: What is evaluated, names in the order of `modalities`.
        persons: Number of the person by id, where several items are of one.
        device: Where the backbone runs.
        patches_per_item: Patches kept of an item with a map, evenly spread.
        most: Items at most.
        seen: Called with the number of items of every batch.

    Raises:
        WeightsError: A feature is not finite.
    """
    subsets = list(subsets)
    rows: dict[str, list[Array]] = {}
    ids: list[str] = []
    notes: dict[str, None] = {}
    with torch.no_grad():
        for whole in batches:
            batch = whole if most is None else _first(whole, most - len(ids))
            count = len(batch[next(name for name in modalities if name in batch)])
            here = batch_to(batch, device)
            for name in modalities:
                if name in here:
                    here[name] = here[name].float()
            found = _of_batch(backbone, here, modalities, subsets, patches_per_item, notes)
            start = len(ids)
            given = batch.get("id")
            ids += [str(i) for i in given] if given else [str(start + i) for i in range(count)]
            for key, value in found.items():
                array = value.detach().cpu().numpy()
                rows.setdefault(key, []).append(
                    array + start if key.startswith("patch_items.") else array
                )
            seen(count)
            if most is not None and len(ids) >= most:
                break
    return _joined(ids, rows, persons, list(notes))


def _first(batch: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return the first items of a batch."""
    return {k: v[:count] if isinstance(v, Tensor | list) else v for k, v in batch.items()}


def _of_batch(
    backbone: Backbone | None,
    batch: Mapping[str, Any],
    modalities: Mapping[str, Modality],
    subsets: list[tuple[str, ...]],
    patches_per_item: int,
    notes: dict[str, None],
) -> dict[str, Tensor]:
    rows: dict[str, Tensor] = {}
    here = tuple(name for name in modalities if name in batch)
    for name in here:
        rows[f"present.{name}"] = present_mask(batch, name)
        source = batch.get(companion(name, "source"))
        if isinstance(source, Tensor):
            rows[f"sources.{name}"] = source.long()
    label = batch.get("label")
    if isinstance(label, Tensor) and label.ndim == 1 and not label.is_floating_point():
        rows["labels"] = label.long()
    for name in ("label", "label_multi"):
        several = batch.get(name)
        if isinstance(several, Tensor) and several.ndim == 2:
            rows["multi"] = several.float()
    raw = {n: band_statistics(batch, modalities[n]) for n in here} if backbone is None else {}
    for subset in subsets:
        if not set(subset) <= set(here):
            continue
        name = "+".join(subset)
        if backbone is None:
            rows[f"pooled.{name}"] = torch.cat([raw[n] for n in subset], dim=1)
            continue
        features = backbone(restricted(batch, subset))
        rows[f"pooled.{name}"] = representation(features, subset).float()
        if isinstance(batch.get("mask"), Tensor):
            tokens = patch_tokens(features, subset, backbone.modalities)
            if tokens is None:
                notes[f"{name}: no patches on one grid, so there is no dense probe of it"] = None
                continue
            values, item, wanted = patch_labels(*tokens, batch["mask"], patches_per_item)
            rows[f"patches.{name}"] = values.float()
            rows[f"patch_items.{name}"], rows[f"patch_labels.{name}"] = item, wanted
    return rows


def _joined(
    ids: list[str], rows: Mapping[str, list[Array]], persons: Mapping[str, int], notes: list[str]
) -> Items:
    """Join batches, and windows of one item."""
    names = list(dict.fromkeys(ids))
    position = {name: row for row, name in enumerate(names)}
    of_item = np.array([position[name] for name in ids], np.int64)
    first = np.unique(of_item, return_index=True)[1]
    numbers = {name: persons.get(name, -1 - row) for row, name in enumerate(names)}
    items = Items(
        ids=names, persons=np.array([numbers[name] for name in names], np.int64), notes=notes
    )
    for key, parts in rows.items():
        kind, _, name = key.partition(".")
        values = np.concatenate(parts)
        if kind.startswith("patch"):
            own: dict[str, Array] = getattr(items, kind)
            own[name] = of_item[values] if kind == "patch_items" else values
        elif kind == "labels":
            items.labels = values[first]
        elif kind == "multi":
            items.multi = values[first]
        elif kind in ("present", "sources"):
            getattr(items, kind)[name] = values[first]
        else:
            items.pooled[name] = _means(values, of_item, len(names))
    for name, found in (*items.pooled.items(), *items.patches.items()):
        if not np.isfinite(found).all():
            count = int((~np.isfinite(found)).any(1).sum())
            raise WeightsError(
                f"Features of {name} are not finite in {count} of {len(found)} rows. The weights "
                "hold NaN, or the data values that the normalisation cannot take; look at both "
                "with inspect."
            )
    return items


def _means(values: Array, of_item: Array, count: int) -> Array:
    """Return the mean of the rows of each item, (N, E) float32."""
    if len(values) == count:
        return values.astype(np.float32)
    total = np.zeros((count, values.shape[1]))
    np.add.at(total, of_item, values)
    return (total / np.bincount(of_item, minlength=count)[:, None]).astype(np.float32)


def save_items(path: Path, items: Items, key: str) -> None:
    """Write items to a safetensors file, complete or not at all.

    Args:
        path: The file.
        items: What is kept.
        key: What they were made of; `load_items` compares it.
    """
    arrays: dict[str, Array] = {"persons": items.persons}
    if items.labels is not None:
        arrays["labels"] = items.labels
    if items.multi is not None:
        arrays["multi"] = items.multi
    for kind in ("present", "sources", "pooled", "patches", "patch_labels", "patch_items"):
        arrays |= {f"{kind}.{name}": value for name, value in getattr(items, kind).items()}
    facts = {"key": key, "ids": json.dumps(items.ids), "notes": json.dumps(items.notes)}
    plain = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, save(plain, metadata=facts))


def load_items(path: Path, key: str) -> Items | None:
    """Return items that were kept; None where there are none made of the same.

    Raises:
        WeightsError: The file is damaged.
    """
    if not path.is_file():
        return None
    with parsing(
        f"{path}: kept features",
        kind=WeightsError,
        advice="Delete the file; it is made again.",
        also=(SafetensorError,),
    ):
        with safe_open(path, framework="numpy") as file:
            facts = file.metadata() or {}
            if facts.get("key") != key:
                return None
            items = Items(
                ids=json.loads(facts["ids"]),
                persons=file.get_tensor("persons"),
                notes=json.loads(facts["notes"]),
            )
            for name in list(file.keys()):
                kind, _, rest = name.partition(".")
                if kind in ("labels", "multi"):
                    setattr(items, kind, file.get_tensor(name))
                elif rest:
                    getattr(items, kind)[rest] = file.get_tensor(name)
    return items
