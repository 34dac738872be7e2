"""Which commands come after `inspect` of data: measure, train, tile, embed."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from domainssl.screen import COMMAND

__all__ = ["following"]

_RECIPES = {  # that read the root of their DataModule without further choices
    "SSL4EOS12DataModule": "ssl4eo_croma",
    "TerraMeshDataModule": "terramesh_croma",
    "SentinelCubeDataModule": "cube_croma",
    "TreeSatAIDataModule": "treesat_omnisat",
    "PastisDataModule": "pastis_maestro",
}
_LISTS = ("scans", "files", "arrays", "slides", "pictures", "bags")  # of a report
_SENSORS = {"S1GRD", "S2L2A"}  # that the recipe of SSL4EO-S12 reads


def following(report: Mapping[str, Any], words: Sequence[str] = ()) -> list[str]:
    """Return the next commands for what a report of data describes.

    Args:
        report: Of `inspect_path` or `inspect_data`, with its `path`.
        words: Options that chose the data, `--config=FILE` first; none of a path.
    """
    if words:
        chosen = shlex.join(words)
        return [f"{COMMAND} stats {chosen} --output stats.yaml", f"{COMMAND} fit {chosen}"]
    path = shlex.quote(str(report["path"]))
    if _is_unreadable(report):
        return []
    kind, is_file = report["kind"], os.path.isfile(report["path"])
    if kind == "data":
        recipe = _RECIPES.get(str(report["data"]))
        return [f"{COMMAND} stats {path} --output stats.yaml", *_trained(recipe, path)]
    if kind == "ssl4eo":
        products = [set(split["products"]) for split in report["splits"].values()]
        recipe = "ssl4eo_croma" if products and products[0] >= _SENSORS else None
        return [f"{COMMAND} stats {path} --output stats.yaml", *_trained(recipe, path)]
    if kind == "scans":
        if is_file:
            return [f"{COMMAND} embed BACKBONE {path} --output {_beside(path, '.nii.gz')}"]
        return [f"{COMMAND} inspect --config RECIPE --data.root={path}", f"{COMMAND} recipes"]
    if kind == "slides":
        asked = "" if any(slide["mpp"] for slide in report["slides"]) else " --mpp_um UM"
        return [
            f"{COMMAND} tile {path} --output GRIDS{asked}",
            f"{COMMAND} embed BACKBONE {path} --output BAGS{asked}",
        ]
    if kind == "pictures":
        if is_file:
            return []
        options = f"--config recipes/tiles_mae.yaml --data.root={path} --data.tiles.mpp_um=UM"
        return [f"{COMMAND} inspect {options}", f"{COMMAND} fit {options}"]
    if kind == "bags":
        return _of_bags(report, path, is_folder=not is_file and report["layout"] != "file")
    if kind in ("geotiff", "cube"):
        return [f"{COMMAND} embed BACKBONE {path} --output {_beside(path, '.zarr')}"]
    return []


def _is_unreadable(report: Mapping[str, Any]) -> bool:
    """Tell whether nothing of what lies there could be read, or nothing in it is valid."""
    if not report.get("problems"):
        return False
    listed = [report[name] for name in _LISTS if name in report]
    is_blank = report["kind"] == "scans" and not report["measured"]
    return is_blank or (bool(listed) and not any(listed))


def _trained(recipe: str | None, path: str) -> list[str]:
    if recipe is None:
        return []
    return [f"{COMMAND} fit --config recipes/{recipe}.yaml --data.root={path}"]


def _of_bags(report: Mapping[str, Any], path: str, *, is_folder: bool) -> list[str]:
    """Return how bags are trained on, with their width and resolution, converted and pooled."""
    after = [f"{COMMAND} embed SLIDE_BACKBONE {path} --output slides.parquet"]
    if not is_folder or not report["bags"]:
        return after
    first = report["bags"][0]
    options = f"--config recipes/slides_titan.yaml --data.root={path}"
    options += f" --data.modalities.tile_features.dim={first['dim']}"
    if first["mpp_um"]:
        options += f" --data.modalities.tile_features.mpp_um={first['mpp_um']:g}"
    return [
        f"{COMMAND} inspect {options}",
        f"{COMMAND} stats {options} --output stats.yaml",
        f"{COMMAND} fit {options} --data.statistics=stats.yaml",
        *after,
    ]


def _beside(path: str, ending: str) -> str:
    """Return a name for the embedding of a file."""
    name = os.path.basename(path.strip("'").rstrip("/")).partition(".")[0]
    return shlex.quote(f"{name}_embedding{ending}")
