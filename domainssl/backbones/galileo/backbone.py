"""Galileo as a backbone: batches of any of its sensors in, features by sensor and patch out."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from domainssl.backbones.base import Backbone, Features, LoadReport, common_size, refuse_replace
from domainssl.backbones.galileo.encoder import (
    GalileoArchitecture,
    GalileoEncoder,
    GalileoTokens,
)
from domainssl.backbones.galileo.encodings import UNIT_M
from domainssl.backbones.galileo.groups import (
    PUBLISHED_FORMS,
    PUBLISHED_GROUPS,
    PUBLISHED_MODALITIES,
    Array,
    GalileoGroup,
    location_xyz,
    usable_groups,
)
from domainssl.errors import ConfigError, DataError, WeightsError
from domainssl.modality import Modality, key, present_mask, valid_mask
from domainssl.nn.dates import month_of
from domainssl.nn.masking import mean_of_valid
from domainssl.nn.patching import grid_coordinates, grid_of, patch_fraction
from domainssl.options import as_dataclass

__all__ = ["GalileoBackbone", "GroupInputs"]


@dataclass(frozen=True, kw_only=True)
class GroupInputs:
    """What the encoder takes, by group; see `GalileoEncoder.forward`.

    Attributes:
        values: Normalised values.
        visible: Which tokens see a valid pixel, bool.
        months: int (B, T) by array.
        patch_size: Side of a patch in pixels.
        gsd_m: Side of a pixel in metres.
    """

    values: dict[str, Tensor]
    visible: dict[str, Tensor]
    months: dict[Array, Tensor]
    patch_size: int
    gsd_m: float


class GalileoBackbone(Backbone):
    """Encode any of its modalities: images and series on one grid, weather, maps and places.

    `tokens` of a modality on a grid are the means of its visible tokens at every patch, over dates
    and groups, (B, h·w, E); of a series without a grid the means of every date, (B, T, E). `joint`
    is the mean of all modalities at every patch, and `pooled["joint"]` that of all visible tokens.

        backbone = load_backbone("galileo_nano", weights="encoder.pt")
        features = backbone({"s2": s2, "s2.dates": dates})  # (B, T, 10, H, W), (B, T)

    Args:
        modalities: What goes in, by name.
        groups: Groups of bands, one token each; those of other modalities are left out.
        architecture: Sizes.
        patch_size: Side of a patch in pixels, 1 to `architecture.max_patch_size`; it may be set to
            another one at any time, as the attribute of this name.
        normalization: Form for all modalities, or one per modality; None takes that of the
            released weights, and `zscore` for other modalities. Values of `zscore` are brought to
            (z + 2) / 4, so that two deviations around the mean become 0 to 1, without clipping.

    Raises:
        ConfigError: A modality has no group, or lacks bands.
    """

    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "galileo_nano": {"architecture": {"width": 128, "depth": 4, "heads": 8}},
        "galileo_tiny": {"architecture": {"width": 192, "depth": 12, "heads": 3}},
        "galileo_base": {"architecture": {"width": 768, "depth": 12, "heads": 12}},
    }
    forward_methods: ClassVar[tuple[str, ...]] = ("encode", "encode_groups", "encode_inputs")

    def __init__(
        self,
        modalities: Mapping[str, Modality | Mapping[str, Any]],
        groups: Sequence[GalileoGroup | Mapping[str, Any]] = PUBLISHED_GROUPS,
        architecture: GalileoArchitecture | Mapping[str, Any] = GalileoArchitecture(),
        patch_size: int = 4,
        normalization: str | dict[str, str] | None = None,
    ) -> None:
        if normalization is None:
            normalization = {name: PUBLISHED_FORMS.get(name, "zscore") for name in modalities}
        super().__init__(modalities, normalization)
        self.groups = usable_groups(groups, self.modalities)
        sizes = as_dataclass(GalileoArchitecture, architecture)
        self.patch_size = patch_size
        self.encoder = GalileoEncoder(self.groups, sizes)
        self.embed_dim = dict.fromkeys([*self.modalities, "joint"], sizes.width)

    def modality_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Yield the projections of one modality's groups."""
        for group in self.groups:
            if group.modality == name:
                parts = cast(nn.ModuleDict, self.encoder.get_submodule(f"{group.array}_embed"))
                yield from parts[group.name].parameters()

    def scale_projections(self, gain: float) -> None:
        """Multiply how far what pixels say lies from what the middle of their range says.

        The middle is 0.5 where `normalize` makes it that, else 0, as of differences of bands.
        """
        form = {name: found.name for name, found in self.normalizer.forms.items()}
        is_shifted = {
            group.name: form[group.modality] == "zscore" and group.derived in ("", "mean")
            for group in self.groups
        }
        self.encoder.scale_projections(gain, {name: 0.5 * yes for name, yes in is_shifted.items()})

    def normalize(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the normalised batch, with the differences of raw bands as `<modality>/<group>`.

        Raises:
            DataError: The batch does not hold what the backbone was built for.
        """
        out = super().normalize(batch)
        for name in self.modalities:
            if name in batch and self.normalizer.forms[name].name == "zscore":
                out[name] = self.normalizer.mask((out[name] + 2) / 4, batch, name)
        for group in self.groups:
            if group.modality in batch and group.derived == "difference":
                modality = self.modalities[group.modality]
                places = [modality.channels.index(band) for band in group.bands]
                a, b = (
                    batch[group.modality].select(modality.channel_axis, place).float()
                    for place in places
                )
                total = a + b
                share = torch.where(total > 0, (a - b) / total, 0.0)
                share = torch.where(share.isfinite(), share, 0.0).unsqueeze(modality.channel_axis)
                out[_derived(group)] = self.normalizer.mask(share, batch, group.modality)
        return out

    def encode(
        self,
        x: Mapping[str, Any],
        keep: Mapping[str, Tensor] | None = None,
        replace: Mapping[str, Tensor] | None = None,
    ) -> Features:
        """Run the network; see `Backbone.encode`.

        Raises:
            ConfigError: `keep` or `replace` is given: what is hidden here are groups, see
                `encode_groups`.
        """
        refuse_replace(replace, type(self).__name__)
        if keep is not None:
            raise ConfigError(
                f"{type(self).__name__} has tokens of groups, not of modalities, and takes no "
                "`keep`; pass `hidden` to encode_groups."
            )
        return self._features(x, self.encode_groups(x))

    def encode_groups(
        self,
        x: Mapping[str, Any],
        hidden: Mapping[str, Tensor] | None = None,
        *,
        depths: int | Mapping[str, int] | None = None,
    ) -> GalileoTokens:
        """Return the tokens of all groups.

        Args:
            x: What `normalize` returned.
            hidden: True where the encoder must not look, bool by group, of the shapes of
                `GalileoEncoder.forward`'s `visible`.
            depths: See `GalileoEncoder.forward`.

        Raises:
            DataError: Dates are missing, sizes differ, or series are too long.
        """
        return self.encode_inputs(self.inputs(x), hidden, depths=depths)

    def encode_inputs(
        self,
        inputs: GroupInputs,
        hidden: Mapping[str, Tensor] | None = None,
        *,
        depths: int | Mapping[str, int] | None = None,
    ) -> GalileoTokens:
        """Return the tokens of what `inputs` returned; see `encode_groups`."""
        visible = dict(inputs.visible)
        for name, where in (hidden or {}).items():
            if name in visible:
                visible[name] = visible[name] & ~where
        return cast(
            GalileoTokens,
            self.encoder(
                inputs.values, inputs.months, visible,
                patch_size=inputs.patch_size, gsd_m=inputs.gsd_m, depths=depths,
            ),
        )  # fmt: skip

    def inputs(self, x: Mapping[str, Any], patch_size: int | None = None) -> GroupInputs:
        """Return what the encoder takes, by group.

        Args:
            x: What `normalize` returned.
            patch_size: Side of a patch in pixels; None takes `self.patch_size`.

        Raises:
            DataError: Dates are missing, or sizes differ.
        """
        self._check_footprint(x)
        side = patch_size or self.patch_size
        values: dict[str, Tensor] = {}
        months: dict[Array, Tensor] = {}
        for group in self.groups:
            if group.modality not in x or (_derived(group) not in x and _is_difference(group)):
                continue
            values[group.name] = self._values(group, x)
            if group.array in ("space_time", "time"):
                months[group.array] = self._months(group, x, months.get(group.array))
        found = [m.gsd_m for name, m in self.modalities.items() if name in x and m.gsd_m]
        return GroupInputs(
            values=values,
            visible={n: mask for n, mask in self.visibility(x, side).items() if n in values},
            months=months,
            patch_size=side,
            gsd_m=found[0] if found else UNIT_M,
        )

    def in_space(self, name: str) -> bool:
        """Tell whether a modality has tokens at places."""
        return any(g.modality == name and g.array in ("space_time", "space") for g in self.groups)

    def _check_footprint(self, x: Mapping[str, Any]) -> None:
        """Refuse modalities on a grid whose sizes differ."""
        sizes = {
            name: common_size(x[name], modality)
            for name, modality in self.modalities.items()
            if name in x and self.in_space(name)
        }
        if len(set(sizes.values())) > 1:
            raise DataError(
                f"Galileo takes one grid of pixels for all modalities; got the sizes {sizes}. "
                "Resample them to one grid, or leave some out."
            )

    def visibility(self, x: Mapping[str, Any], patch_size: int) -> dict[str, Tensor]:
        """Return which tokens of the groups of a batch see a valid pixel.

        Args:
            x: A batch, normalised or not; of values only the shapes count.
            patch_size: Side of a patch in pixels.

        Returns:
            bool (B, h, w, T), (B, h, w), (B, T) or (B,) by group, as its array says.
        """
        known: dict[tuple[str, Array], Tensor] = {}
        found: dict[str, Tensor] = {}
        for group in self.groups:
            if group.modality in x:
                place = (group.modality, group.array)
                if place not in known:
                    known[place] = self._holds_data(group, x, patch_size)
                found[group.name] = known[place]
        return found

    def _holds_data(self, group: GalileoGroup, x: Mapping[str, Any], patch_size: int) -> Tensor:
        name = group.modality
        valid = self._valid(name, x)
        if self.modalities[name].kind == "image" and group.array in ("space_time", "time"):
            valid = valid.unsqueeze(1)
        if group.array in ("space_time", "space"):
            grid = grid_of(tuple(x[name].shape[-2:]), patch_size, f"batch.{name}")
            if group.array == "space":
                return (patch_fraction(valid, patch_size) > 0).unflatten(1, grid)
            share = patch_fraction(valid.flatten(0, 1), patch_size)
            seen = (share > 0).unflatten(0, valid.shape[:2]).unflatten(2, grid)
            return seen.permute(0, 2, 3, 1)
        if group.array == "time":
            return valid.flatten(2).any(2)
        return valid.flatten(1).any(1) if valid.ndim > 1 else valid

    def _valid(self, name: str, x: Mapping[str, Any]) -> Tensor:
        """Return `<m>.valid`, False on padded dates and absent items."""
        modality = self.modalities[name]
        valid, present = valid_mask(x, modality), present_mask(x, name)
        if modality.kind == "series" and key(name, "frames") in x:
            valid = valid & x[key(name, "frames")][:, :, None, None]
        return valid & present.view(-1, *[1] * (valid.ndim - 1))

    def _values(self, group: GalileoGroup, x: Mapping[str, Any]) -> Tensor:
        """Return the values of a group as `GalileoEncoder.forward` takes them."""
        name = group.modality
        modality = self.modalities[name]
        whole = x[_derived(group)] if _is_difference(group) else x[name]
        places = [modality.channels.index(band) for band in group.bands]
        if not _is_difference(group) and places != list(range(modality.num_channels)):
            index = torch.tensor(places, device=whole.device)
            whole = whole.index_select(modality.channel_axis, index)
        valid = self._valid(name, x)
        if modality.kind == "image" and group.array in ("space_time", "time"):
            whole, valid = whole.unsqueeze(1), valid.unsqueeze(1)
        if group.array in ("space_time", "space"):
            return whole
        if group.array == "time":
            return _pixel_mean(whole, valid)
        if group.derived == "mean":
            if modality.kind == "series":
                whole, valid = whole.transpose(1, 2).flatten(2, 3), valid.flatten(1, 2)
            return _pixel_mean(whole.unsqueeze(1), valid.unsqueeze(1))[:, 0]
        return location_xyz(whole) if group.derived == "sphere" else whole

    def _grid(self, name: str, x: Tensor) -> tuple[int, int]:
        rows, columns = grid_of(tuple(x.shape[-2:]), self.patch_size, f"batch.{name}")
        return rows, columns

    def _months(self, group: GalileoGroup, x: Mapping[str, Any], before: Tensor | None) -> Tensor:
        """Return the months of an array, int (B, T), from the dates of one of its modalities."""
        name = group.modality
        if key(name, "dates") not in x:
            raise DataError(
                f"batch.{name}.dates is missing: Galileo needs the month of every date, int32 "
                "(B,) or (B, T) in days since 1970-01-01. Set the dates in the DataModule."
            )
        own = month_of(x[key(name, "dates")].view(len(x[name]), -1))
        if before is None or before.shape != own.shape:  # other lengths are refused by the encoder
            return own
        there = present_mask(x, name).unsqueeze(1)
        if key(name, "frames") in x:
            there = there & x[key(name, "frames")]
        return torch.where(there, own, before)

    def _features(self, x: Mapping[str, Any], found: GalileoTokens) -> Features:
        features = Features()
        for name in self.modalities:
            picked = self._picked(name, found)
            if name not in x or not picked:
                continue
            tokens = torch.cat([part for part, _ in picked], 2)
            visible = torch.cat([mask for _, mask in picked], 2)
            features.pooled[name] = mean_of_valid(tokens.flatten(1, 2), visible.flatten(1))
            tokens, valid = mean_of_valid(tokens, visible, axis=2), visible.any(2)
            grid = self._grid(name, x[name]) if self.in_space(name) else (tokens.shape[1],)
            self._put(features, name, tokens, valid, grid)
            if key(name, "dates") in x:
                features.dates[name] = x[key(name, "dates")]
        tokens, valid = found.per_patch()
        grids = [grid for name, grid in features.grid.items() if self.in_space(name)]
        self._put(features, "joint", tokens, valid, grids[0] if grids else (1,))
        features.pooled["joint"] = found.mean()
        return features

    def _put(
        self, features: Features, name: str, tokens: Tensor, valid: Tensor, grid: tuple[int, ...]
    ) -> None:
        features.tokens[name], features.token_valid[name] = tokens, valid
        features.grid[name] = grid
        features.coords[name] = grid_coordinates(grid, device=tokens.device)

    def _picked(self, name: str, found: GalileoTokens) -> list[tuple[Tensor, Tensor]]:
        """Return tokens (B, N, K, E) and visibility of a modality's groups, N places each.

        Groups of time and of none are left out where the modality has some in space.
        """
        in_space = self.in_space(name)
        picked = []
        for array, tokens in found.tokens.items():
            own = self.encoder.groups[array]
            places = [i for i, group in enumerate(own) if group.modality == name]
            if not places or (in_space and array not in ("space_time", "space")):
                continue
            visible = found.visible[array][..., places]
            tokens = tokens[..., places, :]
            if in_space:
                tokens, visible = tokens.flatten(1, 2), visible.flatten(1, 2)
                picked.append((tokens.flatten(2, -2), visible.flatten(2)))
            elif array == "time":
                picked.append((tokens, visible))
            else:
                picked.append((tokens.unsqueeze(1), visible.unsqueeze(1)))
        return picked

    # -- reference files --------------------------------------------------------------------

    @classmethod
    def from_reference(
        cls,
        state: Mapping[str, Any],
        variant: Mapping[str, Any],
        modalities: Mapping[str, Modality | Mapping[str, Any]] | None = None,
    ) -> tuple[Self, LoadReport]:
        """Read `encoder.pt` of the released folders, all groups of it.

        Statistics are those of the released weights, whatever `modalities` say; bands, order and
        unit of `modalities` are compared with the published ones. Series may be images here: of
        one date.

        Raises:
            WeightsError: It is no such file, or of other sizes or groups.
        """
        arguments = dict(variant)
        if "modalities" not in arguments:
            arguments["modalities"] = _published(modalities or {})
        flat = {n.replace(".backbone", ""): t for n, t in state.items() if isinstance(t, Tensor)}
        if "s_t_channel_embed" not in flat or "month_embed.weight" not in flat:
            raise WeightsError(
                "This is no encoder of Galileo: expected names such as s_t_channel_embed, "
                "space_time_embed.S1.proj.weight and blocks.0.attn.q.weight; found "
                f"{sorted(flat)[:5]}. Pass encoder.pt of a released folder."
            )
        backbone = cls(**arguments)
        if modalities is not None and "modalities" not in variant:
            backbone.check(modalities)
        backbone._check_groups(flat)
        report = backbone.load_tensors({f"encoder.{name}": t for name, t in flat.items()})
        missing = tuple(n for n in report.missing if not n.startswith("normalizer."))
        return backbone, dataclasses.replace(report, missing=missing)

    def _check_groups(self, flat: Mapping[str, Tensor]) -> None:
        """Refuse a file of other groups, another depth or another largest patch."""
        pattern = re.compile(r"(space_time|space|time|static)_embed\.(\w+)\.")
        theirs = {(m[1], m[2]) for name in flat if (m := pattern.match(name))}
        ours = {(group.array, group.name) for group in self.groups}
        if theirs != ours:
            raise WeightsError(
                f"The file's groups differ from the backbone's: only in the file "
                f"{sorted(theirs - ours)}, only in the backbone {sorted(ours - theirs)}. Pass the "
                "groups that it was trained with, as arguments={'groups': …, 'modalities': …}."
            )
        kernels = {
            t.shape[-1] for n, t in flat.items() if n.endswith(".proj.weight") and t.ndim == 4
        }
        depth = len({n.split(".")[1] for n in flat if n.startswith("blocks.")})
        sizes = self.encoder.sizes
        if kernels != {sizes.max_patch_size} or depth != sizes.depth:
            raise WeightsError(
                f"The file has {depth} blocks and kernels of {sorted(kernels)} pixels; the "
                f"backbone {sizes.depth} and max_patch_size {sizes.max_patch_size}. Pass the sizes "
                "of its config.json, as arguments={'architecture': …}."
            )

    @classmethod
    def published_modalities(
        cls,
        state: Mapping[str, Any],
        variant: Mapping[str, Any],
        modalities: Mapping[str, Modality],
    ) -> dict[str, Modality]:
        """Return what the released weights were trained on; see the base class."""
        return _published(modalities)

    def to_reference(self) -> dict[str, Tensor]:
        """Return the weights under the released names."""
        return {name: tensor.detach() for name, tensor in self.encoder.state_dict().items()}


def _is_difference(group: GalileoGroup) -> bool:
    return group.derived == "difference"


def _derived(group: GalileoGroup) -> str:
    return f"{group.modality}/{group.name}"


def _pixel_mean(x: Tensor, valid: Tensor) -> Tensor:
    """(B, T, C, *S) and bool (B, T, *S) -> the mean over valid pixels, (B, T, C)."""
    return mean_of_valid(x.flatten(3).transpose(2, 3), valid.flatten(2), axis=2)


def _published(names: Mapping[str, Modality | Mapping[str, Any]]) -> dict[str, Modality]:
    """Return all published modalities; series are images where the data have these."""
    found = dict(PUBLISHED_MODALITIES)
    for name, given in names.items():
        kind = given.kind if isinstance(given, Modality) else given.get("kind")
        if name in found and found[name].kind == "series" and kind == "image":
            found[name] = dataclasses.replace(found[name], kind="image")
    return found
