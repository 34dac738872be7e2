"""Parts of Galileo that only pretraining needs: sizes, cuts of a batch, and structured masks.

Source: Tseng et al. 2025 (arXiv 2502.09356), sections 3.2 and 3.3, and the released code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from domainssl.backbones.bands import BandPolicy
from domainssl.backbones.galileo.groups import PUBLISHED_GROUPS, GalileoGroup
from domainssl.backbones.tensors import read_tensors
from domainssl.errors import ConfigError, DataError, WeightsError, nearest
from domainssl.modality import COMPANIONS, Modality
from domainssl.options import as_dataclass

__all__ = [
    "SIZES",
    "Cut",
    "GalileoEncoding",
    "GalileoMasking",
    "GalileoPass",
    "GalileoSizes",
    "cut_batch",
    "fill",
    "group_choice",
    "lowest",
    "series_steps",
    "structured",
]

Kind = Literal["time", "space", "random"]
_SPATIAL = ("valid",)  # companions that have rows and columns
_DATED = ("valid", "frames", "dates")  # and those that have dates
_EXACT = 52  # bits of a uniform number


@dataclass(frozen=True, kw_only=True)
class GalileoSizes:
    """Sizes; None takes the value of the named size.

    Attributes:
        width: Token width of the encoder, a multiple of 16.
        depth: Blocks of the encoder.
        heads: Attention heads of the encoder.
        ffn_ratio: Width of the feed-forward layers over that of tokens, in all networks.
        max_patch_size: Side of the stored kernels in pixels.
        max_steps: Longest series.
        drop_path: Share of items that skip a branch of the encoder while training.
        predictor_width: Token width of both predictors; None is that of the encoder.
        predictor_depth: Blocks of a predictor.
        predictor_heads: Attention heads of a predictor.
        learned_groups: Train the predictors' codes of groups, which are zero at first.
        projection_gain: What the initial projections multiply the distance of pixels and numbers
            from the middle of their range by; published: 1. There, codes of place, month and group,
            and what all pixels have in common, outweigh in each token how pixels differ, and a
            short run predicts nothing but means.
    """

    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    ffn_ratio: float = 4.0
    max_patch_size: int = 8
    max_steps: int = 24
    drop_path: float = 0.1
    predictor_width: int | None = None
    predictor_depth: int | None = None
    predictor_heads: int | None = None
    learned_groups: bool = True
    projection_gain: float = 1.0

    def __post_init__(self) -> None:
        if self.projection_gain <= 0:
            raise ConfigError(
                "model.init_args.encoding.architecture.projection_gain: got "
                f"{self.projection_gain!r}, expected more than 0."
            )


Size = Literal["nano", "tiny", "base"]
SIZES: dict[Size, GalileoSizes] = {
    "nano": GalileoSizes(width=128, depth=4, heads=8, predictor_depth=2, predictor_heads=8),
    "tiny": GalileoSizes(width=192, depth=12, heads=3, predictor_depth=4, predictor_heads=3),
    "base": GalileoSizes(width=768, depth=12, heads=12, predictor_depth=4, predictor_heads=12),
}


@dataclass(frozen=True, kw_only=True)
class GalileoEncoding:
    """What encodes the modalities.

    Attributes:
        size: Named size, `nano`, `tiny` or `base`.
        architecture: Explicit sizes over the named one.
        groups: Bands that make a token each, with what they vary over and the depth that their
            targets come from; those of modalities that the data lack are left out. None takes
            those of the released weights.
        patch_size: Side of a patch in pixels where features are taken; training draws its own.
        normalization: Form for all modalities, or one per modality; None takes that of the
            released weights, and `zscore` for other modalities.
        weights: Start from a released `encoder.pt`, one of ours, or an export.
        predictors: Folder of a released model, beside whose `encoder.pt` lie the predictors
            (`decoder.pt`, `second_decoder.pt`) and perhaps the teacher (`target_encoder.pt`), to go
            on with its training; None starts them anew. Needs `weights`.
        bands: Where the bands differ from those of the weights: `strict` refuses.
    """

    size: Size = "base"
    architecture: GalileoSizes = GalileoSizes()
    groups: tuple[GalileoGroup, ...] | None = None
    patch_size: int = 4
    normalization: str | dict[str, str] | None = None
    weights: str | None = None
    predictors: str | None = None
    bands: BandPolicy = "strict"

    def __post_init__(self) -> None:
        if self.predictors is not None and self.weights is None:
            raise ConfigError(
                f"model.init_args.encoding.predictors: {self.predictors!r} belong to an encoder; "
                "set encoding.weights to encoder.pt beside them."
            )
        given = PUBLISHED_GROUPS if self.groups is None else self.groups
        groups = tuple(as_dataclass(GalileoGroup, group) for group in given)
        object.__setattr__(self, "groups", groups)


@dataclass(frozen=True, kw_only=True)
class GalileoMasking:
    """What is cut out of a batch, and hidden; drawn anew for each pass.

    Attributes:
        passes: Masks of a step. `time` and `space` (global) show some groups at some dates or
            places and ask for others elsewhere; `random` (local) shows and asks for single tokens.
        patch_sizes: Sides of patches in pixels, one of which is drawn.
        shapes: Patches along each side, and dates, one pair of which is drawn; smaller where the
            data are.
        encode_ratio: Share of the dates, places or tokens that is shown.
        decode_ratio: Share that is asked for.
        encode_groups: Least and largest number of groups that `time` and `space` show.
        ignored: Groups that are neither shown nor asked for.

    Raises:
        ConfigError: A value lies outside its range.
    """

    passes: tuple[Kind, ...] = ("time", "space", "random", "random")
    patch_sizes: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    shapes: tuple[tuple[int, int], ...] = ((4, 12), (5, 6), (6, 4), (7, 3), (9, 3), (12, 3))
    encode_ratio: float = 0.1
    decode_ratio: float = 0.5
    encode_groups: tuple[int, int] = (2, 6)
    ignored: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("passes", "patch_sizes", "encode_groups", "ignored"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "shapes", tuple(tuple(shape) for shape in self.shapes))
        where = "model.init_args.masking"
        for kind in self.passes:
            if kind not in get_args(Kind):
                raise ConfigError(
                    f"{where}.passes: {kind!r} is not one of {', '.join(get_args(Kind))}."
                    f"{nearest(kind, get_args(Kind))}"
                )
        low, high = self.encode_groups
        checks = {
            "passes": (bool(self.passes), "one or more"),
            "patch_sizes": (min(self.patch_sizes, default=0) > 0, "sides of 1 pixel or more"),
            "shapes": (
                bool(self.shapes) and all(len(s) == 2 and min(s) > 0 for s in self.shapes),
                "pairs of patches and dates, such as [4, 12]",
            ),
            "encode_ratio": (0 < self.encode_ratio < 1, "a share in (0, 1)"),
            "decode_ratio": (
                0 < self.decode_ratio <= 1 - self.encode_ratio,
                "a share above 0 that leaves room for encode_ratio",
            ),
            "encode_groups": (1 <= low <= high, "two numbers of 1 or more, the least first"),
        }
        for name, (is_fine, expected) in checks.items():
            if not is_fine:
                raise ConfigError(
                    f"{where}.{name}: got {getattr(self, name)!r}, expected {expected}."
                )


@dataclass(frozen=True, kw_only=True)
class Cut:
    """The part of a batch that a pass sees, the same of all items and modalities.

    Attributes:
        patch_size: Side of a patch in pixels.
        side: Side of the square in pixels; 0 where nothing has rows and columns.
        corner: First row and column.
        first: First date.
        steps: Number of dates.
        turn: One of the eight ways to turn and flip a square.
    """

    patch_size: int
    side: int
    corner: tuple[int, int]
    first: int
    steps: int
    turn: int

    @classmethod
    def drawn(
        cls, masking: GalileoMasking, extent: tuple[int, int], steps: int, numbers: Sequence[float]
    ) -> Cut:
        """Choose by uniform numbers in [0, 1).

        Args:
            masking: What may be chosen.
            extent: Rows and columns of the data; (0, 0) where nothing has them.
            steps: Dates of the data, 1 or more.
            numbers: Six.
        """

        def pick(number: float, count: int) -> int:
            return min(int(number * count), count - 1)

        fits = [p for p in masking.patch_sizes if p <= min(extent)] or [min(masking.patch_sizes)]
        patch = fits[pick(numbers[0], len(fits))]
        patches, dates = masking.shapes[pick(numbers[1], len(masking.shapes))]
        side = min(patches, min(extent) // patch) * patch
        dates = min(dates, steps)
        return cls(
            patch_size=patch,
            side=side,
            corner=(
                pick(numbers[2], extent[0] - side + 1), pick(numbers[3], extent[1] - side + 1)
            ),
            first=pick(numbers[4], steps - dates + 1),
            steps=dates,
            turn=pick(numbers[5], 8),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GalileoPass:
    """One masked version of a batch.

    Attributes:
        kind: As configured; what is hidden may have another structure where the data have one
            date or one place.
        cut: The part of the batch.
        visible: What the encoder sees, bool by group, of the shapes of
            `GalileoBackbone.visibility`.
        hidden: What is asked for.
    """

    kind: Kind
    cut: Cut
    visible: dict[str, Tensor]
    hidden: dict[str, Tensor]


def cut_batch(
    x: Mapping[str, Any], modalities: Mapping[str, Modality], in_space: Iterable[str], cut: Cut
) -> dict[str, Any]:
    """Return the part of a batch that a pass sees.

    Args:
        x: A batch, normalised or not; values derived of a modality stand under
            `<modality>/<name>`.
        modalities: Those to take.
        in_space: Those that are cut and turned; others keep their rows and columns.
        cut: The part.
    """
    placed, out = set(in_space), {}
    for name, value in x.items():
        owner, _, companion = name.partition(".")
        owner = owner.partition("/")[0]
        if owner not in modalities or companion not in ("", *COMPANIONS):
            continue
        if not isinstance(value, Tensor):
            continue
        is_series = modalities[owner].kind == "series"
        if is_series and companion in ("", *_DATED):
            value = value[:, cut.first : cut.first + cut.steps]
        if owner in placed and companion in ("", *_SPATIAL):
            row, column = cut.corner
            value = value[..., row : row + cut.side, column : column + cut.side]
            value = value.rot90(cut.turn % 4, (-2, -1))
            value = value.flip(-1) if cut.turn >= 4 else value
        out[name] = value
    return out


def lowest(noise: Tensor, usable: Tensor, count: Tensor, start: Tensor | int = 0) -> Tensor:
    """Return which usable entries have the noise of rank `start` to `start + count`.

    Args:
        noise: (B, N).
        usable: bool (B, N).
        count: How many, int (B, 1).
        start: First rank, int (B, 1) or a number.

    Returns:
        bool (B, N).
    """
    rank = noise.masked_fill(~usable, torch.inf).argsort(1).argsort(1)
    return usable & (rank >= start) & (rank < start + count)


def group_choice(
    available: Tensor, noise: Tensor, share: float, encoded: int
) -> tuple[Tensor, Tensor]:
    """Choose the groups that are shown, and which of the others are asked for.

    The choice is common to all items that have all groups: the first `encoded` in the order of
    `noise`, and all non-empty subsets of the rest with equal probability. An item that lacks some
    has the choice among its own; one group alone is both shown and asked for.

    Args:
        available: Groups with any data, bool (B, G).
        noise: Order of the groups, (G,).
        share: Which subset, in [0, 1).
        encoded: Number of groups to show; one is always left to ask for.

    Returns:
        Shown and asked for, bool (B, G) each.
    """
    count = available.sum(1, keepdim=True)
    shown = lowest(noise.expand(available.shape), available, (count - 1).clamp(min=1, max=encoded))
    rest = available & ~shown
    most = torch.minimum(rest.sum(1, keepdim=True), torch.tensor(_EXACT, device=rest.device))
    subsets = 2 ** most.to(torch.int64)
    code = 1 + (share * (subsets - 1).double()).long()
    place = (rest.cumsum(1) - 1).clamp(min=0, max=_EXACT)
    asked = rest & ((code >> place) & 1).bool()
    return shown, asked | (shown & (count == 1))


def structured(
    along: Kind, valid: Mapping[str, Tensor], groups: Sequence[GalileoGroup],
    choice: tuple[Tensor, Tensor], parts: tuple[Tensor, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:  # fmt: skip
    """Show some groups in one part of the places or dates, and ask for others in another part.

    Groups that do not vary along the axis are shown or asked for as a whole.

    Args:
        along: `space` or `time`.
        valid: Tokens that see data, by group; see `GalileoBackbone.visibility`.
        groups: The groups of `valid`, in order.
        choice: Groups shown and asked for, bool (B, G) each.
        parts: Places (B, h, w) or dates (B, T) shown and asked for, bool.

    Returns:
        Visible and hidden tokens by group.
    """
    varies = ("space_time", "space") if along == "space" else ("space_time", "time")
    found: list[dict[str, Tensor]] = []
    for chosen, part in zip(choice, parts, strict=True):
        masks: dict[str, Tensor] = {}
        for number, group in enumerate(groups):
            known = valid[group.name]
            mask = chosen[:, number].view(-1, *[1] * (known.ndim - 1))
            if group.array in varies:
                where = part
                if group.array == "space_time":
                    where = part.unsqueeze(-1) if along == "space" else part[:, None, None]
                mask = mask & where
            masks[group.name] = known & mask
        found.append(masks)
    visible, hidden = found
    # one group alone that does not vary along the axis would be shown and asked for at once
    return visible, {name: mask & ~visible[name] for name, mask in hidden.items()}


def series_steps(x: Mapping[str, Any], modalities: Mapping[str, Modality]) -> int:
    """Return the number of dates of a batch, 1 without series.

    Raises:
        DataError: Series differ in length.
    """
    steps = {n: x[n].shape[1] for n, m in modalities.items() if m.kind == "series" and n in x}
    if len(set(steps.values())) > 1:
        raise DataError(
            f"Galileo takes series of one length; got {steps} dates. Make composites of the same "
            "periods, such as one per month."
        )
    return max(steps.values(), default=1)


def fill(module: nn.Module, path: Path) -> None:
    """Copy a released file into one network of pretraining, all of it.

    Args:
        module: A predictor, or the encoder of the teacher.
        path: Its file.

    Raises:
        WeightsError: The file is missing, or of another network.
    """
    content = read_tensors(path)
    found = {n.replace(".backbone", ""): t for n, t in content.items() if isinstance(t, Tensor)}
    own = module.state_dict()
    odd = sorted(own.keys() ^ found.keys())
    odd += [n for n in own if n in found and own[n].shape != found[n].shape]
    if odd:
        raise WeightsError(
            f"{path} does not fit: {len(odd)} tensors are missing, unknown or of another shape, "
            f"such as {', '.join(odd[:3])}. Give encoding.size, architecture and groups of the "
            "model that it belongs to."
        )
    module.load_state_dict(found)
