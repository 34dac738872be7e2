"""AnySat as a backbone: batches of any of its sensors in, a token per patch of any size out.

Source: Astruc, Gonthier, Mallet, Landrieu, CVPR 2025 (arXiv 2412.14123), and the released code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from domainssl.backbones.anysat.encoder import (
    AnySatArchitecture,
    AnySatCombiner,
    ImageProjector,
    PartTransformer,
    SeriesProjector,
    parts_of_patches,
    parts_on_grid,
)
from domainssl.backbones.anysat.sensors import (
    CELL_M,
    SENSORS,
    AnySatSensor,
    described,
    sensors_of,
)
from domainssl.backbones.base import Backbone, Features, LoadReport, present_names, refuse_replace
from domainssl.backbones.vit_files import read_transformer, write_transformer
from domainssl.errors import ConfigError, DataError, WeightsError, nearest
from domainssl.modality import Modality, as_modalities, key, present_mask, valid_mask
from domainssl.nn.calendar import Calendar, calendars_of
from domainssl.nn.masking import mean_of_valid
from domainssl.nn.patching import grid_coordinates, grid_of, patch_fraction
from domainssl.options import as_dataclass

__all__ = ["AnySatBackbone"]

_DENSE = "dense"


class AnySatBackbone(Backbone):
    """Encode any of its sensors, all over one footprint, at patches of any multiple of 10 m.

    `tokens` of a modality are those of its patches before the fusion, (B, P, E); `joint` holds the
    fused ones, with the class token, the published vector of a tile, as `pooled` and `cls`. With
    `dense`, features of this name hold a token per part of the patches of one modality (2 m of
    aerial images, 10 m of the others, pixels of series), (B, h·w, 2 E): that of the patch, then
    that of the part.

        backbone = load_backbone("anysat_base", weights="AnySat.pth", modalities=data.modalities)
        backbone.patch_m = 20
        features = backbone({"s2": s2, "s2.dates": dates})   # (B, T, 10, H, W), (B, T)

    Args:
        modalities: What goes in; names of sensors, or others that `sensors` gives one.
        sensors: Sensor by modality, where it is not named after one.
        patch_m: Side of a patch in metres, a multiple of 10 m and of the pixels of series; None is
            the smallest that fits. It may be set to another one at any time, as the attribute of
            this name.
        dense: Modality whose parts get features, as an attribute too; None for none.
        architecture: Sizes.
        calendar: How days are counted, one for all or one per modality.
        normalization: Form for all modalities, or one per modality.

    Raises:
        ConfigError: A modality has no sensor, or patches do not fit its pixels.
    """

    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "anysat_tiny": {"architecture": {"width": 256, "depth": 2, "heads": 4}},
        "anysat_small": {"architecture": {"width": 512, "depth": 4, "heads": 8}},
        "anysat_base": {"architecture": {"width": 768, "depth": 6, "heads": 12}},
    }

    def __init__(
        self,
        modalities: Mapping[str, Modality | Mapping[str, Any]],
        sensors: Mapping[str, str] | None = None,
        patch_m: float | None = None,
        dense: str | None = None,
        architecture: AnySatArchitecture | Mapping[str, Any] = AnySatArchitecture(),
        calendar: Calendar | Mapping[str, Any] = Calendar(),
        normalization: str | dict[str, str] = "zscore",
    ) -> None:
        super().__init__(modalities, normalization)
        self.sensors = sensors_of(self.modalities, sensors or {})
        sizes = as_dataclass(AnySatArchitecture, architecture)
        self.depth, self.dense = sizes.depth, dense
        self.patch_m = max(map(_unit_m, self.sensors.values())) if patch_m is None else patch_m
        self.calendars = calendars_of(calendar, self.modalities)
        for name, modality in self.modalities.items():
            sensor = self.sensors[name]
            part: nn.Module
            if sensor.kind == "image":
                part = ImageProjector(modality.num_channels, sensor.part_px, sizes)
            else:
                part = SeriesProjector(modality.num_channels, sensor, sizes)
            self.add_module(f"projector_{name}", part)
            self.patch_px(name)
        self.spatial_encoder = PartTransformer(sizes)
        self.combiner = AnySatCombiner(sizes)
        self.embed_dim = dict.fromkeys([*self.modalities, "joint"], sizes.width)
        if dense is not None:
            self._check_dense(dense)
            self.embed_dim[_DENSE] = 2 * sizes.width

    def modality_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Yield the parameters of one modality's projector."""
        yield from self.get_submodule(f"projector_{name}").parameters()

    def band_tensors(self, name: str) -> dict[str, str]:
        """Return the first layer of a sensor; see `Backbone.band_tensors`."""
        if self.sensors[name].kind == "image":
            return {f"projector_{name}.patch_embed.weight": "convolution"}
        return {f"projector_{name}.patch_embed.inconv.0.weight": "bands first"}

    def patch_px(self, name: str) -> int:
        """Return the side of a modality's patch in pixels.

        Raises:
            ConfigError: `patch_m` is no multiple of 10 m, or of the pixels of a series.
        """
        sensor = self.sensors[name]
        if sensor.whole:
            return 1
        unit = _unit_m(sensor)
        count = round(self.patch_m / unit)
        if count < 1 or not math.isclose(count * unit, self.patch_m):
            raise ConfigError(
                f"patch_m: got {self.patch_m:g}; expected a multiple of {unit:g} m, for {name}. "
                f"Nearest: {max(1, count) * unit:g}."
            )
        return round(self.patch_m / sensor.gsd_m)

    def encode(
        self,
        x: Mapping[str, Any],
        keep: Mapping[str, Tensor] | None = None,
        replace: Mapping[str, Tensor] | None = None,
    ) -> Features:
        """Run the network; see `Backbone.encode`.

        Raises:
            ConfigError: `keep` or `replace` is given, which the released weights do not know.
            DataError: Dates are missing, or the sensors do not cover one footprint.
        """
        refuse_replace(replace, type(self).__name__)
        if keep is not None:
            raise ConfigError(
                f"{type(self).__name__} encodes whole tiles and takes no `keep`; leave it out."
            )
        if self.dense is not None:
            self._check_dense(self.dense)
        features = Features()
        names = present_names(x, self.modalities, "sensors")
        grid = self._common_grid(x, names)
        whole, parts = [], None
        for name in names:
            sensor, own = self.sensors[name], (1, 1) if self.sensors[name].whole else grid
            cells, per_cell = self._division(name)
            cut = parts_of_patches(self._project(name, x), cells, per_cell)
            tokens, inner = self.spatial_encoder(cut, sensor.part_m)
            valid = self._seen(name, x)
            self._put(features, name, tokens, valid, own)
            features.pooled[name] = mean_of_valid(tokens, valid)
            if key(name, "dates") in x:
                features.dates[name] = x[key(name, "dates")]
            if sensor.whole:
                whole.append((tokens[:, 0], valid[:, 0]))
            elif name == self.dense:
                parts = inner
        self._fuse(features, [n for n in names if not self.sensors[n].whole], grid, whole)
        if parts is not None:
            self._put_dense(features, parts, grid)
        return features

    def _fuse(
        self, features: Features, names: list[str], grid: tuple[int, int],
        whole: list[tuple[Tensor, Tensor]],
    ) -> None:  # fmt: skip
        """Add the fused tokens as `joint`."""
        valid = [features.token_valid[name] for name in names]
        tokens = [features.tokens[name] for name in names]
        fused = self.combiner(tokens, valid, grid, self.patch_m, whole)
        self._put(features, "joint", fused[:, 1:], torch.stack(valid).any(0), grid)
        features.pooled["joint"] = features.cls["joint"] = fused[:, 0]

    def _put_dense(self, features: Features, parts: Tensor, grid: tuple[int, int]) -> None:
        """Add a token per part, laid where it is on the ground, as `dense`."""
        name = cast(str, self.dense)
        cells, per_cell = self._division(name)
        fused = features.tokens["joint"].unsqueeze(2).expand(-1, -1, parts.shape[2], -1)
        laid = parts_on_grid(torch.cat([fused, parts], -1), grid, cells, per_cell)
        rows, columns = laid.shape[1:3]
        seen = features.token_valid["joint"].unsqueeze(2).expand(-1, -1, parts.shape[2])
        valid = parts_on_grid(seen.unsqueeze(-1), grid, cells, per_cell).flatten(1)
        self._put(features, _DENSE, laid.flatten(1, 2), valid, (rows, columns))
        features.pooled[_DENSE] = mean_of_valid(laid.flatten(1, 2), valid)

    def _put(
        self, features: Features, name: str, tokens: Tensor, valid: Tensor, grid: tuple[int, int]
    ) -> None:
        features.tokens[name], features.token_valid[name] = tokens, valid
        features.grid[name] = grid
        features.coords[name] = grid_coordinates(grid, device=tokens.device)

    def _check_dense(self, dense: str) -> None:
        fitting = [name for name, sensor in self.sensors.items() if not sensor.whole]
        if dense not in fitting:
            raise ConfigError(
                f"dense: {dense!r} has no parts.{nearest(dense, fitting)} Name one of "
                f"{', '.join(fitting)}."
            )

    def _division(self, name: str) -> tuple[int, int]:
        """Return the cells along a side of a patch, and the parts along a side of a cell."""
        sensor, side = self.sensors[name], self.patch_px(name)
        per_cell = max(1, round(CELL_M / sensor.part_m))
        return side // (sensor.part_px * per_cell), per_cell

    def _common_grid(self, x: Mapping[str, Any], names: tuple[str, ...]) -> tuple[int, int]:
        """Return the patches along each axis, which all sensors share."""
        grids: dict[str, tuple[int, int]] = {}
        for name in names:
            size = tuple(x[name].shape[-2:])
            if self.sensors[name].whole:
                if size != (1, 1):
                    raise DataError(
                        f"batch.{name}: {size} pixels; one pixel of {self.sensors[name].name} "
                        "covers the whole tile, so AnySat takes one. Average them."
                    )
                continue
            rows, columns = grid_of(size, self.patch_px(name), f"batch.{name}")
            grids[name] = (rows, columns)
        if not grids:
            raise DataError(
                f"The batch has {', '.join(names)} alone, one token without a place. AnySat needs "
                "a sensor with patches beside it."
            )
        if len({*grids.values()}) > 1:
            raise DataError(
                f"AnySat takes one footprint for all sensors; got patches of {self.patch_m:g} m in "
                f"the numbers {grids}. Crop them to one footprint in the DataModule."
            )
        return next(iter(grids.values()))

    def _project(self, name: str, x: Mapping[str, Any]) -> Tensor:
        """Return the tokens of a modality's parts on their grid, (B, E, h, w)."""
        projector = self.get_submodule(f"projector_{name}")
        if self.sensors[name].kind == "image":
            return cast(Tensor, projector(x[name]))
        if key(name, "dates") not in x:
            raise DataError(
                f"batch.{name}.dates is missing: AnySat needs int32 (B, T), or (B,) of images, in "
                "days since 1970-01-01. Set the dates in the DataModule."
            )
        is_image = self.modalities[name].kind == "image"
        values: Tensor = x[name].unsqueeze(1) if is_image else x[name]
        days = self.calendars[name].days(x[key(name, "dates")].view(len(values), -1))
        frames = x.get(key(name, "frames"))
        if is_image or frames is None:
            frames = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
        valid = x.get(key(name, "valid"))
        if is_image and valid is not None:
            valid = valid.unsqueeze(1)
        return cast(Tensor, projector(values, torch.where(frames, days, 0), frames, valid))

    def _seen(self, name: str, x: Mapping[str, Any]) -> Tensor:
        """Return which patches hold a measurement on some date, bool (B, P)."""
        modality = self.modalities[name]
        valid = valid_mask(x, modality)
        if modality.kind == "series":
            frames = x.get(key(name, "frames"))
            if frames is not None:
                valid = valid & frames[:, :, None, None]
            valid = valid.any(1)
        share = patch_fraction(valid, self.patch_px(name))
        return (share > 0) & present_mask(x, name).unsqueeze(1)

    # -- released files ---------------------------------------------------------------------

    @classmethod
    def from_reference(
        cls,
        state: Mapping[str, Any],
        variant: Mapping[str, Any],
        modalities: Mapping[str, Modality | Mapping[str, Any]] | None = None,
    ) -> tuple[Self, LoadReport]:
        """Read the released weights, or a training checkpoint, whose teacher is taken.

        Statistics are those of `modalities`: the publisher standardises every data set by its own.
        Projectors of sensors that are not asked for are left out and reported as unexpected.

        Raises:
            WeightsError: It is no such file, no modalities are given, or their bands differ.
        """
        data = modalities if modalities is not None else variant.get("modalities")
        if data is None:
            raise WeightsError(
                "The weights of AnySat bring no statistics; pass modalities=… with the bands, "
                f"mean and std of your data. Its sensors: {', '.join(SENSORS)}."
            )
        flat = _flat(state)
        known = as_modalities(data)
        sensors = sensors_of(known, variant.get("sensors") or {})
        _check_bands(known, sensors)
        backbone = cls(**{**variant, "modalities": known})
        depth = 1 + max((int(n.split(".")[1]) for n in flat if n.startswith("blocks.")), default=-1)
        if depth != backbone.depth + 1:
            raise WeightsError(
                f"The file has {depth - 1} blocks over patches, the backbone {backbone.depth}. "
                "Name the size it was made with."
            )
        loaded = backbone.load_tensors(backbone._renamed(flat))
        if loaded.unexpected:
            raise WeightsError(
                f"The file holds {', '.join(loaded.unexpected[:5])}, which AnySat does not have. "
                "Pass the released AnySat.pth, or a checkpoint of its training."
            )
        missing = tuple(n for n in loaded.missing if not n.startswith("normalizer."))
        used = {f"projector_{sensor.name.replace('_', '-')}." for sensor in sensors.values()}
        left = tuple(n for n in flat if n.startswith("projector_") and not n.startswith((*used,)))
        return backbone, LoadReport(loaded.matched, missing, left)

    def _renamed(self, flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a file under our names, one projector per modality."""
        last = f"blocks.{self.depth}."
        found: dict[str, Tensor] = {}
        plain = {n: t for n, t in flat.items() if n.startswith("blocks.")}
        for name in [n for n in plain if n.startswith(last)]:
            found[f"combiner.readout.{name.removeprefix(last)}"] = plain.pop(name)
        blocks = read_transformer(plain, "timm", "blocks", "norm")
        found |= {f"combiner.{name}": tensor for name, tensor in blocks.items()}
        for name, tensor in flat.items():
            if name == "cls_token":
                found["combiner.cls_token"] = tensor
            elif name.startswith("projector_"):
                sensor, _, rest = name.removeprefix("projector_").partition(".")
                known = sensor.replace("-", "_")
                own = [n for n, s in self.sensors.items() if s.name == known]
                found |= {f"projector_{n}.{rest}": tensor for n in own}
                if known not in SENSORS:
                    found[name] = tensor
            elif name not in plain and not name.startswith(last):
                found[name] = tensor
        return found

    @classmethod
    def published_modalities(
        cls,
        state: Mapping[str, Any],
        variant: Mapping[str, Any],
        modalities: Mapping[str, Modality],
    ) -> dict[str, Modality]:
        """Return the bands of the released weights, with the statistics of the data."""
        return described(sensors_of(modalities, variant.get("sensors") or {}), modalities)

    def to_reference(self) -> dict[str, Tensor]:
        """Return the weights under the released names, without sensors that it does not have."""
        state = {n: t.detach() for n, t in self.state_dict().items()}
        blocks = {
            n.removeprefix("combiner."): t
            for n, t in state.items()
            if n.startswith("combiner.blocks.")
        }
        written = write_transformer(blocks, "timm", "blocks", "norm")
        for name, tensor in state.items():
            if name == "combiner.cls_token":
                written["cls_token"] = tensor
            elif name.startswith("combiner.readout."):
                written[name.replace("combiner.readout", f"blocks.{self.depth}", 1)] = tensor
            elif name.startswith("spatial_encoder."):
                written[name] = tensor
            elif name.startswith("projector_"):
                own, _, rest = name.removeprefix("projector_").partition(".")
                sensor = self.sensors[own].name.replace("_", "-")
                written[f"projector_{sensor}.{rest}"] = tensor
        return written


def _unit_m(sensor: AnySatSensor) -> float:
    """Return the length of which patches are multiples, in metres."""
    return CELL_M if sensor.whole else max(CELL_M, sensor.gsd_m)


def _flat(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a released file, or of the teacher of a training checkpoint."""
    if isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    flat = {n: t for n, t in state.items() if isinstance(t, Tensor)}
    for prefix in ("target_encoder.", "model.encoder.", "model."):
        if f"{prefix}cls_token" in flat:
            flat = {n.removeprefix(prefix): t for n, t in flat.items() if n.startswith(prefix)}
            break
    if "spatial_encoder.cls_token" not in flat or "cls_token" not in flat:
        raise WeightsError(
            "These are no weights of AnySat: expected names such as cls_token, "
            "spatial_encoder.cls_token and projector_s2.patch_embed.inconv.0.weight; found "
            f"{sorted(flat)[:5]}. Pass the released AnySat.pth."
        )
    return flat


def _check_bands(data: Mapping[str, Modality], sensors: Mapping[str, AnySatSensor]) -> None:
    """Refuse other bands than those of the weights, or another order."""
    wrong = [
        f"{name}: got {' '.join(modality.channels)}, the weights of {sensors[name].name} take "
        f"{' '.join(sensors[name].bands)}"
        for name, modality in data.items()
        if modality.channels != sensors[name].bands
    ]
    if wrong:
        raise WeightsError(
            "The data do not fit AnySat's weights:\n  " + "\n  ".join(wrong) + "\nChoose these "
            "bands, in this order, in the DataModule, or pass bands='subset'."
        )
