"""Sentinel cubes of your own: Zarr stores, EOPF products or GeoTIFF, several sensors per place.

    data = SentinelCubeDataModule(root="sample", global_batch_size=32)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))     # s1 (32, 2, 64, 64), s2 (32, 12, 64, 64)

In `sources/`, `cube_options.py` holds the options, `cube_sites.py` finds files, `cube_blocks.py`
cuts and splits places, `cubes.py` reads windows.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any, Literal

from domainssl.datamodules.base import DomainDataModule, check_labels, named_sample
from domainssl.datamodules.statistics import statistics_of
from domainssl.errors import ConfigError, DataError
from domainssl.io.raster.bands import open_store
from domainssl.io.raster.layer import LayerFile
from domainssl.io.storage.paths import list_folder
from domainssl.loading.source import Loading, Source
from domainssl.modality import Modality, as_modalities
from domainssl.sources.cube_blocks import Block, blocks_of, hold_out
from domainssl.sources.cube_offsets import untold_offsets
from domainssl.sources.cube_options import Labels, Layer, default_layers, finest_m, snap_m
from domainssl.sources.cube_sites import Site, open_sites
from domainssl.sources.cubes import CubeSource
from domainssl.sources.dates import Dates
from domainssl.sources.held_out import HeldOut
from domainssl.sources.windows import Window

__all__ = ["SentinelCubeDataModule"]

_log = logging.getLogger(__name__)
_WINDOW = Window(size=1200.0, unit="m")
_USED_DATES = ("max_dates", "start", "end", "span_days", "max_gap_days", "min_valid_fraction")


class SentinelCubeDataModule(DomainDataModule):
    """Windows of co-registered cubes, the same rectangle of the world from every layer.

    One item is one window; an epoch visits every place once. A block of windows, bounded by chunk
    borders, is decoded at once.

    Args:
        root: `sample` (made on first use in the cache), `sample:change` (two dates and a map of
            what changed) or `sample:weather` (with heights and a year's weather), a folder, a
            store, or an fsspec URL.
        modalities: The sensors by modality key; None means Sentinel-1 in `s1` and the 12 bands of
            Sentinel-2 L2A in `s2`.
        global_batch_size: Windows per optimiser step, over all devices and accumulation.
        window: Their size, 1200 m by default, and how they are drawn.
        dates: Dates, drawn per block and epoch; `one` by default.
        held_out: Which part is held out.
        labels: A map of classes beside the data, delivered as `mask` with `labels.mask`; `auto`
            takes the folder `labels` if there is one; None.
        on_bad_sample: `raise`, or `replace` by the next good window.
        statistics: `published` (of SSL4EO-S12, and what layers state), a YAML or JSON file, or
            `card` (those of the model's weights).
        storage_options: fsspec options of a URL.
        seed: Seed of order, windows and dates.
        loading: Worker processes and memory.

    Raises:
        ConfigError: An argument cannot be used.
    """

    def __init__(
        self,
        root: str = "sample",
        modalities: dict[str, Layer] | None = None,
        global_batch_size: int = 128,
        window: Window | None = None,
        dates: Dates | None = None,
        held_out: HeldOut | None = None,
        labels: Labels | str | None = "auto",
        on_bad_sample: Literal["raise", "replace"] = "raise",
        statistics: str = "published",
        storage_options: dict[str, Any] | None = None,
        seed: int = 0,
        loading: Loading | None = None,
    ) -> None:
        super().__init__(
            global_batch_size=global_batch_size,
            seed=seed,
            on_bad_sample=on_bad_sample,
            loading=loading,
        )
        check_labels(labels, "path, variable and names")
        self.root = root
        asked = dict(modalities or default_layers())
        self.locations = [name for name, layer in asked.items() if layer.is_location]
        self.layers = {n: layer for n, layer in asked.items() if not layer.is_location}
        self.timeless = tuple(name for name, layer in self.layers.items() if layer.is_static)
        if not self.layers:
            raise ConfigError(
                "data.init_args.modalities: no layer has files; name one without is_location."
            )
        self._asked = (window or Window()).sized(_WINDOW)
        self._asked.must_not_resize()
        self.window = self._on_grid(snap_m(self.layers), "pixels of the coarsest modality")
        self.dates = (dates or Dates()).of(
            ("one", "views", "all"), _USED_DATES, min_valid_fraction=0.1
        )
        self.held_out = (held_out or HeldOut()).of(("val_fraction", "sites", "gap", "seed"))
        self.labels = labels
        self.statistics = statistics
        self.storage_options = dict(storage_options or {})
        self.sites: list[Site] = []
        self.blocks: dict[str, list[Block]] = {}
        self._problems: list[str] = []
        self._opened: tuple[list[Site], list[str]] | None = None
        self._modalities = as_modalities(
            {name: self._modality(name, layer) for name, layer in asked.items()}
        )

    def _on_grid(self, cell_m: float, name: str) -> Window:
        return self._asked.on_grid(cell_m, px_m=finest_m(self.layers), name=name)

    def _modality(self, name: str, layer: Layer) -> Modality:
        if layer.is_location:
            return layer.modality(name, (), is_series=False)
        size = self._on_grid(layer.gsd_m, f"pixels of {name!r}").shape
        facts = layer.modality(name, size, is_series=self.dates.is_series)
        return statistics_of(facts, self.statistics)

    @property
    def modalities(self) -> dict[str, Modality]:
        """The layers by their keys; statistics as asked for."""
        return self._modalities

    def prepare_data(self) -> None:
        """Write the embedded sample, and open the sites, once per machine for all processes."""
        self._root()
        with suppress(DataError):  # setup says it, on every rank: here the others would wait
            self._opened = self._open_sites()

    def _root(self) -> str:
        if self.root == "sample":
            from domainssl.datamodules.samples.cubes import sample_root

            return str(sample_root())
        name = named_sample(self.root, ("change", "weather"))
        if name == "change":
            from domainssl.datamodules.samples.change import sample_root as change_root

            return str(change_root())
        if name == "weather":
            from domainssl.datamodules.samples.weather import sample_root as weather_root

            return str(weather_root())
        return self.root

    def open_sources(self) -> dict[str, Source]:
        """Find the sites, cut them into blocks and hold some out; predict on those."""
        root = self._root()
        labels = self._label_layer(root)
        (self.sites, self._problems), self._opened = self._opened or self._open_sites(), None
        for problem in self._problems:
            _log.warning("%s: %s", root, problem)
        blocks = [
            block
            for number, site in enumerate(self.sites)
            for block in blocks_of(number, site, self.layers, self.window)
        ]
        train, val, left_out = hold_out(self.sites, blocks, self.held_out)
        self.blocks = {"train": train, "val": val} if val else {"train": train}
        if left_out:
            _log.info(
                "%d training blocks overlap held-out ones or come too near: left out", left_out
            )
        if not val:
            _log.warning("%s: nothing is held out for validation", root)
        if labels is not None:
            self.label_names = self._names(labels)
        sources: dict[str, Source] = {
            split: self._source(found, is_training=split == "train")
            for split, found in self.blocks.items()
        }
        sources["predict"] = self._source(val or train, is_training=False)
        return sources

    def _open_sites(self) -> tuple[list[Site], list[str]]:
        root = self._root()
        sites, problems = open_sites(
            root,
            self.layers,
            self.dates,
            self.window,
            self._label_layer(root),
            self.storage_options,
        )
        return sites, problems + untold_offsets(sites, self.layers)

    def _source(self, blocks: list[Block], *, is_training: bool) -> CubeSource:
        return CubeSource(
            sites=self.sites,
            blocks=blocks,
            layers=self.layers,
            window=self.window,
            dates=self.dates,
            seed=self.seed,
            is_training=is_training,
            label_names=self.label_names,
            has_mask=isinstance(self.labels, Labels) and self.labels.mask,
            locations=self.locations,
        )

    def _label_layer(self, root: str) -> Layer | None:
        labels = self.labels
        if labels is None:
            return None
        if isinstance(labels, str):
            if "labels" not in list_folder(root, self.storage_options):
                return None
            labels = Labels()
        first = next(iter(self.layers.values()))
        return Layer(
            bands=(labels.variable,),
            path=labels.path,
            value_unit="arbitrary",
            stored_unit="arbitrary",
            gsd_m=first.gsd_m,
            crs=first.crs,
            nodata=labels.nodata,
        )

    def _names(self, layer: Layer) -> tuple[str, ...] | None:
        """Return the class names: as asked for, or what the first map says."""
        if isinstance(self.labels, Labels) and self.labels.names:
            return tuple(self.labels.names)
        maps = [site.labels for site in self.sites if site.labels is not None]
        if not maps:
            return None
        names = _flag_meanings(maps[0], self.storage_options)
        if names is None:
            raise ConfigError(
                f"{maps[0].path}: the map of classes does not name them (flag_values and "
                "flag_meanings). List them in data.init_args.labels.names."
            )
        return names

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes: those of the maps, known after setup, or those asked for."""
        asked = self.labels.names if isinstance(self.labels, Labels) else ()
        return self.label_names or tuple(asked) or None

    @property
    def num_classes(self) -> int | None:
        """Number of classes, None without labels; known after setup."""
        return len(self.label_names) if self.label_names is not None else None

    def identity(self) -> dict[str, Any]:
        """Return names, extents and header hashes of the sites, and how they are split."""
        return {
            "format": "cubes",
            "root": self.root,
            "sites": {
                site.name: {
                    "crs": site.crs if len(site.crs) < 20 else "WKT",
                    "bounds": [float(v) for v in (site.bounds.left, site.bounds.bottom,
                                                  site.bounds.right, site.bounds.top)],
                    "headers": site.digest(),
                }
                for site in self.sites
            },
            "blocks": {split: len(blocks) for split, blocks in self.blocks.items()},
        }  # fmt: skip

    @property
    def problems(self) -> list[str]:
        """Sites that were left out, and why; layers whose numbers nothing explains."""
        return list(self._problems)

    def describe(self) -> list[str]:
        """Return lines that tell what was found."""
        lines = [f"{len(self.sites)} sites in {self.root}"]
        lines += [f"problem: {text}" for text in self._problems]
        for name in self.layers:
            modality = self.modalities[name]
            theirs = [site.layers[name] for site in self.sites]
            counts = sorted({len(layer.times) for layer in theirs})
            span = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
            lines.append(
                f"{name}: {modality.num_channels} bands {' '.join(modality.channels)} "
                f"({modality.value_unit}), {modality.size[0]} px of {modality.gsd_m:g} m, "
                f"{span} dates per site, {theirs[0].files[0].kind}"
            )
        lines += [f"{name}: middle of the window in degrees" for name in self.locations]
        names = self.label_names
        lines.append("labels: none" if names is None else f"labels: {', '.join(names)}")
        return lines + super().describe()


def _flag_meanings(file: LayerFile, options: dict[str, Any]) -> tuple[str, ...] | None:
    """Return class names by number as CF states them; None where it does not."""
    if file.kind != "zarr":
        return None
    attrs = open_store(file.path, options).info(file.bands[0].array).attrs
    meanings = attrs.get("flag_meanings")
    texts = meanings.split() if isinstance(meanings, str) else list(meanings or ())
    values = list(attrs.get("flag_values") or range(len(texts)))
    if not texts or len(values) != len(texts):
        return None
    names = {int(v): str(t) for v, t in zip(values, texts, strict=True)}
    return tuple(names.get(i, f"class {i}") for i in range(max(names) + 1))
