"""Where the backbone of a task comes from: trained weights, or a recipe's architecture without."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from domainssl.backbones.base import Backbone
from domainssl.backbones.registry import backbone_class, load_backbone
from domainssl.errors import ConfigError, nearest, parsing
from domainssl.modality import Modality

__all__ = ["starting_backbone", "tell_start", "warn_if_random"]

logger = logging.getLogger(__name__)

_RECIPE = "recipe:"
_REGION = 16  # rows and columns of tiles, as TITAN's
_WHERE = "model.init_args.backbone"


def starting_backbone(
    source: str | Mapping[str, Any] | Backbone,
    modalities: Mapping[str, Modality],
    context_size: int | tuple[int, ...] | None = None,
) -> Backbone:
    """Return the backbone that a task starts from, to be trained.

    Args:
        source: What `load_backbone` reads; `recipe:NAME` for the architecture of a recipe with
            random weights; name and arguments of a class, whose weights follow; or a backbone.
        modalities: Those of the data, all of which the backbone has to know.
        context_size: Window of the data, for a recipe.

    Raises:
        ConfigError: There is no such recipe.
        WeightsError: The weights cannot be used, or the data do not fit.
    """
    if isinstance(source, Backbone):
        backbone = source
        backbone.check(modalities)
    elif isinstance(source, Mapping):
        cls = backbone_class(str(source["name"]))
        backbone = cls(**cls.current_arguments(source["arguments"]))
        backbone.check(modalities)
    elif source.startswith(_RECIPE):
        backbone = _of_recipe(source.removeprefix(_RECIPE), modalities, context_size)
    else:
        backbone = load_backbone(source, modalities=modalities)
    return backbone


def _of_recipe(
    name: str, modalities: Mapping[str, Modality], context_size: int | tuple[int, ...] | None
) -> Backbone:
    """Build the objective of a recipe for these data, and take its backbone."""
    from jsonargparse import ArgumentParser

    from domainssl.training.module import TrainingModule

    model = _model_of(_recipe_file(name))
    arguments = dict(model.get("init_args") or {})
    shown = {key: _on_a_grid(m) for key, m in modalities.items()}
    arguments["modalities"] = {key: m.to_dict() for key, m in shown.items()}
    if shown != dict(modalities):
        context_size = None
    if isinstance(arguments.get("encoding"), dict):
        arguments["encoding"] = {**arguments["encoding"], "weights": None}
    if context_size is not None:
        arguments.setdefault("context_size", context_size)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(TrainingModule, "model")
    spec = {"class_path": _full_name(str(model["class_path"])), "init_args": arguments}
    module = parser.instantiate(parser.parse_object({"model": spec})).model
    backbone: Backbone = module.backbone
    backbone.requires_grad_(True)
    return backbone


def tell_start(source: object) -> str:
    """Return where weights come from, for the start of a run.

    Args:
        source: What `starting_backbone` was given, as tasks record it.
    """
    if isinstance(source, Mapping):
        return f"a new {str(source.get('name')).rpartition('.')[2]}"
    text = str(source)
    if text.startswith(_RECIPE):
        return f"random weights, in the architecture of the recipe {text.removeprefix(_RECIPE)}"
    return f"the backbone of {text}"


def warn_if_random(source: object) -> None:
    """Warn where a recipe names the architecture alone, and its random weights are used."""
    if isinstance(source, str) and source.startswith(_RECIPE):
        logger.warning(
            "%s: %s. Give --model.backbone=RUN to start from trained ones.",
            _WHERE, tell_start(source),
        )  # fmt: skip


def _on_a_grid(modality: Modality) -> Modality:
    """Return features of a bag as those of a region: objectives want one, backbones take both."""
    if modality.kind != "features" or len(modality.size) != 1:
        return modality
    return dataclasses.replace(modality, size=(_REGION, _REGION))


def _recipe_file(name: str) -> Path:
    """Return the file of a recipe, out of the working directory or of the package."""
    if name.endswith((".yaml", ".yml")) and Path(name).is_file():
        return Path(name)
    folders = (Path("recipes"), Path(__file__).resolve().parents[1] / "recipes")
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    known = sorted(path.stem for path in folders[1].glob("*.yaml"))
    known = [stem for stem in known if not stem.startswith("finetune_")]
    raise ConfigError(
        f"{_WHERE}: there is no recipe {name!r}.{nearest(name, known)} Known: {', '.join(known)}."
    )


def _model_of(path: Path) -> dict[str, Any]:
    with parsing(f"{_WHERE}: {path}", kind=ConfigError, advice="Give a recipe of pretraining."):
        model = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
        if str(model["class_path"]).endswith("Task"):
            raise ConfigError(f"{_WHERE}: {path} is no recipe of pretraining. Give one of those.")
    return dict(model)


def _full_name(name: str) -> str:
    """Return the dotted path of an objective; a short name is looked up where objectives are."""
    if "." in name:
        return name
    import importlib

    cls = getattr(importlib.import_module("domainssl.objectives"), name)
    return f"{cls.__module__}.{cls.__qualname__}"
