"""CROMA: contrastive radar-optical masked autoencoders.

Source: Fuller, Millard, Green, NeurIPS 2023 (arXiv 2311.00566). Section and equation numbers
below are the paper's. The published pretraining script holds the model and the losses only.

One training step: hide 75 % of each sensor's patches independently (`draw`), encode both sensors,
contrast their pooled vectors (eq. 1), let radar tokens ask optical ones in the joint encoder,
and reconstruct the hidden patches of both sensors from the joint tokens (eq. 2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from domainssl.backbones.base import Features, LoadReport, common_size
from domainssl.backbones.croma import CROMABackbone, flatten_reference
from domainssl.backbones.registry import load_initial
from domainssl.distributed import RowLayout, row_layout
from domainssl.errors import WeightsError
from domainssl.losses.contrastive import info_nce
from domainssl.losses.reconstruction import masked_patch_mse, patch_statistics
from domainssl.modality import (
    Batch,
    Modality,
    as_modalities,
    present_mask,
    sides_of,
    valid_mask,
)
from domainssl.nn.masking import Masking, kept_count, mask_from_noise
from domainssl.nn.patching import grid_of, hidden_and_seen, patchify, unpatchify
from domainssl.objectives.base import Generators, Objective, Step
from domainssl.objectives.croma_parts import (
    SIZES,
    CROMAArchitecture,
    CROMAEncoding,
    Decoder,
    check_pair,
    per_modality,
    pretraining_name,
)
from domainssl.objectives.terms import term_weights
from domainssl.options import MethodOptions, as_dataclass, decide, named_sizes, option
from domainssl.training.execution import Execution
from domainssl.training.optimization import Optimization

__all__ = [
    "CROMA",
    "CROMAArchitecture",
    "CROMADraws",
    "CROMAEncoding",
    "CROMAOptions",
    "pretraining_name",
]

# Base rate 4e-6 per 256 items at the published global batch of 7200, section A of the paper.
_PUBLISHED = Optimization(lr=4e-6 * 7200 / 256, weight_decay=0.01, betas=(0.9, 0.999))


@dataclass(frozen=True, kw_only=True)
class CROMAOptions(MethodOptions):
    """Where the paper, the released code and good sense differ; None follows `reference`."""

    contrast_gather: Literal["grad", "detach"] | None = option(
        ours="grad",
        reference="detach",
        text="Whether contrastive keys carry gradients; `detach` makes them constants, "
        "in a single process too.",
    )
    joint_self_bias: Literal["2d", "cross"] | None = option(
        ours="2d",
        reference="cross",
        text="Distances that bias the joint encoder's self-attention: among radar tokens (paper), "
        "or from radar to optical tokens (released code, wrong while masks differ).",
    )
    target_norm: Literal["joint", "per_sensor"] | None = option(
        ours="joint",
        reference="joint",
        text="Standardise a target patch over the values of both sensors together, or of each.",
    )
    pixel_validity: bool | None = option(
        ours=True,
        reference=False,
        text="Leave invalid pixels out of target statistics and reconstruction loss.",
    )


@dataclass(frozen=True)
class CROMADraws:
    """Random choices of one step.

    Attributes:
        radar: Masking of the radar tokens.
        optical: Masking of the optical tokens.
    """

    radar: Masking
    optical: Masking


@dataclass(frozen=True)
class _Targets:
    """What is to be reconstructed: patches (B, N, P), optical values first.

    `mean` and `scale` are broadcastable to the patches; `valid` is None where all counts.
    """

    patches: Tensor
    valid: Tensor | None
    mean: Tensor
    scale: Tensor

    def standardized(self) -> Tensor:
        """Return the patches in the units of the prediction, invalid values zero."""
        values = (self.patches.float() - self.mean) / self.scale
        return values if self.valid is None else torch.where(self.valid, values, 0.0)


class CROMA(Objective):
    """Pretrain a `CROMABackbone` on co-registered radar and optical images or volumes.

    Args:
        modalities: Two images or volumes on one grid, in the roles of radar and optical, by name;
            linked from the DataModule by the CLI.
        encoding: Size, patches, normalisation and weights of the backbone.
        context_size: Size of the window in pixels or voxels, one number or one per axis,
            multiples of `encoding.patch_size`.
        mask_ratio: Share of patches hidden, one number for both sensors or one per modality.
        options: Choices between our and the published behaviour.
        loss_weights: Weight of the terms `contrastive` and `reconstruction`.
        optimization: Optimiser and schedule.
        execution: Seed, speed and memory.

    Raises:
        ConfigError: The modalities or sizes cannot be used.
    """

    contrastive: ClassVar[bool] = True
    backbone: CROMABackbone

    def __init__(
        self,
        modalities: dict[str, Modality | dict[str, Any]],
        encoding: CROMAEncoding = CROMAEncoding(),
        context_size: int | tuple[int, ...] = 120,
        mask_ratio: float | dict[str, float] = 0.75,
        options: CROMAOptions = CROMAOptions(),
        loss_weights: dict[str, float] | None = None,
        optimization: Optimization = _PUBLISHED,
        execution: Execution = Execution(),
    ) -> None:
        super().__init__(optimization=optimization, execution=execution, context_size=context_size)
        encoding = as_dataclass(CROMAEncoding, encoding)
        sizes = named_sizes(SIZES, encoding.size, encoding.architecture, "CROMA")
        self.options = decide(CROMAOptions, options)
        self.radar, self.optical = radar, optical = encoding.radar, encoding.optical
        known = as_modalities(modalities)
        check_pair(known, radar, optical)
        self.mask_ratio = per_modality(mask_ratio, (radar, optical))
        self.loss_weights = term_weights(loss_weights, "CROMA")
        patch_size = encoding.patch_size
        patch_size = patch_size if isinstance(patch_size, int) else tuple(patch_size)
        variant: dict[str, Any] = {
            "width": sizes.width,
            "depth": sizes.depth,
            "heads": sizes.heads,
            "patch_size": patch_size,
            "ffn_ratio": sizes.ffn_ratio,
            "radar": radar,
            "optical": optical,
            "normalization": encoding.normalization,
        }
        reference_state: dict[str, Tensor] = {}
        if encoding.weights is None:
            self.backbone = CROMABackbone(known, **variant)
        else:
            self.backbone, reference_state = _from_weights(encoding, known, variant)
        spatial_dims = known[radar].spatial_dims
        where = "model.init_args.context_size"
        grid_of(sides_of(context_size, spatial_dims, where), patch_size, where)
        width = self.backbone.embed_dim["joint"]
        pixels = math.prod(sides_of(patch_size, spatial_dims))
        self._values = [known[name].num_channels * pixels for name in (optical, radar)]
        self.decoder = Decoder(width, sum(self._values), sizes)
        self.radar_projection = nn.Linear(width, width)
        self.optical_projection = nn.Linear(width, width)
        # one axis, because sharding (FSDP2) takes no scalar parameters
        self.logit_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))
        if reference_state:
            self.load_pretraining_parts(reference_state)

    def draw(self, batch: Batch, generators: Generators) -> CROMADraws:
        """Hide patches of both sensors independently (section 3)."""
        return CROMADraws(
            radar=self._draw_mask(batch, self.radar, generators.local),
            optical=self._draw_mask(batch, self.optical, generators.local),
        )

    def _draw_mask(self, batch: Batch, name: str, generator: torch.Generator) -> Masking:
        x = batch[name]
        tokens = math.prod(self._grid(x, name))
        noise = torch.rand(len(x), tokens, generator=generator, device=x.device)
        return mask_from_noise(noise, kept_count(tokens, self.mask_ratio[name]))

    def _grid(self, x: Tensor, name: str) -> tuple[int, ...]:
        size = common_size(x, self.backbone.modalities[name])
        return grid_of(size, self.backbone.patch_size, f"batch.{name}")

    def forward(self, batch: Batch, draws: CROMADraws, outputs: bool = False) -> Step:
        """Compute both losses; items without one of the sensors count in neither."""
        layout = row_layout(batch[self.radar])
        x = self.backbone.normalize(batch)
        keep = {self.radar: draws.radar.keep, self.optical: draws.optical.keep}
        features = self.backbone.encode_sensors(x, keep)
        features = self.backbone.join(features, self_bias=str(self.options.joint_self_bias))
        complete = present_mask(batch, self.radar) & present_mask(batch, self.optical)
        prediction = self.decoder(
            features.tokens["joint"], draws.radar.restore, features.grid[self.radar]
        )
        targets = self._targets(x)
        contrast = self._contrast(features, complete, layout)
        losses = {
            "contrastive": self.loss_weights["contrastive"] * contrast,
            **self._reconstruct(targets, prediction, draws, complete),
        }
        if not outputs:
            return Step(losses)
        return Step(losses, self._outputs(features, targets, prediction, draws))

    def _by_sensor(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Cut the last axis into the optical and the radar values of a patch."""
        optical = self._values[0]
        return values[..., :optical], values[..., optical:]

    def embed(self, features: Features) -> dict[str, Tensor]:
        """Project the pooled sensors into the space of the contrastive loss, (B, E) each."""
        heads = {self.radar: self.radar_projection, self.optical: self.optical_projection}
        return {
            name: head(features.pooled[name])
            for name, head in heads.items()
            if name in features.pooled
        }

    def modality_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Yield the sensor's own encoder and projection."""
        yield from super().modality_parameters(name)
        heads = {self.radar: self.radar_projection, self.optical: self.optical_projection}
        yield from heads[name].parameters()

    def _contrast(self, features: Features, complete: Tensor, layout: RowLayout) -> Tensor:
        """Symmetric InfoNCE between the pooled sensors (eq. 1)."""
        projected = self.embed(features)
        return info_nce(
            projected[self.optical],
            projected[self.radar],
            self.logit_scale.exp().squeeze(0),
            present=complete,
            gather_keys=self.options.contrast_gather or "grad",
            layout=layout,
        )

    def _targets(self, x: Mapping[str, Any]) -> _Targets:
        """Cut both sensors into patches, optical first, with the statistics to predict in."""
        names, size = (self.optical, self.radar), self.backbone.patch_size
        patches = torch.cat([self.backbone.tokenize(x[name]) for name in names], dim=-1)
        valid = None
        if self.options.pixel_validity:
            masks = []
            for name in names:
                modality = self.backbone.modalities[name]
                mask = valid_mask(x, modality).unsqueeze(1).float()
                mask = mask.expand(-1, modality.num_channels, *mask.shape[2:])
                masks.append(patchify(mask, size, channels_first=True) > 0)
            valid = torch.cat(masks, dim=-1)
        if self.options.target_norm == "joint":
            return _Targets(patches, valid, *patch_statistics(patches, valid))
        valids = (None, None) if valid is None else self._by_sensor(valid)
        parts = zip(self._by_sensor(patches), valids, strict=True)
        wide = [[s.expand_as(part) for s in patch_statistics(part, where)] for part, where in parts]
        mean, scale = (torch.cat(pair, dim=-1) for pair in zip(*wide, strict=True))
        return _Targets(patches, valid, mean, scale)

    def _reconstruct(
        self, targets: _Targets, prediction: Tensor, draws: CROMADraws, complete: Tensor
    ) -> dict[str, Tensor]:
        """Mean squared error of hidden patches, per sensor (eq. 2)."""
        wanted = self._by_sensor(targets.standardized())
        valids = (None, None) if targets.valid is None else self._by_sensor(targets.valid)
        masks = (draws.optical.removed, draws.radar.removed)
        names, weight = (self.optical, self.radar), self.loss_weights["reconstruction"]
        return {
            f"reconstruction_{name}": weight
            * masked_patch_mse(predicted, target, removed & complete.unsqueeze(1), where)
            for name, predicted, target, removed, where in zip(
                names, self._by_sensor(prediction), wanted, masks, valids, strict=True
            )
        }

    def _outputs(
        self, features: Features, targets: _Targets, prediction: Tensor, draws: CROMADraws
    ) -> dict[str, Any]:
        """Pictures in normalised units, hidden patches NaN in `visible`, and contrasted vectors."""
        size, grid = self.backbone.patch_size, features.grid[self.radar]
        whole = prediction.float() * targets.scale + targets.mean
        masks = (draws.optical.removed, draws.radar.removed)
        pictures = {}
        for name, seen, predicted, removed in zip(
            (self.optical, self.radar),
            self._by_sensor(targets.patches.float()),
            self._by_sensor(whole),
            masks,
            strict=True,
        ):
            pictures[name] = {
                kind: unpatchify(tokens, grid, size, channels_first=True)
                for kind, tokens in hidden_and_seen(seen, predicted, removed).items()
            }
        embeddings = {name: z.detach() for name, z in self.embed(features).items()}
        return {"reconstruction": pictures, "embeddings": embeddings}

    def load_pretraining_parts(self, state: Mapping[str, Tensor]) -> LoadReport:
        """Fill decoder, projections and logit scale from a pretraining state dict of the reference.

        Args:
            state: Tensors under the reference's names; its encoders are not looked at.

        Raises:
            WeightsError: The file has some of these tensors and lacks others, or shapes differ.
        """
        own = {n: t for n, t in self.state_dict().items() if not n.startswith("backbone.")}
        names = {n: pretraining_name(n) for n in own}
        found = {n: state[names[n]] for n in own if names[n] in state}
        if "logit_scale" in found:
            found["logit_scale"] = found["logit_scale"].reshape(1)
        missing = tuple(names[n] for n in own if names[n] not in state)
        wrong = [n for n, t in found.items() if t.shape != own[n].shape]
        if missing or wrong:
            raise WeightsError(
                f"Pretraining state dict: missing {list(missing[:5])}, of another shape "
                f"{wrong[:5]}. Give the sizes of the run it comes from."
            )
        self.load_state_dict(found, strict=False)
        return LoadReport(tuple(found), missing, ())


def _from_weights(
    encoding: CROMAEncoding, known: dict[str, Modality], variant: dict[str, Any]
) -> tuple[CROMABackbone, dict[str, Tensor]]:
    """Load the backbone, and the file's tensors if it is a pretraining state dict."""
    loaded, content = load_initial(
        CROMABackbone, str(encoding.weights), f"croma_{encoding.size}",
        modalities=known, arguments=variant, same=("patch_size",), bands=encoding.bands,
    )  # fmt: skip
    state = flatten_reference(content)
    return loaded, state if "decoder.mask_token" in state else {}
