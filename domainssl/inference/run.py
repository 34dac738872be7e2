"""`embed` in one call: from a path to embeddings in the form of the domain.

import domainssl
done = domainssl.embed("runs/s2_mae/backbone", "S2.tif", "S2_embedding.zarr")
print(done.outputs)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from domainssl.backbones.base import Backbone
from domainssl.errors import ConfigError, nearest
from domainssl.inference.dense import DenseEmbedding, DenseOptions
from domainssl.inference.inputs import Found, find_inputs, is_raster
from domainssl.inference.preview import write_map_preview
from domainssl.inference.scenes import Scene, SceneOptions, open_scene
from domainssl.inference.tokens import TokenWindows, token_windows
from domainssl.io.raster.geozarr import VectorLayout, VectorStore
from domainssl.lazy import lazily
from domainssl.pieces import Built, Plan, Shard, build

__all__ = ["EmbedOptions", "Embedded", "embed"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """Everything about an embedding but backbone, input and output.

    Attributes:
        feature: Which feature is written; None is that of the only modality, or `joint`.
        window: Side of the window in pixels of the finest modality; None is that of the card.
        form: Final form; None is the domain's own: `zarr`.
        dense: Windows, device, type.
        scene: What is said about rasters.
    """

    feature: str | None = None
    window: int | None = None
    form: Literal["zarr", "cog"] | None = None
    dense: DenseOptions = DenseOptions()
    scene: SceneOptions = SceneOptions()


@dataclass(kw_only=True)
class Embedded:
    """What `embed` did.

    Attributes:
        outputs: Files and folders that are complete.
        pieces: Pieces of this call that are done.
        resumed: Those of them that were done before.
        missing: Parts of which pieces are missing.
    """

    outputs: list[Path] = field(default_factory=list)
    pieces: int = 0
    resumed: int = 0
    missing: list[str] = field(default_factory=list)


def embed(
    backbone: Backbone | str | Path,
    source: str | Path,
    output: str | Path,
    options: EmbedOptions | None = None,
    *,
    plan: Plan | None = None,
    progress: Progress | None = None,
    **more: Any,
) -> Embedded:
    """Write the embeddings of rasters on the grid of the patches.

    Args:
        backbone: A backbone, or what `load_backbone` reads.
        source: A raster, a folder of rasters, or a manifest; see `inputs.find_inputs`.
        output: The file to write where its name ends like one, otherwise a folder.
        options: How; None takes the defaults.
        plan: Part, restart and processes; None does everything in this process.
        progress: Called with the pieces done and their number.
        more: Fields of `EmbedOptions`, `DenseOptions` and `SceneOptions` by name.

    Raises:
        ConfigError: An option cannot be used, or something else lies at the output.
        DataError: The input cannot be read, or the output not written.
        WeightsError: The backbone cannot be loaded, or the data do not fit it.
    """
    options = _with(options or EmbedOptions(), more)
    plan = _of_rank(plan or Plan(jobs=0))
    loaded = backbone if isinstance(backbone, Backbone) else _loaded(backbone)
    found = find_inputs(source, list(loaded.modalities), is_raster, "a GeoTIFF or Zarr store")
    work = _dense(loaded, str(backbone), found, Path(output), options)
    work.claim(restart=plan.restart)
    own = plan.shard.mine(list(work.keys))
    work.order = own if not plan.jobs else ()
    try:
        built = build(work, plan, progress, noun="shards")
    finally:
        with suppress(OSError):
            work.folder.rmdir()  # of claims; other parts may be at work
    return _report(work, built)


def _report(work: DenseEmbedding, built: Built) -> Embedded:
    targets = [work.target(number) for number in range(len(work.items))]
    return Embedded(
        outputs=[target for target in targets if target.exists()],
        pieces=built.entries,
        resumed=built.resumed,
        missing=built.missing,
    )


def _loaded(name: str | Path) -> Backbone:
    load: Any = lazily("domainssl.backbones", "load_backbone")
    found: Backbone = load(name)
    return found


def _with(options: EmbedOptions, more: Mapping[str, Any]) -> EmbedOptions:
    """Return options with some fields replaced, those of groups by their own names."""
    known = {
        **dict.fromkeys(vars(options), ""),
        **dict.fromkeys(vars(options.dense), "dense"),
        **dict.fromkeys(vars(options.scene), "scene"),
    }
    for name, value in more.items():
        if name not in known:
            raise ConfigError(
                f"embed: unknown option {name!r}.{nearest(name, known)} Known: {', '.join(known)}."
            )
        group = known[name]
        inner = {name: value}
        options = replace(
            options, **({group: replace(getattr(options, group), **inner)} if group else inner)
        )
    return options


def _of_rank(plan: Plan) -> Plan:
    """Return the part of this rank where torchrun or SLURM started several."""
    for rank, count in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if rank.startswith("SLURM") and "SLURM_STEP_ID" not in os.environ:
            continue  # a shell of salloc, or a batch script without srun: one process
        if os.environ.get(rank, "").isdigit() and os.environ.get(count, "").isdigit():
            own, world = int(os.environ[rank]), int(os.environ[count])
            first = plan.shard
            parts = Shard((first.number - 1) * world + own + 1, first.count * world)
            return replace(plan, shard=parts)
    return plan


def _dense(
    backbone: Backbone, name: str, found: Sequence[Found], output: Path, options: EmbedOptions
) -> DenseEmbedding:
    scenes = [open_scene(each.files, backbone, options.scene, each.name) for each in found]
    windows = _windows(backbone, scenes, options)
    is_file = output.suffix.lower() in (".zarr", ".tif", ".tiff")
    if is_file and len(scenes) > 1:
        raise ConfigError(
            f"--output {output}: the name of one file, but there are {len(scenes)} inputs. Give a "
            "folder."
        )
    return DenseEmbedding(
        root=output.parent if is_file else output,
        items=scenes,
        windows=windows,
        backbone=backbone,
        options=options.dense,
        facts={"backbone": type(backbone).__name__},
        targets=[output] if is_file else None,
        preview=_map_preview,
    )


def _windows(
    backbone: Backbone, scenes: Sequence[Scene], options: EmbedOptions
) -> list[TokenWindows]:
    """Return the window of each scene; scenes with equal modalities share one."""
    known: dict[Any, TokenWindows] = {}
    out = []
    for scene in scenes:
        dates = max(len(part.dates) for part in scene.parts.values())
        kind = (tuple(scene.parts), dates)
        if kind not in known:
            known[kind] = token_windows(
                backbone, kind[0], feature=options.feature, size=options.window, dates=dates
            )
        out.append(known[kind])
    return out


def _map_preview(store: VectorStore, layout: VectorLayout, path: Path) -> None:
    write_map_preview(
        path,
        layout.shape,
        layout.shard[0],
        lambda rows: store.read((rows, slice(0, layout.shape[1]))),
    )
