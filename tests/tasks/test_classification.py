"""Tasks over a backbone: where they start, what is trained, and what is minimised."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from small_tasks import backbone, batch, task
from torch.nn import functional as F
from torch.utils.data import DataLoader

from domainssl import export_backbone
from domainssl.errors import ConfigError, DataError
from domainssl.modality import Modality
from domainssl.tasks import ClassificationTask, ClassLoss, PooledHead, Tuning
from domainssl.tasks.classification import class_loss
from domainssl.tasks.pooled import GatedPool
from domainssl.tasks.tuning import merge_adapters
from domainssl.training.module import TrainingModule
from domainssl.training.optimization import Optimization, parameter_groups


def test_a_task_starts_from_the_weights_of_an_export(tmp_path):
    kept = backbone()
    export_backbone(kept, tmp_path / "out")
    found = task(backbone=str(tmp_path / "out")).backbone
    assert found.training
    for name, tensor in kept.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor)


def test_the_backbone_of_a_recipe_is_built_for_the_data_and_says_that_it_is_random(
    caplog, tmp_path
):
    found = task(backbone="recipe:tiles_mae")
    assert found.backbone.embed_dim == {"he": 96} and not caplog.text
    assert found.arguments["backbone"] == "recipe:tiles_mae"
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )  # fmt: skip
    items = DataLoader([batch()], batch_size=None)
    trainer.validate(found, items, verbose=False)
    assert caplog.text.count("random weights, in the architecture of the recipe tiles_mae") == 1
    caplog.clear()
    trainer.save_checkpoint(tmp_path / "kept.ckpt")
    again = task(backbone="recipe:tiles_mae")
    trainer.test(again, items, ckpt_path=tmp_path / "kept.ckpt", verbose=False)
    assert "random weights" not in caplog.text
    with pytest.raises(ConfigError, match="no recipe 'tiles_mea'.* Did you mean 'tiles_mae'"):
        task(backbone="recipe:tiles_mea")


@pytest.mark.parametrize("tokens", [64, 2048])
def test_bags_of_any_size_start_from_a_recipe_of_regions(tokens):
    bag = Modality(
        name="tiles", kind="features", channels=("a", "b"), value_unit="arbitrary", size=(tokens,),
        mean=(0.0,) * 2, std=(1.0,) * 2,
    )  # fmt: skip
    found = ClassificationTask(
        "recipe:slides_titan", modalities={"tiles": bag}, classes=("x", "y"),
        context_size=(tokens,), head=PooledHead(kind="gated"),
    ).eval()  # fmt: skip
    places = torch.stack([torch.arange(tokens), torch.arange(tokens)], 1).expand(2, -1, -1)
    given = {"tiles": torch.randn(2, tokens, 2), "tiles.coords": places}
    assert found.logits(given).shape == (2, 2)


@pytest.mark.parametrize(("mode", "trained"), [("full", "all"), ("frozen", "none"), ("lora", "a")])
def test_tuning_decides_what_of_the_backbone_learns(mode, trained):
    found = task(tuning=Tuning(mode=mode))
    names = [n for n, p in found.backbone.named_parameters() if p.requires_grad]
    total = len(list(found.backbone.parameters()))
    assert {"all": len(names) == total, "none": not names,
            "a": bool(names) and all("lora_" in n for n in names)}[trained]  # fmt: skip
    found.train()
    assert found.backbone.training is (mode != "frozen") and found.head.training


def test_adapters_change_nothing_at_first_and_merge_into_the_weights():
    plain, found = task(), task(tuning=Tuning(mode="lora", lora_rank=2, lora_targets=("*qkv",)))
    found.head.load_state_dict(plain.head.state_dict())
    plain.eval(), found.eval()
    torch.testing.assert_close(found.logits(batch()), plain.logits(batch()))
    adapters = [p for n, p in found.backbone.named_parameters() if "lora_B" in n]
    assert len(adapters) == 2
    for parameter in adapters:
        torch.nn.init.normal_(parameter)
    changed = found.logits(batch())
    assert (changed - plain.logits(batch())).abs().max() > 1e-3
    merge_adapters(found.backbone)
    torch.testing.assert_close(found.logits(batch()), changed)
    assert found.backbone.state_dict().keys() == plain.backbone.state_dict().keys()
    with pytest.raises(ConfigError, match="lora_targets.*fits no linear layer.*qkv"):
        task(tuning=Tuning(mode="lora", lora_targets=("*nothing",)))


def test_earlier_blocks_learn_more_slowly_with_layer_decay():
    found = task(tuning=Tuning(layer_decay=0.5), optimization=Optimization(lr=1.0))
    groups = parameter_groups(found.named_parameters(), found.optimization)
    rates = {id(p): g.get("lr", 1.0) for g in groups for p in g["params"]}
    named = dict(found.named_parameters())
    rate = {n: rates[id(p)] for n, p in named.items()}
    assert rate["head.names.he.out.weight"] == 1.0
    assert rate["backbone.transformer.blocks.1.attention.qkv.weight"] == 0.5
    assert rate["backbone.transformer.blocks.0.attention.qkv.weight"] == 0.25
    assert rate["backbone.embed.weight"] == 0.125


def test_unlabelled_items_count_for_nothing_and_weights_as_in_pytorch():
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), requires_grad=True)
    target = torch.tensor([0, 1, 2, -1, 1, -1])
    weights = (1.0, 2.0, 0.5)
    found = class_loss(logits, target, ClassLoss(class_weights=weights, label_smoothing=0.1))
    # PyTorch weighs the smoothed part by class, ours by item; without smoothing both agree
    plain = class_loss(logits, target, ClassLoss(class_weights=weights))
    expected = F.cross_entropy(logits, target, torch.tensor(weights), ignore_index=-1)
    torch.testing.assert_close(plain, expected)
    assert found > 0
    nothing = class_loss(logits, torch.full((6,), -1), ClassLoss())
    nothing.backward()
    assert nothing == 0 and (logits.grad == 0).all()


def test_balanced_weights_are_counted_at_the_start_and_go_to_the_card(monkeypatch, caplog):
    found = task(loss=ClassLoss(class_weights="balanced"))
    with pytest.raises(ConfigError, match="'balanced' is counted when training starts"):
        found.losses(torch.zeros(2, 3), {"label": torch.tensor([0, 1])})
    counted = SimpleNamespace(class_counts=lambda name, classes: [6, 2, 0])
    trainer = SimpleNamespace(datamodule=counted, gradient_clip_val=None)
    monkeypatch.setattr(TrainingModule, "setup", lambda self, stage: None)
    monkeypatch.setattr(ClassificationTask, "trainer", trainer)
    found.setup("fit")
    assert found.loss.class_weights == pytest.approx((8 / 12, 2.0, 0.0))
    assert found.arguments["loss"]["class_weights"] == pytest.approx([8 / 12, 2.0, 0.0])
    assert "balanced gives" in caplog.text
    trainer.datamodule = None
    with pytest.raises(ConfigError, match="'balanced' counts the labels of a DataModule"):
        found._balanced_weights()
    with pytest.raises(ConfigError, match="got 'balance', expected.*Did you mean 'balanced'"):
        ClassLoss(class_weights="balance")


def test_the_focal_loss_is_that_of_monai():
    monai = pytest.importorskip("monai.losses")
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    target = torch.tensor([0, 1, 2, 3, 1])
    theirs = monai.FocalLoss(gamma=2.0, use_softmax=True, reduction="none", to_onehot_y=True)
    expected = theirs(logits, target[:, None]).sum(1).mean()
    found = class_loss(logits, target, ClassLoss(name="focal", gamma=2.0))
    torch.testing.assert_close(found, expected)


def test_several_labels_per_item_may_be_unknown_one_by_one():
    found = task(multi_label=True)
    given = batch()
    given["label"] = torch.tensor([[1.0, 0, torch.nan]] * 4)
    logits = found.logits(given)
    loss = found.losses(logits, given)["cross_entropy"]
    known = given["label"][:, :2]
    expected = F.binary_cross_entropy_with_logits(logits[:, :2], known)
    torch.testing.assert_close(loss, expected)
    with pytest.raises(DataError, match=r"got shape \(4,\).*multi_label: false"):
        found.losses(logits, batch())
    del given["label"]
    with pytest.raises(DataError, match=r"batch.label, which the data do not yield"):
        found.losses(logits, given)


def test_labels_that_data_deliver_beside_one_class_are_learned():
    model, given = task(multi_label=True).eval(), batch(3)
    several = torch.tensor([[True, False, True], [False, False, True], [True, True, False]])
    logits = torch.zeros(3, 3)
    wanted = model.losses(logits, {**given, "label": several.float()})
    found = model.losses(logits, {**given, "label_multi": several})
    assert torch.equal(found["cross_entropy"], wanted["cross_entropy"])
    assert torch.equal(model.scored(logits, {**given, "label_multi": several})[1], several.long())


def test_gated_attention_weighs_valid_tokens_alone():
    torch.manual_seed(0)
    pool = GatedPool(8, 4)
    tokens, valid = torch.randn(3, 5, 8), torch.ones(3, 5, dtype=torch.bool)
    valid[0, 3:], valid[2] = False, False
    mean, weights = pool(tokens, valid)
    torch.testing.assert_close(weights.sum(1), torch.tensor([1.0, 1.0, 0.0]))
    other = copy.deepcopy(tokens)
    other[0, 3:] = 99.0
    torch.testing.assert_close(pool(other, valid)[0], mean)
    hidden = torch.tanh(pool.key(tokens[1])) * torch.sigmoid(pool.gate(tokens[1]))
    expected = (hidden @ pool.query).softmax(0)
    torch.testing.assert_close(weights[1], expected)


def test_options_that_cannot_be_meant_are_refused():
    with pytest.raises(ConfigError, match="tuning.mode: got 'frosen'.*Did you mean 'frozen'"):
        Tuning(mode="frosen")
    with pytest.raises(ConfigError, match="layer_decay: got 0.5 with mode 'frozen'"):
        Tuning(mode="frozen", layer_decay=0.5)
    with pytest.raises(ConfigError, match="head.features: got 'ihc', but ViTBackbone has he"):
        task(head=PooledHead(features="ihc"))
    with pytest.raises(ConfigError, match="class_weights: got 2, expected one per class"):
        task(loss=ClassLoss(class_weights=(1.0, 2.0)))
    with pytest.raises(ConfigError, match="names a class twice"):
        task(classes=("a", "a"))
