"""What DeCUR and its siblings share: encoders per modality, independent views, projections.

Every modality of an item is seen through its own views: its own crop, flips, photometric changes
and, for series, its own date. Nothing has to stay aligned, because one vector per item is compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from domainssl.backbones.bands import BandPolicy
from domainssl.backbones.base import Features
from domainssl.backbones.encoders.backbone import (
    DeformableAttentionUse,
    EncoderBackbone,
    EncoderSizes,
)
from domainssl.backbones.encoders.nets import Encoder
from domainssl.backbones.registry import load_initial
from domainssl.distributed import RowLayout, row_layout
from domainssl.errors import ConfigError, nearest
from domainssl.modality import (
    Batch,
    Modality,
    as_modalities,
    check_batch,
    key,
    present_mask,
    sides_of,
)
from domainssl.nn.heads import ProjectionHead
from domainssl.nn.norm import counted_rows
from domainssl.nn.views import View, Views, draw_view
from domainssl.objectives.base import Generators, Objective, Step
from domainssl.objectives.view_steps import check_photometric, unit_values, view_of
from domainssl.options import as_dataclass
from domainssl.training.execution import Execution
from domainssl.training.optimization import Optimization

__all__ = [
    "EncoderSizes",
    "PairEncoding",
    "ViewDraws",
    "Views",
    "published_optimization",
    "published_views",
]

# Published rates of the released weights: LARS for plain ResNets, AdamW for all others.
_LARS = Optimization(
    optimizer="lars", lr=0.2, lr_bias=0.0048, weight_decay=1e-6, warmup_fraction=0.0
)
_ADAMW = Optimization(lr=1e-4, weight_decay=0.01, betas=(0.9, 0.999), warmup_fraction=0.0)
ViewDraws = dict[str, tuple[View, ...]]


def published_optimization(
    encoder: str | dict[str, str], attention: DeformableAttentionUse
) -> Optimization:
    """Return the optimiser of the released weights for such encoders."""
    names = encoder.values() if isinstance(encoder, dict) else [encoder]
    is_plain = attention == "none" and all(name.startswith("resnet") for name in names)
    return _LARS if is_plain else _ADAMW


@dataclass(frozen=True, kw_only=True)
class PairEncoding:
    """What encodes the two modalities.

    Attributes:
        encoder: `transformer`, or a timm name such as `resnet50`, for both or per modality.
        sizes: Sizes of the encoder `transformer`.
        normalization: Form for both modalities, or one per modality.
        weights: Start from this export, checkpoint or published file.
        bands: Where the bands differ from those of the weights: `strict` refuses, `subset` keeps
            the weights of the bands that are there, `average` gives new ones averaged weights.
    """

    encoder: str | dict[str, str] = "resnet50"
    sizes: EncoderSizes = EncoderSizes()
    normalization: str | dict[str, str] = "mean2std"
    weights: str | None = None
    bands: BandPolicy = "strict"


def published_views(modality: Modality) -> Views:
    """Return the changes that the SSL4EO and GeoNRW pipelines use for such a modality."""
    if modality.value_unit in ("db", "linear"):
        return Views(grey_probability=0.2, blur_probability=0.5)
    if modality.value_unit in ("dn", "reflectance", "rgb8"):
        return Views(
            color_probability=0.8,
            grey_probability=0.2,
            blur_probability=0.5,
            solarize_probability=0.2,
        )
    return Views()


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One projected view of each modality.

    Attributes:
        first: Projections of the first modality, (B, K).
        second: Of the second one, (B, K).
        both: Which items have both modalities, bool (B,).
        layout: Rows of all ranks.
    """

    first: Tensor
    second: Tensor
    both: Tensor
    layout: RowLayout


class _JointEmbedding(Objective):
    """Base of methods that compare one vector per item and view between two modalities.

    Args:
        modalities: Exactly two.
        encoding: Encoders, normalisation and weights to start from.
        attention: Deformable attention of the encoders; see `EncoderBackbone`.
        views: How views are drawn, per modality; None takes `published_views`.
        view_size: Size of a view in pixels or voxels; None takes `context_size`.
        context_size: Size of the window that the DataModule yields.
        optimization: Optimiser and schedule; None takes the published one of the encoder.
        execution: Seed, speed and memory.
        num_views: Views per modality and item.
    """

    contrastive: ClassVar[bool] = True
    backbone: EncoderBackbone

    def __init__(
        self,
        modalities: Mapping[str, Modality | Mapping[str, Any]],
        encoding: PairEncoding | Mapping[str, Any],
        *,
        attention: DeformableAttentionUse = "none",
        views: Mapping[str, Views | Mapping[str, Any]] | None,
        view_size: int | tuple[int, ...] | None,
        context_size: int | tuple[int, ...],
        optimization: Optimization | None,
        execution: Execution,
        num_views: int = 1,
    ) -> None:
        encoding = as_dataclass(PairEncoding, encoding)
        super().__init__(
            optimization=optimization or published_optimization(encoding.encoder, attention),
            execution=execution,
            context_size=context_size,
        )
        known = as_modalities(modalities)
        method = type(self).__name__
        if len(known) != 2:
            raise ConfigError(
                f"{method} compares two modalities, the data have {list(known)}. Choose two in "
                "the DataModule."
            )
        self.num_views = num_views
        axes = next(iter(known.values())).spatial_dims
        given = context_size if view_size is None else view_size
        self.view_size = sides_of(given, axes, "model.init_args.view_size")
        variant: dict[str, Any] = {
            "encoder": encoding.encoder,
            "sizes": as_dataclass(EncoderSizes, encoding.sizes),
            "image_size": max(self.view_size),
            "deformable_attention": attention,
        }
        if encoding.weights is None:
            forms = encoding.normalization
            self.backbone = EncoderBackbone(known, **variant, normalization=forms)
        else:
            self.backbone = _from_weights(encoding, known, variant)
        self.first, self.second = known
        self.views = self._views(views, known)

    def _views(
        self, given: Mapping[str, Views | Mapping[str, Any]] | None, known: dict[str, Modality]
    ) -> dict[str, Views]:
        for name in given or {}:
            if name not in known:
                raise ConfigError(
                    f"model.init_args.views: no modality {name!r}.{nearest(name, known)} "
                    f"The data have {list(known)}."
                )
        chosen = {}
        for name, modality in known.items():
            own = given[name] if given and name in given else published_views(modality)
            chosen[name] = as_dataclass(Views, own)
            form = self.backbone.normalizer.forms[name]
            check_photometric(chosen[name], form, modality, f"views.{name}")
        return chosen

    def setup(self, stage: str) -> None:
        """Refuse what timm's encoders cannot do, besides the checks of every objective."""
        is_own = all(isinstance(e, Encoder) and e.is_own for e in self.backbone.encoders.values())
        wanted = self.execution
        if not is_own and (wanted.compile or wanted.attention != "fused"):
            raise ConfigError(
                "model.init_args.execution: compile and attention act on our own blocks (encoder: "
                "transformer); timm's encoders take compile: false and attention: fused."
            )
        super().setup(stage)

    def draw(self, batch: Batch, generators: Generators) -> ViewDraws:
        """Draw the views of every modality, independently of the other one."""
        draws: ViewDraws = {}
        for name, modality in self.backbone.modalities.items():
            x = batch[name]
            frames = None
            if modality.kind == "series":
                frames = batch.get(key(name, "frames"))
                if frames is None:
                    frames = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
            size = tuple(x.shape[-modality.spatial_dims :])
            draws[name] = tuple(
                draw_view(self.views[name], size, len(x), generators.local, frames, self.view_size)
                for _ in range(self.num_views)
            )
        return draws

    def encode_views(self, batch: Batch, draws: ViewDraws) -> dict[str, list[Tensor]]:
        """Make the views and encode them: pooled vectors (B, E) per modality and view."""
        check_batch(batch, self.backbone.modalities, training=True)
        units = {n: unit_values(self.backbone, batch, n) for n in self.backbone.modalities}
        pooled: dict[str, list[Tensor]] = {name: [] for name in units}
        for index in range(self.num_views):
            x: dict[str, Any] = {}
            for name, (values, usable) in units.items():
                x |= view_of(
                    self.backbone, batch, name, values, usable, draws[name][index],
                    self.views[name], self.view_size,
                )  # fmt: skip
                if key(name, "present") in batch:
                    x[key(name, "present")] = batch[key(name, "present")]
            for name, vector in self.backbone.encode(x).pooled.items():
                pooled[name].append(vector)
        return pooled

    def present(self, batch: Batch) -> dict[str, Tensor]:
        """Return which items have a modality, (B,) per name."""
        return {name: present_mask(batch, name) for name in self.backbone.modalities}

    # -- projections ------------------------------------------------------------------------

    def make_heads(self, widths: Sequence[int], *, shared: bool, last_norm: bool = False) -> None:
        """Build the projections: `heads.shared`, or one per modality.

        Raises:
            ConfigError: A shared projection is wanted for encoders of different width.
        """
        inputs = self.backbone.embed_dim
        if shared and len(set(inputs.values())) > 1:
            raise ConfigError(
                f"{type(self).__name__}: one projection for both modalities needs encoders of one "
                f"width, got {inputs}. Set options.shared_projector: false."
            )
        owners = {"shared": inputs[self.first]} if shared else inputs
        self.heads = nn.ModuleDict(
            {n: ProjectionHead(width, widths, last_norm=last_norm) for n, width in owners.items()}
        )

    def project(self, vector: Tensor, name: str, rows: Tensor | None = None) -> Tensor:
        """Project a pooled vector of a modality, (B, E) -> (B, K)."""
        with counted_rows(rows):
            out: Tensor = self.heads["shared" if "shared" in self.heads else name](vector)
        return out

    def project_pair(self, batch: Batch, draws: ViewDraws) -> Pair:
        """Encode and project the first view of both modalities."""
        rows = self.present(batch)
        layout = row_layout(rows[self.first])
        pooled = self.encode_views(batch, draws)
        first, second = (
            self.project(pooled[name][0], name, rows[name]) for name in (self.first, self.second)
        )
        return Pair(
            first=first, second=second, both=rows[self.first] & rows[self.second], layout=layout
        )

    def step(self, losses: dict[str, Tensor], pair: Pair, outputs: bool) -> Step:
        """Return the losses, with the embeddings where outputs are wanted."""
        vectors = {self.first: pair.first, self.second: pair.second}
        return Step(losses, with_outputs(vectors) if outputs else {})

    def embed(self, features: Features) -> dict[str, Tensor]:
        """Project pooled features into the space of the loss, (B, K) each."""
        return {
            name: self.project(vector, name)
            for name, vector in features.pooled.items()
            if name in self.backbone.modalities
        }

    def modality_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Yield the modality's encoder and, where it has its own, projection."""
        yield from super().modality_parameters(name)
        if name in self.heads:
            yield from self.heads[name].parameters()


def _from_weights(
    encoding: PairEncoding, known: dict[str, Modality], variant: dict[str, Any]
) -> EncoderBackbone:
    """Load an export or checkpoint of ours, or a published file of the chosen encoder."""
    names = (
        name
        for name, published in EncoderBackbone.variants.items()
        if published["encoder"] == variant["encoder"]
        and published.get("deformable_attention", "none") == variant["deformable_attention"]
    )
    sizes = {k: v for k, v in variant.items() if k != "sizes"}
    loaded, _ = load_initial(
        EncoderBackbone, str(encoding.weights), next(names, None),
        modalities=known, arguments=sizes, same=("modalities",), bands=encoding.bands,
    )  # fmt: skip
    return loaded


def with_outputs(vectors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return `Step.outputs` that hold embeddings alone."""
    return {"embeddings": {name: vector.detach() for name, vector in vectors.items()}}
