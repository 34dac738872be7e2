"""MoCo v2 and v3: a query finds the key of the other view of its item among many.

Source: He et al., CVPR 2020 (arXiv 1911.05722); Chen et al. 2020 (v2, arXiv 2003.04297); Chen et
al., ICCV 2021 (v3, arXiv 2104.02057); and their released code, with the settings of SSL4EO-S12.

One training step: cut two views of every item (`draw`); of a series each view may show another
season. In v2 the query encoder sees the first view and the key encoder, a running mean of it, the
second; the keys of earlier batches wait in a queue as negatives. In v3 both encoders see both
views, and negatives are the keys of the batch.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from domainssl.backbones.encoders.nets import ResNetEncoder
from domainssl.distributed import gather, is_distributed, row_layout
from domainssl.errors import ConfigError
from domainssl.losses.contrastive import info_nce, queue_nce
from domainssl.modality import Batch, Modality
from domainssl.nn.heads import ProjectionHead
from domainssl.nn.norm import GlobalBatchNorm, counted_rows
from domainssl.nn.views import Views
from domainssl.objectives.base import Generators, Step
from domainssl.objectives.moco_parts import KeyQueue, MoCoViews, _MoCo, blurred, unit
from domainssl.objectives.student_parts import StudentEncoding
from domainssl.options import MethodOptions, as_dataclass, decide, option
from domainssl.training.execution import Execution
from domainssl.training.optimization import Optimization
from domainssl.training.schedules import cosine

__all__ = ["MoCoV2", "MoCoV2Head", "MoCoV2Options", "MoCoV3", "MoCoV3Head", "MoCoV3Options"]

_PUBLISHED_V2 = Optimization(
    optimizer="sgd", lr=0.03, momentum=0.9, nesterov=False, weight_decay=1e-4, warmup_fraction=0.0
)
_PUBLISHED_V3 = Optimization(
    lr=1.5e-4, weight_decay=0.1, betas=(0.9, 0.999), warmup_fraction=0.1, warmup_start="zero"
)
_RESNET = StudentEncoding(encoder="resnet50")
_VIT = StudentEncoding(size="small", positions="sincos")


@dataclass(frozen=True, kw_only=True)
class MoCoV2Head:
    """The network behind both encoders: Linear, ReLU, Linear.

    Attributes:
        hidden: Width between the layers; None is the width of the backbone.
        dim: Length of queries and keys.
    """

    hidden: int | None = None
    dim: int = 128

    def build(self, inputs: int) -> nn.Sequential:
        """Return a head for vectors of some width."""
        hidden = self.hidden or inputs
        return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, self.dim))


@dataclass(frozen=True, kw_only=True)
class MoCoV2Options(MethodOptions):
    """Where the released code and good sense differ; None follows `reference`."""

    batch_norm: Literal["global", "shuffled"] | None = option(
        ours="global",
        reference="shuffled",
        text="Batch norms measure the items of all ranks, or each rank's own, where keys are "
        "encoded in an order shuffled over the ranks.",
    )


class MoCoV2(_MoCo):
    """Pretrain an encoder of `EncoderBackbone`, or a `ViTBackbone`, against a queue of keys.

    Args:
        modalities: One image, series or volume, by name; linked from the DataModule by the CLI.
        encoding: What the backbone is built from.
        views: Size, changes and seasons of the two views.
        head: Sizes of the head.
        queue: Number of keys of earlier batches.
        momentum: Share of the key encoder that every step keeps.
        temperature: Divides the cosines.
        context_size: Size of the window that the DataModule yields, one number or one per axis.
        options: Single choices, and whether the released code decides the others.
        optimization: Optimiser and schedule.
        execution: Seed, speed and memory.

    Raises:
        ConfigError: The modality, the encoder or sizes cannot be used.
    """

    def __init__(
        self,
        modalities: dict[str, Modality | dict[str, Any]],
        encoding: StudentEncoding = _RESNET,
        views: MoCoViews = MoCoViews(),
        head: MoCoV2Head = MoCoV2Head(),
        queue: int = 65536,
        momentum: float = 0.999,
        temperature: float = 0.2,
        context_size: int | tuple[int, ...] = 224,
        options: MoCoV2Options = MoCoV2Options(),
        optimization: Optimization = _PUBLISHED_V2,
        execution: Execution = Execution(),
    ) -> None:
        super().__init__(
            modalities,
            encoding,
            views=views,
            momentum=momentum,
            temperature=temperature,
            context_size=context_size,
            optimization=optimization,
            execution=execution,
        )
        if queue < 1:
            raise ConfigError(f"model.init_args.queue: got {queue!r}, expected 1 or more keys.")
        self.options = decide(MoCoV2Options, options)
        sizes = as_dataclass(MoCoV2Head, head)
        self.head = sizes.build(self.backbone.embed_dim[self.name])
        self.make_teacher(head=copy.deepcopy(self.head))
        self.queue = KeyQueue(queue, sizes.dim, self.execution.seed)
        for norm in self._norms():
            norm.per_rank = self.options.batch_norm == "shuffled"

    def _norms(self) -> list[GlobalBatchNorm]:
        return [part for part in self.modules() if isinstance(part, GlobalBatchNorm)]

    @staticmethod
    def usual_views(modality: Modality) -> tuple[Views, Views]:
        """Return the changes of SSL4EO-S12's MoCo v2, the same for both views."""
        _, _, half = blurred(modality, (0.2, 1.0))
        return half, half

    def draw_shuffle(self, batch: Batch, generators: Generators) -> Tensor | None:
        """Draw the order of keys over ranks where a batch norm would see which belong together."""
        shuffles = self.options.batch_norm == "shuffled" and is_distributed()
        if not shuffles or not self._norms():
            return None
        total, generator = row_layout(batch[self.name]).total, generators.shared
        return torch.randperm(total, generator=generator, device=generator.device)

    def compare(
        self,
        first: Mapping[str, Tensor],
        second: Mapping[str, Tensor],
        present: Tensor,
        shuffle: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Ask with the first view; the second and the queue answer."""
        queries = self.encoded(self.backbone.encode, self.head, first)
        with torch.no_grad():
            keys = unit(self._keys(second, shuffle))
        loss, logits = queue_nce(queries, keys, self.queue.keys, self.temperature, present=present)
        return {"contrastive": loss}, {
            "keys": keys,
            "queries": queries.detach(),
            "logits": logits.detach(),
        }

    def _keys(self, view: Mapping[str, Tensor], shuffle: Tensor | None) -> Tensor:
        encode: Any = self.teacher["backbone"].encode
        if shuffle is None:
            return self.encoded(encode, self.teacher["head"], view)
        layout = row_layout(view[self.name])
        here = slice(layout.start, layout.start + len(view[self.name]))
        mixed = {n: gather(t, "detach", layout)[shuffle[here]] for n, t in view.items()}
        keys = self.encoded(encode, self.teacher["head"], mixed)
        return gather(keys, "detach", layout)[shuffle.argsort()][here]

    def momentum_now(self) -> float:
        """Return the share of the key encoder that a step keeps, the same for all."""
        return self.momentum

    def after_step(self, step: Step) -> None:
        """Put the keys of the step into the queue, and move the key encoder."""
        super().after_step(step)
        self.queue.add(step.outputs["keys"], step.outputs["present"])


@dataclass(frozen=True, kw_only=True)
class MoCoV3Head:
    """Projector behind both encoders, and predictor behind that of queries.

    Attributes:
        hidden: Width of hidden layers.
        dim: Length of queries and keys.
        layers: Linear layers of the projector; None is 2 for ResNets and 3 for all others.
    """

    hidden: int = 4096
    dim: int = 256
    layers: int | None = None


@dataclass(frozen=True, kw_only=True)
class MoCoV3Options(MethodOptions):
    """Where the released code and good sense differ; None follows `reference`."""

    predictor_norm: Literal["by_encoder", "always", "never"] | None = option(
        ours="by_encoder",
        reference="by_encoder",
        text="The predictor ends with a batch norm: for all encoders but ResNets, for all, or for "
        "none.",
    )
    trains_patches: bool | None = option(
        ours=False,
        reference=False,
        text="Train the patch embedding of transformers; without, it stays random, which keeps "
        "training stable.",
    )


class MoCoV3(_MoCo):
    """Pretrain a `ViTBackbone`, or an encoder of `EncoderBackbone`, against the keys of the batch.

    Args:
        modalities: One image, series or volume, by name; linked from the DataModule by the CLI.
        encoding: What the backbone is built from.
        views: Size, changes and seasons of the two views.
        head: Sizes of projector and predictor.
        momentum: Share of the key encoder that a step keeps at first; rises to 1 by half a cosine.
        temperature: Divides the cosines.
        context_size: Size of the window that the DataModule yields, one number or one per axis.
        options: Single choices, and whether the released code decides the others.
        optimization: Optimiser and schedule.
        execution: Seed, speed and memory.

    Raises:
        ConfigError: The modality, the encoder or sizes cannot be used.
    """

    def __init__(
        self,
        modalities: dict[str, Modality | dict[str, Any]],
        encoding: StudentEncoding = _VIT,
        views: MoCoViews = MoCoViews(),
        head: MoCoV3Head = MoCoV3Head(),
        momentum: float = 0.99,
        temperature: float = 0.2,
        context_size: int | tuple[int, ...] = 224,
        options: MoCoV3Options = MoCoV3Options(),
        optimization: Optimization = _PUBLISHED_V3,
        execution: Execution = Execution(),
    ) -> None:
        super().__init__(
            modalities,
            encoding,
            views=views,
            momentum=momentum,
            temperature=temperature,
            context_size=context_size,
            optimization=optimization,
            execution=execution,
        )
        self.options = decide(MoCoV3Options, options)
        is_resnet = any(isinstance(part, ResNetEncoder) for part in self.backbone.modules())
        self._make_heads(as_dataclass(MoCoV3Head, head), is_resnet)
        if not self.options.trains_patches:
            for part in _patch_embeddings(self.backbone):
                part.requires_grad_(False)

    def _make_heads(self, sizes: MoCoV3Head, is_resnet: bool) -> None:
        layers = sizes.layers or (2 if is_resnet else 3)
        widths = [*[sizes.hidden] * (layers - 1), sizes.dim]
        self.head = ProjectionHead(
            self.backbone.embed_dim[self.name], widths, last_norm=True, last_affine=False
        )
        wanted = self.options.predictor_norm
        self.predictor = ProjectionHead(
            sizes.dim,
            [sizes.hidden, sizes.dim],
            last_norm=wanted == "always" or (wanted == "by_encoder" and not is_resnet),
            last_affine=False,
        )
        self.make_teacher(head=copy.deepcopy(self.head))

    @staticmethod
    def usual_views(modality: Modality) -> tuple[Views, Views]:
        """Return the changes of SSL4EO-S12's MoCo v3: the first view is always blurred."""
        often, seldom, _ = blurred(modality, (0.08, 1.0))
        return often, seldom

    def compare(
        self,
        first: Mapping[str, Tensor],
        second: Mapping[str, Tensor],
        present: Tensor,
        shuffle: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Ask with each view; the other one of the batch answers."""
        encode: Any = self.teacher["backbone"].encode
        head = nn.Sequential(self.head, self.predictor)
        with counted_rows(present):
            queries = [self.encoded(self.backbone.encode, head, view) for view in (first, second)]
            with torch.no_grad():
                keys = [self.encoded(encode, self.teacher["head"], v) for v in (first, second)]
        layout, scale = row_layout(present), torch.tensor(1 / self.temperature)
        terms = [
            info_nce(
                query, answer, scale.to(answer.device),
                present=present, gather_keys="detach", symmetric=False, layout=layout,
            )
            for query, answer in zip(queries, reversed(keys), strict=True)
        ]  # fmt: skip
        loss = 2 * self.temperature * torch.stack(terms).sum()
        kept = {"queries": [query.detach() for query in queries], "both_keys": keys}
        return {"contrastive": loss}, {"keys": keys[1], **kept}

    def momentum_now(self) -> float:
        """Return the share that the key encoder keeps before the next step uses it."""
        done, total = self.progress.step, self.progress.total_steps
        return cosine(self.momentum, 1.0, done + 1, total)


def _patch_embeddings(backbone: nn.Module) -> list[nn.Module]:
    """Return the layers that turn patches into tokens; ResNets have none."""
    names = ("embed", "patch_embed")
    return [part for name, part in backbone.named_modules() if name.rpartition(".")[2] in names]
