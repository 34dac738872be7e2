"""Galileo: predict hidden groups of bands, dates and places of many sensors in latent space.

Source: Tseng et al., ICML 2025 (arXiv 2502.09356), and the released code (nasaharvest/galileo).

One training step looks at the batch several times (`draw`): two passes show some groups of bands at
some dates or places and ask for other groups elsewhere (global), two show and ask for single tokens
(local), each with patches of another size. A predictor says what a teacher, a running mean of the
encoder that sees everything, makes of the hidden tokens: deep features in global passes, bare
projections of the pixels in local ones. Its answer has to be found among the targets of the batch
(AllDisc) or of the item (PatchDisc).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from domainssl.backbones.galileo.backbone import GalileoBackbone, GroupInputs
from domainssl.backbones.galileo.encoder import GalileoTokens
from domainssl.backbones.galileo.groups import Array, GalileoGroup
from domainssl.backbones.galileo.predictor import GalileoPredictor, Predicted, PredictorSizes
from domainssl.backbones.registry import load_initial
from domainssl.distributed import all_reduce_sum, row_layout, world_size
from domainssl.errors import ConfigError, nearest
from domainssl.losses.discrimination import standardized, token_discrimination
from domainssl.losses.latent import masked_regression
from domainssl.modality import Batch, Modality, as_modalities, check_batch
from domainssl.nn.masking import take_tokens
from domainssl.objectives.base import Generators, Step
from domainssl.objectives.galileo_parts import (
    SIZES,
    Cut,
    GalileoEncoding,
    GalileoMasking,
    GalileoPass,
    GalileoSizes,
    cut_batch,
    fill,
    group_choice,
    lowest,
    series_steps,
    structured,
)
from domainssl.objectives.teacher import _Taught
from domainssl.objectives.terms import term_weights
from domainssl.options import MethodOptions, as_dataclass, decide, named_sizes, option
from domainssl.training.execution import Execution
from domainssl.training.optimization import Optimization

__all__ = [
    "Galileo",
    "GalileoDraws",
    "GalileoEncoding",
    "GalileoMasking",
    "GalileoOptions",
    "GalileoSizes",
]

Loss = Literal["alldisc", "patchdisc", "mse"]
_NUMBERS = 8  # uniform numbers per pass: six of the cut, two of the groups

# the base model; nano and tiny have 3e-3 and decay 0.02 and 0.01
_PUBLISHED = Optimization(
    lr=1e-4, weight_decay=0.03, betas=(0.9, 0.999), warmup_fraction=0.06, final_lr_fraction=0.01,
    clip=1.0, clip_by="part",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GalileoOptions(MethodOptions):
    """Where the paper, the released code and good sense differ; None follows `reference`."""

    global_loss: Loss | None = option(
        ours="alldisc",
        reference="patchdisc",
        text="Loss of global passes: find targets among those of the batch (AllDisc, as the paper "
        "says) or of the item (PatchDisc, as the released weights were trained), or their mean "
        "squared error.",
    )
    local_loss: Loss | None = option(
        ours="patchdisc",
        reference="patchdisc",
        text="Loss of local passes.",
    )
    standardize: bool | None = option(
        ours=False,
        reference=False,
        text="Standardise every feature of the predictions over the hidden tokens of the batch "
        "first (`pred2unit` in the released code).",
    )
    gather_targets: bool | None = option(
        ours=True,
        reference=False,
        text="AllDisc looks among the targets of all ranks, or of one.",
    )
    empty_items: Literal["leave_out", "count"] | None = option(
        ours="leave_out",
        reference="count",
        text="Items without a hidden token do not count, or count as a loss of zero.",
    )
    teacher_sees: Literal["all", "hidden", "used"] | None = option(
        ours="all",
        reference="all",
        text="What the teacher sees: everything, hidden tokens alone, or hidden and visible ones "
        "(`target_masking` in the released code).",
    )


@dataclass(frozen=True)
class GalileoDraws:
    """Random choices of one step.

    Attributes:
        passes: The masked versions of the batch.
    """

    passes: tuple[GalileoPass, ...]


class Galileo(_Taught):
    """Pretrain a `GalileoBackbone` by latent prediction of hidden tokens.

    Args:
        modalities: Images, series and tables, any of those that have groups; linked from the
            DataModule by the CLI.
        encoding: Groups, size, normalisation and weights of the backbone.
        context_size: Side in pixels of what the DataModule yields, None for any.
        masking: Passes, patch sizes and shares.
        momentum: Share of the teacher that a step keeps at first; rises to 1 linearly.
        temperature: Divides the cosines.
        loss_weights: Of the terms `global` and `local`, both 1: means over their passes, times the
            share of all passes that these are.
        options: Single choices, and whether the released code decides the others.
        optimization: Optimiser and schedule.
        execution: Seed, speed and memory.

    Raises:
        ConfigError: The modalities or sizes cannot be used.
    """

    backbone: GalileoBackbone
    moves_frozen: ClassVar[bool] = False  # tables of steps and months

    def __init__(
        self,
        modalities: dict[str, Modality | dict[str, Any]],
        encoding: GalileoEncoding = GalileoEncoding(),
        context_size: int | tuple[int, ...] | None = None,
        masking: GalileoMasking = GalileoMasking(),
        momentum: float = 0.996,
        temperature: float = 0.1,
        loss_weights: dict[str, float] | None = None,
        options: GalileoOptions = GalileoOptions(),
        optimization: Optimization = _PUBLISHED,
        execution: Execution = Execution(),
    ) -> None:
        super().__init__(
            momentum=momentum,
            optimization=optimization,
            execution=execution,
            context_size=context_size,
        )
        encoding = as_dataclass(GalileoEncoding, encoding)
        sizes = named_sizes(SIZES, encoding.size, encoding.architecture, "Galileo")
        self.options = decide(GalileoOptions, options)
        self.masking = as_dataclass(GalileoMasking, masking)
        self.loss_weights = term_weights(loss_weights, "Galileo", ("global", "local"))
        if temperature <= 0:
            raise ConfigError(
                f"model.init_args.temperature: got {temperature!r}, expected more than 0."
            )
        self.temperature = temperature
        self.backbone = _backbone(encoding, sizes, as_modalities(modalities))
        self._check_masking([group.name for group in encoding.groups or ()])
        inside = self.backbone.encoder.sizes
        predictor = PredictorSizes(
            width=sizes.predictor_width,
            depth=sizes.predictor_depth or 2,
            heads=sizes.predictor_heads or inside.heads,
            ffn_ratio=sizes.ffn_ratio,
            learned_groups=sizes.learned_groups,
        )
        self.predictors = nn.ModuleDict({
            term: GalileoPredictor(self.backbone.groups, inside.width, predictor, inside.max_steps)
            for term in ("global", "local")
        })  # fmt: skip
        self.make_teacher()
        if encoding.predictors is not None:
            self.load_pretraining_parts(encoding.predictors)

    def load_pretraining_parts(self, folder: str | Path) -> None:
        """Fill the predictors, and the teacher where it is there, from a released folder.

        Args:
            folder: With `decoder.pt` (of global passes), `second_decoder.pt` (of local ones) and
                perhaps `target_encoder.pt`.

        Raises:
            WeightsError: A file is missing, or of other sizes or groups.
        """
        place = Path(folder)
        fill(self.predictors["global"], place / "decoder.pt")
        fill(self.predictors["local"], place / "second_decoder.pt")
        target = place / "target_encoder.pt"
        if target.exists():
            fill(cast(GalileoBackbone, self.teacher["backbone"]).encoder, target)

    def _check_masking(self, known: list[str]) -> None:
        for name in self.masking.ignored:
            if name not in known:
                raise ConfigError(
                    f"model.init_args.masking.ignored: there is no group {name!r}."
                    f"{nearest(name, known)} There are {', '.join(known)}."
                )
        largest = self.backbone.encoder.sizes.max_patch_size
        if max(self.masking.patch_sizes) > largest:
            raise ConfigError(
                f"model.init_args.masking.patch_sizes: got {list(self.masking.patch_sizes)}, but "
                f"encoding.architecture.max_patch_size is {largest}. Leave the larger ones out."
            )

    # -- draws ------------------------------------------------------------------------------

    def draw(self, batch: Batch, generators: Generators) -> GalileoDraws:
        """Draw the part of the batch that every pass sees, and what it shows and asks for."""
        modalities, shared = self.backbone.modalities, generators.shared
        found = [batch[n].shape[-2:] for n in self._placed() if n in batch]
        extent = (min(s[0] for s in found), min(s[1] for s in found)) if found else (0, 0)
        steps = series_steps(batch, modalities)
        kinds = self.masking.passes
        numbers = torch.rand(
            len(kinds), _NUMBERS, generator=shared, device=shared.device, dtype=torch.float64
        ).tolist()
        passes = []
        for kind, own in zip(kinds, numbers, strict=True):
            cut = Cut.drawn(self.masking, extent, steps, own[:6])
            part = cut_batch(batch, modalities, self._placed(), cut)
            valid = self.backbone.visibility(part, cut.patch_size)
            for name in self.masking.ignored:
                valid.pop(name, None)
            visible, hidden = self._masks(kind, valid, own[6:], generators)
            passes.append(GalileoPass(kind=kind, cut=cut, visible=visible, hidden=hidden))
        return GalileoDraws(tuple(passes))

    def _placed(self) -> list[str]:
        return [name for name in self.backbone.modalities if self.backbone.in_space(name)]

    def _masks(
        self, kind: str, valid: dict[str, Tensor], numbers: list[float], generators: Generators
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return what is visible and what is hidden, by group."""
        groups = [group for group in self.backbone.groups if group.name in valid]
        places = max((v[0, ..., 0].numel() if g.array == "space_time" else v[0].numel()
                      for g, v in self._of(groups, valid, "space")), default=1)  # fmt: skip
        dates = max((v.shape[-1] for _, v in self._of(groups, valid, "time")), default=1)
        can = {"space": places > 1, "time": dates > 1}
        along = kind if can.get(kind) else next((a for a, is_so in can.items() if is_so), "random")
        if kind == "random" or along == "random":
            return self._random(valid, generators.local)
        low, high = self.masking.encode_groups
        shared = generators.shared
        noise = torch.rand(len(groups), generator=shared, device=shared.device)
        available = torch.stack([valid[g.name].unsqueeze(-1).flatten(1).any(1) for g in groups], 1)
        shown = min(low + int(numbers[0] * (high - low + 1)), high)
        choice = group_choice(available, noise, numbers[1], shown)
        shape: tuple[int, ...] = (dates,)
        if along == "space":
            shape = next(v.shape[1:3] for _, v in self._of(groups, valid, "space"))
        parts = self._parts(len(available), shape, generators.local)
        return structured(along, valid, groups, choice, parts)  # type: ignore[arg-type]

    @staticmethod
    def _of(
        groups: list[GalileoGroup], valid: Mapping[str, Tensor], axis: str
    ) -> list[tuple[GalileoGroup, Tensor]]:
        """Return the groups that vary over an axis, with their tokens."""
        arrays = ("space_time", axis)
        return [(g, valid[g.name]) for g in groups if g.array in arrays]

    def _parts(
        self, items: int, shape: tuple[int, ...], generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draw the places or dates that are shown, and those that are asked for."""
        count = int(torch.Size(shape).numel())
        shown = max(1, int(self.masking.encode_ratio * count))
        asked = min(max(1, int(self.masking.decode_ratio * count)), count - shown)
        noise = torch.rand(items, count, generator=generator, device=generator.device)
        rank = noise.argsort(1).argsort(1)
        first, second = rank < shown, (rank >= shown) & (rank < shown + asked)
        return first.unflatten(1, shape), second.unflatten(1, shape)

    def _random(
        self, valid: dict[str, Tensor], generator: torch.Generator
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Show and ask for single tokens that hold data, out of all groups."""
        usable = torch.cat([mask.unsqueeze(-1).flatten(1) for mask in valid.values()], 1)
        noise = torch.rand(usable.shape, generator=generator, device=generator.device)
        count = usable.sum(1, keepdim=True)
        shown = (count * self.masking.encode_ratio).long().clamp(min=1)
        asked = (count * self.masking.decode_ratio).long().clamp(min=1)
        found = []
        for mask in (lowest(noise, usable, shown), lowest(noise, usable, asked, shown)):
            parts = mask.split([v[0].numel() for v in valid.values()], 1)
            found.append({
                name: part.unflatten(1, own.shape[1:]) if own.ndim > 1 else part[:, 0]
                for part, (name, own) in zip(parts, valid.items(), strict=True)
            })  # fmt: skip
        return found[0], found[1]

    # -- the step ---------------------------------------------------------------------------

    def forward(self, batch: Batch, draws: GalileoDraws, outputs: bool = False) -> Step:
        """Predict what is hidden; one term for global and one for local passes."""
        check_batch(batch, self.backbone.modalities, training=True)
        x = self.backbone.normalize(batch)
        terms: dict[str, list[Tensor]] = {"global": [], "local": []}
        kept: dict[str, Any] = {"spread": []}
        for each in draws.passes:
            term = "local" if each.kind == "random" else "global"
            part = cut_batch(x, self.backbone.modalities, self._placed(), each.cut)
            inputs = self.backbone.inputs(part, each.cut.patch_size)
            found, targets = self.predict(each, inputs, term)
            terms[term].append(self.loss(term, found, targets))
            if term == "global":
                kept["spread"].append(_spread(targets, found.counted))
        losses = {
            term: torch.stack(own).sum() * (self.loss_weights[term] / len(draws.passes))
            for term, own in terms.items()
            if own
        }
        if outputs:
            with torch.no_grad():
                kept["embeddings"] = self.embed(self.backbone.encode(x))
        return Step(losses, kept)

    def predict(
        self, each: GalileoPass, inputs: GroupInputs, term: str
    ) -> tuple[Predicted, Tensor]:
        """Return what the predictor says of the hidden tokens, and the teacher's targets."""
        unseen = {name: ~self._mask(each.visible, name, mask)
                  for name, mask in inputs.visible.items()}  # fmt: skip
        seen = self.backbone.encode_inputs(inputs, unseen)
        with torch.no_grad():
            teacher = cast(GalileoBackbone, self.teacher["backbone"])
            whole = teacher.encode_inputs(
                inputs, self._unseen_by_teacher(each, inputs), depths=self.depths(term)
            )
        predictor = cast(GalileoPredictor, self.predictors[term])
        found = predictor(
            seen, self._by_array(each.hidden, seen), inputs.months,
            patch_size=inputs.patch_size, gsd_m=inputs.gsd_m,
        )  # fmt: skip
        return found, take_tokens(whole.flat()[0], found.order)

    def depths(self, term: str) -> int | dict[str, int]:
        """Return the blocks after which the targets of every group are taken."""
        if term == "local":
            return 0
        depth = self.backbone.encoder.sizes.depth
        return {g.name: round(g.target_depth * depth) for g in self.backbone.groups}

    def loss(self, term: str, found: Predicted, targets: Tensor) -> Tensor:
        """Compare predictions with targets, as the options of a term say."""
        o = self.options
        kind = o.global_loss if term == "global" else o.local_loss
        if kind == "mse":
            return masked_regression(found.tokens, targets, found.counted)
        tokens = standardized(found.tokens, found.counted) if o.standardize else found.tokens
        gathers = kind == "alldisc" and bool(o.gather_targets)
        return token_discrimination(
            tokens,
            targets,
            found.counted,
            self.temperature,
            candidates="batch" if kind == "alldisc" else "item",
            gathers=gathers,
            counts_empty=o.empty_items == "count",
            layout=row_layout(targets.flatten(0, 1)) if gathers else None,
        )

    @staticmethod
    def _mask(masks: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
        """Return the mask of a group, nothing where it is left out."""
        return masks[name] if name in masks else torch.zeros_like(like)

    def _by_array(self, masks: Mapping[str, Tensor], like: GalileoTokens) -> dict[Array, Tensor]:
        """Stack masks of groups in the order of the tokens, (..., G) by array."""
        found: dict[Array, Tensor] = {}
        for array, visible in like.visible.items():
            own = self.backbone.encoder.groups[array]
            parts = [self._mask(masks, g.name, visible[..., i]) for i, g in enumerate(own)]
            found[array] = torch.stack(parts, -1)
        return found

    def _unseen_by_teacher(
        self, each: GalileoPass, inputs: GroupInputs
    ) -> dict[str, Tensor] | None:
        if self.options.teacher_sees == "all":
            return None
        shown = {n: self._mask(each.hidden, n, mask) for n, mask in inputs.visible.items()}
        if self.options.teacher_sees == "used":
            shown = {n: mask | self._mask(each.visible, n, mask) for n, mask in shown.items()}
        return {name: ~mask for name, mask in shown.items()}

    # -- what follows a step ----------------------------------------------------------------

    def momentum_now(self) -> float:
        """Return the share of the teacher that this step keeps."""
        done = min(1.0, self.progress.step / max(1, self.progress.total_steps))
        return self.momentum + (1 - self.momentum) * done

    def monitors(self, step: Step) -> dict[str, Tensor]:
        """Return the spread of the features of global targets: 0 where they have collapsed."""
        found = {"momentum": torch.tensor(self.momentum_now())}
        if step.outputs["spread"]:
            mean = torch.stack(step.outputs["spread"]).mean()
            found["target_std"] = all_reduce_sum(mean) / world_size()
        return found


def _spread(targets: Tensor, counted: Tensor) -> Tensor:
    """Return the mean over features of their deviation over the counted tokens, ()."""
    with torch.no_grad():
        rows, weight = targets.float(), counted.unsqueeze(-1)
        count = counted.sum().clamp(min=1)
        mean = torch.where(weight, rows, 0.0).sum((0, 1)) / count
        squares = torch.where(weight, (rows - mean).square(), 0.0).sum((0, 1)) / count
        return squares.sqrt().mean()


def _backbone(
    encoding: GalileoEncoding, sizes: GalileoSizes, known: dict[str, Modality]
) -> GalileoBackbone:
    """Build the backbone, or load the weights that it starts from."""
    inside = ("width", "depth", "heads", "ffn_ratio", "max_patch_size", "max_steps", "drop_path")
    arguments: dict[str, Any] = {
        "groups": encoding.groups,
        "architecture": {name: getattr(sizes, name) for name in inside},
        "patch_size": encoding.patch_size,
        "normalization": encoding.normalization,
    }
    if encoding.weights is None:
        backbone = GalileoBackbone(known, **arguments)
        if sizes.projection_gain != 1:
            backbone.scale_projections(sizes.projection_gain)
        return backbone
    loaded, _ = load_initial(
        GalileoBackbone, encoding.weights, f"galileo_{encoding.size}",
        modalities=known, arguments=arguments, bands=encoding.bands,
    )  # fmt: skip
    return loaded
