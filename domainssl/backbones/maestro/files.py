"""Read the released MAESTRO checkpoints: names, sizes and modalities follow from the tensors."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from domainssl.backbones.base import Backbone
from domainssl.errors import WeightsError, nearest
from domainssl.modality import Modality, as_modalities

__all__ = ["fit_shape", "read_reference", "reference_name", "reference_tensors"]

_CELL_M = 0.625  # ground length of a position cell in the published configurations
_BANDS = {
    "aerial": ("NIR", "R", "G", "B"),
    "spot": ("R", "G", "B"),
    "dem": ("DSM", "DTM"),
    "s2": ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12"),
    "s1": ("VV", "VH"),
    "s1_asc": ("VV", "VH"),
    "s1_des": ("VV", "VH"),
}
_UNITS = {"aerial": "rgb8", "spot": "rgb8", "s2": "dn", "s1": "db", "s1_asc": "db", "s1_des": "db"}
# log(linear) / 5 of the released code is dB / (50 / ln 10); digital numbers are divided by 5000.
_FORMS = {"rgb8": "scale(255)", "dn": "scale(5000)", "db": "scale(21.71472409516259)"}
_IMAGES = ("aerial", "spot", "dem", "rgb", "vhr")


def reference_tensors(state: Mapping[str, Any], use_ema: bool = False) -> dict[str, Tensor]:
    """Return the model's tensors under the released names, without the prefix.

    Args:
        state: Content of a Lightning checkpoint, its `state_dict`, or a bare model state dict.
        use_ema: Take the averaged copy that stands beside the trained weights.

    Raises:
        WeightsError: There is no such copy, or this is no MAESTRO file.
    """
    if isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    tensors = {n: t for n, t in state.items() if isinstance(t, Tensor)}
    prefix = "ema_model." if use_ema else "model."
    if any(n.startswith(("model.", "ema_model.")) for n in tensors):
        tensors = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        if not tensors:
            raise WeightsError(f"The file has no tensors under {prefix!r}; set use_ema otherwise.")
    elif use_ema:
        raise WeightsError("use_ema: the file holds one set of weights and no average of them.")
    renamed = {re.sub(r"^(encoder|enc_to_dec|decoder)\.sen1\.", r"\1.s1.", n): t
               for n, t in tensors.items()}  # fmt: skip
    if not any(n.startswith("patch_embed.") for n in renamed):
        raise WeightsError(
            "This is no MAESTRO weights file: expected patch_embed.*, encoder.*, decoder.*; found "
            f"{sorted(renamed)[:5]}."
        )
    return renamed


def reference_name(own: str) -> str:
    """Translate a parameter name of backbone or objective to the released one."""
    rules = (
        (r"^backbone\.", ""),
        (r"^patch_embed\.([^.]+)\.bands\.", r"patch_embed.\1.patchify_bands."),
        (r"^encoders\.", "encoder."),
        (r"^shared_encoder\.", "encoder_inter."),
        (r"^decoders\.([^.]+)\.embed\.", r"enc_to_dec.\1."),
        (r"^decoders\.([^.]+)\.transformer\.", r"decoder.\1."),
        (r"^heads\.([^.]+)\.bands\.(\d+)\.", r"embed_to_rec.\1.pixelify_bands.\2.conv."),
        (r"^mask_tokens\.([^.]+)\.token$", r"mask_token.\1"),
        (r"\.blocks\.", ".layers."),
        (r"\.attention\.norm\.", ".0.norm."),
        (r"\.attention\.qkv\.", ".0.to_qkv."),
        (r"\.attention\.out\.", ".0.to_out.0."),
        (r"\.feed_forward\.norm\.", ".1.net.0."),
        (r"\.feed_forward\.up\.", ".1.net.1."),
        (r"\.feed_forward\.down\.", ".1.net.4."),
    )
    for pattern, replacement in rules:
        own = re.sub(pattern, replacement, own)
    return own


def fit_shape(tensor: Tensor, wanted: Tensor) -> Tensor:
    """Drop or add axes of length one (1x1 convolutions are linear layers here)."""
    if [n for n in tensor.shape if n > 1] == [n for n in wanted.shape if n > 1]:
        return tensor.reshape(wanted.shape)
    return tensor


def _numbers(names: Iterable[str], pattern: str) -> list[int]:
    return sorted({int(found[1]) for n in names if (found := re.match(pattern, n))})


def _parts(names: Iterable[str], prefix: str) -> list[str]:
    return list(dict.fromkeys(n.split(".")[1] for n in names if n.startswith(f"{prefix}.")))


def read_reference(
    cls: type[Backbone],
    state: Mapping[str, Any],
    variant: Mapping[str, Any],
    modalities: Mapping[str, Modality | Mapping[str, Any]] | None,
) -> tuple[dict[str, Any], dict[str, Tensor], tuple[str, ...]]:
    """Return constructor arguments, the backbone's tensors under our names, and what is left.

    Sizes, patches and band groups are those of the tensors. A checkpoint does not say how many
    heads there are: the released models have heads of 64 channels, others need `heads` and
    `head_dim` in `variant`; nor what the data look like: `modalities` does, and without it the
    published bands in the published units are assumed.
    """
    given = dict(variant)
    flat = reference_tensors(state, bool(given.pop("use_ema", False)))
    known = as_modalities(given.pop("modalities", None) or modalities or _published(flat))
    arguments = {**_sizes(flat, given), **given}
    encoders = _parts(flat, "encoder")
    if "fusion" not in given:
        arguments["fusion"] = "shared" if encoders == ["shared"] else "group"
    arguments["inputs"] = _inputs(flat, known, arguments["fusion"], given.get("inputs") or {})
    arguments.setdefault("position_cells", _cells(known))
    if "normalization" not in given:
        arguments["normalization"] = {
            n: _FORMS.get(m.value_unit, "identity") for n, m in known.items()
        }
    arguments["modalities"] = known
    accepted = set(inspect.signature(cls.__init__).parameters)
    unknown = sorted(set(arguments) - accepted)
    if unknown:
        raise WeightsError(f"{cls.__name__} takes no arguments {unknown}.")
    own = cls(**arguments).state_dict()
    found = {n: flat[reference_name(n)] for n in own if reference_name(n) in flat}
    tensors = {n: fit_shape(t, own[n]) for n, t in found.items()}
    used = {reference_name(n) for n in tensors}
    return arguments, tensors, tuple(n for n in flat if n not in used)


def _sizes(flat: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    encoder = _parts(flat, "encoder")[0]
    qkv = flat[f"encoder.{encoder}.layers.0.0.to_qkv.weight"]
    width = qkv.shape[1]
    own = len(_numbers(flat, rf"encoder\.{encoder}\.layers\.(\d+)\."))
    shared = len(_numbers(flat, r"encoder_inter\.layers\.(\d+)\."))
    head_dim = int(given.get("head_dim", 64))
    heads = int(given["heads"]) if "head_dim" in given else qkv.shape[0] // 3 // head_dim
    if qkv.shape[0] != 3 * heads * head_dim:
        raise WeightsError(
            f"The file's attention has {qkv.shape[0] // 3} channels, which {heads} heads of "
            f"{head_dim} do not have; pass arguments={{'heads': …, 'head_dim': …}}."
        )
    hidden = flat[f"encoder.{encoder}.layers.0.1.net.1.weight"].shape[0]
    sizes = {"width": width, "depth": own + shared, "heads": heads, "shared_depth": shared}
    for name, size in {**sizes, "ffn_ratio": hidden / width}.items():
        if name in given and given[name] != size:
            raise WeightsError(f"The file has {name} {size}, but {given[name]} is asked for.")
    return {**sizes, "head_dim": head_dim, "ffn_ratio": hidden / width}


def _published(flat: Mapping[str, Tensor]) -> dict[str, Modality]:
    """Describe the modalities of a file by the published configurations."""
    found = {}
    for name in _parts(flat, "mask_token") or _parts(flat, "patch_embed"):
        pattern = rf"patch_embed\.{name}\.patchify_bands\.\d+\.conv\.weight"
        count = sum(t.shape[1] for n, t in flat.items() if re.match(pattern, n))
        bands = _BANDS.get(name, ())
        if len(bands) != count:
            bands = tuple(f"band_{i}" for i in range(count))
        found[name] = Modality(
            name=name,
            kind="image" if name in _IMAGES else "series",
            channels=bands,
            value_unit=_UNITS.get(name, "arbitrary")
            if len(_BANDS.get(name, ())) == count
            else "arbitrary",
        )
    return found


def _inputs(
    flat: Mapping[str, Tensor],
    known: Mapping[str, Modality],
    fusion: str,
    given: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """Find patch embedding, group and band groups of every modality."""
    from domainssl.arguments import plain

    embeddings, encoders = _parts(flat, "patch_embed"), _parts(flat, "encoder")
    chosen = {}
    for name, modality in known.items():
        asked: dict[str, Any] = {k: v for k, v in plain(given.get(name, {})).items() if v}
        embedding = asked.get("embedding") or _match(name, embeddings)
        group = asked.get("group") or _match(name, encoders)
        encoder = {"group": group, "shared": "shared"}.get(fusion, name)
        if embedding not in embeddings or encoder not in encoders:
            raise WeightsError(
                f"The file has no patch embedding or encoder for {name!r}.{nearest(name, encoders)}"
                f" It has the embeddings {embeddings} and the encoders {encoders}; pass "
                f"arguments={{'inputs': {{{name!r}: {{'embedding': …, 'group': …}}}}}}."
            )
        prefix = f"patch_embed.{embedding}.patchify_bands"
        indices = _numbers(flat, rf"{re.escape(prefix)}\.(\d+)\.")
        weights = [flat[f"{prefix}.{i}.conv.weight"] for i in indices]
        bands, groups, start = list(modality.channels), [], 0
        for weight in weights:
            groups.append(bands[start : start + weight.shape[1]])
            start += weight.shape[1]
        if start != len(bands) and "token_bands" not in asked:
            raise WeightsError(
                f"{name}: the weights have {start} bands, the data {len(bands)}: {bands}. Choose "
                "them in the DataModule or by inputs.<modality>.token_bands."
            )
        derived: dict[str, Any] = {
            "patch_size": weights[0].shape[-1],
            "group": group if fusion == "group" and group != name else None,
            "embedding": None if embedding == name else embedding,
            "token_bands": groups if len(groups) > 1 else None,
        }
        chosen[name] = {**derived, **asked}
    return chosen


def _match(name: str, stored: list[str]) -> str | None:
    """Return the stored name, or the one that it begins with: `s1_asc` takes `s1`."""
    if name in stored:
        return name
    return next((s for s in stored if name.startswith(f"{s}_")), None)


def _cells(known: Mapping[str, Modality]) -> int | None:
    """Return the position cells of the footprint, as long on the ground as the published ones."""
    for modality in known.values():
        if modality.gsd_m is not None and modality.size:
            return max(1, round(modality.size[0] * modality.gsd_m / _CELL_M))
    return None
