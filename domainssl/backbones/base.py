"""What every backbone is: raw physical values in, features out, normalisation included."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from domainssl._torch import register_container
from domainssl.arguments import Recorded, class_name, class_of
from domainssl.errors import ConfigError, DataError, WeightsError, nearest
from domainssl.lazy import lazily
from domainssl.modality import Modality, as_modalities, check_batch
from domainssl.nn.normalization import Normalizer
from domainssl.nn.patching import grid_of
from domainssl.units import UnitCheck

if TYPE_CHECKING:
    from domainssl.backbones.bands import BandChange

__all__ = ["Backbone", "Features", "LoadReport"]

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Features:
    """Features of a batch, keyed by modality name and `joint` for the fusion.

    Attributes:
        tokens: (B, N, E) per name.
        pooled: One vector per item, (B, E) per name.
        coords: Token positions in patch units, (N, D), or (B, K, D) after `keep`.
        grid: Number of tokens per axis: (h, w), (t, h, w) or (x, y, z).
        token_valid: bool (B, N); False where a token saw no valid pixel or its modality is absent.
        dates: int32 days since 1970-01-01, (B,) or (B, T), where the batch has them.
        cls: Class tokens (B, E) of backbones that have some.
    """

    tokens: dict[str, Tensor] = field(default_factory=dict)
    pooled: dict[str, Tensor] = field(default_factory=dict)
    coords: dict[str, Tensor] = field(default_factory=dict)
    grid: dict[str, tuple[int, ...]] = field(default_factory=dict)
    token_valid: dict[str, Tensor] = field(default_factory=dict)
    dates: dict[str, Tensor] = field(default_factory=dict)
    cls: dict[str, Tensor] = field(default_factory=dict)


def _flatten(features: Features) -> tuple[list[Any], tuple[str, ...]]:
    names = tuple(f.name for f in dataclasses.fields(Features))
    return [getattr(features, name) for name in names], names


register_container(
    Features,
    _flatten,
    lambda values, names: Features(**dict(zip(names, values, strict=True))),
    "domainssl.Features",
)


@dataclass(frozen=True)
class LoadReport:
    """What became of the tensors of a weights file.

    Attributes:
        matched: Names in the model that were filled.
        missing: Names in the model that the file does not have.
        unexpected: Names in the file that the model has no place for.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def __str__(self) -> str:
        def some(names: tuple[str, ...]) -> str:
            shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
            return f"{len(names)} ({shown})" if names else "0"

        return (
            f"{len(self.matched)} tensors loaded, missing in the file: {some(self.missing)}, "
            f"unexpected in the file: {some(self.unexpected)}"
        )


class Backbone(Recorded, nn.Module):
    """Base of all backbones.

    Subclasses call `super().__init__(modalities, forms)`, set `embed_dim` and write `encode`.

    Args:
        modalities: What goes in, by name; Modality objects or plain dicts.
        forms: Normalisation form, one for all or one per modality (see `nn.normalization.Form`).

    Attributes:
        modalities: The modalities by name, with the statistics the backbone was built with.
        embed_dim: Feature width per name, `joint` included where there is one.
        normalizer: The sealed normalisation; its statistics are persistent buffers.
    """

    embed_dim: dict[str, int]
    forward_methods: ClassVar[tuple[str, ...]] = ("encode",)  # entry points besides `forward`
    reference_holds_classes: ClassVar[bool] = False  # published files pickle their configuration
    takes_wavelengths: ClassVar[bool] = False  # tells bands by wavelengths: any will do
    band_changes: tuple[BandChange, ...] = ()  # of weights for other bands

    def __init__(
        self,
        modalities: Mapping[str, Modality | Mapping[str, Any]],
        forms: str | Mapping[str, str],
    ) -> None:
        super().__init__()
        self.modalities = as_modalities(modalities)
        self._units: UnitCheck | None = None
        self.normalizer = Normalizer(self.modalities, forms)

    def normalize(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the batch with its modalities normalised in float32, invalid values zero.

        Raises:
            DataError: The batch does not hold what the backbone was built for.
        """
        if not isinstance(batch, Mapping):
            first = next(iter(self.modalities))
            raise DataError(
                f"A backbone takes a dict of tensors by modality, such as {{{first!r}: x}}; got "
                f"{type(batch).__name__}."
            )
        check_batch(batch, self.modalities)
        out: dict[str, Any] = self.normalizer(batch)
        return out

    def encode(
        self,
        x: Mapping[str, Any],
        keep: Mapping[str, Tensor] | None = None,
        replace: Mapping[str, Tensor] | None = None,
    ) -> Features:
        """Run the network on a normalised batch.

        Args:
            x: What `normalize` returned; any subset of the modalities the method can use.
            keep: Encode only these tokens, int64 (B, K) per modality.
            replace: Put the mask token where True, bool (B, N) per modality.
        """
        raise NotImplementedError

    def forward(self, batch: Mapping[str, Any]) -> Features:
        """Return the features of raw physical values; see `Features` and `modality.Batch`."""
        return self.encode(self.watched(batch))

    def watched(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return what `normalize` does, after a look at the units where that is asked for.

        For whatever takes raw values: `forward`, and pyramids that do not pass through it.
        """
        if self._units is not None and not torch.compiler.is_compiling():
            self._warn_of_units(batch)
        return self.normalize(batch)

    def watch_units(self) -> None:
        """Warn, once, when the values of the next forward pass must be in another unit.

        `load_backbone` asks for it. Only values on the CPU are looked at, so that no device has to
        be waited for.
        """
        self._units = UnitCheck(self.modalities, least_votes=1)

    def _warn_of_units(self, batch: Mapping[str, Any]) -> None:
        check, self._units = self._units, None
        found = check.find(batch, "first", "the first batch") if check is not None else ""
        if found:
            logger.warning("%s Features of other units mean nothing. (Said once.)", found)

    def feature_maps(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return tokens laid out on their grid, (B, E, h, w) or (B, E, x, y, z) per name."""
        features = self(batch)
        return {
            name: tokens.transpose(1, 2).unflatten(2, features.grid[name])
            for name, tokens in features.tokens.items()
        }

    def feature_pyramid(self, batch: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        """Return the maps that decoders of dense tasks take, finest first, (B, E_i, *S_i) per name.

        The base knows one level, that of `feature_maps`.
        """
        return {name: [values] for name, values in self.feature_maps(batch).items()}

    def modality_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Yield the parameters that only serve one modality.

        They stay untouched in a step whose global batch lacks the modality.
        """
        raise NotImplementedError

    def band_tensors(self, name: str) -> dict[str, str]:
        """Return the weights that take the bands of a modality, by name in the state dict.

        Values say how they are laid out: `convolution` (E, C, *S), `bands first` (E, C·P) or
        `bands last` (E, P·C).

        Raises:
            WeightsError: The method does not take bands one by one.
        """
        raise self.no_bands(name, "its input weights do not take bands one by one")

    def no_bands(self, name: str, why: str) -> WeightsError:
        """Return the error that refuses other bands than those of the weights."""
        return WeightsError(
            f"{name}: {type(self).__name__} cannot be fitted to other bands: {why}. Choose the "
            f"bands {', '.join(self.modalities[name].channels[:20])} in the DataModule."
        )

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute transformer blocks in the backward pass instead of keeping activations."""
        for module in self.modules():
            if hasattr(module, "gradient_checkpointing"):
                setattr(module, "gradient_checkpointing", enabled)  # noqa: B010

    def check(self, modalities: Mapping[str, Modality | Mapping[str, Any]]) -> None:
        """Compare the modalities of some data with those the weights were made for.

        Raises:
            WeightsError: A modality is unknown, or bands, their order, the unit or the kind
                differ; all differences are told at once.
        """
        problems = []
        for name, found in as_modalities(modalities).items():
            if name not in self.modalities:
                problems.append(
                    f"{name}: this backbone has no such modality.{nearest(name, self.modalities)} "
                    f"It knows {', '.join(self.modalities)}."
                )
                continue
            problems += _differences(name, found, self.modalities[name])
        if problems:
            raise WeightsError("The data do not fit the backbone:\n  " + "\n  ".join(problems))

    def load_tensors(self, state: Mapping[str, Tensor]) -> LoadReport:
        """Copy the tensors whose name and shape fit, and say what was left over.

        Raises:
            WeightsError: A tensor of the right name has the wrong shape.
        """
        own = self.state_dict()
        wrong = [
            f"{name}: file {tuple(state[name].shape)}, model {tuple(own[name].shape)}"
            for name in own
            if name in state and state[name].shape != own[name].shape
        ]
        if wrong:
            raise WeightsError(
                "Weights of another architecture or band count: " + "; ".join(wrong[:5])
            )
        self.load_state_dict({n: t for n, t in state.items() if n in own}, strict=False)
        return LoadReport(
            matched=tuple(n for n in own if n in state),
            missing=tuple(n for n in own if n not in state),
            unexpected=tuple(n for n in state if n not in own),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return class and arguments, without weights: what a task that was given it records."""
        return {"name": class_name(class_of(self)), "arguments": copy.deepcopy(self.arguments)}

    @classmethod
    def current_arguments(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the constructor arguments of a card or checkpoint as this version takes them."""
        return dict(arguments)

    @classmethod
    def from_reference(
        cls,
        state: Mapping[str, Any],
        variant: Mapping[str, Any],
        modalities: Mapping[str, Modality | Mapping[str, Any]] | None = None,
    ) -> tuple[Self, LoadReport]:
        """Build the backbone from the content of a published weights file.

        Args:
            state: What the file holds.
            variant: Constructor arguments of the named variant.
            modalities: What the data look like; None takes the published description.

        Raises:
            WeightsError: The family has no reference files, or the file is none of them.
        """
        raise WeightsError(f"{cls.__name__} has no reference weights to read.")

    @classmethod
    def published_modalities(
        cls,
        state: Mapping[str, Any],
        variant: Mapping[str, Any],
        modalities: Mapping[str, Modality],
    ) -> dict[str, Modality]:
        """Return what a published file was trained on, under the names of the data.

        Args:
            state: What the file holds.
            variant: Constructor arguments; `modalities` among them describe the file.
            modalities: The data.

        Raises:
            WeightsError: Neither the file nor `variant` says it.
        """
        given = variant.get("modalities")
        if given is None:
            raise WeightsError(
                f"Files for {cls.__name__} do not say which bands they were trained on. Pass them, "
                "with unit and statistics, as arguments={'modalities': …}; for a run, export that "
                "backbone (export_backbone) and name the export."
            )
        return as_modalities(given)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, revision: str | None = None, **options: Any
    ) -> Self:
        """Load a backbone, as `load_backbone` does; `owner/repository` is one on the hub.

        Args:
            name_or_path: See `load_backbone`; `owner/repository` stands for
                `hf://owner/repository` where there is no such folder.
            revision: Branch, tag or commit on the hub.
            options: Further arguments of `load_backbone`.

        Raises:
            WeightsError: See `load_backbone`; or it is a backbone of another class.
        """
        source = str(name_or_path)
        is_repository = source.count("/") == 1 and not Path(source).exists()
        if is_repository and isinstance(name_or_path, str):
            source = f"hf://{source}"
        if revision is not None:
            if not source.startswith("hf://") or "@" in source:
                raise WeightsError(
                    f"revision={revision!r} is for an address on the hub without one, such as "
                    f"'owner/repository'; got {source!r}."
                )
            source = f"{source}@{revision}"
        load = cast(Any, lazily("domainssl.backbones", "load_backbone"))
        found = load(source, **options)
        if not isinstance(found, cls):
            raise WeightsError(
                f"{source} holds a {type(found).__name__}, expected a {cls.__name__}. Use "
                f"{type(found).__name__}.from_pretrained, or load_backbone."
            )
        return found

    def save_pretrained(self, folder: str | Path, **options: Any) -> Path:
        """Write the backbone and its card; see `export_backbone`, which takes the same options.

        Args:
            folder: Created where it does not exist.
            options: `licence`, `provenance`, `overwrite`.

        Returns:
            Path of the card.
        """
        export = cast(Any, lazily("domainssl.backbones", "export_backbone"))
        return Path(export(self, folder, **options))

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the export and a model card to the Hugging Face Hub.

        Args:
            repo_id: `owner/repository`; created where it does not exist.
            options: `licence` and `provenance` as in `export_backbone`; `commit_message`,
                `private`, `token`, `revision` and `create_pr` as in huggingface_hub.

        Returns:
            The address for `load_backbone`, with the commit.

        Raises:
            WeightsError: The hub refuses it, or there is no connection.
            MissingExtraError: huggingface_hub is not installed.
        """
        push = cast(Any, lazily("domainssl.backbones", "push_backbone"))
        return str(push(self, repo_id, **options))


def _differences(name: str, found: Modality, wanted: Modality) -> list[str]:
    problems = []
    if found.channels != wanted.channels:
        what = (
            "the same bands in another order"
            if sorted(found.channels) == sorted(wanted.channels)
            else f"{len(found.channels)} bands"
        )
        problems.append(
            f"{name}: {what}: got {list(found.channels)}, the weights expect "
            f"{len(wanted.channels)} in the order {list(wanted.channels)}. Choose these bands, "
            "in this order, in the DataModule."
        )
    for attribute, remedy in (
        ("value_unit", "Convert the values, or declare the unit they really have."),
        ("kind", "Choose the DataModule options that give this kind."),
    ):
        got, expected = getattr(found, attribute), getattr(wanted, attribute)
        if got != expected:
            problems.append(
                f"{name}: {attribute} is {got!r}, the weights expect {expected!r}. {remedy}"
            )
    return problems


def refuse_replace(replace: object, name: str) -> None:
    """Refuse `encode(replace=...)` for a backbone without a mask token.

    Raises:
        ConfigError: `replace` was given.
    """
    if replace is not None:
        raise ConfigError(f"{name} has no mask token; pass `keep` instead of `replace`.")


def present_names(
    x: Mapping[str, Any], known: Mapping[str, Modality], what: str
) -> tuple[str, ...]:
    """Return the modalities of a batch, in the order of the model.

    Args:
        x: The batch.
        known: The modalities of the model.
        what: How messages call them, such as `contrasts`.

    Raises:
        DataError: There is none.
    """
    found = tuple(name for name in known if name in x)
    if not found:
        raise DataError(f"The batch has none of the {what} {list(known)}; got {sorted(x)}.")
    return found


def shared_grid(
    x: Mapping[str, Any], names: Sequence[str], patch_size: int | Sequence[int], what: str
) -> tuple[int, ...]:
    """Return the patches per axis of images or volumes of one size.

    Args:
        x: The batch.
        names: Modalities that it has.
        patch_size: Side of a patch, one number or one per axis.
        what: Whose grid it is, such as `The contrasts of an exam`.

    Raises:
        DataError: The sizes differ, or are no multiple of the patch.
    """
    sizes = {name: tuple(x[name].shape[2:]) for name in names}
    if len({*sizes.values()}) > 1:
        raise DataError(
            f"{what} share a grid; got {sizes}. Resample them to one of them in the DataModule."
        )
    name, size = next(iter(sizes.items()))
    return grid_of(size, patch_size, f"batch.{name}")


def common_size(x: Tensor, modality: Modality) -> tuple[int, ...]:
    """Return the spatial size of a batch tensor, (H, W) or (X, Y, Z).

    Raises:
        DataError: The modality has no grid.
    """
    if modality.spatial_dims == 0:
        raise DataError(f"{modality.name}: kind {modality.kind!r} has no grid to cut into patches.")
    return tuple(x.shape[-modality.spatial_dims :])
