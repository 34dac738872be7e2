"""Miniature EOPF products with the tree, types, codecs and attributes of real ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["L1C", "L2A", "S1", "SHARDED", "miniature"]

L2A = "S2A_MSIL2A_20251008T100041_N0511_R122_T32TQM_20251008T122613"
L1C = "S2B_MSIL1C_20250113T103309_N0511_R108_T32TLQ_20250113T122458"
S1 = "S1A_IW_GRDH_1SDV_20241218T180252_20241218T180317_057050_0702F2_0BC2"
SHARDED = f"geozarr_sharded_{L2A}"
Array = np.ndarray[Any, Any]


def miniature(
    metadata: Path, path: Path, shrink: int, fill: Callable[[str, tuple[int, ...]], Array | None]
) -> Path:
    """Write a product whose images are `shrink` times smaller, chunks too.

    Args:
        metadata: The real product's tree.
        path: Where to write.
        shrink: Factor along y, x, azimuth_time and ground_range.
        fill: Values of an array by its path and new shape; None leaves out its chunks.
    """
    import zarr

    tree = json.loads(metadata.read_text())
    version = int(tree["zarr_format"])
    root = zarr.open_group(str(path), mode="w", zarr_format=version)
    root.attrs.update(tree["attributes"])
    for name, node in _walk(tree):
        if "shape" not in node:
            root.require_group(name).attrs.update(node["attributes"])
            continue
        dims = node.get("dimension_names") or node["attributes"].get("_ARRAY_DIMENSIONS", [])
        sizes = zip(node["shape"], [*dims, *[""] * 9], strict=False)
        shape = tuple(max(1, n // shrink) if _is_large(d, n) else n for n, d in sizes)
        if version == 2:
            chunks = tuple(min(n, max(1, c // shrink) if n < full else c) for n, c, full in
                           zip(shape, node["chunks"], node["shape"], strict=True))  # fmt: skip
            array = root.create_array(
                name, shape=shape, dtype=np.dtype(node["dtype"]), chunks=chunks or "auto",
                fill_value=_plain(node["fill_value"]), compressors=_codec(node["compressor"]),
            )  # fmt: skip
        else:
            inner = tuple(n // 4 if n >= 8 and n % 4 == 0 else n for n in shape)
            sharded = any("shard" in c["name"] for c in node["codecs"]) and inner != shape
            array = root.create_array(
                name, shape=shape, dtype=node["data_type"], dimension_names=dims or None,
                chunks=inner or "auto", shards=shape if sharded else None,
                fill_value=_plain(node["fill_value"]),
            )  # fmt: skip
        array.attrs.update(_shrunk(node["attributes"], shape, shrink))
        values = fill(name, shape)
        if values is not None:
            array[...] = values
    return path


def _walk(node: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, child in (node.get("members") or {}).items():
        here = f"{path}/{name}".lstrip("/")
        yield here, child
        yield from _walk(child, here)


def _is_large(dim: str, size: int) -> bool:
    return size >= 100 and dim in ("y", "x", "azimuth_time", "ground_range")


def _shrunk(attrs: Mapping[str, Any], shape: tuple[int, ...], shrink: int) -> dict[str, Any]:
    """Keep the corner of the grid; the product is smaller, not coarser."""
    attrs = dict(attrs)
    if "proj:shape" in attrs:
        attrs["proj:shape"] = list(shape[-2:])
    return attrs


def _plain(value: Any) -> Any:
    return float("nan") if value == "NaN" else value


def _codec(config: Mapping[str, Any] | None) -> Any:
    import numcodecs

    return numcodecs.get_codec(dict(config)) if config else None
