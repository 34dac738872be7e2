"""Judge the backbone on held-out items while it trains."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from domainssl.callbacks._common import console_of, observing
from domainssl.distributed import all_gather_objects, gather, is_distributed, rank, world_size
from domainssl.errors import ConfigError, nearest
from domainssl.evaluation.features import representation, restricted
from domainssl.evaluation.raw import band_statistics
from domainssl.evaluation.report import (
    Collected,
    count_classes,
    has_classes,
    measure,
    measure_raw,
    subset_name,
    subsets,
    table,
    verdict,
)
from domainssl.modality import key as companion
from domainssl.modality import present_mask

__all__ = ["OnlineEvaluation"]

logger = logging.getLogger(__name__)


class OnlineEvaluation(Callback):
    """Logs neighbours, probe, retrieval, spread and rank; prints a table at the end.

    Judged are each modality alone, all together (`joint`) and the subsets between, on the items
    of the validation loader, gathered over ranks. The same numbers of the backbone before
    training (`val/untrained/...`) and of raw statistics per band (`val/raw/...`) stand
    beside them. Nothing of it touches training: no gradients, no random state.

    Args:
        every_n_epochs: Epochs between evaluations; the last epoch is always evaluated.
        per_class: Labelled items per class of the probe.
        max_items: Held-out items used at most, over all ranks.
        collapse_std: Below this embedding standard deviation features count as collapsed.
        collapse_rank: Below this effective rank, too.
        stop_on_collapse: End the run when features have collapsed.
        alone: Modalities that are judged without the others, alone and together; None takes all.
            The rest, such as heights, weather or a place, only takes part in `joint`.
    """

    def __init__(
        self,
        every_n_epochs: int = 1,
        per_class: int = 10,
        max_items: int = 4096,
        collapse_std: float = 0.01,
        collapse_rank: float = 1.5,
        stop_on_collapse: bool = False,
        alone: tuple[str, ...] | None = None,
    ) -> None:
        for name, value in (("every_n_epochs", every_n_epochs), ("per_class", per_class)):
            if value < 1:
                raise ConfigError(f"OnlineEvaluation.{name}: got {value}, expected 1 or more.")
        self.every_n_epochs = every_n_epochs
        self.per_class = per_class
        self.max_items = max_items
        self.collapse_std, self.collapse_rank = collapse_std, collapse_rank
        self.stop_on_collapse = stop_on_collapse
        self.alone = None if alone is None else tuple(alone)
        self.baseline: dict[str, float] = {}
        self.metrics: dict[str, float] = {}
        self._evaluated_at = -1
        self._parts: list[tuple[list[str], dict[str, Tensor]]] = []
        self._count = 0
        self._data: Any = None
        self._has_warned = self._has_noted = False

    # -- before training ----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Keep the baseline, which a resumed run cannot measure, and the values for the table."""
        return {
            "baseline": dict(self.baseline),
            "metrics": dict(self.metrics),
            "evaluated_at": self._evaluated_at,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the baseline and the last values."""
        self.baseline = dict(state_dict["baseline"])
        self.metrics = dict(state_dict.get("metrics", {}))
        self._evaluated_at = int(state_dict.get("evaluated_at", -1))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the backbone before training, and the raw statistics."""
        if self.baseline or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        found = self._pass(trainer, pl_module, with_raw=True)
        if found is None:
            return
        names = tuple(pl_module.backbone.modalities)  # type: ignore[union-attr, arg-type]
        judged = None if self.alone is None else self._subsets(names)
        raw = _on_first_rank(lambda: measure_raw(found, names, self.per_class, judged))
        if trainer.ckpt_path is not None:
            logger.warning(
                "OnlineEvaluation: the checkpoint holds no values of the untrained backbone, "
                "because it was written without this callback; they are left out."
            )
            self.baseline = raw
            return
        untrained = _on_first_rank(lambda: measure(found, names, "val/untrained/", self.per_class))
        self.baseline = {**untrained, **raw}

    def _pass(self, trainer: Trainer, module: Any, *, with_raw: bool = False) -> Collected | None:
        """Collect features in a pass over the validation loader of our own."""
        datamodule = getattr(trainer, "datamodule", None)
        limit = trainer.limit_val_batches
        if datamodule is None or limit == 0:
            return None
        self._parts, self._count = [], 0
        with observing(module):
            loader = datamodule.val_dataloader()
            count = limit if isinstance(limit, int) else math.ceil(limit * len(loader))
            try:
                for index, batch in enumerate(loader):
                    if index >= count:
                        break
                    batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
                    self._collect(trainer, module, batch, with_raw=with_raw)
            finally:  # its worker processes would stay, unused, to the end of the run
                if hasattr(loader, "close"):
                    loader.close()
        return self._gathered(module)

    # -- while validating ---------------------------------------------------------------------

    def _is_due(self, trainer: Trainer) -> bool:
        if trainer.sanity_checking:
            return False
        epoch = trainer.current_epoch + 1
        is_fit = trainer.state.fn == "fit"
        return not is_fit or epoch % self.every_n_epochs == 0 or epoch == trainer.max_epochs

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with nothing."""
        self._parts, self._count = [], 0

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the features of a batch."""
        if self._is_due(trainer) and dataloader_idx == 0:
            with observing(pl_module):
                self._collect(trainer, pl_module, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log."""
        if not self._is_due(trainer):
            return
        module: Any = pl_module
        self._evaluate(trainer, module, self._gathered(module))
        for name, value in {**self.metrics, **self.baseline}.items():
            pl_module.log(name, value, sync_dist=True, batch_size=1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table of a run that only validates."""
        if trainer.state.fn == "validate":
            self._print(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table; a run that ends between evaluations gets a last one."""
        if self._evaluated_at != trainer.global_step:
            found = self._pass(trainer, pl_module)
            if found is not None:
                self._evaluate(trainer, pl_module, found)
                for target in trainer.loggers:
                    target.log_metrics(self.metrics, trainer.global_step)
        self._print(trainer)

    # -- collecting ---------------------------------------------------------------------------

    def _collect(
        self, trainer: Trainer, module: Any, batch: Mapping[str, Any], *, with_raw: bool = False
    ) -> None:
        """Add the rows of one batch to what this rank has."""
        self._data = getattr(trainer, "datamodule", None)
        known = module.backbone.modalities
        here = tuple(name for name in known if name in batch)
        if self._count * world_size() >= self.max_items:
            return
        rows: dict[str, Tensor] = {}
        with trainer.precision_plugin.forward_context():
            for subset in self._subsets(tuple(known)):
                if not set(subset) <= set(here):
                    continue
                features = module.features(restricted(batch, subset))
                name = subset_name(subset, tuple(known))
                rows[f"features.{name}"] = representation(features, subset)
                if subset == tuple(known) and len(subset) > 1:
                    for key, value in module.embed(features).items():
                        if self.alone is None or key in self.alone:
                            rows[f"embeddings.{key}"] = value
        for name in here:
            rows[f"present.{name}"] = present_mask(batch, name)
            if with_raw:
                rows[f"raw.{name}"] = band_statistics(batch, known[name])
            if companion(name, "source") in batch:
                rows[f"sources.{name}"] = batch[companion(name, "source")]
        label = batch.get("label")
        if isinstance(label, Tensor) and label.ndim == 1:
            rows["labels"] = label
        count = len(batch[here[0]])
        ids = batch.get("id") or [f"{rank()}:{self._count + i}" for i in range(count)]
        self._count += count
        self._parts.append(([str(i) for i in ids], {k: _to_host(v) for k, v in rows.items()}))

    def _subsets(self, known: tuple[str, ...]) -> list[tuple[str, ...]]:
        """Return the sets of modalities that are judged.

        Raises:
            ConfigError: `alone` names a modality that there is not.
        """
        if self.alone is None:
            return subsets(known)
        for name in self.alone:
            if name not in known:
                raise ConfigError(
                    f"callbacks.evaluation.init_args.alone: no modality {name!r}."
                    f"{nearest(name, known)} There are {', '.join(known)}."
                )
        some = subsets(tuple(name for name in known if name in self.alone))
        return some if known in some else [*some, known]

    def _gathered(self, module: Any) -> Collected | None:
        """Join the rows of all ranks, each item once, in the order of their ids."""
        parts, self._parts, self._count = self._parts, [], 0
        ids = [i for own in all_gather_objects([i for part, _ in parts for i in part]) for i in own]
        widths = {key: tuple(v.shape[1:]) for _, rows in parts for key, v in rows.items()}
        everywhere = all_gather_objects(widths)
        if not ids or any(other != everywhere[0] for other in everywhere):
            return None
        position = {item: row for row, item in reversed(list(enumerate(ids)))}
        order = torch.tensor([position[item] for item in sorted(position)])
        persons: Mapping[str, int] = getattr(self._data, "persons", {})
        found = Collected(
            source_names=getattr(self._data, "source_names", {}),
            groups=torch.tensor(  # items of nobody known are of a person each
                [persons.get(item, -1 - row) for row, item in enumerate(sorted(position))]
            ),
        )
        for key, width in sorted(widths.items()):
            example = next(rows[key] for _, rows in parts if key in rows)
            blocks = [rows.get(key, example.new_zeros((len(i), *width))) for i, rows in parts]
            local = torch.cat(blocks)
            if is_distributed():
                local = gather(local.to(module.device), "detach").cpu()
            kind, _, name = key.partition(".")
            if kind == "labels":
                found.labels = local[order]
            else:
                getattr(found, kind)[name] = local[order]
        return found

    # -- judging ------------------------------------------------------------------------------

    def _evaluate(self, trainer: Trainer, module: Any, found: Collected | None) -> None:
        if found is None:
            return
        names = tuple(module.backbone.modalities)
        self.metrics = _on_first_rank(lambda: measure(found, names, "val/", self.per_class))
        items = len(next(iter(found.present.values())))
        classes = 0
        if has_classes(found.labels):
            assert found.labels is not None
            classes = count_classes(found.labels)
        elif not self._has_noted and trainer.is_global_zero:
            self._has_noted = True
            console_of(trainer).print(
                "validation data carry no labels of at least two classes: kNN and probe are left "
                "out, retrieval, spread and rank are reported"
            )
        # chance of retrieval and of the probe is one over these
        self.metrics |= {"val/items": float(items), "val/classes": float(classes)}
        self._evaluated_at = trainer.global_step
        self._warn_of_collapse(trainer)

    def _warn_of_collapse(self, trainer: Trainer) -> None:
        collapsed = [
            f"{key.removeprefix('val/')} = {value:.3g}"
            for key, value in self.metrics.items()
            if (key.startswith("val/emb_std/") and not value >= self.collapse_std)
            or (key.startswith("val/rankme/") and not value >= self.collapse_rank)
        ]
        if not collapsed or trainer.state.fn != "fit":
            return
        if not self._has_warned or self.stop_on_collapse:
            self._has_warned = True
            logger.warning(
                "Features have collapsed after step %d: %s. All items look alike to the backbone, "
                "whatever the loss says. Lower the learning rate, lengthen the warm-up, enlarge "
                "the batch or look at the data.%s",
                trainer.global_step,
                ", ".join(collapsed),
                " The run stops here (stop_on_collapse)." if self.stop_on_collapse else "",
            )
        if self.stop_on_collapse:
            trainer.should_stop = True

    def _print(self, trainer: Trainer) -> None:
        if not self.metrics or not trainer.is_global_zero:
            return
        console = console_of(trainer)
        both = {**self.metrics, **self.baseline}
        items, classes = (int(self.metrics[f"val/{what}"]) for what in ("items", "classes"))
        console.print(table(both, items, classes, self.per_class))
        console.print(verdict(both), markup=False)


def _to_host(value: Tensor) -> Tensor:
    value = value.detach()
    return (value.float() if value.is_floating_point() else value).cpu()


def _on_first_rank(compute: Any) -> dict[str, float]:
    """Compute once and let all ranks have it."""
    result: dict[str, float] = all_gather_objects(compute() if rank() == 0 else None)[0]
    return result
