"""`embed` in one call: from a path to embeddings in the form of the domain.

import domainssl
done = domainssl.embed("runs/s2_mae/backbone", "S2.tif", "S2_embedding.zarr")
print(done.outputs)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from domainssl.backbones.base import Backbone
from domainssl.errors import ConfigError, nearest
from domainssl.files import remove_rests
from domainssl.inference.data_rows import DataEmbedding, embedding_of_data, is_data
from domainssl.inference.dense import DenseEmbedding, DenseOptions
from domainssl.inference.domain import domain_of
from domainssl.inference.inputs import RASTERS, find_inputs, is_raster, open_scenes
from domainssl.inference.outputs import beside, encoder_name, refuse_ending, refuse_one_file
from domainssl.inference.parted_table import PartedTable
from domainssl.inference.pooled_items import pooled_items, pooled_scenes
from domainssl.inference.preview import write_map_preview
from domainssl.inference.scenes import Scene, SceneOptions
from domainssl.inference.slide_bags import embed_slides
from domainssl.inference.tokens import TokenWindows, token_windows
from domainssl.inference.volumes import VolumeEmbedding, volume_embedding
from domainssl.io.raster.cog import CogWriter
from domainssl.io.raster.geozarr import VectorLayout, VectorStore
from domainssl.io.volume.vectors import NiftiWriter
from domainssl.lazy import lazily
from domainssl.pieces import Plan, Shard, build

__all__ = ["EmbedOptions", "Embedded", "embed", "plan_of_rank"]

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """Everything about an embedding but backbone, input and output.

    Attributes:
        feature: Which feature is written; None is that of the only modality, or `joint`.
        window: Side of the window in pixels of the finest modality; None is that of the card.
        form: Final form of maps: a Zarr store, or a COG or NIfTI made from it; None is the
            domain's own: NIfTI of volumes, Zarr of rasters.
        ids: Names of the outputs of exams: `hashed`, or `plain` where names may be public.
        id_table: CSV file to write that tells which id is which exam, slide or bag; None writes
            none.
        pooled: Write one vector per item, as a table.
        split: Of a DataModule.
        dense: Windows, device, type.
        scene: What is said about rasters.
        scan: What is said about scans whose files leave it open: fields of `Reading`.
        mpp_um: Micrometres per pixel of level 0, of slides that state none or a wrong one.
    """

    feature: str | None = None
    window: int | None = None
    form: Literal["zarr", "cog", "nifti"] | None = None
    ids: Literal["hashed", "plain"] = "hashed"
    id_table: Path | None = None
    pooled: bool = False
    split: str = "val"
    dense: DenseOptions = DenseOptions()
    scene: SceneOptions = SceneOptions()
    scan: Mapping[str, Any] = field(default_factory=dict)
    mpp_um: float | None = None


@dataclass(kw_only=True)
class Embedded:
    """What `embed` did.

    Attributes:
        outputs: Files and folders that are complete.
        pieces: Pieces of this call that are done.
        resumed: Those of them that were done before.
        missing: Parts of which pieces are missing.
        left_out: Why something could not be read and was left out, by its name.
    """

    outputs: list[Path] = field(default_factory=list)
    pieces: int = 0
    resumed: int = 0
    missing: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def embed(
    backbone: Backbone | str | Path,
    source: Any,
    output: str | Path,
    options: EmbedOptions | None = None,
    *,
    plan: Plan | None = None,
    progress: Progress | None = None,
    **more: Any,
) -> Embedded:
    """Write embeddings of rasters or volumes on the grid of the patches, bags, or one per item.

    Args:
        backbone: A backbone, or what `load_backbone` reads.
        source: A raster, a folder of rasters, or a manifest, see `inputs.find_inputs`; or, where
            the backbone takes volumes, a scan or a folder of exams; of slides, a
            slide or a folder with some, whose tiles become bags in the folder `output`. A
            DataModule gives one vector per item of its `split`.
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
    plan = plan_of_rank(plan or Plan(jobs=0))
    loaded = backbone if isinstance(backbone, Backbone) else _loaded(backbone)
    if is_data(source):
        rows = embedding_of_data(loaded, source, options.split, Path(output), options)
        rows.skip_bad = plan.skip_bad
        return _run(rows, plan, progress, "items")
    if not isinstance(source, str | os.PathLike):
        raise ConfigError(
            f"embed: got a {type(source).__name__}, expected a path or a DataModule of this "
            "library; DatasetDataModule.of makes one of any torch Dataset."
        )
    domain = domain_of(loaded)
    if domain != "rasters" and (options.pooled or domain == "bags"):
        pooled = pooled_items(loaded, domain, str(source), Path(output), options)
        pooled.skip_bad = plan.skip_bad
        return _run(pooled, plan, progress, "items")
    if domain == "volumes":
        return _run(_volumes(loaded, str(source), Path(output), options), plan, progress, "exams")
    if domain == "slides":
        given = backbone if not isinstance(backbone, Backbone) else type(backbone).__name__
        name = encoder_name(str(given))
        bags = embed_slides(loaded, str(source), Path(output), options, plan, name, progress)
        return Embedded(
            outputs=bags.work.outputs, pieces=bags.built.entries, resumed=bags.built.resumed,
            missing=bags.built.missing, left_out=bags.skipped,
        )  # fmt: skip
    if options.id_table is not None:
        raise ConfigError("id_table: is for exams, slides and bags; rasters keep their names.")
    found = find_inputs(str(source), list(loaded.modalities), is_raster, RASTERS, Path(output))
    unopened = dict[str, str]()
    scenes = open_scenes(found, loaded, options.scene, unopened if plan.skip_bad else None)
    if options.pooled:
        table = pooled_scenes(loaded, scenes, Path(output), options)
        table.skip_bad = plan.skip_bad
        done = _run(table, plan, progress, "groups")
    else:
        done = _run(_dense(loaded, scenes, Path(output), options), plan, progress, "shards")
    done.left_out = {**unopened, **done.left_out}
    return done


def _run(
    work: DenseEmbedding | PartedTable | VolumeEmbedding,
    plan: Plan,
    progress: Progress | None,
    noun: str,
) -> Embedded:
    work.claim(restart=plan.restart)
    is_here = not plan.jobs and plan.scheduler is None
    if isinstance(work, DenseEmbedding | DataEmbedding) and is_here:
        work.order = plan.shard.mine(list(work.keys))
    if isinstance(work, PartedTable):
        work.try_again(plan.shard.mine(list(work.keys)))
    try:
        built = build(work, plan, progress, noun=noun)
        left_out = built.skipped
        if isinstance(work, DenseEmbedding):
            before = work.left_out()
            left_out = {**before, **work.leave_out(built.skipped)}
        elif isinstance(work, PartedTable):
            left_out = {**left_out, **work.left_out()}
    finally:
        work.release()
    targets = [work.target] if isinstance(work, PartedTable) else work.outputs
    if not isinstance(work, PartedTable):
        remove_rests(target for target in targets if beside(target, "json").is_file())
    return Embedded(
        outputs=[target for target in targets if target.exists()],
        pieces=built.entries,
        resumed=built.resumed,
        missing=built.missing,
        left_out=left_out,
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


def plan_of_rank(plan: Plan) -> Plan:
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
    backbone: Backbone, scenes: Sequence[Scene], output: Path, options: EmbedOptions
) -> DenseEmbedding:
    suffix = output.suffix.lower()
    form = options.form or ("cog" if suffix in (".tif", ".tiff") else "zarr")
    if form == "nifti":
        raise ConfigError("--format nifti: is for volumes; rasters become zarr or cog.")
    endings = {"zarr": (".zarr",), "cog": (".tif", ".tiff")}[form]
    if suffix in (".zarr", ".tif", ".tiff") and suffix not in endings:
        raise ConfigError(
            f"--output {output}: --format {form} writes {endings[0]}. Name both alike."
        )
    if suffix not in endings:
        refuse_ending(output, "rasters become .zarr or .tif, and .parquet with --pooled")
    else:
        refuse_one_file(output, len(scenes), "inputs")
    return DenseEmbedding(
        root=output.parent if suffix in endings else output,
        items=scenes,
        windows=_windows(backbone, scenes, options),
        backbone=backbone,
        options=options.dense,
        facts={"backbone": type(backbone).__name__},
        targets=[output] if suffix in endings else None,
        writer=CogWriter() if form == "cog" else None,
        preview=_map_preview,
    )


def _volumes(
    backbone: Backbone, source: str, output: Path, options: EmbedOptions
) -> VolumeEmbedding:
    form = options.form or ("zarr" if output.name.endswith(".zarr") else "nifti")
    if form == "cog":
        raise ConfigError("--format cog: is for rasters; volumes become nifti or zarr.")
    ending = output.name.lower().endswith(".zarr" if form == "nifti" else ".nii.gz")
    if ending:
        raise ConfigError(f"--output {output}: is not the name of a {form} file.")
    if not output.name.lower().endswith((".nii.gz", ".zarr")):
        refuse_ending(output, "scans become .nii.gz or .zarr, and .parquet with --pooled")
    return volume_embedding(
        backbone,
        source,
        output,
        modality=options.scene.modality,
        ids=options.ids,
        id_table=options.id_table,
        scan=options.scan,
        options=options.dense,
        feature=options.feature,
        window=options.window,
        writer=NiftiWriter() if form == "nifti" else None,
    )


def _windows(
    backbone: Backbone, scenes: Sequence[Scene], options: EmbedOptions
) -> list[TokenWindows]:
    """Return the window of each scene; scenes with equal modalities share one."""
    known: dict[Any, TokenWindows] = {}
    out = []
    for scene in scenes:
        dates = max(len(part.dates) for part in scene.parts.values())
        shape = scene.extent if options.window else ()
        kind = (tuple(scene.parts), dates, shape)
        if kind not in known:
            known[kind] = token_windows(
                backbone, kind[0], feature=options.feature, size=options.window, shape=shape,
                dates=dates,
            )  # fmt: skip
        out.append(known[kind])
    return out


def _map_preview(store: VectorStore, layout: VectorLayout, path: Path) -> None:
    write_map_preview(
        path,
        layout.shape,
        layout.shard[0],
        lambda rows: store.read((rows, slice(0, layout.shape[1]))),
    )
