"""Private API of torch and Lightning: one test per hook, and nothing of it anywhere else."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import ModelParallelStrategy
from tiny import TinyData, TinyObjective, tiny_modalities, tiny_trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from domainssl import _torch
from domainssl.training import _lightning

PACKAGE = Path(__file__).resolve().parents[1] / "domainssl"
HOMES = {Path("_torch.py"), Path("training/_lightning.py")}


def test_private_names_of_other_libraries_stand_in_two_files() -> None:
    """Ours are those that some file of the package defines.

    `os._exit` is documented, and GDAL's error classes have no public name in rasterio (`_err`).
    """
    paths = [
        Path(folder, name)
        for folder, _, names in os.walk(PACKAGE, followlinks=True)
        for name in names
        if name.endswith(".py")
    ]
    trees = {path.relative_to(PACKAGE): ast.parse(path.read_text()) for path in paths}
    ours = {"_exit", "_err"}
    used: list[tuple[Path, int, str]] = []
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                ours.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                ours.add(node.id)
            elif isinstance(node, ast.Attribute):
                is_ours = isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
                if is_ours and path not in HOMES:
                    ours.add(node.attr)
                elif not node.attr.startswith("__"):
                    used.append((path, node.lineno, node.attr))
            elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(
                "domainssl"
            ):
                parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                used += [(path, node.lineno, p) for p in parts if not p.startswith("__")]
    wrong = [
        f"{path}:{line}: {name}"
        for path, line, name in used
        if name.startswith("_") and name not in ours and path not in HOMES
    ]
    assert not wrong, "\n".join(wrong)


# -- torch ------------------------------------------------------------------------------------


def test_resize_into_equals_interpolate() -> None:
    x, out = torch.randn(1, 3, 9, 7), torch.empty(1, 3, 5, 5)
    _torch.resize_into(x, out)
    wanted = F.interpolate(x, (5, 5), mode="bilinear", antialias=True, align_corners=False)
    torch.testing.assert_close(out, wanted)


def test_convolution_with_another_bias_keeps_its_padding_mode() -> None:
    layer, x = nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), torch.randn(1, 2, 5, 5)
    assert layer.bias is not None
    torch.testing.assert_close(_torch.conv_with_bias(layer, x, layer.bias + 1), layer(x) + 1)


def test_rates_of_schedule_and_optimiser_are_set() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    _torch.set_rates(schedule, [0.25])
    assert schedule.get_last_lr() == [0.25] and optimizer.param_groups[0]["lr"] == 0.25


def test_shared_bytes_lie_in_shared_memory() -> None:
    held = _torch.shared_bytes(16)
    assert held.shape == (16,) and held.dtype == torch.uint8 and held.is_shared()


def test_workers_are_seen_and_ended() -> None:
    loader = DataLoader([1, 2], num_workers=1, persistent_workers=True)
    assert not _torch.has_workers(loader) and not _torch.has_ended_worker(loader, 0)
    iterator = iter(loader)
    assert _torch.has_workers(loader) and not _torch.has_ended_worker(loader, 0)
    _torch.end_workers(loader)
    assert _torch.has_ended_worker(loader, 600)
    del iterator


def test_compiler_keeps_the_asked_number_of_variants() -> None:
    before = torch._dynamo.config.recompile_limit
    with _torch.compile_variants(before + 5):
        assert torch._dynamo.config.recompile_limit == before + 5
    assert torch._dynamo.config.recompile_limit == before


def test_a_registered_container_is_searched_for_tensors() -> None:
    class Box:
        def __init__(self, *items: object) -> None:
            self.items = items

    _torch.register_container(
        Box, lambda box: (list(box.items), None), lambda items, _: Box(*items), "test.Box"
    )
    doubled = torch.utils._pytree.tree_map(lambda x: 2 * x, Box(1, 2))
    assert doubled.items == (2, 4)


def test_batch_norms_share_a_base() -> None:
    for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        assert issubclass(kind, _torch.BatchNormBase)


def test_dispatch_mode_sees_operators() -> None:
    seen = []

    class Mode(_torch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        torch.ones(2) + 1
    assert torch.ops.aten.add.Tensor in seen


# -- Lightning --------------------------------------------------------------------------------


class Watch(Callback):
    """Notes what the helpers say after every batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[bool, bool]] = []
        self.ends: list[tuple[bool, bool]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        own = (_lightning.is_logging_step(trainer), _lightning.is_accumulating(trainer))
        self.seen.append(own)
        ends = (_lightning.validation_follows(trainer), _lightning.is_last_batch(trainer))
        self.ends.append(ends)


class Looking(TinyObjective):
    looked = 0

    def look_at_batch(self, batch, dataloader_idx):
        super().look_at_batch(batch, dataloader_idx)
        self.looked += 1


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """Four batches, a log every second optimiser step of two batches."""
    model, watch = Looking(tiny_modalities(), execution={"allow_accumulation": True}), Watch()
    assert _lightning.attached_trainer(model) is None
    trainer = tiny_trainer(
        tmp_path_factory.mktemp("watched"), max_epochs=1, accumulate_grad_batches=2,
        log_every_n_steps=2, val_check_interval=3, callbacks=[watch],
    )  # fmt: skip
    trainer.fit(model, datamodule=TinyData(items=32))
    return model, watch, trainer


def test_logging_and_accumulating_steps_are_told(watched) -> None:
    assert [logging for logging, _ in watched[1].seen][-1] is True
    assert [accumulating for _, accumulating in watched[1].seen] == [True, False, True, False]


def test_validation_and_the_end_of_an_epoch_are_foreseen(watched) -> None:
    assert [follows for follows, _ in watched[1].ends] == [False, False, True, False]
    assert [last for _, last in watched[1].ends] == [False, False, False, True]


def test_every_batch_is_looked_at_before_it_moves(watched) -> None:
    assert watched[0].looked == 4 + 3  # of training and of validation


def test_the_trainer_of_a_module_is_found(watched) -> None:
    assert _lightning.attached_trainer(watched[0]) is watched[2]


def test_hyperparameters_are_recorded_as_a_copy() -> None:
    model, arguments = TinyObjective(tiny_modalities()), {"a": [1]}
    _lightning.record_hyperparameters(model, arguments)
    arguments["a"].append(2)
    assert model.hparams["a"] == [1]


def test_a_strategy_of_one_group_counts_all_processes(monkeypatch) -> None:
    monkeypatch.setattr(ModelParallelStrategy, "setup_environment", lambda self: None)
    monkeypatch.setattr(_lightning.OneGroupStrategy, "num_processes", 4, raising=False)
    strategy = _lightning.OneGroupStrategy(process_group_backend="gloo")
    strategy.num_nodes = 2
    strategy.setup_environment()
    assert strategy._data_parallel_size == 8


def test_a_checkpoint_is_saved_now_followed_and_linked(tmp_path) -> None:
    events: list[str] = []

    class Saving(_lightning.CheckpointHooks):
        def after_save(self, trainer, path):
            events.append(f"saved {Path(path).name}")

        @staticmethod
        def link_last(trainer, path, link):
            events.append(f"{Path(link).name} -> {Path(path).name}")

        def on_train_epoch_end(self, trainer, pl_module):
            if self.can_save(trainer):
                self.save_now(trainer)

    saving = Saving(
        dirpath=tmp_path, filename="{step}", save_top_k=-1, save_last="link",
        every_n_train_steps=1000, auto_insert_metric_name=False,
    )  # fmt: skip
    trainer = tiny_trainer(
        tmp_path, max_epochs=1, limit_val_batches=0, callbacks=[saving], enable_checkpointing=True
    )
    trainer.fit(TinyObjective(tiny_modalities()), datamodule=TinyData(items=16))
    assert events == ["saved 2.ckpt", "last.ckpt -> 2.ckpt"]


def test_a_command_line_waits_until_it_is_told_to_run() -> None:
    ran = []

    class Base(LightningCLI):
        def __init__(self) -> None:
            self._run_subcommand("fit")
            self._parse_ckpt_path()

    class Line(_lightning.CLIHooks, Base):
        pass

    line = Line()
    line.trainer, line.config_init = None, {"fit": {}}
    line._prepare_subcommand_kwargs = lambda verb: {}
    line.trainer = type("T", (), {"fit": lambda self: ran.append("fit")})()
    line.subcommand = "fit"
    line.run_verb("fit")
    assert ran == ["fit"]
