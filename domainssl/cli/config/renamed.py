"""Keys that were renamed: the mistake report answers an old one with its new name."""

from __future__ import annotations

from typing import Any

__all__ = ["new_name", "new_value"]

_SIZES = "with `size`, `min_size`, `max_size` instead of `size`, `min_px`, `max_px`"
_PROJECTOR = ("projector", "the widths of its layers, such as `[512, 128]`")
_PROJECTORS = {"projector_width": _PROJECTOR, "embedding_width": _PROJECTOR}


def _grouped(encoding: str) -> dict[str, tuple[str, str]]:
    """Return the keys of a method that moved into its groups."""
    groups = {"encoding": encoding, "execution": "seed check_units allow_accumulation"}
    moved = {key: group for group, keys in groups.items() for key in keys.split()}
    moved["reference"] = "options"
    return {key: (f"{group}.{key}", "") for key, group in moved.items()}


_PAIR = _PROJECTORS | _grouped("encoder sizes normalization weights")
_TILE_KEYS = {"footprint": ("window", "with `size` and `unit: m` instead of `size_m`")}

# owner (class that takes the key) -> old key -> new key, and how the value is written now
_RENAMED: dict[str, dict[str, tuple[str, str]]] = {
    "SSL4EOS12DataModule": {
        "products": ("modalities", ""),
        "crop": ("window", _SIZES),
        "mask_clouds": ("dates.mask_clouds", ""),
    },
    "SentinelCubeDataModule": {
        "layers": ("modalities", ""),
        "windows": ("window", "with `size` and `unit: m` instead of `side_m`"),
    },
    "TreeSatAIDataModule": _TILE_KEYS,
    "PastisDataModule": {
        **_TILE_KEYS,
        **{f"{split}_folds": (f"folds.{split}", "") for split in ("train", "val", "test")},
    },
    "Window": {
        "min_px": ("min_size", "with `unit: px`"),
        "max_px": ("max_size", "with `unit: px`"),
        "side_m": ("size", "with `unit: m`"),
        "size_m": ("size", "with `unit: m`"),
    },
    "Dates": {
        "take": ("mode", "and `views:3` is `mode: views` with `max_dates: 3`"),
        "most": ("max_dates", ""),
        "least_valid": ("min_valid_fraction", ""),
        "min_clear": ("min_valid_fraction", ""),
    },
    "HeldOut": {"share": ("val_fraction", ""), "gap_m": ("gap", "in metres")},
    "Loading": {"max_bad_share": ("max_bad_fraction", "")},
    "CROMA": _grouped("size architecture patch_size radar optical normalization weights"),
    "OmniSat": _grouped("size architecture patch_m patch_size grid calendar normalization weights"),
    "MAESTRO": _grouped(
        "inputs size architecture fusion shared_depth position_cells date_reference "
        "normalization weights"
    ),
    "DeCUR": _PAIR | _grouped("deformable_attention"),
    **dict.fromkeys(("BarlowTwins", "CLIP", "SimCLR", "VICReg"), _PAIR),
    "AtomicCheckpoint": {"keep": ("keep_last", "")},
}


def new_name(owner: str, key: str) -> str:
    """Return the advice for a key that a class once took, empty if it never did."""
    new, how = _RENAMED.get(owner, {}).get(key, ("", ""))
    return f"{key!r} is now {new!r}{f' ({how})' if how else ''}." if new else ""


def new_value(key: str, value: Any) -> str:
    """Return the advice for a value in the form that a key once had, else an empty text."""
    if key == "dates":
        if isinstance(value, str):
            mode, _, count = value.partition(":")
            most = f", max_dates: {count or 2}" if mode == "views" else ""
            return f"'dates' is now a mapping: {{mode: {mode}{most}}}."
        if isinstance(value, int | list):
            return f"'dates' is now a mapping: {{mode: fixed, positions: {value}}}."
    if key == "modalities" and isinstance(value, list):
        pairs = ", ".join(f"{name}: {name}" for name in value)
        return f"'modalities' is now a mapping of keys to what they read: {{{pairs}}}."
    return ""
