"""A tiny objective and DataModule for tests of the command line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn

from domainssl.arguments import Recorded
from domainssl.modality import Modality
from domainssl.training.guard import check_resume

__all__ = ["FakeDataModule", "FakeObjective", "UndescribedDataModule"]


@dataclass(frozen=True)
class FakeOptions:
    """Nested options."""

    lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)
    warmup_steps: int | None = None


class FakeObjective(Recorded, LightningModule):
    """Fits the mean of its input."""

    def __init__(
        self,
        modalities: Mapping[str, Modality | Mapping[str, Any]],
        size: Literal["tiny", "base"] = "tiny",
        mask_ratio: float = 0.75,
        context_size: int = 120,
        optimization: FakeOptions | Mapping[str, Any] | None = None,
        options: FakeOptions = FakeOptions(),
        weights: str | None = None,
    ) -> None:
        super().__init__()
        self._set_hparams(self.arguments)
        self.modalities = {k: Modality.of(m) for k, m in modalities.items()}
        self.context_size = context_size
        self.options = options
        self.backbone = nn.Linear(sum(m.num_channels for m in self.modalities.values()), 1)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return a loss."""
        loss = self.backbone(batch["a"]).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Log a loss."""
        self.log("val/loss", self.backbone(batch["a"]).square().mean(), batch_size=4)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return outputs."""
        return self.backbone(batch["a"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on with other arguments."""
        if self.trainer.state.fn == "fit":
            saved, own = checkpoint["hyper_parameters"], self.arguments
            check_resume(saved, own, may_change=("weights",), constructor=type(self).__init__)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=self.options.lr)


class _Loader:
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[dict[str, Any]]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.steps):
            yield {"a": torch.randn(4, 3, generator=generator)}


class FakeDataModule(LightningDataModule):
    """Yields random vectors."""

    def __init__(self, root: str, global_batch_size: int = 4, window: int = 64) -> None:
        super().__init__()
        self.root = root
        self.global_batch_size = global_batch_size
        self.window = window

    @property
    def context_size(self) -> int:
        """Side of a window."""
        return self.window

    @property
    def modalities(self) -> dict[str, Modality]:
        """The one modality."""
        size = (self.window, self.window)
        return {
            "a": Modality(
                name="a",
                kind="image",
                channels=("r", "g", "b"),
                value_unit="rgb8",
                size=size,
                gsd_m=10.0,
            )
        }

    def identity(self) -> dict[str, Any]:
        """Say which data these are."""
        return {"root": self.root, "files": []}

    def describe(self) -> list[str]:
        """Say what was found."""
        return [f"12 random vectors from {self.root!r}"]

    def train_dataloader(self) -> _Loader:
        """Return three batches."""
        return _Loader(3)

    def val_dataloader(self) -> _Loader:
        """Return two batches."""
        return _Loader(2)

    test_dataloader = predict_dataloader = val_dataloader


class UndescribedDataModule(LightningDataModule):
    """A DataModule of somebody else: without modalities, passing arguments on."""

    def __init__(self, batch_size: int = 1, **kwargs: Any) -> None:
        super().__init__()
        self.kwargs = kwargs

    def train_dataloader(self) -> _Loader:
        """Return three batches."""
        return _Loader(3)
