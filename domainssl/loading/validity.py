"""Stop a run that is trained on nothing: a modality of which no pixel is ever valid."""

from __future__ import annotations

from torch import Tensor

from domainssl.errors import DataError
from domainssl.modality import Batch, key

__all__ = ["ValidityCheck"]

_BATCHES = 100
_MARK = key("", "valid")


class ValidityCheck:
    """Waits for a valid pixel of every modality of one split.

    Args:
        split: Name for messages.
    """

    def __init__(self, split: str) -> None:
        self._split = split
        self._waiting: set[str] | None = None
        self._seen = 0

    def look(self, batch: Batch) -> None:
        """Look at a batch until every modality has shown a valid pixel.

        Raises:
            DataError: One has shown none in the first 100 batches.
        """
        if self._waiting is None:
            self._waiting = {name.removesuffix(_MARK) for name in batch if name.endswith(_MARK)}
        if not self._waiting:
            return
        self._seen += 1
        for name in list(self._waiting):
            valid, present = batch.get(key(name, "valid")), batch.get(key(name, "present"))
            if isinstance(present, Tensor) and isinstance(valid, Tensor):
                valid = valid[present.bool()]
            if not isinstance(valid, Tensor) or bool(valid.any()):
                self._waiting.discard(name)
        if self._seen >= _BATCHES:
            self.end()

    def end(self) -> None:
        """Judge at the end of an epoch or a validation.

        Raises:
            DataError: A modality has shown no valid pixel.
        """
        if self._waiting and self._seen:
            names = ", ".join(sorted(self._waiting))
            raise DataError(
                f"{names}: not one pixel is valid in {self._seen} {self._split} batches, so the "
                "run would learn nothing from it. Nodata, limits of valid values or a mask hide "
                "everything, or no file of it is there; `inspect` shows which values count."
            )
