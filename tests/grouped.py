"""Write an objective's arguments flat in a test; they are grouped as its constructor takes them."""

from __future__ import annotations

from typing import Any

_GROUPS = {
    "encoding": (
        "size", "architecture", "patch_size", "patch_m", "patch_mm", "grid", "calendar", "radar",
        "optical", "inputs", "fusion", "shared_depth", "position_cells", "date_reference",
        "encoder", "sizes", "deformable_attention", "normalization", "weights",
    ),
    "execution": ("seed", "check_units", "allow_accumulation"),
    "options": ("reference",),
}  # fmt: skip


def grouped(**flat: Any) -> dict[str, Any]:
    """Return the arguments with those that have a group inside it, beside what it holds."""
    out: dict[str, Any] = {}
    for name, value in flat.items():
        group = next((g for g, members in _GROUPS.items() if name in members), None)
        if group is None and name in _GROUPS:
            known = value if isinstance(value, dict) else vars(value)
            out[name] = {**known, **out.get(name, {})}
        elif group is None:
            out[name] = value
        else:
            out[group] = {**out.get(group, {}), name: value}
    return out
