"""What every DataModule keeps, whatever its format (DESIGN, section 6)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import DATAMODULES, build, build_data, tensors
from lightning.pytorch import Callback, Trainer
from plain_readers import READERS
from torch import Tensor

from domainssl.callbacks.checkpoint import AtomicCheckpoint
from domainssl.datamodules.base import DomainDataModule
from domainssl.loading.plan import Piece
from domainssl.modality import Modality, check_batch

_STEPS = 9  # of a run, over more than one epoch


@pytest.fixture(scope="module", params=DATAMODULES)
def recipe(request: pytest.FixtureRequest, sample_root: Path) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def data(recipe: str) -> DomainDataModule:
    module = build_data(recipe, loading={"workers": 0})
    module.setup("fit")
    return module


@pytest.fixture(scope="module")
def epoch(data: DomainDataModule) -> list[dict[str, Any]]:
    data.epoch = 0
    return list(data.train_dataloader())


def _equal(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> bool:
    if [batch["id"] for batch in a] != [batch["id"] for batch in b]:
        return False
    pairs = zip(tensors(a), tensors(b), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_modalities_are_known_without_looking_at_the_disk(recipe: str) -> None:
    there = build_data(recipe)
    elsewhere = build_data(recipe, root="no/such/folder")
    assert elsewhere.modalities == there.modalities
    for modality in there.modalities.values():
        json.dumps(modality.to_dict(), allow_nan=False)


def test_a_path_that_does_not_exist_is_refused_and_the_sample_is_named(recipe: str) -> None:
    with pytest.raises(ValueError, match=r"no/such/folder[\s\S]*sample"):
        build_data(recipe, root="no/such/folder").setup("fit")


def test_batches_are_what_the_modalities_say(
    data: DomainDataModule, epoch: list[dict[str, Any]]
) -> None:
    for batch in epoch:
        check_batch(batch, data.modalities, training=True)
        assert len(batch["id"]) == len(batch["index"]) == data.global_batch_size
        for name, modality in data.modalities.items():
            x = batch[name]
            assert x.isfinite().all() if x.is_floating_point() else True
            if modality.kind == "features":  # tokens of a grid, or of a bag
                assert x.shape[1] == math.prod(modality.size)
                assert batch[f"{name}.coords"].shape == (*x.shape[:2], 2)
                continue
            sides = x.shape[-modality.spatial_dims :] if modality.spatial_dims else ()
            assert tuple(sides) == modality.size  # co-registered ones may differ in resolution
        largest = max(modality.size for modality in data.modalities.values())
        assert data.context_size == largest


def test_raw_physical_values_reach_the_batch(
    data: DomainDataModule, epoch: list[dict[str, Any]]
) -> None:
    """Level and spread of every channel are of the size that the modality states, in every item."""
    for name, modality in data.modalities.items():
        if modality.mean is None or modality.std is None:
            continue
        for batch in epoch:
            pixels = batch[name].float().movedim(modality.channel_axis, -1)  # (B, ..., C)
            seen = batch[f"{name}.valid"]
            for item, mask in zip(pixels, seen, strict=True):
                if not mask.any():
                    continue
                level, spread = item[mask].mean(0), item[mask].std(0)  # (C,)
                mean, std = torch.tensor(modality.mean), torch.tensor(modality.std)
                assert ((level - mean).abs() < 5 * std).all(), (name, level, mean)
                assert (spread > 0.005 * std).all() and (spread < 10 * std).all(), (name, spread)


def test_delivered_values_are_those_in_the_files(recipe: str, data: DomainDataModule) -> None:
    """Held-out items equal what other libraries read; all of their valid pixels are compared.

    A second item is read where the readers do not say how the dates of a modality are joined.
    """
    name = type(data).__name__
    assert name in READERS, f"write into plain_readers.py how the files of {name} are read"
    source = data.source("val")
    left: set[str] | None = None
    for number in range(3):
        batch = source.load(Piece(number, 0, 1), 0).data
        expected = READERS[name](source, batch)
        assert expected and set(expected) <= set(data.modalities)
        compared = {key for key in expected if _equals(data.modalities[key], batch, expected[key])}
        left = (set(expected) if left is None else left) - compared
        if not left:
            return
    raise AssertionError(f"no value of {left} was compared")


def _equals(modality: Modality, batch: dict[str, Any], expected: np.ndarray) -> bool:
    """Compare one modality of the first item; return whether half of it can be compared."""
    key = modality.name
    assert bool(batch[f"{key}.present"][0])
    valid = np.asarray(batch[f"{key}.valid"])[0]
    found = np.moveaxis(np.asarray(batch[key], np.float64)[0], modality.channel_axis - 1, -1)
    wanted = np.moveaxis(expected, modality.channel_axis - 1, -1)
    assert found.shape == wanted.shape
    known = valid & np.isfinite(wanted).all(-1)
    assert valid.sum() > 0
    if known.sum() < 0.5 * valid.sum():
        return False
    assert np.abs(found[known]).max() > 0
    np.testing.assert_allclose(found[known], wanted[known], rtol=1e-6, atol=1e-5)
    return True


def test_an_epoch_holds_no_item_twice(epoch: list[dict[str, Any]]) -> None:
    ids = [item for batch in epoch for item in batch["id"]]
    assert len(ids) == len(set(ids)) > 0


def test_order_and_content_do_not_depend_on_the_number_of_workers(
    recipe: str, epoch: list[dict[str, Any]]
) -> None:
    other = build_data(recipe, loading={"workers": 2})
    other.setup("fit")
    try:
        assert _equal(list(other.train_dataloader()), epoch)
    finally:
        other.teardown()


def test_epochs_and_seeds_differ_and_can_be_repeated(
    recipe: str, data: DomainDataModule, epoch: list[dict[str, Any]]
) -> None:
    data.epoch = 1
    assert not _equal([next(iter(data.train_dataloader()))], epoch[:1])
    data.epoch = 0
    assert _equal(list(data.train_dataloader()), epoch)
    seed = build_data(recipe, loading={"workers": 0}, seed=data.seed + 1)
    seed.setup("fit")
    assert not _equal([next(iter(seed.train_dataloader()))], epoch[:1])


def test_held_out_items_are_the_same_every_time_and_not_trained_on(
    data: DomainDataModule, epoch: list[dict[str, Any]]
) -> None:
    first = list(data.val_dataloader())
    assert _equal(first, list(data.val_dataloader()))
    trained = {item for batch in epoch for item in batch["id"]}
    assert trained.isdisjoint(item for batch in first for item in batch["id"])


def test_identity_and_description_say_what_was_found(data: DomainDataModule) -> None:
    assert len(json.dumps(data.identity())) > 20
    text = "\n".join(data.describe())
    assert all(name in text for name in data.modalities)


class _Watch(Callback):
    """Keep ids and losses of every training step."""

    def __init__(self) -> None:
        self.steps: list[tuple[list[str], Tensor]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.steps.append((list(batch["id"]), outputs["loss"].detach().clone()))


def _run(
    recipe: str, folder: Path, workers: int, steps: int, every: int, checkpoint: Path | None = None
) -> list[tuple[list[str], Tensor]]:
    """Train to a step and save every few steps; a checkpoint goes on from there."""
    data = build_data(recipe, loading={"workers": workers}, global_batch_size=16)
    watch = _Watch()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=10,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
        callbacks=[
            watch,
            AtomicCheckpoint(str(folder), every_n_train_steps=every, keep_last=-1),
            _Stop(steps),
        ],
    )
    trainer.fit(build(recipe), data, ckpt_path=checkpoint, weights_only=True)
    return watch.steps


class _Stop(Callback):
    """End the run after a step, which leaves the length of the schedule as it was."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.steps


@pytest.fixture(scope="module")
def uninterrupted(recipe: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], Path]:
    """Return the steps of a run, and a checkpoint that it left while its workers read ahead."""
    folder = tmp_path_factory.mktemp("whole")
    return _run(recipe, folder, 2, _STEPS, 4), folder / "step_0000004.ckpt"


def _assert_same(steps: list[Any], expected: list[Any]) -> None:
    assert len(steps) == len(expected) > 0
    for (ids, loss), (expected_ids, expected_loss) in zip(steps, expected, strict=True):
        assert ids == expected_ids
        assert torch.equal(loss, expected_loss)


def test_a_resumed_run_goes_on_bit_for_bit(
    recipe: str, uninterrupted: tuple[list[Any], Path], tmp_path: Path
) -> None:
    steps, checkpoint = uninterrupted
    assert len(steps) == _STEPS
    _assert_same(_run(recipe, tmp_path, 2, _STEPS, _STEPS, checkpoint), steps[4:])


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_bit_for_bit_without_workers(
    recipe: str, uninterrupted: tuple[list[Any], Path], tmp_path: Path
) -> None:
    stop = 2 if DATAMODULES.index(recipe) % 2 else 6  # both sides of the fast test's stop
    before = _run(recipe, tmp_path / "first", 0, stop, stop)
    checkpoint = tmp_path / "first" / "last.ckpt"
    after = _run(recipe, tmp_path / "second", 0, _STEPS, _STEPS, checkpoint)
    _assert_same(before + after, uninterrupted[0])
