"""Normalisation that belongs to the weights: its form and its statistics, in one module."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from domainssl.errors import ConfigError, DataError, nearest
from domainssl.modality import Modality, key, present_mask, valid_mask

__all__ = ["Form", "Normalizer", "batch_mean2std"]

Name = Literal[
    "identity", "zscore", "mean2std", "mean2std8", "scale", "log", "window", "item", "batch"
]
_NUMBERS = {"scale": 1, "log": 1, "window": 2}
_STATISTICS = ("zscore", "mean2std", "mean2std8")
_PATTERN = re.compile(r"\s*([a-z0-9]+)\s*(?:\((.*)\))?\s*\Z")


@dataclass(frozen=True)
class Form:
    """How physical values become network input.

    ==================  ===================================================================
    written             computes
    ==================  ===================================================================
    `identity`          x
    `zscore`            (x - mean) / std
    `mean2std`          clip((x - (mean - 2 std)) / (4 std), 0, 1)
    `mean2std8`         the same, rounded down to 8 bit
    `scale(f)`          x / f
    `log(f)`            log(max(x, 1e-6)) / f
    `window(lo,hi)`     clip((x - lo) / (hi - lo), 0, 1)
    `item`              the same with the limits the item carries in `<m>.window`
    `batch`             mean2std with the statistics of the batch itself (not for inference:
                        the output of an item depends on its batch)
    ==================  ===================================================================
    """

    name: Name
    numbers: tuple[float, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Form:
        """Read a form as it is written in a config.

        Raises:
            ConfigError: Unknown form, or wrong numbers.
        """
        found = _PATTERN.match(text)
        names = get_args(Name)
        if not found or found[1] not in names:
            raise ConfigError(
                f"normalization: {text!r} is not one of {', '.join(names)} "
                f"(scale and log take one number, window two).{nearest(text, names)}"
            )
        name = found[1]
        try:
            numbers = tuple(float(part) for part in (found[2] or "").split(",") if part.strip())
        except ValueError as error:
            raise ConfigError(
                f"normalization: {text!r} holds something that is no number."
            ) from error
        wanted = _NUMBERS.get(name, 0)
        if len(numbers) != wanted or (name == "window" and numbers[0] >= numbers[1]):
            raise ConfigError(
                f"normalization: {text!r} has the numbers {numbers}; {name!r} takes {wanted}"
                f"{' in ascending order' if wanted == 2 else ''}."
            )
        if name in ("scale", "log") and numbers[0] == 0:
            raise ConfigError(f"normalization: {text!r} would divide by zero.")
        return cls(cast(Name, name), numbers)

    @property
    def needs_statistics(self) -> bool:
        """Mean and standard deviation per channel are needed."""
        return self.name in _STATISTICS

    def __str__(self) -> str:
        numbers = ",".join(f"{n:g}" for n in self.numbers)
        return f"{self.name}({numbers})" if numbers else self.name


def batch_mean2std(
    x: Tensor, *, valid: Tensor | None = None, channel_axis: int = 1, eight_bit: bool = False
) -> Tensor:
    """Scale a batch by its own mean and unbiased standard deviation per channel.

    Args:
        x: (B, C, ...).
        valid: bool, broadcastable to x; False values do not count. None counts all.
        channel_axis: Position of C.
        eight_bit: Round down to multiples of 1/255.

    Source: usage example of the CROMA release; the standard deviation is kept above 1e-6.
    """
    axes = [axis for axis in range(x.ndim) if axis != channel_axis]
    if valid is None:
        mean, std = x.mean(axes, keepdim=True), x.std(axes, keepdim=True)
    else:
        weight = valid.expand_as(x).float()
        count = weight.sum(axes, keepdim=True)
        mean = torch.where(valid, x, 0.0).sum(axes, keepdim=True) / count.clamp(min=1)
        squares = torch.where(valid, x - mean, 0.0).square().sum(axes, keepdim=True)
        std = (squares / (count - 1).clamp(min=1)).sqrt()
    std = std.clamp(min=1e-6)
    return _to_unit(x, mean - 2 * std, mean + 2 * std, eight_bit)


def _to_unit(x: Tensor, low: Tensor, high: Tensor, eight_bit: bool = False) -> Tensor:
    unit = (x - low) / (high - low)
    if eight_bit:
        return (unit * 255).clamp(0, 255).trunc() / 255
    return unit.clamp(0, 1)


class Normalizer(nn.Module):
    """Normalise every modality by its form, with statistics kept as persistent buffers.

    Args:
        modalities: Modalities with `mean` and `std` where the form needs them.
        forms: Form per modality, or one for all, as text.

    Raises:
        ConfigError: A form needs statistics that a modality lacks.
    """

    def __init__(self, modalities: Mapping[str, Modality], forms: str | Mapping[str, str]) -> None:
        super().__init__()
        self.modalities = dict(modalities)
        self.forms: dict[str, Form] = {}
        if not isinstance(forms, str):
            for name in forms:
                if name not in modalities:
                    raise ConfigError(
                        f"normalization.{name}: no such modality.{nearest(name, modalities)} "
                        f"Known: {', '.join(modalities)}."
                    )
        for name, modality in modalities.items():
            text = forms if isinstance(forms, str) else forms.get(name)
            if text is None:
                raise ConfigError(f"normalization: no form is given for modality {name!r}.")
            form = Form.parse(text)
            self.forms[name] = form
            if form.name in _STATISTICS:
                if modality.mean is None or modality.std is None:
                    raise ConfigError(
                        f"normalization.{name}: {text!r} needs mean and std per channel and the "
                        "modality has none; set data.init_args.statistics or choose another form."
                    )
                self.register_buffer(f"mean_{name}", torch.tensor(modality.mean))
                self.register_buffer(f"std_{name}", torch.tensor(modality.std))

    def statistics(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Return mean and standard deviation of a modality, (C,) each, if its form has them."""
        if self.forms[name].name not in _STATISTICS:
            return None
        return self.get_buffer(f"mean_{name}"), self.get_buffer(f"std_{name}")

    def _per_channel(self, values: Tensor, modality: Modality, x: Tensor) -> Tensor:
        shape = [1] * x.ndim
        shape[modality.channel_axis] = -1
        return values.to(torch.float32).view(shape)

    def to_unit(self, batch: Mapping[str, Any], name: str) -> Tensor:
        """Bring physical values to [0, 1] where the form has such a step, in float32."""
        modality, form = self.modalities[name], self.forms[name]
        x: Tensor = batch[name].to(torch.float32)
        if form.name in ("identity", "zscore"):
            return x
        if form.name == "scale":
            return x / form.numbers[0]
        if form.name == "log":
            return x.clamp(min=1e-6).log() / form.numbers[0]
        if form.name == "batch":
            valid = self._usable(batch, name, x)
            return batch_mean2std(x, valid=valid, channel_axis=modality.channel_axis)
        if form.name == "item":
            return _to_unit(x, *self._item_limits(batch, name, x))
        if form.name == "window":
            low, high = (x.new_tensor(n) for n in form.numbers)
            return _to_unit(x, low, high)
        mean, std = (self._per_channel(s, modality, x) for s in self.statistics(name) or (x, x))
        return _to_unit(x, mean - 2 * std, mean + 2 * std, form.name == "mean2std8")

    def _item_limits(self, batch: Mapping[str, Any], name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        limits = batch.get(key(name, "window"))
        if limits is None:
            raise DataError(
                f"batch.{name}.window is missing: the normalisation form 'item' scales every item "
                "by limits that the DataModule measures on the whole item, (B, C, 2)."
            )
        shape = [x.shape[0]] + [1] * (x.ndim - 1)
        shape[self.modalities[name].channel_axis] = x.shape[self.modalities[name].channel_axis]
        low, high = (limits[..., i].float().view(shape) for i in (0, 1))
        return low, torch.maximum(high, low + 1e-6)

    def standardize(self, x: Tensor, name: str) -> Tensor:
        """Centre and scale values that `to_unit` returned, where the form has such a step."""
        if self.forms[name].name != "zscore":
            return x
        modality = self.modalities[name]
        mean, std = (self._per_channel(s, modality, x) for s in self.statistics(name) or (x, x))
        return (x - mean) / std

    def can_undo(self, name: str) -> bool:
        """Tell whether `undo` knows the form: not where it depends on the item or the batch."""
        return self.forms[name].name not in ("item", "batch")

    def undo(self, x: Tensor, name: str) -> Tensor:
        """Return physical values of normalised ones; what was clipped stays at its limit.

        Args:
            x: Values in the modality's layout, such as (B, C, H, W).
            name: Which modality, one for which `can_undo` holds.
        """
        modality, form = self.modalities[name], self.forms[name]
        if form.name == "identity":
            return x
        if form.name == "scale":
            return x * form.numbers[0]
        if form.name == "log":
            return (x * form.numbers[0]).exp()
        if form.name == "window":
            low, high = form.numbers
            return x * (high - low) + low
        mean, std = (self._per_channel(s, modality, x) for s in self.statistics(name) or (x, x))
        return x * std + mean if form.name == "zscore" else (x * 4 - 2) * std + mean

    def mask(self, x: Tensor, batch: Mapping[str, Any], name: str) -> Tensor:
        """Set values to zero where they are not valid or the modality is absent."""
        return torch.where(self._usable(batch, name, x), x, 0.0)

    def _usable(self, batch: Mapping[str, Any], name: str, x: Tensor) -> Tensor:
        """True where a value was measured and the item has the modality; broadcastable to x."""
        modality = self.modalities[name]
        valid = valid_mask(batch, modality).unsqueeze(modality.channel_axis)
        return valid & present_mask(batch, name).view(-1, *[1] * (x.ndim - 1))

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the batch with every known modality normalised.

        Values that are invalid, absent or not finite are zero.
        """
        out = dict(batch)
        with torch.autocast(_device_type(batch, self.modalities), enabled=False):
            for name in self.modalities:
                if name in batch:
                    x = self.standardize(self.to_unit(batch, name), name)
                    x = self.mask(x, batch, name)
                    raw = batch[name]
                    if raw.is_floating_point():
                        x = torch.where(raw.isfinite(), x, 0.0)
                    out[name] = x
        return out


def _device_type(batch: Mapping[str, Any], names: Mapping[str, Modality]) -> str:
    for name in names:
        if name in batch:
            return str(batch[name].device.type)
    return "cpu"
