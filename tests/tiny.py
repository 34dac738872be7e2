"""A backbone, an objective and a DataModule small enough to train in a test in milliseconds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning import LightningDataModule, Trainer
from torch import nn

from domainssl.backbones.base import Backbone, Features
from domainssl.modality import Modality, collate, present_mask
from domainssl.objectives.base import Objective, Step

SIDE = 4


def tiny_modalities(names=("s1", "s2")):
    bands = {"s1": ("VV", "VH"), "s2": ("B02", "B03", "B04")}
    return {
        name: Modality(
            name=name,
            kind="image",
            channels=bands.get(name, ("a", "b")),
            value_unit="arbitrary",
            size=(SIDE, SIDE),
            mean=(0.0,) * len(bands.get(name, ("a", "b"))),
            std=(1.0,) * len(bands.get(name, ("a", "b"))),
        )
        for name in names
    }


class TinyBackbone(Backbone):
    """One linear layer per modality; `joint` is their sum."""

    def __init__(self, modalities, dim=8, side=SIDE):
        super().__init__(modalities, "zscore")
        self.embed_dim = dict.fromkeys([*self.modalities, "joint"], dim)
        self.layers = nn.ModuleDict(
            {n: nn.Linear(m.num_channels * side**2, dim) for n, m in self.modalities.items()}
        )

    def encode(self, x, keep=None, replace=None):
        pooled = {n: self.layers[n](x[n].flatten(1)) for n in self.modalities if n in x}
        if len(pooled) > 1:
            pooled["joint"] = torch.stack(list(pooled.values())).sum(0)
        return Features(pooled=pooled)

    def modality_parameters(self, name):
        yield from self.layers[name].parameters()


class TinyObjective(Objective):
    """Pulls noisy modalities of one item together, and keeps their spread."""

    contrastive = True

    def __init__(self, modalities, dim=8, temperature=0.2, optimization=None, **shared: Any):
        super().__init__(optimization=optimization or {"lr": 0.01}, **shared)
        self.backbone = TinyBackbone(modalities, dim)
        self.temperature = temperature
        self.dropout = nn.Dropout(0.1)
        self.steps_followed = 0
        self.losses_seen: list[float] = []

    def draw(self, batch, generators):
        return {
            name: 0.1 * torch.randn(batch[name].shape, generator=generators.local)
            for name in self.backbone.modalities
        }

    def forward(self, batch, draws, outputs=False):
        x = self.backbone.normalize(batch)
        noisy = {n: x[n] + draws[n] for n in draws}
        pooled = self.backbone.encode(noisy).pooled
        names = [n for n in pooled if n != "joint"]
        weights = [present_mask(batch, n).float() for n in names]
        unit = [nn.functional.normalize(self.dropout(pooled[n]), dim=1) for n in names]
        logits = unit[0] @ unit[-1].T / self.temperature
        targets = torch.arange(len(logits))
        each = nn.functional.cross_entropy(logits, targets, reduction="none")
        weight = weights[0] * weights[-1]
        contrast = (each * weight).sum() / weight.sum().clamp(min=1)
        size = 1e-3 * sum((u.square().sum(1) * w).mean() for u, w in zip(unit, weights))
        extra = {}
        if outputs:
            extra = {
                "reconstruction": {
                    n: {"input": x[n], "visible": noisy[n], "predicted": noisy[n]} for n in names
                },
                "embeddings": {n: pooled[n] for n in names},
            }
        return Step({"contrast": contrast, "size": size}, extra)

    def after_step(self, step):
        self.steps_followed += 1

    def on_train_batch_end(self, outputs, batch, batch_idx):
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.losses_seen.append(float(outputs["loss"]))


class Batches:
    """A loader: fixed batches, skipping those a resumed run has already processed."""

    def __init__(self, batches, module=None):
        self.batches = batches
        self.module = module

    def __len__(self):
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        start = 0
        if self.module is not None:
            start, self.module.skip = self.module.skip, 0
        for batch in self.batches[start:]:
            yield {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


class TinyData(LightningDataModule):
    """Items whose class, and four numbers of their own, show in both modalities."""

    def __init__(
        self, items=32, batch_size=8, labelled=True, names=("s1", "s2"), edit=None, held_out=24
    ):
        super().__init__()
        self.modalities = tiny_modalities(names)
        self.context_size = SIDE
        self.label_names = ("water", "forest", "town") if labelled else None
        self.skip = 0
        self.edit = edit
        self.items, self.held_out = items, held_out
        self.batch_size, self.labelled = batch_size, labelled

    def make(self, count, seed):
        g = torch.Generator().manual_seed(seed)
        patterns = torch.Generator().manual_seed(99)
        kinds = {
            n: torch.randn(3, m.num_channels, SIDE, SIDE, generator=patterns)
            for n, m in self.modalities.items()
        }
        shared = {
            n: torch.randn(4, m.num_channels, SIDE, SIDE, generator=patterns)
            for n, m in self.modalities.items()
        }
        samples = []
        for i in range(count):
            label = int(torch.randint(3, (), generator=g))
            sample: dict[str, Any] = {"id": f"{seed}_{i:03d}", "index": i}
            if self.labelled:
                sample["label"] = label
            own = torch.randn(4, generator=g)
            for n, kind in kinds.items():
                noise = torch.randn(kind.shape[1:], generator=g)
                sample[n] = kind[label] + torch.einsum("k,kchw->chw", own, shared[n]) + 0.5 * noise
            samples.append(sample)
        size = self.batch_size
        batches = [collate(samples[i : i + size]) for i in range(0, count, size)]
        return [self.edit(b, i) if self.edit else b for i, b in enumerate(batches)]

    def train_dataloader(self):
        return Batches(self.make(self.items, 1), self)

    def val_dataloader(self):
        edit, self.edit = self.edit, None
        loader = Batches(self.make(self.held_out, 2))
        self.edit = edit
        return loader

    def state_dict(self):
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return {"processed": progress.processed % self.trainer.num_training_batches}

    def load_state_dict(self, state):
        self.skip = state["processed"]


def tiny_trainer(folder, **options: Any) -> Trainer:
    """A quiet trainer on the CPU."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "default_root_dir": str(folder),
        **options,
    }
    return Trainer(**settings)
