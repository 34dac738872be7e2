"""data2vec: from an image with hidden patches, predict what a teacher says about the whole image.

Source: Baevski et al. 2022 (data2vec 1.0, arXiv 2202.03555), in the variant for images that builds
on BEiT (Bao et al. 2022, arXiv 2106.08254), and its released code, with the settings of SSL4EO-S12.

One training step: cut one view of every image and draw blocks of patches (`draw`); the teacher, a
running mean of the student, sees the view, the student sees mask tokens in place of those patches.
Targets are the outputs of the teacher's upper blocks, normalised and averaged; a linear layer
behind the student predicts them where patches are hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from domainssl.backbones.bands import BandPolicy
from domainssl.backbones.base import Backbone, Features
from domainssl.backbones.beit import BEiTArchitecture, BEiTBackbone
from domainssl.backbones.registry import load_initial
from domainssl.distributed import all_reduce_sum
from domainssl.errors import ConfigError
from domainssl.losses.latent import layer_targets, masked_regression, spread_penalty
from domainssl.modality import Batch, Modality, key, present_mask, sides_of
from domainssl.nn.block_masks import BlockMasks
from domainssl.nn.views import Views
from domainssl.objectives.base import Step
from domainssl.objectives.student_teacher import CropDraws, _StudentTeacher
from domainssl.objectives.view_steps import check_photometric
from domainssl.options import MethodOptions, as_dataclass, decide, named_sizes, option
from domainssl.training.execution import Execution
from domainssl.training.optimization import Optimization

__all__ = [
    "Data2Vec",
    "Data2VecArchitecture",
    "Data2VecEncoding",
    "Data2VecLoss",
    "Data2VecOptions",
    "Data2VecTargets",
    "Data2VecTeacher",
]

Size = Literal["tiny", "small", "base"]
# SSL4EO-S12: 10 of 100 epochs warm up; gradients are clipped by the norm of all.
_PUBLISHED = Optimization(
    lr=1e-3, weight_decay=0.05, betas=(0.9, 0.999), warmup_fraction=0.1, clip=3.0, clip_by="all"
)
_BLOCKS = BlockMasks(fraction=1.0, ratio=(0.6125, 0.6125), least_tokens=16)  # 120 of 196


@dataclass(frozen=True, kw_only=True)
class Data2VecArchitecture:
    """Explicit sizes over the named ones; None keeps the named value.

    Attributes:
        width: Token width.
        depth: Blocks.
        heads: Attention heads.
        mlp_ratio: Width of the feed-forward layers over that of tokens.
        init_values: What the branches are scaled by at first.
        drop_path: Largest share of items that skip a branch while training.
        attention_dropout: Share of attention weights dropped while training.
        shared_bias: One relative bias for all blocks, or each block its own.
        qkv_bias: Queries and values have a bias; keys have none.
    """

    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    mlp_ratio: float | None = None
    init_values: float | None = None
    drop_path: float | None = None
    attention_dropout: float | None = None
    shared_bias: bool | None = None
    qkv_bias: bool | None = None


_SIZES = {
    name: Data2VecArchitecture(
        width=width, depth=depth, heads=heads, mlp_ratio=4.0, init_values=1e-4,
        drop_path=0.25, attention_dropout=0.05, shared_bias=True, qkv_bias=True,
    )
    for name, width, depth, heads in (
        ("tiny", 48, 2, 4), ("small", 384, 12, 6), ("base", 768, 12, 12)
    )
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Data2VecEncoding:
    """What the backbone is built from.

    Attributes:
        size: Named size: `tiny` (tests), `small` or `base`.
        architecture: Explicit sizes over the named one.
        patch_size: Side of a patch in pixels, one number or one per axis.
        normalization: Form of the modality.
        weights: Start student and teacher from these released or exported weights.
        bands: Where the bands differ from those of the weights: `strict` refuses, `subset` keeps
            the weights of the bands that are there, `average` gives new ones averaged weights.
    """

    size: Size = "small"
    architecture: Data2VecArchitecture = field(default_factory=Data2VecArchitecture)
    patch_size: int | tuple[int, ...] = 16
    normalization: str | dict[str, str] = "mean2std"
    weights: str | None = None
    bands: BandPolicy = "strict"


@dataclass(frozen=True, kw_only=True)
class Data2VecTeacher:
    """How the teacher follows the student.

    Attributes:
        momentum: Share of the teacher that a step keeps.
        first_momentum: The same in the first step; it rises in a straight line.
        momentum_steps: Steps until `momentum` is reached; 0 has it from the first step on.

    Raises:
        ConfigError: A value lies outside its range.
    """

    momentum: float = 0.9998
    first_momentum: float = 0.999
    momentum_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("momentum", "first_momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(
                    f"model.init_args.teacher.{name}: got {getattr(self, name)!r}, expected a "
                    "share in [0, 1]."
                )
        if self.momentum_steps < 0:
            raise ConfigError(
                f"model.init_args.teacher.momentum_steps: got {self.momentum_steps!r}, expected 0 "
                "or more."
            )

    def at(self, step: int) -> float:
        """Return the share that a step keeps."""
        if step >= self.momentum_steps:
            return self.momentum
        rise = (self.momentum - self.first_momentum) / self.momentum_steps
        return self.first_momentum + step * rise


@dataclass(frozen=True, kw_only=True)
class Data2VecTargets:
    """What is predicted.

    Attributes:
        layers: Numbers of the teacher's blocks, from 0; None takes the upper half.
        output: What a block ends with (`end`), or what its feed-forward branch added (`fc`).
        norm: Of every layer: over the channels of each token (`layer`), over the tokens of each
            image and channel (`instance`, data2vec 2.0), or `none`.
        last_norm: Normalise the mean of the layers over the channels as well.

    Raises:
        ConfigError: There is no such output or norm.
    """

    layers: tuple[int, ...] | None = None
    output: Literal["end", "fc"] = "end"
    norm: Literal["layer", "instance", "none"] = "layer"
    last_norm: bool = True

    def __post_init__(self) -> None:
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
        known = {"output": ("end", "fc"), "norm": ("layer", "instance", "none")}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ConfigError(
                    f"model.init_args.targets.{name}: got {getattr(self, name)!r}, expected one "
                    f"of {', '.join(values)}."
                )

    def of(self, depth: int) -> tuple[int, ...]:
        """Return the numbers of the blocks of a backbone.

        Raises:
            ConfigError: It has no such blocks.
        """
        chosen = tuple(range(depth // 2, depth)) if self.layers is None else self.layers
        if not chosen or not all(0 <= number < depth for number in chosen):
            raise ConfigError(
                f"model.init_args.targets.layers: got {list(chosen)}, expected some of the "
                f"{depth} blocks, numbered from 0 to {depth - 1}."
            )
        return chosen


@dataclass(frozen=True, kw_only=True)
class Data2VecLoss:
    """How predictions are compared with targets.

    Attributes:
        beta: Where the smooth L1 loss goes from squares to straight lines; None takes squares.
        spread: Weight of a term that keeps predictions apart; 0 for none.
        margin: Deviation of the channels over the hidden patches that this term asks for.

    Raises:
        ConfigError: A value lies outside its range.
    """

    beta: float | None = 2.0
    spread: float = 0.0
    margin: float = 0.5

    def __post_init__(self) -> None:
        checks = {
            "beta": (self.beta is None or self.beta > 0, "more than 0, or null"),
            "spread": (self.spread >= 0, "0 or more"),
            "margin": (self.margin > 0, "more than 0"),
        }
        for name, (is_fine, expected) in checks.items():
            if not is_fine:
                raise ConfigError(
                    f"model.init_args.loss.{name}: got {getattr(self, name)!r}, expected "
                    f"{expected}."
                )


@dataclass(frozen=True, kw_only=True)
class Data2VecOptions(MethodOptions):
    """Where the released code and good sense differ; None follows `reference`."""

    invalid_patches: Literal["drop", "count"] | None = option(
        ours="drop",
        reference="count",
        text="Hidden patches without a valid pixel count in no term, or like all others.",
    )


@dataclass(frozen=True)
class _OneView:
    """The single crop of an image, in the form in which crops are cut; None until fitted."""

    size: int | tuple[int, ...] | None
    changes: Views | None
    large: tuple[int, ...] = ()

    def plan(self) -> list[tuple[str, tuple[int, ...]]]:
        """Return kind and size of the crop."""
        return [("first", self.large)]

    def views(self, which: str) -> Views:
        """Return how the crop is drawn."""
        assert self.changes is not None
        return self.changes


class Data2Vec(_StudentTeacher):
    """Pretrain a `BEiTBackbone` on one image modality by predicting a teacher's features.

    Args:
        modalities: One image by name; linked from the DataModule by the CLI.
        encoding: What the backbone is built from.
        view_size: Size of the view in pixels; None takes `context_size`.
        views: How the view is drawn; None takes crops of a fifth to all of the window, flips, and
            brightness and contrast where values have that.
        masks: Which patches are hidden from the student.
        teacher: Momentum.
        targets: Which layers are predicted, and how they are normalised.
        loss: How predictions are compared.
        context_size: Size of the window that the DataModule yields, one number or one per axis.
        options: Single choices, and whether the released code decides the others.
        optimization: Optimiser and schedule.
        execution: Seed, speed and memory.

    Raises:
        ConfigError: The modality or sizes cannot be used.
    """

    backbone: BEiTBackbone
    exported: ClassVar[str] = "backbone"
    masked_crops: ClassVar[int] = 1

    def __init__(
        self,
        modalities: dict[str, Modality | dict[str, Any]],
        encoding: Data2VecEncoding = Data2VecEncoding(),
        view_size: int | tuple[int, ...] | None = None,
        views: Views | None = None,
        masks: BlockMasks = _BLOCKS,
        teacher: Data2VecTeacher = Data2VecTeacher(),
        targets: Data2VecTargets = Data2VecTargets(),
        loss: Data2VecLoss = Data2VecLoss(),
        context_size: int | tuple[int, ...] = 224,
        options: Data2VecOptions = Data2VecOptions(),
        optimization: Optimization = _PUBLISHED,
        execution: Execution = Execution(),
    ) -> None:
        settings = as_dataclass(Data2VecTeacher, teacher)
        own: dict[str, Any] = {"encoding": encoding, "crops": _OneView(view_size, views)}
        super().__init__(
            modalities,
            masks=as_dataclass(BlockMasks, masks),
            momentum=settings.momentum,
            context_size=context_size,
            optimization=optimization,
            execution=execution,
            **own,
        )
        self.settings, self.loss = settings, as_dataclass(Data2VecLoss, loss)
        self.options = decide(Data2VecOptions, options)
        self.targets = as_dataclass(Data2VecTargets, targets)
        self.layers = self.targets.of(len(self.backbone.blocks))
        width = self.backbone.embed_dim[self.name]
        self.head = nn.Linear(width, width)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.make_teacher()

    def build_student(
        self,
        known: Mapping[str, Modality],
        encoding: Any,
        crops: Any,
        context_size: int | tuple[int, ...],
        *,
        has_masks: bool,
    ) -> tuple[_OneView, Backbone]:
        """Return the view, fitted to the data, and the student."""
        chosen = as_dataclass(Data2VecEncoding, encoding)
        modality, where = known[self.name], "model.init_args.view_size"
        size = sides_of(context_size if crops.size is None else crops.size, 2, where)
        patch = sides_of(chosen.patch_size, 2, "model.init_args.encoding.patch_size")
        if any(side % p for side, p in zip(size, patch, strict=True)):
            raise ConfigError(f"{where}: got {size}, no multiple of the patches of {patch}.")
        sizes = named_sizes(_SIZES, chosen.size, chosen.architecture, "Data2Vec")
        arguments: dict[str, Any] = {
            "architecture": BEiTArchitecture(**vars(sizes)),
            "patch_size": chosen.patch_size,
            "image_size": size,
            "normalization": chosen.normalization,
        }
        if chosen.weights is None:
            backbone = BEiTBackbone(known, **arguments)
        else:
            backbone, _ = load_initial(
                BEiTBackbone, chosen.weights, "beit_small",
                modalities=known, arguments=arguments, same=("modalities",), bands=chosen.bands,
            )  # fmt: skip
        changes = as_dataclass(
            Views, _usual_view(modality) if crops.changes is None else crops.changes
        )
        changes.flips(2)
        check_photometric(changes, backbone.normalizer.forms[self.name], modality, "views")
        return _OneView(size, changes, size), backbone

    def setup(self, stage: str) -> None:
        """Refuse other paths of attention than the one of BEiT's blocks."""
        if self.execution.attention != "fused":
            raise ConfigError(
                f"model.init_args.execution.attention: got {self.execution.attention!r}; the "
                "learned biases of BEiT's blocks take fused alone."
            )
        super().setup(stage)

    def features(self, batch: Batch) -> Features:
        """Return the features of the student, as published."""
        features: Features = self.backbone(batch)
        return features

    def forward(self, batch: Batch, draws: CropDraws, outputs: bool = False) -> Step:
        """Predict the teacher's features of hidden patches; absent items do not count."""
        assert draws.mask is not None
        (view,) = self.cut_crops(batch, draws.views)
        present = present_mask(batch, self.name)
        losses, kept = self.compare({**view, key(self.name, "present"): present}, draws.mask[:, 0])
        if outputs:
            kept["embeddings"] = {self.name: kept["vectors"]}
        return Step(losses, kept)

    def compare(
        self, view: Mapping[str, Any], mask: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the losses of a normalised view, and what `monitors` needs.

        Args:
            view: What `normalize` returns.
            mask: Patches that are hidden from the student, bool (B, N).
        """
        teacher: Any = self.teacher["backbone"]
        with torch.no_grad():
            whole, ends, branches = teacher.encode_layers(view)
            layers = ends if self.targets.output == "end" else branches
            target = layer_targets(
                [layers[number] for number in self.layers],
                self.targets.norm,
                last_norm=self.targets.last_norm,
            )
        present = present_mask(view, self.name)
        counted = mask & present.unsqueeze(1)
        if self.options.invalid_patches == "drop":
            counted = counted & whole.token_valid[self.name]
        prediction = self.predict(view, mask)
        losses = {"regression": masked_regression(prediction, target, counted, self.loss.beta)}
        rows = prediction.flatten(0, 1), counted.flatten()
        if self.loss.spread > 0:
            losses["spread"] = self.loss.spread * spread_penalty(*rows, self.loss.margin)
        kept = {
            "vectors": whole.pooled[self.name],
            "present": present,
            "counted": rows[1],
            "prediction": rows[0].detach(),
            "target": target.flatten(0, 1),
        }
        return losses, kept

    def predict(self, view: Mapping[str, Any], mask: Tensor) -> Tensor:
        """Return what the student says in place of every patch, (B, N, E)."""
        seen: Any = self.backbone.encode_layers(view, mask)[0]
        out: Tensor = self.head(seen.tokens[self.name])
        return out

    def momentum_now(self) -> float:
        """Return the share of the teacher that this step keeps."""
        return self.settings.at(self.progress.step)

    def monitors(self, step: Step) -> dict[str, Tensor]:
        """Return, besides rank and spread of the teacher's vectors, the spread of both sides.

        `target_std` and `prediction_std` are the deviation of a channel over the hidden patches of
        all ranks, averaged over channels; both fall to 0 when all patches get one answer.
        """
        counted = step.outputs["counted"].unsqueeze(1)
        count = all_reduce_sum(counted.float().sum()).clamp(min=1)
        found = {}
        for name in ("target", "prediction"):
            rows = torch.where(counted, step.outputs[name].float(), 0.0)
            mean = all_reduce_sum(rows.sum(0)) / count
            variance = all_reduce_sum(rows.square().sum(0)) / count - mean.square()
            found[f"{name}_std"] = variance.clamp(min=0).sqrt().mean()
        return {**super().monitors(step), **found}


def _usual_view(modality: Modality) -> Views:
    """Return the changes of SSL4EO-S12's data2vec: crop, flip and, of optical images, colour."""
    is_optical = modality.value_unit in ("dn", "reflectance", "rgb8")
    return Views(
        crop_area=(0.2, 1.0), flip=(0.0, 0.5), color_probability=0.8 if is_optical else 0.0
    )
