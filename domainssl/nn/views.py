"""Random views of images, series and volumes: crops, flips and photometric changes on the device.

What a view is stands in a `View` of tensors that `draw_view` makes; `geometry` and `photometry`
apply it without any further choice. Every item of the batch has its own parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from domainssl.errors import ConfigError

__all__ = ["View", "Views", "draw_view", "geometry", "photometry"]

_TRIES = 10


@dataclass(frozen=True, kw_only=True)
class Views:
    """How views of one modality are drawn; probabilities lie in [0, 1].

    Attributes:
        crop_area: Least and largest share of the window's area (volume) that a crop covers.
        crop_aspect: Largest ratio of two sides of a crop, beyond the ratio that the sides of the
            view have.
        flip: Probability of a flip along each axis, one number or one per axis: 0 along x keeps
            left and right apart, where organs lie on one side.
        brightness: Factors lie in [1 - x, 1 + x].
        contrast: The same around the mean of each channel.
        color_probability: Probability of brightness and contrast, drawn together.
        grey_probability: Probability of replacing all channels by their mean.
        blur_probability: Probability of a Gaussian blur.
        blur_sigma: Least and largest standard deviation in pixels of the view.
        solarize_probability: Probability of inverting the darkest values.
        solarize_threshold: Values below it, in [0, 1], are inverted.
        gamma: Least and largest exponent of values in [0, 1].
        gamma_probability: Probability of such an exponent.
        stain: Largest change of the amounts of hematoxylin, eosin and DAB in colours (rgb8):
            factors lie in [1 - x, 1 + x], shifts in [-x, x] of optical density; 0.05 is light, 0.2
            strong, which can hide how much of a dye there is.
        stain_probability: Probability of such a change.

    Raises:
        ConfigError: A value lies outside its range.
    """

    crop_area: tuple[float, float] = (0.2, 1.0)
    crop_aspect: float = 4 / 3
    flip: float | tuple[float, ...] = 0.5
    brightness: float = 0.4
    contrast: float = 0.4
    color_probability: float = 0.0
    grey_probability: float = 0.0
    blur_probability: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_probability: float = 0.0
    solarize_threshold: float = 0.5 / 255
    gamma: tuple[float, float] = (0.7, 1.5)
    gamma_probability: float = 0.0
    stain: float = 0.05
    stain_probability: float = 0.0

    def __post_init__(self) -> None:
        for name in ("crop_area", "blur_sigma", "gamma"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not isinstance(self.flip, int | float):
            object.__setattr__(self, "flip", tuple(self.flip))
        low, high = self.crop_area
        checks = {
            "crop_area": 0 < low <= high <= 1,
            "crop_aspect": self.crop_aspect >= 1,
            "blur_sigma": 0 < self.blur_sigma[0] <= self.blur_sigma[1],
            "brightness": 0 <= self.brightness <= 1,
            "contrast": 0 <= self.contrast <= 1,
            "stain": 0 <= self.stain < 1,
            "gamma": 0 < self.gamma[0] <= self.gamma[1],
            "flip": all(0 <= p <= 1 for p in self.flips(1)),
        }
        names = [f.name for f in fields(self) if f.name.endswith("probability")]
        checks |= {name: 0 <= getattr(self, name) <= 1 for name in names}
        for name, is_fine in checks.items():
            if not is_fine:
                raise ConfigError(f"views.{name}: got {getattr(self, name)!r}, out of range.")

    def flips(self, axes: int) -> tuple[float, ...]:
        """Return the probability of a flip along each of so many axes.

        Raises:
            ConfigError: There are as many probabilities as another number of axes.
        """
        if isinstance(self.flip, int | float):
            return (float(self.flip),) * axes
        if axes > 1 and len(self.flip) != axes:
            raise ConfigError(
                f"views.flip: got {list(self.flip)!r}, expected one probability or {axes}, one "
                "per axis."
            )
        return self.flip

    @property
    def is_photometric(self) -> bool:
        """True when values in [0, 1] change, not only places; stains apart."""
        names = [f.name for f in fields(self) if "probability" in f.name]
        return any(getattr(self, name) > 0 for name in names if name != "stain_probability")


@dataclass(frozen=True, kw_only=True)
class View:
    """Parameters of one view of every item, drawn; D is 2 or 3.

    Attributes:
        start: First corner of the crop as a share of the window, (B, D).
        extent: Sides of the crop as shares, (B, D).
        flip: bool (B, D).
        brightness: Factor, (B,); 1 leaves values alone.
        contrast: Factor, (B,); 1 leaves values alone.
        grey: bool (B,).
        sigma: Standard deviation of the blur in pixels, (B,); 0 leaves values alone.
        solarize: bool (B,).
        date: Which date of a series, int64 (B,).
        gamma: Exponent, (B,); 1 leaves values alone.
        stain: Factor and shift of the amounts of three dyes, (B, 2, 3); 1 and 0 leave them alone.
    """

    start: Tensor
    extent: Tensor
    flip: Tensor
    brightness: Tensor
    contrast: Tensor
    grey: Tensor
    sigma: Tensor
    solarize: Tensor
    date: Tensor
    gamma: Tensor
    stain: Tensor


def draw_view(
    views: Views,
    size: tuple[int, ...],
    items: int,
    generator: torch.Generator,
    frames: Tensor | None = None,
    view_size: tuple[int, ...] | None = None,
) -> View:
    """Draw one view of every item.

    Args:
        views: What to draw.
        size: Spatial size of the window, (H, W) or (X, Y, Z).
        items: Number of items B.
        generator: Source of all randomness; tensors are made on its device.
        frames: bool (B, T), True where a date is real; each item's date is one of them.
        view_size: Size that crops are resized to; they have its proportions, so that thick slices
            stay thick. None asks for squares and cubes.
    """
    device = generator.device

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(items, generator=generator, device=device)

    def happens(probability: float) -> Tensor:
        return torch.rand(items, generator=generator, device=device) < probability

    start, extent = _draw_crop(views, size, items, generator, view_size or (1,) * len(size))
    flip = torch.rand(items, len(size), generator=generator, device=device)
    flip = flip < torch.tensor(views.flips(len(size)), device=device)
    color = happens(views.color_probability)
    brightness = uniform(1 - views.brightness, 1 + views.brightness)
    contrast = uniform(1 - views.contrast, 1 + views.contrast)
    grey = happens(views.grey_probability)
    blur = happens(views.blur_probability)
    sigma = uniform(*views.blur_sigma)
    solarize = happens(views.solarize_probability)
    date = torch.zeros(items, dtype=torch.int64, device=device)
    if frames is not None:
        noise = torch.rand(frames.shape, generator=generator, device=device)
        date = noise.masked_fill(~frames.to(device), -1.0).argmax(1)
    gamma = torch.ones(items, device=device)
    if views.gamma_probability > 0:
        gamma = torch.where(happens(views.gamma_probability), uniform(*views.gamma), 1.0)
    stain = torch.tensor([1.0, 0.0], device=device).view(1, 2, 1).repeat(items, 1, 3)
    if views.stain_probability > 0:
        change = 2 * torch.rand(items, 2, 3, generator=generator, device=device) - 1
        change = views.stain * change * happens(views.stain_probability).view(-1, 1, 1)
        stain = stain + change
    return View(
        start=start,
        extent=extent,
        flip=flip,
        brightness=torch.where(color, brightness, 1.0),
        contrast=torch.where(color, contrast, 1.0),
        grey=grey,
        sigma=torch.where(blur, sigma, 0.0),
        solarize=solarize,
        date=date,
        gamma=gamma,
        stain=stain,
    )


def _draw_crop(
    views: Views,
    size: tuple[int, ...],
    items: int,
    generator: torch.Generator,
    proportions: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """Take the first of ten drawn boxes that fits; otherwise the largest central one."""
    device, dims = generator.device, len(size)
    sides = torch.tensor(size, dtype=torch.float32, device=device)
    unit = math.prod(proportions) ** (1 / dims) if len(set(proportions)) > 1 else proportions[0]
    shape = torch.tensor([side / unit for side in proportions], device=device)

    def draw(*shape: int) -> Tensor:
        return torch.rand(items, *shape, generator=generator, device=device)

    low, high = views.crop_area
    volume = (low + (high - low) * draw(_TRIES)) * math.prod(size)
    # sides that differ by at most the aspect from each other, and multiply to the volume
    relative = (draw(_TRIES, dims) - 0.5) * math.log(views.crop_aspect)
    relative = (relative - relative.mean(-1, keepdim=True)).exp()
    boxes = volume.pow(1 / dims).unsqueeze(-1) * relative * shape  # (B, tries, D) in pixels
    fits = (boxes <= sides).all(-1)
    first = fits.float().argmax(1)
    chosen = boxes.gather(1, first.view(-1, 1, 1).expand(-1, 1, dims)).squeeze(1)
    central = ((sides / shape).min() * shape).expand(items, dims)
    chosen = torch.where(fits.any(1, keepdim=True), chosen, central)
    place = torch.where(fits.any(1, keepdim=True), draw(dims), 0.5)
    extent = chosen / sides
    return place * (1 - extent), extent


def geometry(x: Tensor, valid: Tensor, view: View, size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Cut, resize and flip; only valid pixels are interpolated.

    Args:
        x: (B, C, *S); values where `valid` is False do not matter.
        valid: bool (B, *S).
        view: Which crop and flips.
        size: Spatial size of the result.

    Returns:
        Values (B, C, *size), zero where not valid, and validity (B, *size): at least half of
        what a pixel is made of.
    """
    with torch.autocast(x.device.type, enabled=False):
        weight = valid.unsqueeze(1).float()
        stacked = torch.cat([torch.where(valid.unsqueeze(1), x.float(), 0.0), weight], dim=1)
        grid = _sampling_grid(view, size).to(x.device)
        out = F.grid_sample(stacked, grid, padding_mode="border", align_corners=False)
        values, share = out[:, :-1], out[:, -1:]
        seen = share >= 0.5
        values = torch.where(seen, values / share.clamp(min=0.5), 0.0)
    return values, seen.squeeze(1)


def _sampling_grid(view: View, size: tuple[int, ...]) -> Tensor:
    """Return the positions to read in [-1, 1], last axis first, (B, *size, D)."""
    items, dims = view.start.shape
    coordinates = []
    for axis, count in enumerate(size):
        unit = (torch.arange(count, dtype=torch.float32, device=view.start.device) + 0.5) / count
        along = unit.expand(items, -1)
        along = torch.where(view.flip[:, axis : axis + 1], 1 - along, along)
        along = view.start[:, axis : axis + 1] + view.extent[:, axis : axis + 1] * along
        shape = [items] + [1] * dims
        shape[1 + axis] = count
        coordinates.append((2 * along - 1).view(shape).expand(items, *size))
    return torch.stack(coordinates[::-1], dim=-1)


def photometry(x: Tensor, valid: Tensor, view: View, views: Views) -> Tensor:
    """Change gamma, brightness, contrast, colour and sharpness, in that order; within [0, 1].

    Args:
        x: Values in [0, 1], (B, C, *S).
        valid: bool (B, *S); the mean of a channel is that of its valid pixels.
        view: Parameters.
        views: What they were drawn from.

    Source: DeCUR's published pipeline; where that wraps around in 8 bit, values are clipped here.
    """
    if not views.is_photometric:
        return x
    each = [-1] + [1] * (x.ndim - 1)
    with torch.autocast(x.device.type, enabled=False):
        x = x.float()
        if views.gamma_probability > 0:  # no gradient passes, so that 0 to a power is no trouble
            x = x.clamp(0, 1).pow(view.gamma.view(each))
        x = (x * view.brightness.view(each)).clamp(0, 1)
        weight = valid.unsqueeze(1).float()
        axes = list(range(2, x.ndim))
        mean = (x * weight).sum(axes, keepdim=True) / weight.sum(axes, keepdim=True).clamp(min=1)
        x = (mean + (x - mean) * view.contrast.view(each)).clamp(0, 1)
        x = torch.where(view.grey.view(each), x.mean(1, keepdim=True), x)
        if views.blur_probability > 0:
            x = _blur(x, view.sigma, views.blur_sigma[1])
        is_dark = x < views.solarize_threshold
        x = torch.where(view.solarize.view(each) & is_dark, 1 - x, x)
    return x


def _blur(x: Tensor, sigma: Tensor, largest: float) -> Tensor:
    """Blur every item with its own sigma, one axis after the other, reflecting at the border."""
    for axis in range(2, x.ndim):
        side = x.shape[axis]
        radius = min(math.ceil(3 * largest), side - 1)
        steps = torch.arange(-radius, radius + 1, device=x.device)
        kernel = torch.exp(-0.5 * (steps / sigma.clamp(min=1e-3).unsqueeze(1)).square())
        kernel = (kernel / kernel.sum(1, keepdim=True)).to(x.dtype)  # (B, k)
        source = (torch.arange(side, device=x.device).unsqueeze(1) + steps).abs()
        source = torch.where(source >= side, 2 * (side - 1) - source, source)
        mixing = kernel.new_zeros(len(x), side, side)
        mixing = mixing.scatter_add(
            2, source.expand(len(x), -1, -1), kernel.unsqueeze(1).expand(-1, side, -1)
        )
        rows = x.movedim(axis, -1)
        blurred = rows.flatten(1, -2) @ mixing.transpose(1, 2)  # (B, rows, S)
        x = blurred.view(rows.shape).movedim(-1, axis)
    return x
