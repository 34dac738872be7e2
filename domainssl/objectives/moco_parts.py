"""What MoCo v2 and v3 share: two views of an item, a key encoder, a queue of keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainssl.backbones.base import Backbone, Features
from domainssl.distributed import gather, row_layout
from domainssl.errors import ConfigError
from domainssl.modality import Batch, Modality, key, present_mask
from domainssl.nn.precision import full
from domainssl.nn.views import View, Views
from domainssl.objectives.base import Generators, Objective, Step
from domainssl.objectives.student_parts import Crops, StudentEncoding, published_crops
from domainssl.objectives.student_teacher import _StudentTeacher
from domainssl.options import as_dataclass
from domainssl.training.execution import Execution
from domainssl.training.optimization import Optimization

__all__ = ["KeyQueue", "MoCoDraws", "MoCoViews", "positive_number"]


@dataclass(frozen=True, kw_only=True)
class MoCoViews:
    """How the two views of an item are drawn.

    Attributes:
        size: Size of a view in pixels or voxels, one number or one per axis; None is that of the
            window.
        first: Changes of the first view; None takes those of the SSL4EO-S12 baselines.
        second: Changes of the second view; None as above.
        seasons: Which date of a series a view shows: each view one of its own (`augment`), both
            the same drawn one (`random`), or always the first (`fixed`).

    Raises:
        ConfigError: There is no such choice of seasons.
    """

    size: int | tuple[int, ...] | None = None
    first: Views | None = None
    second: Views | None = None
    seasons: Literal["augment", "random", "fixed"] = "augment"

    def __post_init__(self) -> None:
        if self.seasons not in ("augment", "random", "fixed"):
            raise ConfigError(
                f"model.init_args.views.seasons: got {self.seasons!r}, expected augment, random "
                "or fixed."
            )

    def crops(self, usual: tuple[Views, Views]) -> Crops:
        """Return both views as the two large crops, with `usual` changes where None."""
        first, second = (own or other for own, other in zip((self.first, self.second), usual))
        return Crops(
            global_size=self.size, local_count=0, first=first, second=second, local=Views()
        )


@dataclass(frozen=True, kw_only=True)
class MoCoDraws:
    """Random choices of one step.

    Attributes:
        views: The first and the second view of every item.
        shuffle: Order in which the keys of all ranks are encoded, int64 (W·B,); None keeps it.
    """

    views: tuple[View, View]
    shuffle: Tensor | None = None


class KeyQueue(nn.Module):
    """The keys of the last batches, of unit length; the oldest is replaced first.

    Args:
        size: Number of keys, K.
        width: Length of a key, E.
        seed: Seed of the random keys that fill it at first, equal on all ranks.
    """

    keys: Tensor
    pointer: Tensor

    def __init__(self, size: int, width: int, seed: int) -> None:
        super().__init__()
        keys = torch.randn(size, width, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("keys", F.normalize(keys, dim=-1))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.int64))

    @torch.no_grad()
    def add(self, keys: Tensor, present: Tensor) -> None:
        """Replace the oldest keys.

        Args:
            keys: Keys of unit length of the items of this rank, (B, E).
            present: bool (B,); the keys of other items are left out.
        """
        layout = row_layout(present)
        present, keys = gather(present, "detach", layout), gather(keys, "detach", layout)
        kept = keys[present][-len(self.keys) :].to(self.keys.dtype)
        steps = torch.arange(len(kept), device=kept.device)
        self.keys[(self.pointer + steps) % len(self.keys)] = kept
        self.pointer.copy_((self.pointer + len(kept)) % len(self.keys))


class _MoCo(_StudentTeacher):
    """Base of both versions: a query encoder that is trained and kept, a key encoder behind it.

    A subclass calls `make_teacher(head=...)` and writes `usual_views` and `compare`.

    Args:
        modalities: Exactly one.
        encoding: What the backbone is built from.
        views: How views are drawn.
        momentum: Share of the key encoder that a step keeps.
        temperature: Divides the cosines.
        context_size: Size of the window that the DataModule yields.
        optimization: Optimiser and schedule.
        execution: Seed, speed and memory.
    """

    contrastive: ClassVar[bool] = True
    exported: ClassVar[str] = "backbone"

    def __init__(
        self,
        modalities: Mapping[str, Modality | Mapping[str, Any]],
        encoding: StudentEncoding,
        *,
        views: MoCoViews,
        momentum: float,
        temperature: float,
        context_size: int | tuple[int, ...],
        optimization: Optimization,
        execution: Execution,
    ) -> None:
        chosen: Any = as_dataclass(MoCoViews, views)
        super().__init__(
            modalities,
            encoding,
            crops=chosen,
            masks=None,
            momentum=momentum,
            context_size=context_size,
            optimization=optimization,
            execution=execution,
        )
        self.seasons = chosen.seasons
        self.temperature = positive_number(temperature, "temperature")

    @staticmethod
    def usual_views(modality: Modality) -> tuple[Views, Views]:
        """Return the changes of the two views as published."""
        raise NotImplementedError("A version of MoCo must implement usual_views(modality).")

    def compare(
        self,
        first: Mapping[str, Tensor],
        second: Mapping[str, Tensor],
        present: Tensor,
        shuffle: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the losses of two normalised views, and what `after_step` needs.

        Args:
            first: First view of every item.
            second: Second view.
            present: bool (B,).
            shuffle: See `MoCoDraws`.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement compare(first, second).")

    def build_student(
        self,
        known: Mapping[str, Modality],
        encoding: StudentEncoding,
        crops: Any,
        context_size: int | tuple[int, ...],
        *,
        has_masks: bool,
    ) -> tuple[Any, Backbone]:
        """Return both views as crops, fitted to the data, and the query encoder."""
        crops = crops.crops(self.usual_views(known[self.name]))
        return super().build_student(known, encoding, crops, context_size, has_masks=has_masks)

    def make_teacher(self, **parts: nn.Module) -> None:
        """Copy backbone and heads; the key encoder is in the mode of the query encoder."""
        super().make_teacher(**parts)
        self.teacher.train(self.training)

    def train(self, mode: bool = True) -> _MoCo:
        """Let the batch norms of the key encoder take the statistics of their own batch."""
        Objective.train(self, mode)
        return self

    def features(self, batch: Batch) -> Features:
        """Return the features of the query encoder, as published."""
        features: Features = self.backbone(batch)
        return features

    def same_dates(self, views: tuple[View, ...]) -> tuple[View, ...]:
        """Choose the dates of the views as `seasons` says."""
        first, second = views
        if self.seasons == "random":
            return first, dataclasses.replace(second, date=first.date)
        if self.seasons == "fixed":
            date = torch.zeros_like(first.date)
            return tuple(dataclasses.replace(view, date=date) for view in views)
        return views

    def draw(self, batch: Batch, generators: Generators) -> MoCoDraws:  # type: ignore[override]
        """Draw both views of every item."""
        first, second = super().draw(batch, generators).views
        return MoCoDraws(views=(first, second), shuffle=self.draw_shuffle(batch, generators))

    def draw_shuffle(self, batch: Batch, generators: Generators) -> Tensor | None:
        """Return the order in which keys are encoded; the base keeps it."""
        return None

    def forward(self, batch: Batch, draws: MoCoDraws, outputs: bool = False) -> Step:  # type: ignore[override]
        """Compare the views; items without the modality do not count."""
        present = present_mask(batch, self.name)
        first, second = (
            {**crop, key(self.name, "present"): present}
            for crop in self.cut_crops(batch, draws.views)
        )
        losses, kept = self.compare(first, second, present, draws.shuffle)
        kept |= {"vectors": kept["keys"], "present": present}
        if outputs:
            kept["embeddings"] = {self.name: kept["keys"]}
        return Step(losses, kept)

    def encoded(
        self, encode: Callable[..., Features], head: nn.Module, view: Mapping[str, Tensor]
    ) -> Tensor:
        """Return what a head makes of a view, (B, E)."""
        out: Tensor = head(self.vector(encode(view)))
        return out

    def after_step(self, step: Step) -> None:
        """Move the key encoder; its batch norms have followed its own batches."""
        self.move_teacher(self.momentum_now())


def unit(x: Tensor) -> Tensor:
    """Divide by the length, in float32."""
    return F.normalize(full(x), dim=-1)


def blurred(modality: Modality, area: tuple[float, float]) -> tuple[Views, Views, Views]:
    """Return the changes of SSL4EO-S12 with a blur always, seldom and half of the time.

    Without solarisation.
    """
    first, second, local = (
        dataclasses.replace(views, crop_area=area, solarize_probability=0.0)
        for views in published_crops(modality)
    )
    return first, second, local


def positive_number(value: float, name: str) -> float:
    """Return `value` if it is above zero.

    Raises:
        ConfigError: It is not.
    """
    if not value > 0:
        raise ConfigError(f"model.init_args.{name}: got {value!r}, expected more than 0.")
    return value
