"""Backbones and tasks as graphs that run without this library: ONNX and `torch.export`.

Normalisation is part of the graph: raw physical values go in; pooled features and tokens come out,
or what a task says of them.
What is written has been run beside the backbone before it gets its name.
"""

from __future__ import annotations

import copy
import io
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from domainssl.arguments import class_name, class_of, plain
from domainssl.backbones.base import Backbone
from domainssl.backbones.graph_module import GraphModule, Headed
from domainssl.errors import ConfigError, DataError, DomainSSLError, WeightsError, nearest, require
from domainssl.modality import Modality, sides_of
from domainssl.nn.blocks import CrossAttention, SelfAttention

__all__ = ["GraphFormat", "export_graph", "plausible_values"]

GraphFormat = Literal["onnx", "torch_export"]
FORMAT = "domainssl.graph/1"
TOLERANCE = 1e-4  # largest difference over the largest feature, at least over 1
_SUFFIX = {"onnx": ".onnx", "torch_export": ".pt2"}
_BATCHES = (2, 3)  # the first is traced
_STEPS = (8, 14, 16, 32, 64)  # pixels: a patch, or what convolutions and windows halve
# what tracing and the exporters raise on something that they cannot express
_FAILURES: tuple[type[Exception], ...] = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip
_INSTEAD = {
    False: "share the backbone itself (export_backbone)",
    True: "export its backbone without the head (task.backbone, --backbone)",
}
_Run = Callable[[Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True, kw_only=True)
class _Written:
    """One attempt: whether sizes are free, and the largest difference that was measured."""

    is_dynamic: bool
    difference: float
    scale: float


def export_graph(
    backbone: Backbone | Headed,
    folder: str | Path,
    *,
    format: GraphFormat = "onnx",
    modalities: Sequence[str] | None = None,
    size: int | Sequence[int] | None = None,
    dynamic_size: bool = True,
    licence: str = "unspecified",
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a backbone or a task as one graph, run it beside PyTorch, and put a card beside it.

    The number of items is free. So is the size of images, where the method allows it; otherwise,
    and for volumes, it is the traced one, and the card says so. Values that are not finite count as
    invalid; masks of validity are no input.

    Args:
        backbone: What to write; it stays as it is. A task gives its logits, or numbers, with its
            head; adapters are merged before (`tasks.export.whole_task`).
        folder: Gets `encoder.onnx` or `encoder.pt2`, of a task `task.onnx` or `task.pt2`, and the
            card, its name with `.json` behind.
        format: `onnx`, checked with onnxruntime, or `torch_export`.
        modalities: Inputs of the graph; None takes all.
        size: Size that is traced, one number or one per axis; None takes that of the modality.
        dynamic_size: Try to leave the size of images free.
        licence: Licence of the weights.
        provenance: Plain facts about their origin.
        overwrite: Replace an earlier graph.

    Returns:
        Path of the card.

    Raises:
        ConfigError: The backbone cannot be such a graph, or a size is missing.
        WeightsError: The folder holds such a graph, or what was written computes other features.
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
    """
    if format not in get_args(GraphFormat):
        raise ConfigError(
            f"format: {format!r} is not one of {', '.join(get_args(GraphFormat))}."
            f"{nearest(format, get_args(GraphFormat))}"
        )
    graph = GraphModule(backbone, ())
    if graph.is_task and graph.whole.kind == "change":
        raise ConfigError(
            "A task of change compares two dates, which graphs do not take. Export its backbone, "
            "which sees one date (task.backbone, --backbone), or use load_task."
        )
    chosen = _chosen(graph.backbone, modalities)
    sizes = {name: _size(modality, size) for name, modality in chosen.items()}
    target = Path(folder) / f"{'task' if graph.is_task else 'encoder'}{_SUFFIX[format]}"
    card = target.with_name(target.name + ".json")
    if (target.exists() or card.exists()) and not overwrite:
        raise WeightsError(f"{target} exists already; pass overwrite=True (--overwrite).")
    if format == "onnx":
        for module in ("onnx", "onnxscript", "onnxruntime"):
            require(module, "export")
    graph = GraphModule(copy.deepcopy(graph.whole).cpu().float().eval(), list(chosen))
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        torch.no_grad(),
        tempfile.TemporaryDirectory(dir=target.parent, prefix=".graph-") as hidden,
    ):
        example = plausible_values(graph.backbone, chosen, sizes, _BATCHES[0])
        graph.find_outputs(example)
        is_free = dynamic_size and all(m.kind == "image" for m in chosen.values())
        written = _write(graph, Path(hidden) / target.name, format, sizes, is_free)
        facts = {
            **_card(graph, sizes, written, example),
            "format": FORMAT,
            "file": target.name,
            "kind": format,
            "licence": licence,
            "provenance": plain({"torch": torch.__version__, **(provenance or {})}),
        }
        pending = Path(hidden) / card.name
        pending.write_text(json.dumps(facts, indent=1, allow_nan=False), encoding="utf-8")
        card.unlink(missing_ok=True)
        for path in (*sorted(Path(hidden).glob(f"{target.name}*data")), Path(hidden) / target.name):
            path.replace(target.with_name(path.name))
        pending.replace(card)
    return card


def _chosen(backbone: Backbone, names: Sequence[str] | None) -> dict[str, Modality]:
    """Return the modalities of the graph.

    Raises:
        ConfigError: One is unknown or cannot be an input, or attention has no graph.
    """
    chosen = {}
    for name in names or list(backbone.modalities):
        if name not in backbone.modalities:
            raise ConfigError(
                f"modalities: this backbone has no {name!r}.{nearest(name, backbone.modalities)} "
                f"It knows {', '.join(backbone.modalities)}."
            )
        modality = backbone.modalities[name]
        if modality.kind not in ("image", "volume"):
            others = [n for n, m in backbone.modalities.items() if m.kind in ("image", "volume")]
            raise ConfigError(
                f"modalities: {name!r} is of kind {modality.kind!r}; graphs take images and "
                "volumes, because dates, padded frames and coordinates are no plain tensor of "
                f"values. Choose others ({', '.join(others) or 'there are none'}), or load the "
                "backbone with load_backbone."
            )
        form = backbone.normalizer.forms[name].name
        if form in ("item", "batch"):
            what = "limits of the whole item" if form == "item" else "the other items of the batch"
            raise ConfigError(
                f"normalization.{name}: {form!r} depends on {what}, which a graph of raw values "
                "does not know. Export a backbone trained with another form, or use load_backbone."
            )
        chosen[name] = modality
    for where, module in backbone.named_modules():
        if isinstance(module, SelfAttention | CrossAttention) and module.path == "flex":
            raise ConfigError(
                f"{where}: FlexAttention cannot be exported. Call "
                "domainssl.nn.blocks.set_attention_path(backbone, 'fused') first; the features are "
                "the same."
            )
    return chosen


def _size(modality: Modality, size: int | Sequence[int] | None) -> tuple[int, ...]:
    if size is not None:
        return sides_of(size, modality.spatial_dims, "size")
    if not modality.size:
        raise ConfigError(
            f"size: modality {modality.name!r} has none of its own; give the size of the images "
            "to trace (--size), a multiple of the patch size."
        )
    return modality.size


def plausible_values(
    backbone: Backbone,
    chosen: Mapping[str, Modality],
    sizes: Mapping[str, tuple[int, ...]],
    items: int,
) -> tuple[Tensor, ...]:
    """Return plausible raw values, float32 (items, C, *size) per modality, the same every time.

    Args:
        backbone: Whose statistics and forms say what is plausible.
        chosen: Modalities, images or volumes.
        sizes: Size of each.
        items: Number of items.
    """
    generator = torch.Generator().manual_seed(items)
    made = []
    for name, modality in chosen.items():
        unit = torch.rand(items, modality.num_channels, *sizes[name], generator=generator)
        form = backbone.normalizer.forms[name]
        statistics = backbone.normalizer.statistics(name)
        if statistics is not None:
            mean, std = (s.view(1, -1, *[1] * len(sizes[name])) for s in statistics)
            made.append(mean + (4 * unit - 2) * std)
        elif form.name == "window":
            low, high = form.numbers
            made.append(low + unit * (high - low))
        else:
            made.append(unit * form.numbers[0] if form.name == "scale" else unit)
    return tuple(made)


def _write(
    graph: GraphModule,
    path: Path,
    format: GraphFormat,
    sizes: Mapping[str, tuple[int, ...]],
    is_free: bool,
) -> _Written:
    """Write and check the graph; with sizes of its own where free ones cannot be had.

    Raises:
        ConfigError: It cannot be traced or written.
        WeightsError: It computes something else than the backbone.
    """
    failures = (*_FAILURES, *_runtime_failures(format))
    for is_dynamic in (True, False) if is_free else (False,):
        try:
            run = _trace(graph, path, format, sizes, is_dynamic)
            return _compare(graph, run, sizes, is_dynamic)
        except DataError:  # a size other than its own
            if is_dynamic:
                continue
            raise
        except DomainSSLError:
            raise
        except failures as error:
            if is_dynamic:
                continue  # the method has no graph for every size; the card says which it has
            words = " ".join(str(error).split())[:400]
            raise ConfigError(
                f"{type(graph.whole).__name__} with {', '.join(graph.names)} cannot be exported "
                f"as {format}: {type(error).__name__}: {words}. Export one modality (modalities, "
                f"--modalities), or {_INSTEAD[graph.is_task]}."
            ) from error
    raise AssertionError("unreachable")


def _runtime_failures(format: GraphFormat) -> tuple[type[Exception], ...]:
    if format != "onnx":
        return ()
    module = require("onnxruntime.capi.onnxruntime_pybind11_state", "export")
    return (module.Fail, module.InvalidArgument, module.InvalidGraph, module.RuntimeException,
            module.NotImplemented)  # fmt: skip


def _trace(
    graph: GraphModule,
    path: Path,
    format: GraphFormat,
    sizes: Mapping[str, tuple[int, ...]],
    is_dynamic: bool,
) -> _Run:
    """Write one graph and return how to run the file."""
    free = torch.export.Dim.DYNAMIC
    axes = [
        {0: free, **({2 + axis: free for axis in range(len(side))} if is_dynamic else {})}
        for side in sizes.values()
    ]
    chosen = {name: graph.backbone.modalities[name] for name in graph.names}
    example = plausible_values(graph.backbone, chosen, sizes, _BATCHES[0])
    program = torch.export.export(graph, example, dynamic_shapes=(tuple(axes),), strict=False)
    if format == "torch_export":
        _save_program(program, path)
        loaded = torch.export.load(path).module()
        return lambda values: list(loaded(*values))
    outputs = graph.outputs
    made: Any = torch.onnx.export(
        program, (), dynamo=True, verbose=False, input_names=graph.names, output_names=outputs
    )
    made.save(str(path))
    runtime: Any = require("onnxruntime", "export")
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # what fails here is raised, and told where it matters
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(values: Sequence[Tensor]) -> list[Tensor]:
        feeds = {name: v.numpy() for name, v in zip(graph.names, values, strict=True)}
        return [torch.from_numpy(found) for found in session.run(outputs, feeds)]

    return run


def _save_program(program: Any, path: Path) -> None:
    """Write a program; torch's own writer of files ends the process on a full disk."""
    content = io.BytesIO()
    torch.export.save(program, content)
    path.write_bytes(content.getbuffer())


def _slightly_larger(
    graph: GraphModule, sizes: Mapping[str, tuple[int, ...]]
) -> list[dict[str, tuple[int, ...]]]:
    """Return the next size that the whole takes, by a patch: a decoder may have to pad it."""
    chosen = {name: graph.backbone.modalities[name] for name in graph.names}
    for step in _STEPS:
        side = {name: (own[0] + step, *own[1:]) for name, own in sizes.items()}
        try:
            graph(*plausible_values(graph.backbone, chosen, side, 1))
        except DomainSSLError:  # no multiple of the patch
            continue
        return [side]
    return []


def _compare(
    graph: GraphModule, run: _Run, sizes: Mapping[str, tuple[int, ...]], is_dynamic: bool
) -> _Written:
    """Run the graph beside the backbone, with two numbers of items, and another size if it is free.

    Raises:
        WeightsError: Features differ by more than the tolerance.
    """
    chosen = {name: graph.backbone.modalities[name] for name in graph.names}
    cases = [(items, sizes) for items in _BATCHES]
    if is_dynamic:
        other = {n: tuple((2 + i) * s for i, s in enumerate(side)) for n, side in sizes.items()}
        cases.append((_BATCHES[1], other))  # other proportions too
        cases += [(_BATCHES[1], side) for side in _slightly_larger(graph, sizes)]
    worst, scale = 0.0, 1.0
    for items, side in cases:
        values = plausible_values(graph.backbone, chosen, side, items)
        wanted = graph(*values)
        for name, found, expected in zip(graph.outputs, run(values), wanted, strict=True):
            assert found.shape == expected.shape, f"{name}: {found.shape}"
            difference = float((found - expected).abs().max())
            largest = max(1.0, float(expected.abs().max()))
            if not difference <= TOLERANCE * largest:
                raise WeightsError(
                    f"The exported graph computes something else: {name} of {items} items "
                    f"of {side[graph.names[0]]} differs by {difference:.3g} at values up to "
                    f"{largest:.3g}; allowed are {TOLERANCE:g} of it. Nothing was written. Rather "
                    f"{_INSTEAD[graph.is_task]}."
                )
            worst, scale = max(worst, difference), max(scale, largest)
    return _Written(is_dynamic=is_dynamic, difference=worst, scale=scale)


def _axes(name: str, axes: int) -> str:
    """Return the axes of an output; those of maps of a task are the pixels of its input."""
    if name.endswith(".pooled"):
        return "B E"
    if name.endswith(".tokens"):
        return "B N E"
    return {2: "B K", 4: "B K H W", 5: "B K X Y Z"}[axes]


def _card(
    graph: GraphModule,
    sizes: Mapping[str, tuple[int, ...]],
    written: _Written,
    example: Sequence[Tensor],
) -> dict[str, Any]:
    """Return what goes in and what comes out, in the order of the graph."""
    inputs = []
    for name in graph.names:
        modality = graph.backbone.modalities[name]
        inputs.append({
            "name": name,
            "bands": list(modality.channels),
            "unit": modality.value_unit,
            "axes": modality.axes,
            "dtype": "float32",
            "size": list(sizes[name]),
            "size_is_free": written.is_dynamic,
            "normalization": str(graph.backbone.normalizer.forms[name]),
        })  # fmt: skip
    outputs = [
        {
            "name": name,
            "axes": _axes(name, found.ndim),
            "dtype": "float32",
            "width": int(found.shape[1 if graph.is_task else -1]),
        }
        for name, found in zip(graph.outputs, graph(*example), strict=True)
    ]
    about = {"kind": graph.whole.kind, "names": list(graph.whole.classes)} if graph.is_task else {}
    return {
        "backbone": class_name(class_of(graph.backbone)),
        **({"task": {"name": class_name(class_of(graph.whole)), **about}} if about else {}),
        "inputs": inputs,
        "outputs": outputs,
        "check": {
            "items": list(_BATCHES),
            "largest_difference": written.difference,
            "largest_value": written.scale,
            "tolerance": TOLERANCE,
        },
    }
