"""Cells of the matrix: every objective on every kind of data, found by scanning the recipes.

A recipe is a cell of its own. Where an objective has no recipe on a kind of data, a cell is
composed: the model of its nearest recipe, with what names modalities and sizes adapted, on the data
and trainer of the recipe that stands for the kind.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from itertools import combinations
from typing import Any

__all__ = ["COLUMNS", "Cell", "Column", "column_of", "find_cells"]


@dataclass(frozen=True)
class Column:
    """A kind of data.

    Attributes:
        title: Its name.
        word: Its name in those of composed cells, where a recipe has the usual name.
        prefixes: Beginnings of the names of its recipes, `<data>_<method>`.
        base: Recipe whose data and trainer stand for the kind in composed cells.
    """

    title: str
    word: str
    prefixes: tuple[str, ...]
    base: str


COLUMNS = (
    Column("S1/S2 images", "images", ("ssl4eo", "cube", "so2sat", "terramesh"), "ssl4eo_croma"),
    Column("series", "series", ("treesat", "pastis"), "pastis_maestro"),
    Column("CT and MR volumes", "volumes", ("ct", "ctmr", "petct"), "petct_croma"),
    Column("contrasts of MRI", "contrasts", ("mri",), "mri_croma"),
    Column("tiles", "tiles", ("tiles", "stains"), "stains_croma"),
    Column("feature grids of slides", "grids", ("slides",), "slides_titan"),
)
_SERIES = "series"
# arguments that hold one entry per modality, and what an entry for other data leaves out
_PER_MODALITY = ("views", "inputs", "patch_size")
_OF_THE_DATA = ("target_bands", "group", "image_size")
_EPOCHS = ("max_epochs", "check_val_every_n_epoch", "every_n_epochs")
_MOST_CHOICES = 6  # sets of modalities that are tried for a composed cell


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One objective on one kind of data.

    Attributes:
        name: `<data>_<method>`, the name of the recipe where there is one.
        objective: Its class.
        column: Title of the kind of data.
        config: The complete configuration.
        is_recipe: Whether a recipe holds it; composed otherwise.
        recipes: Recipes it comes from: itself, or those of the model and of the data.
        reason: Why the objective cannot use the data; empty where it can.
    """

    name: str
    objective: str
    column: str
    config: Mapping[str, Any] = field(repr=False)
    is_recipe: bool
    recipes: tuple[str, ...]
    reason: str = ""

    @property
    def sha256(self) -> str:
        """Hash of the configuration."""
        text = json.dumps(self.config, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def is_named(self, pattern: str) -> bool:
        """Tell whether a pattern such as `mri_*` fits its name, objective or kind of data."""
        return any(fnmatch(text, pattern) for text in (self.name, self.objective, self.column))


def find_cells(
    recipes: Mapping[str, Mapping[str, Any]],
    refusal: Callable[[Mapping[str, Any]], str],
    patterns: Sequence[str] = ("*",),
) -> list[Cell]:
    """Return every recipe as a cell, and a composed cell for every pair that no recipe covers.

    Args:
        recipes: Name to content of pretraining recipes.
        refusal: Says why a configuration cannot be built, or returns an empty text. A composed cell
            takes the first modalities of its data with which the objective can be built.
        patterns: Which cells are composed; of others only names are known, and `config` is empty.

    Returns:
        All cells by column, then objective.
    """
    objectives = sorted({_objective(content) for content in recipes.values()})
    found = []
    for column in _columns(recipes):
        own = {n: recipes[n] for n in sorted(recipes) if column_of(n, recipes[n]) == column.title}
        for objective in objectives:
            cells = [
                Cell(
                    name=name,
                    objective=objective,
                    column=column.title,
                    config=content,
                    is_recipe=True,
                    recipes=(name,),
                )
                for name, content in own.items()
                if _objective(content) == objective
            ]
            if not cells and column.base in recipes:
                cells = [_composed(objective, column, recipes, refusal, patterns)]
            found += cells
    return found


def column_of(name: str, recipe: Mapping[str, Any]) -> str:
    """Return the title of the kind of data of a recipe.

    Images of several dates are series, whichever archive they come from.
    """
    if recipe["data"]["init_args"].get("dates", {}).get("mode") in ("views", "all"):
        return _SERIES
    titles = [column.title for column in COLUMNS if _prefix(name) in column.prefixes]
    return titles[0] if titles else _prefix(name)


def _columns(recipes: Mapping[str, Any]) -> Sequence[Column]:
    """Return the columns, with one of its own for every kind of data that no column names."""
    known = {prefix for column in COLUMNS for prefix in column.prefixes}
    others = sorted({_prefix(name) for name in recipes} - known)
    more = [Column(p, p, (p,), min(n for n in recipes if _prefix(n) == p)) for p in others]
    return [*COLUMNS, *more]


def _prefix(name: str) -> str:
    return name.partition("_")[0]


def _objective(content: Mapping[str, Any]) -> str:
    return str(content["model"]["class_path"]).rpartition(".")[2]


def _composed(
    objective: str,
    column: Column,
    recipes: Mapping[str, Mapping[str, Any]],
    refusal: Callable[[Mapping[str, Any]], str],
    patterns: Sequence[str],
) -> Cell:
    base = recipes[column.base]
    candidates = [name for name in recipes if _objective(recipes[name]) == objective]
    donor = min(candidates, key=lambda name: (_distance(recipes[name], base), _rank(name)))
    method = donor.partition("_")[2]
    name = f"{_prefix(column.base)}_{method}"
    cell = Cell(
        name=f"{column.word}_{method}" if name in recipes else name,
        objective=objective,
        column=column.title,
        config={},
        is_recipe=False,
        recipes=(donor, column.base),
    )
    if not any(map(cell.is_named, patterns)):
        return cell
    refused: list[dict[str, Any]] = []
    for tried in _tries(recipes[donor], base):
        if tried in refused:
            continue
        said = refusal(tried)
        refused.append(tried)
        if not cell.config or not said:
            cell = replace(cell, config=tried, reason=said)
        if not said:
            break
    return cell


def _tries(donor: Mapping[str, Any], base: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the model of `donor` on the data of `base`, in the order of preference.

    As many modalities as the model was made for, the first ones first; then, for the first of
    them, with the normalisation of the model, with its patches and with its window.
    """
    names = tuple(_modalities(base))
    count = min(len(_modalities(donor)), len(names))
    choices = list(combinations(names, count))[:_MOST_CHOICES]
    for choice in choices:
        yield _joined(donor, base, choice, base)
    yield _joined(donor, base, choices[0], base, keep_normalization=True)
    yield _joined(donor, base, choices[0], donor)
    config = _joined(donor, base, choices[0], donor)
    window = donor["data"]["init_args"].get("window", {})
    if "size" in window and "window" in config["data"]["init_args"]:
        config["data"]["init_args"]["window"]["size"] = window["size"]
        yield config


def _joined(
    donor: Mapping[str, Any],
    base: Mapping[str, Any],
    names: tuple[str, ...],
    patches: Mapping[str, Any],
    *,
    keep_normalization: bool = False,
) -> dict[str, Any]:
    """Return the model of `donor` on the modalities `names` of `base`, with the patches of one."""
    config, model = copy.deepcopy(dict(base)), copy.deepcopy(dict(donor["model"]))
    old = tuple(_modalities(donor))
    model["init_args"] = _adapted(model["init_args"], old, names, _scale(donor, base))
    encoding = model["init_args"].get("encoding", {})
    of_data = base["model"]["init_args"].get("encoding", {})
    if "normalization" in encoding and "normalization" in of_data and not keep_normalization:
        encoding["normalization"] = of_data["normalization"]
    patch = _patch(patches["model"]["init_args"].get("encoding", {}))
    for part in (encoding, encoding.get("sizes") or {}):
        if isinstance(part.get("patch_size"), int) and isinstance(patch, int):
            part["patch_size"] = patch
    config["model"] = model
    left_out = set(_modalities(base)) - set(names)
    config["data"]["init_args"] = _without(config["data"]["init_args"], left_out)
    config["callbacks"] = {k: v for k, v in config.get("callbacks", {}).items() if k != "panels"}
    if _steps(donor) > 2 * _steps(base):
        return _longer(config, math.ceil(_steps(donor) / _steps(base)))
    return config


def _steps(recipe: Mapping[str, Any]) -> int:
    """Return how many steps a recipe trains: recipes log once per epoch."""
    trainer = recipe["trainer"]
    return int(trainer["max_epochs"] * trainer.get("log_every_n_steps", 1))


def _longer(value: Any, factor: int) -> Any:
    """Return a configuration with all counts of epochs multiplied."""
    if not isinstance(value, dict):
        return value
    return {
        k: factor * v if isinstance(v, int) and k in _EPOCHS else _longer(v, factor)
        for k, v in value.items()
    }


def _patch(encoding: Mapping[str, Any]) -> Any:
    """Return the length of the patches of a model, of its first modality where they differ."""
    inputs: Mapping[str, Any] = encoding.get("inputs") or {}
    first = next((each.get("patch_size") for each in inputs.values()), None)
    return encoding.get("patch_size", encoding.get("sizes", {}).get("patch_size", first))


def _without(value: Any, names: set[str]) -> Any:
    """Return arguments without the entries of some modalities."""
    if not isinstance(value, dict):
        return value
    return {k: _without(v, names) for k, v in value.items() if k not in names}


def _rank(name: str) -> tuple[int, str]:
    """Order recipes as the columns are, then by name."""
    places = [n for n, column in enumerate(COLUMNS) if _prefix(name) in column.prefixes]
    return (places[0] if places else len(COLUMNS), name)


def _distance(donor: Mapping[str, Any], base: Mapping[str, Any]) -> tuple[bool, bool]:
    """Rank donors: the same DataModule first, then as many modalities."""
    return (
        donor["data"]["class_path"] != base["data"]["class_path"],
        len(_modalities(donor)) != len(_modalities(base)),
    )


def _modalities(recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    return recipe["data"]["init_args"].get("modalities") or {}


def _scale(donor: Mapping[str, Any], base: Mapping[str, Any]) -> float:
    """Return how much smaller or larger the window of the data is; 1 where it has several sides."""
    sides = [r["data"]["init_args"].get("window", {}).get("size") for r in (donor, base)]
    if all(isinstance(side, int) for side in sides):
        return float(sides[1] / sides[0])
    return 1.0


def _adapted(value: Any, old: Sequence[str], new: Sequence[str], scale: float) -> Any:
    """Return arguments with modalities by place instead of name, and views scaled."""
    if not isinstance(value, dict):
        return value
    result: dict[str, Any] = {}
    for key, item in value.items():
        if key in _PER_MODALITY and isinstance(item, dict) and set(item) & set(old):
            first = next(iter(item.values()))
            if isinstance(first, dict):
                first = {k: v for k, v in first.items() if k not in _OF_THE_DATA}
            result[key] = {name: copy.deepcopy(first) for name in new}
        elif isinstance(item, str) and item in old:
            result[key] = new[min(old.index(item), len(new) - 1)]
        elif key.endswith(("view_size", "global_size", "local_size")) and isinstance(item, int):
            result[key] = max(8, round(item * scale / 8) * 8)
        else:
            result[key] = _adapted(item, old, new, scale)
    return result
