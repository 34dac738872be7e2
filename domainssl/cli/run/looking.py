"""Which data `stats`, `inspect` and `embed` look at: of a configuration, a sample, or a path."""

from __future__ import annotations

from typing import Any

from domainssl.errors import ConfigError, nearest

__all__ = ["data_at"]

_SAMPLES = {  # name -> DataModule and its root
    "ssl4eo": ("ssl4eo.SSL4EOS12DataModule", "sample"),
    "objects": ("ssl4eo.SSL4EOS12DataModule", "sample:objects"),
    "terramesh": ("terramesh.TerraMeshDataModule", "sample"),
    "relief": ("terramesh.TerraMeshDataModule", "sample:relief"),
    "cubes": ("cubes.SentinelCubeDataModule", "sample"),
    "so2sat": ("dataset.DatasetDataModule", "sample"),
    "treesatai": ("treesatai.TreeSatAIDataModule", "sample"),
    "pastis": ("pastis.PastisDataModule", "sample"),
    "crops": ("pastis.PastisDataModule", "sample:crops"),
    "ctmr": ("volumes.VolumeDataModule", "sample:ctmr"),
    "petct": ("volumes.VolumeDataModule", "sample:petct"),
    "upright": ("volumes.VolumeDataModule", "sample:upright"),
    "heads": ("volumes.VolumeDataModule", "sample:heads"),
    "visits": ("volumes.VolumeDataModule", "sample:visits"),
    "brain": ("volumes.VolumeDataModule", "sample:brain"),
    "organs": ("volumes.VolumeDataModule", "sample:organs"),
    "lesions": ("volumes.VolumeDataModule", "sample:lesions"),
    "tiles": ("tiles.TileDataModule", "sample:tiles"),
    "slide": ("tiles.TileDataModule", "sample:slide"),
    "bags": ("slides.SlideFeatureDataModule", "sample:bags"),
    "bags_clam": ("slides.SlideFeatureDataModule", "sample:bags_clam"),
    "cohort": ("slides.SlideFeatureDataModule", "sample:cohort"),
}
# name -> recipe whose data section says which layers it has
_OF_RECIPES = {"weather": "recipes/cube_galileo.yaml", "change": "recipes/finetune_change.yaml"}
_SIZES = {"tiles": 64, "terramesh": 64, "relief": 32, "volumes": 32}  # px, voxels


def data_at(path: str | None, config: list[str], more: list[str], verb: str) -> Any:
    """Return the DataModule of `--config FILE ...` or of `sample:NAME`, None for other paths.

    Raises:
        ConfigError: Neither or both are given, or they cannot be used.
    """
    if config:
        from domainssl.cli.run.train import build_data

        if path is not None:
            raise ConfigError(f"{verb}: give a path, or --config, but not both.")
        return build_data([*(f"--config={file}" for file in config), *more])
    if more:
        raise ConfigError(
            f"{verb}: {more[0]!r} changes the data of a recipe. Add --config RECIPE, or leave "
            "the option out."
        )
    if path is None:
        raise ConfigError(f"{verb}: which data? Give a path, or --config RECIPE.")
    kind, colon, name = path.partition(":")
    if kind != "sample" or not colon:
        return None
    if name in _OF_RECIPES:
        from domainssl.cli.config.catalog import recipes
        from domainssl.cli.run.train import build_data

        return build_data([f"--config={recipes()[_OF_RECIPES[name]]}"])
    if name not in _SAMPLES:
        known = [*_SAMPLES, *_OF_RECIPES]
        raise ConfigError(
            f"{verb} {path}: there is no sample {name!r}, only {', '.join(known)}."
            f"{nearest(name, known)}"
        )
    from importlib import import_module

    path, root = _SAMPLES[name]
    module, _, title = path.partition(".")
    build = getattr(import_module(f"domainssl.datamodules.{module}"), title)
    if name == "relief":
        return build(root=root, modalities={"rgb": "S2RGB", "dem": "DEM"}, window=_window(name))
    return build(root=root, window=_window(module)) if module in _SIZES else build(root=root)


def _window(module: str) -> Any:
    """Return a window that lies inside of the embedded pictures and exams."""
    from domainssl.sources.volume_options import ExamWindow
    from domainssl.sources.windows import Window

    return (ExamWindow if module == "volumes" else Window)(size=_SIZES[module])
