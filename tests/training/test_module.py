"""What a task needs of `domainssl.training`: a supervised module over a backbone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import TinyBackbone, TinyData, tiny_modalities, tiny_trainer
from torch import nn

from domainssl.errors import ConfigError
from domainssl.modality import Batch
from domainssl.training.guard import NotFiniteError
from domainssl.training.module import Generators, Step, TrainingModule


class Classify(TrainingModule):
    """A linear layer over `joint`, with noise on it that only the generators decide."""

    def __init__(self, modalities: Any, classes: int = 3, **shared: Any) -> None:
        super().__init__(optimization=shared.pop("optimization", {"lr": 0.02}), **shared)
        self.backbone = TinyBackbone(modalities)
        self.head = nn.Linear(self.backbone.embed_dim["joint"], classes)
        self.seen: list[float] = []

    def compute(self, batch: Batch, generators: Generators) -> Step:
        joint = self.backbone(batch).pooled["joint"]
        noise = torch.randn(joint.shape, generator=generators.local)
        loss = nn.functional.cross_entropy(self.head(joint + 0.1 * noise), batch["label"])
        loss = loss + batch.get("poison", 0)
        return Step({"label": loss})

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.seen.append(float(outputs["loss"]))


def make(**options: Any) -> Classify:
    torch.manual_seed(0)
    return Classify(tiny_modalities(), **options)


def spoil(batch: Batch, index: int) -> Batch:
    if index == 2:
        batch["poison"] = torch.tensor(float("nan"))
    return batch


def test_a_task_trains_logs_and_resumes_exactly(tmp_path) -> None:
    whole = make()
    trainer = tiny_trainer(tmp_path, max_epochs=3)
    trainer.fit(whole, datamodule=TinyData())
    assert sum(whole.seen[-4:]) < 0.7 * sum(whole.seen[:4])
    assert {"train/loss/label", "val/loss", "train/lr"} <= set(trainer.callback_metrics)

    first = make()
    trainer = tiny_trainer(tmp_path, max_epochs=3, max_steps=-1, limit_val_batches=0)
    own = first.on_train_batch_end

    def stop(outputs: Any, batch: Batch, batch_idx: int) -> None:
        own(outputs, batch, batch_idx)
        if len(first.seen) == 6:
            trainer.save_checkpoint(tmp_path / "six.ckpt")
            trainer.should_stop = True

    first.on_train_batch_end = stop  # type: ignore[method-assign]
    trainer.fit(first, datamodule=TinyData())
    second = make()
    tiny_trainer(tmp_path, max_epochs=3).fit(
        second, datamodule=TinyData(), ckpt_path=str(tmp_path / "six.ckpt")
    )
    assert second.seen == whole.seen[6:]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    with pytest.raises(ConfigError, match="classes: checkpoint 3, configuration 4"):
        tiny_trainer(tmp_path, max_epochs=3).fit(
            make(classes=4), datamodule=TinyData(), ckpt_path=str(tmp_path / "six.ckpt")
        )


def test_a_task_that_is_not_finite_ends_without_a_checkpoint(tmp_path) -> None:
    trainer = tiny_trainer(tmp_path, log_every_n_steps=100)
    with pytest.raises(NotFiniteError, match=r"loss 'label' in training batch 2 \(ids: 1_016"):
        trainer.fit(make(), datamodule=TinyData(edit=spoil))
        trainer.save_checkpoint(tmp_path / "bad.ckpt")
    assert not (tmp_path / "bad.ckpt").exists()


def test_sizes_are_compared_axis_by_axis(tmp_path) -> None:
    data = TinyData()
    data.context_size = (96, 96, 32)
    with pytest.raises(ConfigError, match=r"windows of \(96, 96, 32\).* \(32, 32, 96\)"):
        tiny_trainer(tmp_path).fit(make(context_size=(32, 32, 96)), datamodule=data)
    data.context_size = (4, 4)
    tiny_trainer(tmp_path, max_epochs=1).fit(make(context_size=4), datamodule=data)


def test_a_module_without_compute_says_what_it_must_implement() -> None:
    with pytest.raises(NotImplementedError, match=r"TrainingModule must implement compute\("):
        TrainingModule().compute({}, None)  # type: ignore[arg-type]
