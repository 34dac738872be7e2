"""The command line's recipes for Python: build a run, list what there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from domainssl.cli.config import catalog
from domainssl.errors import ConfigError, nearest

if TYPE_CHECKING:
    from domainssl.cli.run.evaluating import Evaluation

__all__ = ["build", "evaluate", "list_datamodules", "list_objectives", "list_tasks"]


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


def evaluate(
    *backbones: str | Path,
    config: str | Path | Sequence[str | Path] = (),
    output: str | Path = "evaluation",
    split: str | None = None,
    protocols: Sequence[str] | None = None,
    seeds: int = 3,
    resamples: int = 1000,
    max_items: int | None = None,
    baselines: bool = True,
    device: str = "auto",
    thumbnails: bool = False,
    data: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Measure what frozen features of backbones tell about the labels of data.

        found = domainssl.evaluate("runs/a", "mine=exported", output="evaluation")
        found.value("mine", "s2", "linear", "accuracy")

    Writes what `python -m domainssl evaluate` writes, with the same figures.

    Args:
        *backbones: Folders of runs, exports, checkpoints or `hf://…`, perhaps as `LABEL=PLACE`.
        config: Files with a data section; none takes that of the first run.
        output: Folder for `evaluation.csv`, `evaluation.json`, `report.html` and kept features.
        split: Where is measured; None takes `test`, else `val`.
        protocols: Names out of `domainssl.evaluation.comparison.PROTOCOLS`; None takes all.
        seeds: Runs of what is random.
        resamples: Draws of the bootstrap.
        max_items: Items of a split at most.
        baselines: Add untrained backbones and raw statistics.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        thumbnails: Show pictures of items whose ids are protected, too.
        data: Values over those of `config`, such as `{"root": "/data"}`.

    Returns:
        The rows, and where they were written.

    Raises:
        ConfigError: An argument or the configuration cannot be used.
        DataError: The data cannot be evaluated by.
        WeightsError: A backbone cannot be loaded, or does not fit the data.
    """
    from domainssl.cli.run.evaluating import Request, evaluate_backbones
    from domainssl.evaluation.comparison import PROTOCOLS, Protocol

    files = [config] if isinstance(config, str | Path) else list(config)
    return evaluate_backbones(
        Request(
            backbones=tuple(map(str, backbones)),
            config=tuple(map(str, files)),
            more=tuple(_words({"data": dict(data)}) if data else ()),
            output=Path(output),
            split=split,
            protocol=Protocol(
                names=tuple(protocols or PROTOCOLS), seeds=tuple(range(seeds)), resamples=resamples
            ),
            max_items=max_items,
            baselines=baselines,
            device=device,
            thumbnails=thumbnails,
        )
    )


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
