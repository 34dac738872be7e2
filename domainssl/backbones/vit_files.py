"""Weights of vision transformers under the names of timm (also MAE's) and of MONAI."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from domainssl.errors import WeightsError

__all__ = [
    "Layout",
    "ViTFile",
    "patch_weight",
    "read_transformer",
    "read_vit_file",
    "tensors_of",
    "write_transformer",
]

Layout = Literal["timm", "monai"]

# Parts of a block: ours, timm's, MONAI's.
_BLOCK = (
    ("attention.norm", "norm1", "norm1"),
    ("attention.qkv", "attn.qkv", "attn.qkv"),
    ("attention.out", "attn.proj", "attn.out_proj"),
    ("feed_forward.norm", "norm2", "norm2"),
    ("feed_forward.up", "mlp.fc1", "mlp.linear1"),
    ("feed_forward.down", "mlp.fc2", "mlp.linear2"),
)
_COLUMN: dict[Layout, int] = {"timm": 1, "monai": 2}
# MONAI's blocks hold a norm that nothing uses; files from before 1.5 a whole unused layer.
_UNUSED = re.compile(r"(norm_cross_attn|cross_attn)\.|attn\.relative")
_WRAPPERS = ("teacher", "state_dict", "model", "net", "network_weights")
_PREFIXES = ("module.", "_orig_mod.", "backbone.", "encoder.")
# Students and teachers of DINO, iBOT, DINOv2 and SimDINO, beside heads, of which the teacher is
# used, and the query encoder of MoCo v3, beside its key encoder.
_STUDENTS = (
    "teacher.backbone.", "backbone.", "module.backbone.", "student.backbone.",
    "module.base_encoder.",
)  # fmt: skip
_STEM: dict[Layout, str] = {"timm": "patch_embed.proj", "monai": "patch_embedding.patch_embeddings"}
# What is no part of the encoder: heads of classifiers, and decoders.
_HEADS = re.compile(
    r"(head\.|fc_norm\.|decoder|mask_token|conv3d_transpose|classification_head\."
    r"|patch_embedding\.cls_token$)"
)


@dataclass(frozen=True, kw_only=True)
class ViTFile:
    """What a weights file holds.

    Attributes:
        layout: Whose names it has.
        tensors: The encoder under our names; `embed.weight` as in the file.
        table: Positions of the patches, (1, N, E), if there are some.
        class_position: Position of the class token, (1, 1, E), in timm's files.
        mask_token: What stands for hidden patches, in files of DINOv2 and iBOT.
        unknown: Names that are neither of the encoder nor of a decoder or head.
    """

    layout: Layout
    tensors: dict[str, Tensor]
    table: Tensor | None
    class_position: Tensor | None
    mask_token: Tensor | None
    unknown: tuple[str, ...]

    def has(self, name: str) -> bool:
        """Tell whether the encoder has a tensor of this name (ours)."""
        return name in self.tensors


def tensors_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a file without its containers and the prefixes of wrappers."""
    for wrapper in _WRAPPERS:
        if isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    flat = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    for prefix in _STUDENTS:
        if any(name.startswith(prefix) for name in flat):
            flat = {n.removeprefix(prefix): t for n, t in flat.items() if n.startswith(prefix)}
            break
    for prefix in _PREFIXES:
        if flat and all(name.startswith(prefix) for name in flat):
            flat = {name.removeprefix(prefix): t for name, t in flat.items()}
    return flat


def read_transformer(
    flat: Mapping[str, Tensor], layout: Layout, blocks: str, norm: str
) -> dict[str, Tensor]:
    """Return the tensors of a stack of blocks under the names of `nn.blocks.Transformer`.

    Args:
        flat: Tensors of the file.
        layout: Whose names they have.
        blocks: What the blocks are called.
        norm: What the last norm is called; in some files it is one more block.

    Raises:
        WeightsError: A block holds something that ours does not compute.
    """
    column = _COLUMN[layout]
    ours = {names[column]: names[0] for names in _BLOCK}
    found = {}
    for name, tensor in flat.items():
        if match := re.fullmatch(rf"(?:{norm}|{blocks}\.\d+)\.(weight|bias)", name):
            found[f"norm.{match[1]}"] = tensor
        elif match := re.fullmatch(rf"{blocks}\.(\d+)\.(.+)\.(weight|bias)", name):
            if match[2] in ours:
                found[f"blocks.{match[1]}.{ours[match[2]]}.{match[3]}"] = tensor
            elif not _UNUSED.match(f"{match[2]}."):
                raise _unlike(name)
        elif re.match(rf"{blocks}\.\d+\.", name):
            raise _unlike(name)
    return found


def _unlike(name: str) -> WeightsError:
    return WeightsError(
        f"The file holds {name!r}, which no plain transformer block has (layer scale, norms of "
        "queries, other feed-forward layers): its features cannot be reproduced. Use "
        "EncoderBackbone, which takes the models of timm as they are."
    )


def write_transformer(
    state: Mapping[str, Tensor], layout: Layout, blocks: str, norm: str | None
) -> dict[str, Tensor]:
    """Return the tensors of a `nn.blocks.Transformer` under the names of a library.

    Args:
        state: Its state dict.
        layout: Whose names to write.
        blocks: What the blocks are called.
        norm: What the last norm is called; None makes it one more block.
    """
    column = _COLUMN[layout]
    theirs = {names[0]: names[column] for names in _BLOCK}
    depth = 1 + max((int(n.split(".")[1]) for n in state if n.startswith("blocks.")), default=-1)
    written = {}
    for name, tensor in state.items():
        part, _, kind = name.rpartition(".")
        if part == "norm":
            written[f"{norm or f'{blocks}.{depth}'}.{kind}"] = tensor
            continue
        _, index, inner = part.split(".", 2)
        written[f"{blocks}.{index}.{theirs[inner]}.{kind}"] = tensor
        if layout == "monai" and inner == "attention.norm":
            # never used in self-attention, but part of MONAI's state dicts
            written[f"{blocks}.{index}.norm_cross_attn.{kind}"] = tensor
    return written


def read_vit_file(state: Mapping[str, Any]) -> ViTFile:
    """Sort the content of a weights file of timm, MAE, or MONAI's ViT family.

    Raises:
        WeightsError: It is none of these files.
    """
    flat = tensors_of(state)
    if any(n.startswith("vit.") for n in flat):  # UNETR, whose decoders have other names
        flat = {n.removeprefix("vit."): t for n, t in flat.items() if n.startswith("vit.")}
    layout: Layout | None = None
    stem = ""
    for known, names in _STEM.items():
        for candidate in (names, f"{names}.1"):  # MONAI's perceptron is the second of two layers
            if f"{candidate}.weight" in flat:
                layout, stem = known, candidate
    if layout is None:
        raise WeightsError(
            "This is no ViT weights file of timm or MONAI: expected 'patch_embed.proj.weight' or "
            f"'patch_embedding.patch_embeddings.weight'; found {sorted(flat)[:5]}."
        )
    encoder = {n: t for n, t in flat.items() if n.startswith("blocks.") or re.match(r"norm\.", n)}
    tensors = {
        f"transformer.{n}": t
        for n, t in read_transformer(encoder, layout, "blocks", "norm").items()
    }
    for kind in ("weight", "bias"):
        if f"{stem}.{kind}" in flat:
            tensors[f"embed.{kind}"] = flat[f"{stem}.{kind}"]
    table = flat.get("pos_embed", flat.get("patch_embedding.position_embeddings"))
    class_position = None
    if "cls_token" in flat:
        tensors["class_token"] = flat["cls_token"]
        if table is not None and layout == "timm":
            class_position, table = table[:, :1], table[:, 1:]
    read = {*encoder, f"{stem}.weight", f"{stem}.bias", "cls_token", "pos_embed"}
    read.add("patch_embedding.position_embeddings")
    mask_token = flat.get("masked_embed", flat.get("mask_token"))
    if any(n.startswith("decoder") for n in flat):  # MAE's belongs to its decoder
        mask_token = None
    read.add("masked_embed")
    return ViTFile(
        layout=layout,
        tensors=tensors,
        table=table,
        class_position=class_position,
        mask_token=mask_token,
        unknown=tuple(n for n in flat if n not in read and not _HEADS.match(n)),
    )


def patch_weight(weight: Tensor, channels: int, patch: tuple[int, ...]) -> Tensor:
    """Return the weight of a patch embedding over values in the order (c, *patch).

    Args:
        weight: Of a convolution, (E, C, *patch), or of MONAI's perceptron, (E, P·C) over values
            in the order (*patch, c).
        channels: Channels C.
        patch: Sides of a patch.

    Raises:
        WeightsError: It is for other patches or channels.
    """
    expected = (channels, *patch)
    if weight.ndim == 2 and weight.shape[1] == math.prod(expected):
        return weight.unflatten(1, (*patch, channels)).movedim(-1, 1).flatten(1)
    if tuple(weight.shape[1:]) != expected:
        raise WeightsError(
            f"The weights embed patches of (channels, sides) {tuple(weight.shape[1:])}, the model "
            f"ones of {expected}. Give the patch_size and the channels of the weights."
        )
    return weight.flatten(1)
