"""Weights files of SwinUNETR and its self-supervised pretraining, from and to MONAI's names.

=================  ==========================================================  =======
layout             names                                                       merging
=================  ==========================================================  =======
`model_swinvit`    `state_dict: module.layers1.0.blocks.0.mlp.fc1.weight`      legacy
`disruptive`       `model: encoder.layers1.0.0.blocks.0.mlp.linear1.weight`    legacy
`monai`            `[module.]swinViT.layers1.0.blocks.0.mlp.linear1.weight`    not said
=================  ==========================================================  =======

SwinUNETR's own state dict, files of the research code (with its heads), of VoCo and of SuPreM
have the names of `monai` behind some prefix. Files that we write say `merging` beside the tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor

from domainssl.backbones.encoders.swin import Merging
from domainssl.errors import WeightsError

__all__ = ["SwinFile", "SwinLayout", "read_swin_file", "write_swin_file"]

SwinLayout = Literal["monai", "model_swinvit"]
_STEM = "patch_embed.proj.weight"
_INDEX = "relative_position_index"
_HEADS = ("rotation_head.", "contrastive_head.", "conv.")


@dataclass(frozen=True)
class SwinFile:
    """A weights file, sorted.

    Attributes:
        encoder: Tensors under the names of MONAI's SwinTransformer, without integer tables.
        heads: `rotation_head.*`, `contrastive_head.*` and `conv.*` of the research code.
        merging: Order of patch merging that the file's layout or its own entry states.
    """

    encoder: dict[str, Tensor]
    heads: dict[str, Tensor]
    merging: Merging | None

    def sizes(self) -> dict[str, Any]:
        """Return the arguments of `SwinArchitecture` that the shapes tell, but for `merging`.

        Raises:
            WeightsError: Tensors that every SwinTransformer has are missing.
        """
        depths, heads = [], []
        for stage in range(1, 5):
            pattern = rf"layers{stage}\.0\.blocks\.(\d+)\."
            found = {int(m[1]) for n in self.encoder if (m := re.match(pattern, n))}
            depths.append(len(found))
            heads.append(
                self._shape(f"layers{stage}.0.blocks.0.attn.relative_position_bias_table")[1]
            )
        table = self._shape("layers1.0.blocks.0.attn.relative_position_bias_table")[0]
        features = self._shape(_STEM)[0]
        return {
            "feature_size": features,
            "depths": tuple(depths),
            "heads": tuple(heads),
            "window": (round(table ** (1 / 3)) + 1) // 2,
            "mlp_ratio": self._shape("layers1.0.blocks.0.mlp.linear1.weight")[0] / features,
            "residual_convolution": any(n.startswith("layers1c.") for n in self.encoder),
        }

    @property
    def channels(self) -> int:
        """Number of input channels."""
        return self._shape(_STEM)[1]

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self.encoder:
            raise WeightsError(
                f"The file is no complete SwinTransformer of three axes: {name!r} is missing."
            )
        return tuple(self.encoder[name].shape)


def read_swin_file(state: Mapping[str, Any]) -> SwinFile:
    """Sort the content of a weights file.

    Args:
        state: What the file holds, in one of the module's layouts.

    Raises:
        WeightsError: It holds no SwinTransformer.
    """
    stated = state.get("merging")
    for wrapper in ("state_dict", "model", "net", "network_weights"):
        if isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
            break
    flat = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    stems = [name for name in flat if name == _STEM or name.endswith(f".{_STEM}")]
    if not stems:
        raise WeightsError(
            f"No SwinTransformer in this file: no tensor is called '…{_STEM}'. Its names are "
            f"{sorted(flat)[:5] or list(state)[:5]}."
        )
    prefix = stems[0].removesuffix(_STEM)
    own = {n.removeprefix(prefix): t for n, t in flat.items() if n.startswith(prefix)}
    is_old = any(".mlp.fc1." in name for name in own)
    is_disruptive = any(name.startswith("layers1.0.0.") for name in own)
    encoder = {
        _monai_name(name): tensor
        for name, tensor in own.items()
        if not name.endswith(_INDEX) and re.match(r"(patch_embed|layers[1-4]c?)\.", name)
    }
    heads = {
        name: tensor
        for long, tensor in flat.items()
        if (name := long.removeprefix("module.")).startswith(_HEADS)
    }
    merging: Merging | None = "legacy" if is_old or is_disruptive else None
    if stated is not None:
        if stated not in ("standard", "legacy"):
            raise WeightsError(f"The file says merging {stated!r}, expected standard or legacy.")
        merging = cast(Merging, stated)
    return SwinFile(encoder, heads, merging)


def _monai_name(name: str) -> str:
    name = re.sub(r"^(layers[1-4])\.0\.0\.", r"\1.0.", name)
    return name.replace(".mlp.fc1.", ".mlp.linear1.").replace(".mlp.fc2.", ".mlp.linear2.")


def write_swin_file(
    encoder: Mapping[str, Tensor], merging: Merging, layout: SwinLayout
) -> dict[str, Any]:
    """Return the content of a weights file that MONAI's SwinUNETR reads.

    Args:
        encoder: Tensors under the names of MONAI's SwinTransformer, integer tables included.
        merging: Stated in the file, because shapes do not tell it.
        layout: `monai` for `SwinUNETR.load_state_dict(…["state_dict"], strict=False)`,
            `model_swinvit` for `SwinUNETR.load_from`.
    """
    if layout == "monai":
        named = {f"swinViT.{name}": tensor for name, tensor in encoder.items()}
    else:
        named = {
            "module." + n.replace(".linear1.", ".fc1.").replace(".linear2.", ".fc2."): tensor
            for n, tensor in encoder.items()
        }
    return {"state_dict": named, "merging": merging}
