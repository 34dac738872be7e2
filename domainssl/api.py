"""The command line's recipes for Python: build a run, list what there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from domainssl.cli.config import catalog
from domainssl.errors import ConfigError, nearest

__all__ = ["build", "list_datamodules", "list_objectives", "list_tasks"]


def build(recipe: str | Path, *overlays: str | Path, **overrides: Any) -> Any:
    """Build the trainer, model and data of a recipe, as `fit` does, without running anything.

        run = domainssl.build("ssl4eo_croma", trainer={"max_epochs": 2})
        run.trainer.fit(run.model, run.datamodule)

    Args:
        recipe: Name of a shipped recipe, such as `ssl4eo_croma`, or the path of a YAML file.
        *overlays: Paths of partial YAML files, merged into the recipe from left to right.
        **overrides: Values by section, such as `data={"root": "/data/ssl4eo"}`,
            `model={"mask_ratio": 0.6}`; mappings are merged, everything else is replaced.

    Returns:
        An object with `trainer`, `model` and `datamodule`.

    Raises:
        ConfigError: There is no such recipe, or the configuration has mistakes; all are listed.
    """
    from domainssl.cli.run.train import build as build_run

    words = [f"--config={_recipe(recipe)}", *(f"--config={path}" for path in overlays)]
    return build_run("fit", [*words, *_words(overrides)])


def _recipe(name: str | Path) -> str:
    known = {Path(path).stem: path for path in catalog.recipes()}
    if Path(name).suffix in (".yaml", ".yml"):
        return str(name)
    if str(name) not in known:
        raise ConfigError(
            f"There is no recipe {str(name)!r}.{nearest(str(name), known)} Known: "
            f"{', '.join(known)}; or give the path of a YAML file."
        )
    return known[str(name)]


def _words(values: Mapping[str, Any], prefix: str = "") -> Sequence[str]:
    """Return the words of the command line that set the same values."""
    import json

    words: list[str] = []
    for key, value in values.items():
        name = f"{prefix}.{key}" if prefix else key
        if isinstance(value, Mapping) and value:
            words += _words(value, name)
        else:
            words.append(f"--{name}={value if isinstance(value, str) else json.dumps(value)}")
    return words


def list_objectives(pattern: str = "*") -> list[str]:
    """Return the names of the objectives, such as `CROMA`.

    Args:
        pattern: Shell pattern, such as `*Twins`.
    """
    return _models("objectives", pattern)


def list_tasks(pattern: str = "*") -> list[str]:
    """Return the names of the tasks, such as `ClassificationTask`.

    Args:
        pattern: Shell pattern, such as `*Task`.
    """
    return _models("tasks", pattern)


def _models(package: str, pattern: str) -> list[str]:
    found = catalog.find_classes("model").items()
    start = f"domainssl.{package}."
    return [name for name, path in found if path.startswith(start) and fnmatch(name, pattern)]


def list_datamodules(pattern: str = "*") -> list[str]:
    """Return the names of the DataModules, such as `SSL4EOS12DataModule`.

    Args:
        pattern: Shell pattern, such as `SSL4EO*`.
    """
    return [name for name in catalog.find_classes("data") if fnmatch(name, pattern)]
