"""What every DataModule of the project shares: global batch, epochs, resume, description.

A subclass opens its sources (`open_sources`) and states its modalities; everything about order,
ranks, workers and position is here and in `loading/stream.py`.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor

from domainssl.arguments import Recorded
from domainssl.errors import ConfigError, counted, nearest
from domainssl.loading.counts import class_counts
from domainssl.loading.part import PartSource
from domainssl.loading.plan import ORDER_VERSION, EpochPlan
from domainssl.loading.source import Loading, Source
from domainssl.loading.stream import BlockStream
from domainssl.modality import Batch, Modality
from domainssl.pieces import Buildable, cores
from domainssl.sources.patients import tested_split

__all__ = ["DomainDataModule", "check_labels", "named_sample"]

_log = logging.getLogger(__name__)
_SMALL_BYTES = 256_000_000  # an epoch that decodes less is read without worker processes
_MOST_WORKERS = 16


class DomainDataModule(Recorded, LightningDataModule):
    """Base of all DataModules.

    Args:
        global_batch_size: Items per optimiser step, over all devices and accumulated batches.
        seed: Seed of order, windows and dates.
        on_bad_sample: `raise`, or `replace` an unreadable item by the next good one.
        loading: Worker processes and memory.

    Raises:
        ConfigError: An argument cannot be used.
    """

    label_names: tuple[str, ...] | None = None
    # What the number in `<m>.source` stands for, of modalities that several scanners make.
    source_names: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    # Id of an item -> number of the person it is of, where several items may be of one.
    persons: Mapping[str, int] = MappingProxyType({})
    # Split -> items that carry their labels, where the files tell them; set by `open_sources`.
    splits: Mapping[str, Sequence[Any]] = MappingProxyType({})
    # Modalities whose files state unit, scale and offset: `domainssl.units` believes them.
    units_stated: tuple[str, ...] = ()
    # `<m>.dates` counts days from the first visit of a person instead of from 1970-01-01.
    days_are_relative: bool = False
    # Modalities that have no dates, as terrain has none: `inspect` misses none of theirs.
    timeless: tuple[str, ...] = ()
    _policies: ClassVar[tuple[str, ...]] = ("raise", "replace")

    def __init__(
        self,
        *,
        global_batch_size: int,
        seed: int = 0,
        on_bad_sample: Literal["raise", "replace"] = "raise",
        loading: Loading | None = None,
    ) -> None:
        super().__init__()
        if global_batch_size < 1:
            raise ConfigError(
                f"data.init_args.global_batch_size: got {global_batch_size!r}, expected at least 1."
            )
        if seed < 0:
            raise ConfigError(f"data.init_args.seed: got {seed!r}, expected 0 or more.")
        if on_bad_sample not in self._policies:
            raise ConfigError(
                f"data.init_args.on_bad_sample: got {on_bad_sample!r}, expected one of "
                f"{self._policies}.{nearest(on_bad_sample, self._policies)}"
            )
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.on_bad_sample = on_bad_sample
        self.loading = loading or Loading()
        self.epoch = 0  # used where there is no Trainer
        self._sources: dict[str, Source] = {}
        self._streams: list[BlockStream] = []
        self._world_size, self._rank, self._accumulate = 1, 0, 1
        self._steps = 0
        self._running_epoch = 0
        self._pending: dict[str, Any] | None = None

    # What a subclass states -----------------------------------------------------------------

    @property
    @abstractmethod
    def modalities(self) -> dict[str, Modality]:
        """What batches hold, by name; known without touching the disk."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes that tasks learn, by number; None where they are not known (yet)."""
        return self.label_names

    @property
    def mask_classes(self) -> tuple[str, ...] | None:
        """Names of the classes of pixels, by number; the base takes those of items."""
        return self.classes

    @property
    def context_size(self) -> tuple[int, ...]:
        """Pixels or voxels of the finest modality along each axis, (H, W) or (X, Y, Z)."""
        return max(modality.size for modality in self.modalities.values())

    @abstractmethod
    def open_sources(self) -> dict[str, Source]:
        """Look at what is there and return a source per split: `train`, `val`, `test`, `predict`.

        Raises:
            DataError: The data are missing or contradict themselves.
        """

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return plain data that tell these files from others: names, sizes, header hashes."""

    def source(self, split: str) -> Source:
        """Return where the items of a split come from; known after setup.

        Raises:
            ConfigError: There is no such split.
        """
        if split not in self._sources:
            raise ConfigError(
                f"There is no {split!r} split; call setup() first."
                if not self._sources
                else f"There is no {split!r} split here, only {sorted(self._sources)}."
            )
        return self._sources[split]

    def class_counts(self, name: str, classes: Sequence[str]) -> list[int]:
        """Return how often each class occurs in the training items; see `loading.counts`.

        Raises:
            DataError: They have no labels of this name, or of other classes.
        """
        return class_counts(self.source("train"), name, classes)

    def preparations(self) -> list[Buildable]:
        """Return what `cache build` can make before a run; known after setup."""
        return []

    def describe(self) -> list[str]:
        """Return lines that tell what was found."""
        lines = []
        for split, source in self._sources.items():
            lines.append(f"{split}: {sum(source.sizes)} items in {len(source.sizes)} blocks")
        lines.append(
            f"batches: {self.batch_size} items on each of {counted(self._world_size, 'rank')}"
            + (f", {self._accumulate} accumulated" if self._accumulate > 1 else "")
            + f" = {self.global_batch_size} per optimiser step"
        )
        return lines

    @property
    def withheld(self) -> tuple[str, ...]:
        """Texts, such as paths, that no file of a run may hold; the configuration is the user's."""
        return ()

    @property
    def problems(self) -> list[str]:
        """What was left out or is odd, known after setup; `inspect` lists it."""
        return []

    # Lightning's hooks ----------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """Divide the global batch over devices and accumulation, and open the sources."""
        trainer = self._trainer
        if trainer is not None:
            self._world_size, self._rank = _ranks(trainer)
            self._accumulate = int(trainer.accumulate_grad_batches)
        parts = self._world_size * self._accumulate
        if self.global_batch_size % parts:
            lower = self.global_batch_size // parts * parts
            choices = f"{lower} or {lower + parts}" if lower else f"{parts}"
            raise ConfigError(
                f"data.init_args.global_batch_size={self.global_batch_size} cannot be divided by "
                f"{self._world_size} device(s) x {self._accumulate} accumulated batch(es) = "
                f"{parts}. Use {choices}, or change trainer.devices or "
                "trainer.accumulate_grad_batches."
            )
        if not self._sources:
            self._sources = self._part_of(self.open_sources())

    def _part_of(self, sources: dict[str, Source]) -> dict[str, Source]:
        """Take the fraction of the training items that is asked for."""
        loading, train = self.loading, sources.get("train")
        if loading.train_fraction < 1 and train is not None:
            sources = dict(sources)
            sources["train"] = PartSource(
                source=train,
                fraction=loading.train_fraction,
                draw=self._draw,
                least=loading.train_least,
            )
        return sources

    @property
    def _draw(self) -> int:
        """Which part of the training items is taken."""
        draw = self.loading.train_draw
        return self.seed if draw is None else draw

    def train_dataloader(self) -> BlockStream:
        """Return the stream of shuffled training batches, on from the restored position."""
        stream = self._stream("train", shuffle=True)
        self._steps = len(stream)
        return stream

    def val_dataloader(self) -> BlockStream | list[BlockStream]:
        """Return the held-out items in fixed order, or nothing where there are none."""
        return self._stream("val", shuffle=False) if "val" in self._sources else []

    @property
    def tested_split(self) -> str:
        """The split that `test` measures, after setup.

        It is `test`; `val` without one, and where `splits` say that its items lack labels that
        others have.
        """
        if self.splits:
            return tested_split(self.splits)
        return "test" if "test" in self._sources else "val"

    def test_dataloader(self) -> BlockStream | list[BlockStream]:
        """Return the items of the tested split in fixed order."""
        split = self.tested_split
        return self._stream(split, shuffle=False) if split in self._sources else []

    def predict_dataloader(self) -> BlockStream:
        """Return the items to predict, in fixed order."""
        return self._stream("predict", shuffle=False)

    def ordered_dataloader(self, split: str) -> BlockStream:
        """Return the items of any split in fixed order, read as held-out items are: nothing drawn.

        Raises:
            ConfigError: There is no such split.
        """
        source = self.source(split)
        if getattr(source, "is_training", False):
            source = replace(source, is_training=False)  # type: ignore[type-var]
        return self._stream(split, shuffle=False, source=source)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Convert the modalities to float32, now that they are on the device."""
        return {
            name: value.float() if name in self.modalities and isinstance(value, Tensor) else value
            for name, value in batch.items()
        }

    def teardown(self, stage: str | None = None) -> None:
        """End the worker processes."""
        for stream in self._streams:
            stream.close()
        self._streams.clear()

    def on_exception(self, exception: BaseException) -> None:
        """End the worker processes when the run is interrupted."""
        self.teardown()

    # Position, saved with every checkpoint --------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return epoch and number of processed batches, and what they were counted with."""
        if self._pending is not None:
            return dict(self._pending)
        epoch, processed = self._running_epoch, 0
        if self._trainer is not None and self._trainer.state.fn == "fit":
            # Prefetched batches do not count: this number is Lightning's, of finished steps.
            progress: Any = self._trainer.fit_loop.epoch_loop.batch_progress
            processed = int(progress.current.processed)
        if self._steps and processed >= self._steps:
            epoch, processed = epoch + 1, 0
        return {"epoch": epoch, "processed": processed, **self._fingerprint()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a position; it is used when the first batch is asked for."""
        self._pending = dict(state_dict)

    def _fingerprint(self) -> dict[str, Any]:
        """What a position inside an epoch depends on."""
        train = self._sources.get("train")
        few = self.loading.train_fraction < 1
        return {
            **({"train_draw": self._draw} if few else {}),
            "order_version": ORDER_VERSION,
            "world_size": self._world_size,
            "batch_size": self.batch_size,
            "window_blocks": self.loading.window_blocks,
            "seed": self.seed,
            "items": sum(train.sizes) if train is not None else 0,
            "workers": self.loading.workers,
        }

    def _position(self) -> tuple[int, int]:
        """Return the epoch that begins or goes on now, and its processed batches."""
        fitting = self._trainer is not None and self._trainer.state.fn == "fit"
        epoch = int(self._trainer.current_epoch) if fitting else self.epoch  # type: ignore[union-attr]
        state, processed = self._pending, 0
        if state is not None:
            if state["epoch"] == epoch + 1 and state["processed"] == 0:
                return epoch, self._steps  # saved after this epoch's last batch
            if state["epoch"] > epoch:
                raise ConfigError(
                    f"The checkpoint's data stand in epoch {state['epoch']}, but the Trainer "
                    f"begins with epoch {epoch}. Resume with the checkpoint as it was written: "
                    "fit --ckpt_path."
                )
            if state["epoch"] == epoch and state["processed"]:
                processed = self._check_position(state)
                _log.info("Resuming in epoch %d after %d batches", epoch, processed)
            self._pending = None
        self._running_epoch = epoch
        return epoch, processed

    def _check_position(self, state: Mapping[str, Any]) -> int:
        """Refuse a position that was counted under other conditions."""
        now = self._fingerprint()
        differing = [
            f"{name} {state.get(name)!r} then, {now[name]!r} now"
            for name in now
            if name != "workers" and state.get(name) != now[name]
        ]
        if differing:
            raise ConfigError(
                f"The checkpoint stands in epoch {state['epoch']} after {state['processed']} "
                f"batches of an order that this run does not have ({'; '.join(differing)}). "
                "Resume with the same devices, batch size, seed and data, or from a checkpoint "
                "taken at the end of an epoch, where these may change."
            )
        return int(state["processed"])

    # Streams --------------------------------------------------------------------------------

    @property
    def _trainer(self) -> Trainer | None:
        return getattr(self, "trainer", None)

    @property
    def batch_size(self) -> int:
        """Items per batch on this rank."""
        return self.global_batch_size // (self._world_size * self._accumulate)

    def _stream(self, split: str, *, shuffle: bool, source: Source | None = None) -> BlockStream:
        source = source or self.source(split)

        def plan(epoch: int) -> EpochPlan:
            return EpochPlan(
                sizes=tuple(source.sizes),
                seed=self.seed,
                epoch=epoch,
                world_size=self._world_size,
                rank=self._rank,
                batch_size=self.batch_size,
                window_blocks=self.loading.window_blocks if shuffle else 1,
                shuffle=shuffle,
            )

        stream = BlockStream(
            source,
            plan,
            self._position if shuffle else _from_the_start,
            self._resolve_loading(source),
            split=split,
            on_bad_sample=self.on_bad_sample,
        )
        self._streams.append(stream)
        return stream

    def _resolve_loading(self, source: Source) -> Loading:
        """Fill in what the user left open."""
        trainer, loading = self._trainer, self.loading
        pin = loading.pin_memory
        if pin is None:
            pin = trainer is not None and trainer.strategy.root_device.type == "cuda"
        workers = loading.workers
        if workers is None:
            processes = trainer.num_devices if trainer is not None else 1
            own = max(1, cores() // processes - 1)
            pieces = -(-len(source.sizes) // self._world_size)
            small = source.num_bytes / self._world_size < _SMALL_BYTES
            workers = 0 if small else min(own, pieces, _MOST_WORKERS)
        return replace(loading, workers=workers, pin_memory=pin and torch.cuda.is_available())


def named_sample(root: str, names: Collection[str]) -> str | None:
    """Return NAME of the embedded sample `sample:NAME`, None where `root` is a folder.

    Raises:
        ConfigError: There is no such sample.
    """
    word, _, name = root.partition(":")
    if word != "sample":
        return None
    if name not in names:
        raise ConfigError(
            f"data.init_args.root: got {root!r}, expected sample:{', sample:'.join(names)} or a "
            f"folder.{nearest(name, names)}"
        )
    return name


def check_labels(labels: object, keys: str) -> None:
    """Refuse a word other than `auto` where a mapping with `keys` may stand.

    Raises:
        ConfigError: `labels` is such a word.
    """
    if isinstance(labels, str) and labels != "auto":
        raise ConfigError(
            f"data.init_args.labels: got {labels!r}, expected 'auto', null, or a mapping with "
            f"{keys}."
        )


def _from_the_start() -> tuple[int, int]:
    return 0, 0


def _ranks(trainer: Trainer) -> tuple[int, int]:
    """Return the number of data-parallel ranks and this one's number.

    Tensor-parallel ranks share their data, so the strategy is asked before the Trainer.
    """
    if trainer.world_size > 1:
        known = getattr(trainer.strategy, "distributed_sampler_kwargs", None)
        if known is not None:
            return int(known["num_replicas"]), int(known["rank"])
    return int(trainer.world_size), int(trainer.global_rank)
