"""Segmentation: losses over what is labelled, missing contrasts, windows as prediction has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from domainssl.backbones.encoders.backbone import EncoderBackbone
from domainssl.backbones.multi_contrast import MultiContrastBackbone
from domainssl.backbones.vit import ViTBackbone
from domainssl.errors import ConfigError, DataError
from domainssl.modality import as_modalities
from domainssl.tasks import SegmentationTask
from domainssl.tasks.maps import window_sizes

pytest.importorskip("monai")
FACTS = {"kind": "volume", "channels": ("a",), "value_unit": "arbitrary", "size": (16, 16, 16)}
CONTRASTS = {"t1": FACTS, "t2": FACTS}
NAMES = ("healthy", "oedema", "core")


def contrasts(head: str = "unetr", **more: Any) -> SegmentationTask:
    torch.manual_seed(0)
    backbone = MultiContrastBackbone(
        CONTRASTS, {"width": 12, "depth": 2, "heads": 2, "hidden": 12}, 8, "identity"
    )
    return SegmentationTask(
        backbone, modalities=CONTRASTS, classes=NAMES, head={"name": head, "width": 4}, **more
    )


def batch(size: int = 16, count: int = 2) -> dict[str, Any]:
    torch.manual_seed(1)
    shape = (count, 1, size, size, size)
    mask = torch.randint(-1, 3, shape)[:, 0]
    return {"t1": torch.randn(shape), "t2": torch.randn(shape), "mask": mask}


def test_absent_contrasts_and_their_filler_change_nothing_else() -> None:
    task, x = contrasts().eval(), batch()
    with torch.no_grad():
        both = task.logits(x)
        alone = task.logits({"t1": x["t1"]})
        marked = {**x, "t2.present": torch.tensor([False, False])}
        filled = {**marked, "t2": x["t2"] * 100 + 7}
        assert both.shape == (2, 3, 16, 16, 16) and both.dtype == torch.float32
        torch.testing.assert_close(task.logits(marked), alone, rtol=1e-4, atol=1e-5)
        assert torch.equal(task.logits(filled), task.logits(marked))
        assert not torch.allclose(both, alone)


def test_unlabelled_voxels_count_for_nothing() -> None:
    task, x = contrasts(loss={"name": "dice_ce"}), batch()
    logits = torch.randn(2, 3, 16, 16, 16)
    changed = torch.where((x["mask"] < 0)[:, None], logits * -3, logits)
    first, second = task.losses(logits, x), task.losses(changed, x)
    assert set(first) == {"dice", "cross_entropy"}
    for name, value in first.items():
        torch.testing.assert_close(second[name], value)
    perfect = torch.nn.functional.one_hot(x["mask"].clamp(min=0), 3).movedim(-1, 1) * 100.0
    assert all(float(value) < 1e-3 for value in task.losses(perfect, x).values())


def test_dice_is_that_of_monai_over_the_whole_volume() -> None:
    from monai.losses import DiceLoss

    task, x = contrasts(loss={"name": "dice", "include_background": False}), batch()
    target, logits = x["mask"].clamp(min=0), torch.randn(2, 3, 16, 16, 16)
    wanted = DiceLoss(include_background=False, softmax=True, to_onehot_y=True)
    found = task.losses(logits, {**x, "mask": target})["dice"]
    torch.testing.assert_close(found, wanted(logits, target[:, None]))


def test_metrics_are_told_per_class() -> None:
    task, x = contrasts(), batch()
    watched = task.metrics()
    perfect = torch.nn.functional.one_hot(x["mask"].clamp(min=0), 3).movedim(-1, 1).float()
    watched.update(*task.scored(perfect, x))
    found = task.named_results(task.computed(watched))
    assert {"dice", "iou", "accuracy", "dice/core", "iou/oedema"} <= set(found)
    assert all(float(value) == 1 for value in found.values())


def test_items_larger_than_a_window_are_judged_in_windows() -> None:
    task, x = contrasts(tiles={"size": 16, "overlap": 0.5}).eval(), batch(24, 1)
    with torch.no_grad():
        found = task(x)
        assert found.shape == (1, 3, 24, 24, 24)
        corner = task.logits({n: v[..., :16, :16, :16] for n, v in x.items()})
        assert torch.allclose(found[..., :8, :8, :8], corner[..., :8, :8, :8], atol=1e-5)
        small = task({n: v[..., :10, :16, :16] for n, v in x.items()})  # filled up to a window
        assert small.shape == (1, 3, 10, 16, 16)


def test_images_take_the_same_class() -> None:
    facts = {"kind": "image", "channels": ("r", "g"), "value_unit": "dn", "size": (16, 16)}
    backbone = ViTBackbone({"s2": facts}, {"width": 8, "depth": 2, "heads": 2}, 4, None, "identity")
    task = SegmentationTask(
        backbone, modalities={"s2": facts}, classes=("a", "b"), head={"name": "pyramid", "width": 8}
    )
    x = {"s2": torch.randn(2, 2, 16, 16), "mask": torch.randint(0, 2, (2, 16, 16))}
    logits = task.logits(x)
    assert logits.shape == (2, 2, 16, 16)
    task.losses(logits, x)["cross_entropy"].backward()
    assert task.head.out.weight.grad.abs().sum() > 0


def test_windows_of_voxels_that_are_longer_along_one_axis_keep_their_sides() -> None:
    """Heads and predictions of items took half of the layers where these are twice as far."""
    thick = FACTS | {"spacing_mm": (1.0, 1.0, 2.0)}
    thin = thick | {"spacing_mm": (0.5, 0.5, 2.0)}
    assert window_sizes(as_modalities({"t1": thick}), (16, 16, 8)) == {"t1": (16, 16, 8)}
    both = window_sizes(as_modalities({"t1": thick, "t2": thin}), (16, 16, 8))
    assert both == {"t1": (8, 8, 8), "t2": (16, 16, 8)}


def test_a_decoder_that_normalises_maps_wants_more_than_one_cell() -> None:
    """PyTorch refused the first batch: `Expected more than 1 spatial element when training`."""
    sizes = {"features": (4, 8), "blocks": (1, 1)}
    backbone = EncoderBackbone({"a": FACTS}, "resenc", sizes, normalization="identity")
    with pytest.raises(ConfigError, match="window of 2 x 2 x 2 has a single cell.*or 'light'"):
        SegmentationTask(
            backbone, modalities={"a": FACTS}, classes=NAMES, head={"name": "swin_unetr"},
            context_size=2,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"head": {"name": "swin_unetr"}}, "maps that halve"),
        ({"head": {"name": "fpn"}}, "'fpn' is no head for 3 axes, expected one of light, unetr"),
        ({"head": {"name": "unet3"}}, "Did you mean 'unet'"),
        ({"loss": {"name": "dise"}}, "Did you mean 'dice'"),
        ({"loss": {"class_weights": (1.0, 2.0)}}, "got 2, expected one per class: healthy"),
        ({"classes": ("one",)}, "expected two or more"),
        ({"head": {"name": "light", "features": ("t3",)}}, "has maps of t1, t2, joint"),
    ],
)
def test_mistakes_are_named(arguments: dict[str, Any], text: str) -> None:
    backbone = contrasts().backbone
    given = {"modalities": CONTRASTS, "classes": NAMES, "head": {"name": "light"}, **arguments}
    with pytest.raises(ConfigError) as caught:
        SegmentationTask(backbone, **given)
    assert text in str(caught.value)


def test_masks_that_do_not_fit_are_named() -> None:
    task, x = contrasts(), batch()
    logits: Tensor = torch.randn(2, 3, 16, 16, 16)
    with pytest.raises(DataError, match=r"expected whole numbers \(2, 16, 16, 16\)"):
        task.losses(logits, {**x, "mask": x["mask"][:, :8]})
    with pytest.raises(DataError, match="values from -1 to 7, expected -1 or the numbers of 3"):
        task.losses(logits, {**x, "mask": x["mask"].masked_fill(x["mask"] == 2, 7)})
    with pytest.raises(DataError, match=r"learns from batch.mask"):
        task.losses(logits, {"t1": x["t1"]})


def test_forms_that_want_limits_of_the_item_get_some_when_the_head_is_built() -> None:
    backbone = ViTBackbone({"ct": FACTS}, {"width": 12, "depth": 2, "heads": 2}, 8, None, "item")
    task = SegmentationTask(
        backbone, modalities={"ct": FACTS}, classes=NAMES, head={"name": "light"}
    )
    x = {"ct": torch.randn(1, 1, 16, 16, 16), "ct.window": torch.tensor([[[-2.0, 2.0]]])}
    assert task.logits(x).shape == (1, 3, 16, 16, 16)
