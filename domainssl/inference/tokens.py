"""Features of a window, laid out on the grid of its tokens.

windows = token_windows(backbone, ["s2"])       # size of a window and of its grid
tokens = windows.tokens(batch)                   # (B, E, *grid), NaN where nothing was seen
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from domainssl.backbones.base import Backbone, Features
from domainssl.errors import ConfigError, nearest
from domainssl.modality import Batch, Modality, zero_batch
from domainssl.nn.masking import mean_of_valid

__all__ = ["Autocast", "TokenWindows", "autocast_context", "feature_name", "fitting_sides",
           "token_map", "token_windows", "whole_windows"]  # fmt: skip

Autocast = Literal["bfloat16", "float16"]
_SIDE = 1024  # of a window that fits everything, where nothing says what was trained on
_TYPES: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast_context(device: str, autocast: Autocast | None) -> AbstractContextManager[Any]:
    """Return the context in which matrix products have a type; None leaves float32."""
    if autocast is None:
        return nullcontext()
    context: AbstractContextManager[Any] = torch.autocast(
        torch.device(device).type, _TYPES[autocast]
    )
    return context


def fitting_sides(
    asked: Sequence[int], trained: Sequence[int], shape: Sequence[int]
) -> tuple[int, ...]:
    """Return a window no larger than an input needs: its shape in whole windows of training.

    Args:
        asked: Sides of the window asked for.
        trained: Sides that the weights were trained on.
        shape: Sides of the input, in the same pixels.
    """
    return tuple(
        min(side, -(-length // step) * step)
        for side, step, length in zip(asked, trained, shape, strict=True)
    )


def feature_name(backbone: Backbone, names: Sequence[str], asked: str | None) -> str:
    """Return which feature is written: the one asked for, that of the only modality, or `joint`.

    Raises:
        ConfigError: There is no such feature, or several.
    """
    known = backbone.embed_dim
    if asked is not None:
        if asked not in known:
            raise ConfigError(
                f"--feature: got {asked!r}, expected one of {', '.join(known)}."
                f"{nearest(asked, known)}"
            )
        return asked
    if len(names) == 1 and names[0] in known:
        return names[0]
    if "joint" in known:
        return "joint"
    raise ConfigError(f"--feature: say which of {', '.join(known)} is written.")


def token_map(features: Features, name: str, axes: int) -> Tensor:
    """Return tokens on their grid, float32 (B, E, *grid), NaN where a token saw nothing valid.

    Args:
        features: What the backbone said.
        name: Which feature.
        axes: Axes of space; tokens of several dates become the mean of those that are valid.
    """
    tokens, grid = features.tokens[name].float(), features.grid[name]
    valid = features.token_valid.get(name)
    if valid is None:
        valid = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if len(grid) > axes:  # (B, T·L, E) -> (B, L, E)
        tokens = tokens.unflatten(1, (grid[0], -1)).transpose(1, 2)
        valid = valid.unflatten(1, (grid[0], -1)).transpose(1, 2)
        tokens, valid, grid = mean_of_valid(tokens, valid, axis=2), valid.any(2), grid[1:]
    tokens = tokens.masked_fill(~valid.unsqueeze(-1), torch.nan)
    return tokens.transpose(1, 2).unflatten(2, grid)


@dataclass(frozen=True, kw_only=True)
class TokenWindows:
    """A window that a backbone sees at once.

    Attributes:
        feature: Which feature is taken.
        sizes: Pixels or voxels of the window along each axis, by modality.
        grid: Tokens along each axis.
        dim: Length of a token.
    """

    feature: str
    sizes: Mapping[str, tuple[int, ...]]
    grid: tuple[int, ...]
    dim: int

    def cells(self, name: str) -> tuple[int, ...]:
        """Return the pixels of a modality along the sides of a token."""
        return tuple(s // g for s, g in zip(self.sizes[name], self.grid, strict=True))

    def predict(self, backbone: Backbone, batch: Batch) -> Tensor:
        """Return tokens, float32 (B, E, *grid), NaN where nothing valid was seen."""
        return token_map(backbone(batch), self.feature, len(self.grid))


def token_windows(
    backbone: Backbone,
    names: Sequence[str],
    *,
    feature: str | None = None,
    size: int | None = None,
    shape: Sequence[int] = (),
    dates: int = 1,
) -> TokenWindows:
    """Find the grid of tokens of a window by one pass over zeros.

    Args:
        backbone: In evaluation mode.
        names: Modalities that go in.
        feature: See `feature_name`.
        size: Side of the window in pixels of the finest modality; None is the size of the card.
        shape: Pixels of that modality that the input has along each axis: a `size` that is larger
            becomes what is needed for them.
        dates: Dates of a series.

    Raises:
        ConfigError: The card states no size, the backbone takes no such window, or has no tokens.
    """
    chosen = feature_name(backbone, names, feature)
    modalities = {name: backbone.modalities[name] for name in names}
    sizes = _sizes(modalities, size, shape)
    batch = zero_batch(modalities, sizes, dates)
    with torch.inference_mode():
        features = backbone.encode(backbone.normalize(batch))
    if chosen not in features.tokens:
        raise ConfigError(
            f"--feature {chosen}: the backbone gives no tokens for it, only for "
            f"{', '.join(features.tokens) or 'nothing'}. Write one vector per item with --pooled."
        )
    axes = len(next(iter(sizes.values())))
    grid = features.grid[chosen][-axes:]
    for name, sides in sizes.items():
        if any(side % count for side, count in zip(sides, grid, strict=True)):
            raise ConfigError(
                f"--window: {list(sides)} pixels of {name} are no whole number for each of the "
                f"{list(grid)} tokens. Choose a multiple of the patch."
            )
    return TokenWindows(
        feature=chosen, sizes=sizes, grid=tuple(grid), dim=features.tokens[chosen].shape[-1]
    )


def whole_windows(
    backbone: Backbone,
    names: Sequence[str],
    *,
    feature: str | None,
    size: int | None,
    shape: Sequence[int] = (),
) -> TokenWindows:
    """Return windows as grids of one cell, for one vector each; see `token_windows`."""
    chosen = feature_name(backbone, names, feature)
    sizes = _sizes({name: backbone.modalities[name] for name in names}, size, shape)
    axes = len(next(iter(sizes.values())))
    dim = backbone.embed_dim[chosen]
    return TokenWindows(feature=chosen, sizes=sizes, grid=(1,) * axes, dim=dim)


def _sizes(
    modalities: Mapping[str, Modality], size: int | None, shape: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    finest = min(modality.gsd_m or 1.0 for modality in modalities.values())
    if size is not None and shape:
        trained = [m.size for m in modalities.values() if (m.gsd_m or 1.0) == finest and m.size]
        size = _fitting(size, trained[0] if trained else (), shape)
    sizes = {}
    for name, modality in modalities.items():
        if size is None and not modality.size:
            raise ConfigError(
                f"--window: the card of the backbone states no size for {name}. Give the side of "
                "the window that it was trained on, in pixels."
            )
        if size is None:
            sizes[name] = modality.size
            continue
        side = size * finest / (modality.gsd_m or finest)
        if side != round(side):
            raise ConfigError(f"--window {size}: gives {name} {side:g} pixels; take a multiple.")
        sizes[name] = (round(side),) * modality.spatial_dims
    return sizes


def _fitting(size: int, trained: Sequence[int], shape: Sequence[int]) -> int:
    longest = max(shape)
    if trained:
        return fitting_sides([size], [math.lcm(*trained)], [longest])[0]
    if size > max(2 * longest, _SIDE):
        raise ConfigError(
            f"--window {size}: an input has {' x '.join(map(str, shape))} pixels, and the card of "
            f"the backbone states no size. Choose a window of at most {max(2 * longest, _SIDE)}."
        )
    return size
