"""Where items come from, as the block stream sees it: blocks of known sizes, loaded in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from domainssl.errors import ConfigError, nearest
from domainssl.loading.memory import empty
from domainssl.loading.plan import Piece
from domainssl.modality import Batch

__all__ = ["LabelledSource", "Loading", "Rows", "Source", "empty"]

_START_METHODS = ("fork", "spawn", "forkserver")


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How data are brought in; the order changes with `window_blocks`, the items with `train_*`.

    Attributes:
        workers: Decoding processes per rank; None chooses by CPU count and size of the data.
        start_method: `fork`, `spawn` or `forkserver`; None takes the platform's default.
        window_blocks: Blocks whose items are shuffled together. Up to twice as many are in memory.
        prefetch: Blocks each worker prepares ahead.
        pin_memory: Page-locked batches; None does so when training on CUDA.
        max_bad_fraction: Fraction of bad items, with `on_bad_sample: replace`, that ends the run.
        train_fraction: Share of the training items that is used, for learning from few labels; of
            every class where items have one that is known without reading them. Windows of one
            exam, slide or patch stay together.
        train_draw: Which items those are; another number draws others. None takes `data.seed`.
        train_least: Items of each class at least, as far as there are that many.
    """

    workers: int | None = None
    start_method: Literal["fork", "spawn", "forkserver"] | None = None
    window_blocks: int = 8
    prefetch: int = 2
    pin_memory: bool | None = None
    max_bad_fraction: float = 0.01
    train_fraction: float = 1.0
    train_draw: int | None = None
    train_least: int = 1

    def __post_init__(self) -> None:
        for name, low in (
            ("workers", 0), ("window_blocks", 1), ("prefetch", 1), ("train_draw", 0),
            ("train_least", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(
                    f"data.init_args.loading.{name}: got {value!r}, expected at least {low}."
                )
        if self.start_method not in (None, *_START_METHODS):
            raise ConfigError(
                f"data.init_args.loading.start_method: got {self.start_method!r}, expected one of "
                f"{_START_METHODS}.{nearest(self.start_method, _START_METHODS)}"
            )
        if not 0 < self.train_fraction <= 1:
            raise ConfigError(
                f"data.init_args.loading.train_fraction: got {self.train_fraction!r}, expected a "
                "share of the training items above 0 and up to 1, such as 0.1."
            )
        if not 0 <= self.max_bad_fraction <= 1:
            raise ConfigError(
                f"data.init_args.loading.max_bad_fraction: got {self.max_bad_fraction!r}, expected "
                "a fraction between 0 and 1, such as 0.01."
            )


@dataclass(kw_only=True)
class Rows:
    """Items of one piece, stacked.

    Attributes:
        data: Per batch key a tensor or array whose first axis is the item, or a list.
        count: Number of items.
        bytes_decoded: Bytes that came out of the decoder.
        bytes_needed: Bytes of what was asked for.
        bad: Position in the piece and reason of every item that could not be read.
    """

    data: Batch
    count: int
    bytes_decoded: int = 0
    bytes_needed: int = 0
    bad: dict[int, str] = field(default_factory=dict)


class Source(Protocol):
    """Where blocks come from. It is pickled to workers, so it holds paths and options only."""

    @property
    def sizes(self) -> Sequence[int]:
        """Items per block."""

    @property
    def num_bytes(self) -> int:
        """Bytes decoded in an epoch, roughly."""

    def load(self, piece: Piece, epoch: int) -> Rows:
        """Decode one piece and make its items; the same arguments always give the same rows.

        Raises:
            DataError: Nothing of the piece can be read.
        """


class LabelledSource(Source, Protocol):
    """A source that knows classes without reading items, where these have one each."""

    @property
    def items_per_unit(self) -> int:
        """Items in a row that are windows of the same exam, slide or tile."""

    @property
    def unit_labels(self) -> Sequence[int] | None:
        """Class of each exam, slide or tile in order, -1 where unknown; None without labels."""
