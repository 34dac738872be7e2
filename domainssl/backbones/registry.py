"""Find backbones by name, and load their weights from every layout we know."""

from __future__ import annotations

import importlib
import logging
import pkgutil
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors_bytes

from domainssl import backbones
from domainssl.arguments import class_name
from domainssl.backbones.bands import BandPolicy, adapt_bands, check_policy
from domainssl.backbones.base import Backbone, LoadReport
from domainssl.backbones.card import export_files, read_card
from domainssl.backbones.hub import HubAddress, check_sha256, fetch_weights
from domainssl.backbones.loaded import check_record, refuse_lost_numbers
from domainssl.backbones.pretrained import PRETRAINED, Pretrained
from domainssl.backbones.tensors import is_own_file, read_tensors
from domainssl.errors import ConfigError, WeightsError, nearest, parsing
from domainssl.modality import Modality, as_modalities

__all__ = [
    "backbone_class",
    "list_backbones",
    "load_backbone",
    "load_initial",
    "load_reference",
]

logger = logging.getLogger(__name__)

_Kind = TypeVar("_Kind", bound=Backbone)
_WHERE = "model.init_args.encoding.weights"


def _families() -> dict[str, type[Backbone]]:
    """Import every family's file and return the backbone classes by name with module."""
    for module in pkgutil.walk_packages(backbones.__path__, f"{backbones.__name__}."):
        importlib.import_module(module.name)

    def below(cls: type[Backbone]) -> list[type[Backbone]]:
        return [c for child in cls.__subclasses__() for c in (child, *below(child))]

    return {class_name(cls): cls for cls in below(Backbone)}


def _variants() -> dict[str, tuple[type[Backbone], dict[str, Any]]]:
    found: dict[str, tuple[type[Backbone], dict[str, Any]]] = {}
    for own, cls in _families().items():
        for name, arguments in vars(cls).get("variants", {}).items():
            if name in found:
                other = class_name(found[name][0])
                raise WeightsError(f"Both {other} and {own} name a variant {name!r}. Rename one.")
            found[name] = (cls, arguments)
    return found


@overload
def list_backbones(pattern: str = "*", *, pretrained: Literal[False] = False) -> list[str]: ...


@overload
def list_backbones(pattern: str = "*", *, pretrained: Literal[True]) -> list[Pretrained]: ...


def list_backbones(pattern: str = "*", *, pretrained: bool = False) -> list[str] | list[Pretrained]:
    """Return the names that `load_backbone` knows, such as `croma_base`.

        for weights in list_backbones("croma_*", pretrained=True):
            print(weights.tag, weights.file, weights.licence)

    Args:
        pattern: Shell pattern, such as `croma_*`.
        pretrained: Return the published weights instead, such as `croma_base.ssl4eo`: who publishes
            them, bands, units and licence.
    """
    if pretrained:
        return [found for tag, found in PRETRAINED.items() if fnmatch(tag, pattern)]
    return sorted(name for name in _variants() if fnmatch(name, pattern))


def backbone_class(name: str) -> type[Backbone]:
    """Return the backbone class of a card.

    Args:
        name: With its module; the class alone, as cards before 0.2 hold it, is looked up too, and
            one of ours whose file has moved.

    Raises:
        WeightsError: There is no such class, or more than one; a class of your own must be
            imported first.
    """
    families = _families()
    short = name.rpartition(".")[2]
    if name not in families and (name == short or name.startswith("domainssl.")):
        same = [full for full in families if full.rpartition(".")[2] == short]
        if name != short:
            same = [full for full in same if full.startswith("domainssl.")]
        if len(same) > 1:
            raise WeightsError(
                f"Backbone class {name!r} may be any of {', '.join(same)}. Write one of them as "
                "'name' into the card."
            )
        name = same[0] if same else name
    if name not in families:
        raise WeightsError(
            f"Unknown backbone class {name!r}.{nearest(name, families)} Known: "
            f"{', '.join(families)}. Import the module that defines your own class first."
        )
    return families[name]


def load_backbone(
    name_or_path: str | Path,
    *,
    weights: str | Path | None = None,
    modalities: Mapping[str, Modality | Mapping[str, Any]] | None = None,
    arguments: Mapping[str, Any] | None = None,
    strict: bool = True,
    bands: BandPolicy = "strict",
    sha256: str | None = None,
) -> Backbone:
    """Load a backbone that takes raw physical values and normalises them itself.

    Args:
        name_or_path: An export (folder, card or tensors file), a checkpoint of a run (`.ckpt`),
            one of both on the Hugging Face Hub (`hf://owner/repository[/path][@revision]`), or a
            name of `list_backbones()`, with or without a tag of published weights, together with
            `weights`.
        weights: File in a layout that the family reads, for a name, here or on the hub
            (`hf://owner/repository/path/file@revision`); `"random"` for a backbone without weights.
        modalities: What your data look like; bands, order and unit are compared with those of
            the weights. Only with `weights="random"` do they decide the statistics.
        arguments: Constructor arguments over those of the named variant.
        strict: Raise when the file lacks tensors; otherwise only log what is missing.
        bands: `strict` refuses other bands than those of the weights; `subset` keeps the weights
            of the bands that the data have; `average` gives new bands averaged weights besides;
            `wavelengths` takes any bands, for encoders that tell them by it (LESS ViT). See
            `adapt_bands`.
        sha256: Of the file of the weights, compared before anything in it is parsed; None takes
            that of the published record, where it has one.

    Returns:
        The backbone in evaluation mode, on the CPU. Its first forward pass warns of values that
        must be in another unit, where they lie on the CPU.

    Raises:
        WeightsError: The name is unknown, the file cannot be fetched or used, or the data do not
            fit.
        ConfigError: `bands` is no policy, or no modalities are given for it.
        MissingExtraError: An address on the hub is given and huggingface_hub is not installed.
    """
    check_policy(bands)
    if bands != "strict" and modalities is None:
        raise ConfigError(
            f"bands={bands!r} fits the weights to your data; pass modalities=… that describe them, "
            "such as those of your DataModule."
        )
    name_or_path, weights = _local(name_or_path, weights, sha256)
    return _watched(_load(name_or_path, weights, modalities, arguments, strict, bands))


def _local(
    name_or_path: str | Path, weights: str | Path | None, sha256: str | None
) -> tuple[str | Path, str | Path | None]:
    """Fetch what is on the hub, and compare the hash of the file before it is parsed."""
    source = name_or_path if weights is None else weights
    if HubAddress.matches(name_or_path):
        if weights is not None:
            raise WeightsError(
                f"{name_or_path} brings its own weights; leave out weights={str(weights)!r}, or "
                "pass a name."
            )
        address = HubAddress.parse(name_or_path)
        found = _recorded(address)
        if found is not None:
            name_or_path, weights = found.tag, source
        elif address.is_file and not address.path.endswith((".safetensors", ".json", ".ckpt")):
            raise WeightsError(
                f"{address} is no export or checkpoint of this library. Pass the name of its "
                f"architecture: load_backbone(NAME, weights={str(address)!r}); names: "
                f"{', '.join(list_backbones())}."
            )
        else:
            name_or_path = fetch_weights(address, with_card=True)
    known = PRETRAINED.get(str(name_or_path))
    is_named = known is not None or str(name_or_path) in _variants()
    if is_named and weights is not None and HubAddress.matches(weights):
        address = HubAddress.parse(weights)
        if not address.is_file:
            raise WeightsError(f"weights={str(weights)!r} names no file; add its path.")
        if known and known.repository == address.repository and not address.revision:
            address = HubAddress(address.repository, address.path, known.revision)
        weights = fetch_weights(address, with_card=False)
    expected, said_by = sha256, "sha256=…"
    if expected is None and known is not None:
        expected, said_by = known.sha256, f"the record of {known.tag!r}"
    if sha256 is not None and str(weights) == "random":
        raise WeightsError("weights='random' reads no file; leave out sha256.")
    path = Path(name_or_path if weights is None else weights)
    if weights is None and path.suffix != ".ckpt":
        path = export_files(path)[1]
    if expected is not None and path.is_file():  # what is missing is told when it is loaded
        check_sha256(path, expected, source, said_by)
    return name_or_path, weights


def _recorded(address: HubAddress) -> Pretrained | None:
    """Return the published weights that an address names."""
    rows = [
        row
        for row in PRETRAINED.values()
        if (row.repository, row.file) == (address.repository, address.path)
    ]
    return rows[0] if len(rows) == 1 else None


def load_reference(
    name: str,
    path: str | Path,
    *,
    modalities: Mapping[str, Modality | Mapping[str, Any]],
    arguments: Mapping[str, Any],
    bands: BandPolicy = "strict",
) -> tuple[Backbone, dict[str, Any]]:
    """Load a named backbone from a file of others, and return all that the file holds besides.

    Args:
        name: Name of `list_backbones()`.
        path: File in a layout that the family reads.
        modalities: See `load_backbone`.
        arguments: See `load_backbone`.
        bands: See `load_backbone`.

    Returns:
        The backbone as `load_backbone` returns it, and the content of the file.

    Raises:
        WeightsError: The file cannot be used, or the data do not fit.
    """
    variants = _variants()
    if name not in variants:
        raise WeightsError(
            f"{path}: files of others are read under the name of a backbone, and {name!r} is none."
            f"{nearest(name, variants)} Known names: {', '.join(sorted(variants))}."
        )
    cls, variant = variants[name]
    content = _read_reference(cls, path)
    built = _build(cls, {**variant, **arguments}, content, path, modalities, True, bands)
    return _watched(built), content


def load_initial(
    kind: type[_Kind],
    path: str | Path,
    variant: str | None,
    *,
    modalities: Mapping[str, Modality],
    arguments: Mapping[str, Any],
    same: Sequence[str] = (),
    bands: BandPolicy = "strict",
) -> tuple[_Kind, dict[str, Any]]:
    """Load the backbone that an objective starts from, as `encoding.weights` names it.

    Args:
        kind: Class of the objective's backbone.
        path: An export or checkpoint of ours, or a file of others; here or on the hub (`hf://…`).
        variant: Name of `list_backbones()` that reads files of others; None refuses them.
        modalities: Those of the data, all of which the backbone has to know.
        arguments: Constructor arguments for a file of others.
        same: Names out of `arguments` that an export must share, and `modalities`, which asks for
            the same ones in the same order.
        bands: See `load_backbone`.

    Returns:
        The backbone in training mode, and the content of a file of others; empty for ours, and
        where the backbone was fitted to other bands, which its decoder and heads are not.

    Raises:
        WeightsError: The file cannot be used, or holds another backbone.
    """
    if HubAddress.matches(path):
        address = HubAddress.parse(path)
        path = fetch_weights(address, with_card=address.is_export)
    path = Path(path)
    content: dict[str, Any] = {}
    if is_own_file(path):
        loaded = load_backbone(path, modalities=modalities, bands=bands)
    elif variant is None:
        raise WeightsError(
            f"{_WHERE}: {str(path)!r} is no export or checkpoint of this library, and files of "
            f"others are not read for these arguments; they are for "
            f"{', '.join(vars(kind).get('variants', {})) or 'no ' + kind.__name__}. Load the file "
            "with load_backbone and export it."
        )
    else:
        loaded, content = load_reference(
            variant, path, modalities=modalities, arguments=arguments, bands=bands
        )
    if content and loaded.band_changes:
        logger.warning("%s: decoder and heads are for other bands and start anew.", path)
        content = {}
    if not isinstance(loaded, kind):
        raise WeightsError(
            f"{_WHERE}: {str(path)!r} holds a {type(loaded).__name__}, expected a {kind.__name__}. "
            "Name weights of this method, or leave weights out."
        )
    wanted = {**arguments, "modalities": list(modalities)}
    own = {n: getattr(loaded, n) if n != "modalities" else list(loaded.modalities) for n in same}
    differing = [f"{n} {own[n]!r}, expected {wanted[n]!r}" for n in same if own[n] != wanted[n]]
    if differing:
        raise WeightsError(
            f"{_WHERE}: {str(path)!r} holds a {kind.__name__} with {'; '.join(differing)}. Set "
            "model.init_args.encoding and data to what the weights have."
        )
    return loaded.train(), content


def _watched(backbone: Backbone) -> Backbone:
    refuse_lost_numbers(backbone)
    backbone.eval().watch_units()
    return backbone


def _load(
    name_or_path: str | Path,
    weights: str | Path | None,
    modalities: Mapping[str, Modality | Mapping[str, Any]] | None,
    arguments: Mapping[str, Any] | None,
    strict: bool,
    bands: BandPolicy,
) -> Backbone:
    variants = _variants()
    name = str(name_or_path)
    record = PRETRAINED.get(name)
    if record is not None:
        arguments = {**record.arguments, **(arguments or {})}
        name = record.backbone
        if weights is None:
            raise WeightsError(_where_to_get(record))
    if name in variants:
        cls, variant = variants[name]
        loaded = _load_variant(
            name, cls, {**variant, **(arguments or {})}, weights, modalities, strict, bands
        )
        if record is not None and weights is not None and str(weights) != "random":
            check_record(loaded, record, weights)
            if modalities is not None and "modalities" in record.arguments and bands == "strict":
                loaded.check(modalities)  # the record says what goes in, not the data
        return loaded
    path = Path(name_or_path)
    if not path.exists():
        for cls in _families().values():
            if str(name_or_path) in getattr(cls, "not_loadable", {}):
                reason = cls.not_loadable[str(name_or_path)]  # type: ignore[attr-defined]
                raise WeightsError(f"{str(name_or_path)!r} cannot be loaded: {reason}.")
        if len(path.parts) > 1:  # no name holds a separator
            raise WeightsError(
                f"{str(name_or_path)!r} does not exist. Give the folder of a run or an export, a "
                "checkpoint, or a name of list_backbones()."
            )
        raise WeightsError(
            f"{str(name_or_path)!r} is neither a file or folder nor the name of a backbone."
            f"{nearest(name_or_path, [*variants, *PRETRAINED])} Known names: "
            f"{', '.join(sorted(variants))}; list_backbones(pretrained=True) lists published "
            "weights of them."
        )
    if weights is not None:
        raise WeightsError(
            f"{path} brings its own weights; leave out weights={str(weights)!r}, or pass a name."
        )
    if path.suffix == ".ckpt":
        backbone = _load_checkpoint(path)
    else:
        backbone = _load_export(path)
    if modalities is not None:
        backbone = adapt_bands(backbone, modalities, bands)
    return backbone


def _where_to_get(found: Pretrained) -> str:
    what = f"the file {found.file}" if found.file else "the file"
    place = f" from {found.repository}" if found.repository else " from its publisher"
    licence = f" (licence {found.licence})" if found.licence else ""
    return (
        f"{found.tag!r} names published weights of {found.method}, and nothing is downloaded "
        f"unasked. Get {what}{place}{licence}, and pass it: load_backbone({found.tag!r}, "
        f"weights='…'), a path or {found.address or 'hf://owner/repository/file@revision'}."
    )


def _load_variant(
    name: str,
    cls: type[Backbone],
    variant: dict[str, Any],
    weights: str | Path | None,
    modalities: Mapping[str, Modality | Mapping[str, Any]] | None,
    strict: bool,
    bands: BandPolicy,
) -> Backbone:
    if weights is None:
        raise WeightsError(
            f"{name!r} is an architecture; pass the file of its weights, `--weights FILE` or "
            f"load_backbone({name!r}, weights='…'), or weights='random' for an untrained one."
            f"{_published(name)}"
        )
    if str(weights) == "random":
        if modalities is None:
            raise WeightsError(f"{name!r} without weights needs modalities=… to be built for.")
        return cls(**{"modalities": modalities, **variant})
    content = _read_reference(cls, weights)
    return _build(cls, variant, content, weights, modalities, strict, bands)


def _published(name: str) -> str:
    tags = [tag for tag, found in PRETRAINED.items() if found.backbone == name]
    return f" Published weights: {', '.join(tags)}." if tags else ""


def _read_reference(cls: type[Backbone], path: str | Path) -> dict[str, Any]:
    return read_tensors(Path(path), inert_classes=cls.reference_holds_classes)


def _build(
    cls: type[Backbone],
    variant: dict[str, Any],
    content: dict[str, Any],
    source: str | Path,
    modalities: Mapping[str, Modality | Mapping[str, Any]] | None,
    strict: bool,
    bands: BandPolicy,
) -> Backbone:
    if modalities is None or bands == "strict":
        backbone, report = cls.from_reference(content, variant, modalities)
        _tell(report, source, strict)
        return backbone
    known = as_modalities(modalities)
    published = cls.published_modalities(content, variant, known)
    variant = {name: value for name, value in variant.items() if name != "modalities"}
    backbone, report = cls.from_reference(content, variant, published)
    _tell(report, source, strict)
    return adapt_bands(backbone, known, bands)


def _tell(report: LoadReport, source: object, strict: bool) -> None:
    if report.missing and strict:
        raise WeightsError(
            f"{source}: {report}. Pass strict=False to keep the initial values of what is missing."
        )
    level = logging.WARNING if report.missing else logging.INFO
    logger.log(level, "%s: %s", source, report)


def _load_export(path: Path) -> Backbone:
    card, content = read_card(path)
    cls = backbone_class(card.name)
    with parsing(
        f"{path}: card and tensors do not fit this version; the backbone",
        kind=WeightsError,
        advice="Export it again, or install the version that its card names under provenance.",
        also=(SafetensorError,),
    ):
        tensors = load_safetensors_bytes(content)
        backbone = cls(**cls.current_arguments(card.arguments))
        backbone.load_state_dict(tensors, strict=True)
    return backbone


def _load_checkpoint(path: Path) -> Backbone:
    content = read_tensors(path)
    facts = content.get("backbone")
    if not isinstance(facts, dict) or "state_dict" not in content:
        raise WeightsError(
            f"{path} is no checkpoint of an objective of this library (it has no 'backbone' "
            "entry). For reference files pass the name: load_backbone('croma_base', weights=path)."
        )
    if not isinstance(facts.get("name"), str) or not isinstance(facts.get("arguments"), dict):
        raise WeightsError(f"{path}: its 'backbone' entry has no 'name' and 'arguments'.")
    cls = backbone_class(facts["name"])
    prefix = str(facts.get("prefix", "backbone."))  # a teacher's, where the method has one
    with parsing(
        f"{path}: does not fit this version; the backbone",
        kind=WeightsError,
        advice="Use the version that wrote the checkpoint, or another checkpoint.",
    ):
        backbone = cls(**cls.current_arguments(facts["arguments"]))
        state = {
            name.removeprefix(prefix): tensor
            for name, tensor in content["state_dict"].items()
            if name.startswith(prefix)
        }
        backbone.load_state_dict(state, strict=True)
    return backbone
