"""DeCUR: decouple what two modalities have in common from what is unique to each.

Source: Wang et al., ECCV 2024 (arXiv 2309.05300), and its released code. Section numbers below are
the paper's.

One training step: draw two views of each modality independently (`draw`), encode and project them,
pull the first `common_ratio` of the dimensions of both modalities together and decorrelate all
others across modalities (section 3.2), and apply Barlow Twins to the two views within each modality
(section 3.1). Unlike in the paper's figure, the released code projects both modalities with the
same layers; so does this, unless `options.shared_projector: false`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from domainssl.backbones.base import Features, LoadReport
from domainssl.backbones.encoders.backbone import DeformableAttentionUse
from domainssl.backbones.encoders.files import read_encoder_file
from domainssl.backbones.tensors import read_tensors
from domainssl.distributed import row_layout
from domainssl.errors import ConfigError, WeightsError
from domainssl.losses.decorrelation import decur_cross, local_gradient, redundancy
from domainssl.modality import Batch, Modality
from domainssl.nn.norm import GlobalBatchNorm
from domainssl.objectives.base import Step
from domainssl.objectives.joint_embedding import (
    PairEncoding,
    ViewDraws,
    Views,
    _JointEmbedding,
    with_outputs,
)
from domainssl.options import MethodOptions, as_dataclass, decide, option
from domainssl.training.execution import Execution
from domainssl.training.optimization import Optimization

__all__ = ["DeCUR", "DeCUREncoding", "DeCUROptions"]


@dataclass(frozen=True, kw_only=True)
class DeCUREncoding(PairEncoding):
    """What encodes the two modalities.

    Attributes:
        encoder: `transformer`, or a timm name such as `resnet50`, for both or per modality.
        sizes: Sizes of the encoder `transformer`.
        normalization: Form for both modalities, or one per modality.
        weights: Start from this export, checkpoint or published file.
        deformable_attention: Residual deformable attention in ResNets (section 3.3).
    """

    deformable_attention: bool = False


@dataclass(frozen=True, kw_only=True)
class DeCUROptions(MethodOptions):
    """Where the paper, the released code and good sense differ; None follows `reference`."""

    correlation_divisor: Literal["global", "4n"] | None = option(
        ours="global",
        reference="4n",
        text="What correlations are divided by: the number of items of all ranks, or four times "
        "the batch of one rank (released code, right on four ranks only).",
    )
    correlation_gradient: Literal["exact", "local"] | None = option(
        ours="exact",
        reference="local",
        text="Gradient of the reduced correlations on W ranks: that of one process, or 1/W of it "
        "(released code).",
    )
    shared_projector: bool | None = option(
        ours=True,
        reference=True,
        text="One projector for both modalities (released code and weights), or one for each "
        "(paper's figure).",
    )
    rda_share: bool | None = option(
        ours=True,
        reference=True,
        text="One pair of deformable attention blocks for both modalities (released code), or one "
        "pair for each (paper).",
    )
    loss_form: Literal["code", "paper_sum"] | None = option(
        ours="code",
        reference="code",
        text="(L_1 + L_2 + (L_common + L_unique) / 2) / 3, or the plain sum of the four (paper).",
    )


class DeCUR(_JointEmbedding):
    """Pretrain an `EncoderBackbone` on two modalities, common and unique dimensions apart.

    Args:
        modalities: Two modalities by name; linked from the DataModule by the CLI.
        encoding: Encoders, normalisation and weights to start from.
        projector: Widths of the projector's linear layers; the last is the embedding's, K.
        common_ratio: Share of the dimensions that both modalities have in common.
        off_diagonal: Weight lambda of correlations off the diagonal.
        views: How views are drawn, per modality; None takes the published pipelines.
        context_size: Size of the window that the DataModule yields, in pixels.
        view_size: Size of a view in pixels; None takes `context_size`.
        options: Choices between our and the published behaviour.
        optimization: Optimiser and schedule; None takes the published one of the encoder.
        execution: Seed, speed and memory.

    Raises:
        ConfigError: The modalities or sizes cannot be used.
    """

    def __init__(
        self,
        modalities: dict[str, Modality | dict[str, Any]],
        encoding: DeCUREncoding = DeCUREncoding(),
        projector: tuple[int, ...] = (8192, 8192, 8192),
        common_ratio: float = 0.875,
        off_diagonal: float = 0.0051,
        views: dict[str, Views] | None = None,
        context_size: int | tuple[int, ...] = 224,
        view_size: int | tuple[int, ...] | None = None,
        options: DeCUROptions = DeCUROptions(),
        optimization: Optimization | None = None,
        execution: Execution = Execution(),
    ) -> None:
        encoding, chosen = as_dataclass(DeCUREncoding, encoding), decide(DeCUROptions, options)
        attention: DeformableAttentionUse = "none"
        if encoding.deformable_attention:
            attention = "shared" if chosen.rda_share else "per_modality"
        super().__init__(
            modalities,
            encoding,
            attention=attention,
            views=views,
            view_size=view_size,
            context_size=context_size,
            optimization=optimization,
            execution=execution,
            num_views=2,
        )
        self.options = chosen
        if not 0 <= common_ratio <= 1:
            raise ConfigError(
                f"model.init_args.common_ratio: got {common_ratio!r}, expected a share in [0, 1]."
            )
        self.off_diagonal = off_diagonal
        self.make_heads(projector, shared=bool(chosen.shared_projector))
        self.common = round(common_ratio * projector[-1])
        self.norm = GlobalBatchNorm(projector[-1], affine=False)
        if encoding.weights is not None:
            self._load_published_head(encoding.weights)

    def forward(self, batch: Batch, draws: ViewDraws, outputs: bool = False) -> Step:
        """Compute the terms; items without a modality count in no term that needs it."""
        rows = self.present(batch)
        pooled = self.encode_views(batch, draws)
        z = {
            name: [self.project(vector, name, rows[name]) for vector in vectors]
            for name, vectors in pooled.items()
        }
        losses = self.losses(z, rows)
        if not outputs:
            return Step(losses)
        return Step(losses, with_outputs({n: self._common(v[0]) for n, v in z.items()}))

    def losses(
        self, z: Mapping[str, list[Tensor]], rows: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Compute the weighted terms from the projections of two views per modality.

        Args:
            z: Projections (B, K) of view 1 and 2, by modality.
            rows: bool (B,), True where the item has the modality.
        """
        intra, half, name_of = 1 / 3, 1 / 6, (self.first, self.second)
        if self.options.loss_form == "paper_sum":
            intra, half = 1.0, 1.0
        divisor = None
        if self.options.correlation_divisor == "4n":
            divisor = 4.0 * len(rows[self.first])
        found: dict[str, Tensor] = {}
        layout = row_layout(rows[self.first])
        for name in name_of:
            a, b = (self.norm(_float(v), rows[name]) for v in z[name])
            terms = redundancy(a, b, present=rows[name], divisor=divisor, layout=layout)
            found[f"intra_{name}"] = intra * terms.weighted(self.off_diagonal)
        both = rows[self.first] & rows[self.second]
        a, b = (self.norm(_float(z[name][0]), both) for name in name_of)
        common, unique = decur_cross(
            a, b, self.common, off_diagonal=self.off_diagonal, present=both, divisor=divisor,
            layout=layout,
        )  # fmt: skip
        found["common"], found["unique"] = half * common, half * unique
        if self.common == 0 or self.common == a.shape[1]:
            del found["common" if self.common == 0 else "unique"]
        if self.options.correlation_gradient == "local":
            found = {name: local_gradient(loss) for name, loss in found.items()}
        return found

    def embed(self, features: Features) -> dict[str, Tensor]:
        """Return the common dimensions, standardised by running statistics, (B, K_c) each."""
        return {n: parts["common"] for n, parts in self.common_and_unique(features).items()}

    def common_and_unique(self, features: Features) -> dict[str, dict[str, Tensor]]:
        """Project pooled features; what the modalities share and what each has to itself.

        Args:
            features: From `features(batch)`, of one modality or both.

        Returns:
            By modality `common` (B, K_c) and `unique` (B, K - K_c), standardised by running
            statistics.
        """
        found = {}
        for name, z in super().embed(features).items():
            common, unique = self.split(z)
            found[name] = {"common": common, "unique": unique}
        return found

    def _common(self, z: Tensor) -> Tensor:
        return self.split(z)[0]

    def split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Standardise projections by running statistics; common and unique dimensions."""
        out = F.batch_norm(
            _float(z), self.norm.running_mean, self.norm.running_var, eps=self.norm.eps
        )
        return out[:, : self.common], out[:, self.common :]

    # -- reference files --------------------------------------------------------------------

    def _load_published_head(self, weights: str) -> None:
        """Take the projector of a joint file too; other files have none."""
        path = Path(weights)
        if path.suffix in (".pth", ".pt", ".safetensors") and path.is_file():
            head = read_encoder_file(read_tensors(path)).head
            if head:
                self.load_pretraining_parts(head)

    def load_pretraining_parts(self, head: Mapping[str, Tensor]) -> LoadReport:
        """Fill projectors and final norm from a published joint file.

        Args:
            head: Tensors `projector1.*`, `projector2.*`, `bn.*`, without `module.`.

        Raises:
            WeightsError: Tensors are missing or of other sizes, or the projectors of the file
                differ although one is to be shared.
        """
        renamed: dict[str, Tensor] = {}
        owners = {"shared": "1"} if "shared" in self.heads else {self.first: "1", self.second: "2"}
        for owner, index in owners.items():
            for own in self.heads[owner].state_dict():
                renamed[f"heads.{owner}.{own}"] = _need(head, f"projector{index}.{own}")
                is_shared = owner == "shared" and f"projector2.{own}" in head
                if is_shared and not torch.equal(
                    head[f"projector2.{own}"], renamed[f"heads.shared.{own}"]
                ):
                    raise WeightsError(
                        f"projector1.{own} and projector2.{own} of the file differ; set "
                        "model.init_args.options.shared_projector: false."
                    )
            start, known = f"projector{index}.", self.heads[owner].state_dict()
            more = [n for n in head if n.startswith(start) and n.removeprefix(start) not in known]
            if more:
                raise WeightsError(
                    f"The joint file's projector has more layers, {sorted(more)[:3]}. "
                    "Set model.init_args.projector to the widths of all of them."
                )
        renamed |= {f"norm.{own}": _need(head, f"bn.{own}") for own in self.norm.state_dict()}
        own_state = self.state_dict()
        wrong = [n for n, t in renamed.items() if t.shape != own_state[n].shape]
        if wrong:
            raise WeightsError(
                f"Projector of another size: {wrong[:3]} have "
                f"{[tuple(renamed[n].shape) for n in wrong[:3]]}, expected "
                f"{[tuple(own_state[n].shape) for n in wrong[:3]]}. Set projector to the "
                "widths of the file."
            )
        self.load_state_dict(renamed, strict=False)
        return LoadReport(tuple(renamed), (), ())

    def to_reference(self) -> dict[str, Tensor]:
        """Return the published joint layout, under `module.`; a shared projector stands twice."""
        written = self.backbone.to_reference()
        for index, name in enumerate((self.first, self.second), 1):
            head = self.heads["shared" if "shared" in self.heads else name]
            written |= {f"module.projector{index}.{n}": t for n, t in head.state_dict().items()}
        return written | {f"module.bn.{n}": t for n, t in self.norm.state_dict().items()}


def _float(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


def _need(head: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in head:
        raise WeightsError(
            f"The joint file has no {name!r}; it has {sorted(head)[:5]}. Set "
            "model.init_args.projector to the widths of the file's linear layers."
        )
    return head[name]
