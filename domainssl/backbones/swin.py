"""MONAI's SwinTransformer with its normalisation sealed in: the encoder of SwinUNETR.

The same weights give MONAI's hidden states, in both orders of patch merging (see
`encoders.swin`), and weights go both ways.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from domainssl.backbones.base import Backbone, Features, LoadReport, refuse_replace
from domainssl.backbones.encoders.swin import SwinArchitecture, SwinEncoder
from domainssl.backbones.swin_files import (
    SwinFile,
    SwinLayout,
    read_swin_file,
    write_swin_file,
)
from domainssl.errors import ConfigError, DataError, WeightsError
from domainssl.modality import Modality, as_modalities, key, present_mask, valid_mask
from domainssl.nn.patching import grid_coordinates
from domainssl.options import as_dataclass

__all__ = ["STRIDE", "SwinBackbone", "fits_stride"]

logger = logging.getLogger(__name__)

STRIDE = 32  # voxels per cell of the deepest map: a patch of 2 and four mergings
_LEAST_SHARE = 0.95
_PUBLISHED_FORM = "window(-1000,1000)"


def fits_stride(size: Sequence[int]) -> tuple[int, ...] | None:
    """Return the nearest sizes that SwinUNETR takes, or None if `size` is one of them."""
    if all(side > 0 and side % STRIDE == 0 for side in size):
        return None
    return tuple(max(1, round(side / STRIDE)) * STRIDE for side in size)


class SwinBackbone(Backbone):
    """Encode one volume modality; tokens are the cells of the deepest map, pooled is their mean.

    Args:
        modalities: One volume; contrasts that belong together are channels of it.
        architecture: Sizes and order of patch merging.
        normalization: Form; the published pretraining brings HU from [-1000, 1000] to [0, 1].

    Raises:
        ConfigError: There is more than one modality, or it is no volume.
    """

    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "swin_unetr": {},
        "swin_unetr_standard": {"architecture": {"merging": "standard"}},
        "swin_unetr_legacy": {"architecture": {"merging": "legacy"}},
    }

    def __init__(
        self,
        modalities: Mapping[str, Modality | Mapping[str, Any]],
        architecture: SwinArchitecture = SwinArchitecture(),
        normalization: str | dict[str, str] = _PUBLISHED_FORM,
    ) -> None:
        super().__init__(modalities, normalization)
        if len(self.modalities) != 1:
            raise ConfigError(
                f"{type(self).__name__} encodes one volume, the data have {list(self.modalities)}. "
                "Choose one modality in the DataModule."
            )
        ((self.name, modality),) = self.modalities.items()
        self.architecture = as_dataclass(SwinArchitecture, architecture)
        self.encoder = SwinEncoder(modality, self.architecture)
        self.embed_dim = {self.name: self.encoder.width}

    def modality_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Yield all parameters: there is one modality."""
        yield from self.encoder.parameters()

    def _inputs(self, x: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        values, valid = x[self.name], valid_mask(x, self.modalities[self.name])
        size = tuple(values.shape[2:])
        better = fits_stride(size)
        if better is not None:
            raise DataError(
                f"batch.{self.name}: size {size} is not divisible by {STRIDE}; crop or pad it, for "
                f"example to {better}."
            )
        return values, valid

    def encode(
        self,
        x: Mapping[str, Any],
        keep: Mapping[str, Tensor] | None = None,
        replace: Mapping[str, Tensor] | None = None,
    ) -> Features:
        """Encode the volume; see `Backbone.encode`.

        Raises:
            ConfigError: `keep` or `replace` is given: windows need the whole volume.
            DataError: A side is not divisible by 32.
        """
        refuse_replace(replace, type(self).__name__)
        if keep is not None:
            raise ConfigError(f"{type(self).__name__} cannot leave tokens out (keep).")
        values, valid = self._inputs(x)
        out = self.encoder(values, valid)
        seen = out.token_valid & present_mask(x, self.name).unsqueeze(1)
        features = Features(
            tokens={self.name: out.tokens},
            pooled={self.name: out.pooled},
            coords={self.name: grid_coordinates(out.grid, device=out.tokens.device)},
            grid={self.name: out.grid},
            token_valid={self.name: seen},
        )
        if key(self.name, "dates") in x:
            features.dates[self.name] = x[key(self.name, "dates")]
        return features

    def feature_pyramid(self, batch: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        """Return SwinUNETR's five hidden states at 1/2 to 1/32, (B, F·2^i, *S / 2^(i+1))."""
        return {self.name: self.encoder.pyramid(*self._inputs(self.watched(batch)))}

    def band_tensors(self, name: str) -> dict[str, str]:
        """Return the patch embedding; see `Backbone.band_tensors`."""
        return {f"encoder.{n}": layout for n, layout in self.encoder.band_tensors.items()}

    # -- files of others --------------------------------------------------------------------

    @classmethod
    def from_reference(
        cls,
        state: Mapping[str, Any],
        variant: Mapping[str, Any],
        modalities: Mapping[str, Modality | Mapping[str, Any]] | None = None,
    ) -> tuple[Self, LoadReport]:
        """Read `model_swinvit.pt`, MONAI's SwinUNETR, files of the research code, VoCo, SuPreM.

        Sizes come from the file, and the order of patch merging where its layout tells it.

        Raises:
            WeightsError: The file holds no SwinTransformer, less than 95 % of one, one of other
                sizes, or does not tell the order of merging and neither does the variant.
        """
        file = read_swin_file(state)
        known = as_modalities(modalities) if modalities is not None else _published(file)
        for name, modality in known.items():
            if modality.num_channels != file.channels:
                raise WeightsError(
                    f"{name}: the data have {modality.num_channels} channels, the file "
                    f"{file.channels}. Choose the channels that the weights were trained on."
                )
        architecture = _architecture(file, variant.get("architecture"))
        form = variant.get("normalization")
        if form is None and any(m.value_unit != "hu" for m in known.values()):
            raise WeightsError(
                "The published weights were trained on CT in HU; for other data pass "
                "arguments={'normalization': …}, such as 'item' or 'window(0,1)'."
            )
        backbone = cls(known, architecture, form or _PUBLISHED_FORM)
        report = backbone.load_tensors({f"encoder.net.{n}": t for n, t in file.encoder.items()})
        wanted = [n for n in backbone.state_dict() if n.startswith("encoder.")]
        if len(report.matched) < _LEAST_SHARE * len(wanted):
            raise WeightsError(
                f"Only {len(report.matched)} of {len(wanted)} tensors of the encoder are in the "
                f"file; missing are {list(report.missing[:3])}, left over {report.unexpected[:3]}."
            )
        missing = tuple(n for n in report.missing if n.startswith("encoder."))
        return backbone, LoadReport(report.matched, missing, report.unexpected)

    @classmethod
    def published_modalities(
        cls,
        state: Mapping[str, Any],
        variant: Mapping[str, Any],
        modalities: Mapping[str, Modality],
    ) -> dict[str, Modality]:
        """Return CT under the name of the data, for files of one channel; see the base class."""
        if "modalities" in variant or len(modalities) != 1:
            return super().published_modalities(state, variant, modalities)
        (known,) = _published(read_swin_file(state)).values()
        return {name: dataclasses.replace(known, name=name) for name in modalities}

    def to_reference(self, layout: SwinLayout = "monai") -> dict[str, Any]:
        """Return the content of a file for MONAI's SwinUNETR (see `write_swin_file`)."""
        net = self.encoder.net
        tensors = dict(net.state_dict())
        tensors |= {n: t for n, t in net.named_buffers() if n.endswith("relative_position_index")}
        return write_swin_file(tensors, self.architecture.merging or "standard", layout)


def _published(file: SwinFile) -> dict[str, Modality]:
    if file.channels != 1:
        raise WeightsError(
            f"The file is for {file.channels} channels and does not say which; pass modalities=… "
            "with their names and unit."
        )
    return {"ct": Modality(name="ct", kind="volume", channels=("ct",), value_unit="hu")}


def _architecture(file: SwinFile, wanted: object) -> SwinArchitecture:
    """Return the sizes of the file, with the order of merging that it or the variant states."""
    given = vars(wanted) if dataclasses.is_dataclass(wanted) else dict(wanted or {})  # type: ignore[call-overload]
    sizes = file.sizes()
    wrong = {n: v for n, v in given.items() if n != "merging" and _plain(v) != _plain(sizes[n])}
    if wrong:
        raise WeightsError(
            f"The file holds a SwinTransformer with {sizes}, but {wrong} was asked for. Leave the "
            "sizes out, or choose another file."
        )
    merging = given.get("merging") or file.merging
    if merging is None:
        raise WeightsError(
            "The file does not tell the order of its patch merging, and a wrong one gives wrong "
            "features without any other sign. If it was trained with MONAI before 1.5 (2025-01) "
            "load it as 'swin_unetr_legacy', else as 'swin_unetr_standard' (in an objective: "
            "encoding.architecture.merging)."
        )
    if file.merging not in (None, merging):
        logger.warning(
            "The layout of the file is that of weights with %s patch merging; %s was asked for.",
            file.merging, merging,
        )  # fmt: skip
    return SwinArchitecture(**sizes, merging=merging)


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value
