"""Graphs: what the written file computes, what its card says, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from small_tasks import CLASSES, MODALITIES, batch, task
from small_tasks import backbone as small
from torch.utils.data import DataLoader

from domainssl.backbones.base import Backbone
from domainssl.backbones.croma import PUBLISHED_MODALITIES, CROMABackbone
from domainssl.backbones.encoders.backbone import EncoderBackbone
from domainssl.backbones.encoders.swin import SwinArchitecture
from domainssl.backbones.graph import _save_program, export_graph
from domainssl.backbones.maestro.backbone import MAESTROBackbone
from domainssl.backbones.maestro.inputs import MAESTROInput
from domainssl.backbones.multi_contrast import MultiContrastBackbone
from domainssl.backbones.omnisat import OmniSatBackbone
from domainssl.backbones.swin import SwinBackbone
from domainssl.backbones.vit import ViTArchitecture, ViTBackbone
from domainssl.cli import main
from domainssl.errors import ConfigError, WeightsError
from domainssl.modality import Modality
from domainssl.nn.blocks import set_attention_path
from domainssl.tasks import RegressionTask, SegmentationTask, Tuning


def _image(**changes) -> dict[str, Modality]:
    facts = {
        "name": "img", "kind": "image", "channels": ("a", "b", "c"), "value_unit": "arbitrary",
        "mean": (100.0, 200.0, 300.0), "std": (10.0, 20.0, 30.0), "size": (16, 16), **changes,
    }  # fmt: skip
    return {"img": Modality(**facts)}


def _vit(depth: int = 1) -> ViTBackbone:
    torch.manual_seed(0)
    sizes = {"width": 24, "depth": depth, "heads": 2}
    return ViTBackbone(_image(), architecture=sizes, patch_size=8)


def _croma() -> CROMABackbone:
    torch.manual_seed(0)
    return CROMABackbone(dict(PUBLISHED_MODALITIES), width=32, depth=2, heads=4)


def _encoder(name: str) -> EncoderBackbone:
    torch.manual_seed(0)
    sizes = {"width": 24, "depth": 1, "heads": 2, "patch_size": 8}
    size = (64, 64) if name == "resnet18" else (16, 16)
    return EncoderBackbone(_image(size=size), encoder=name, sizes=sizes)


def _run(card: Path, *values: torch.Tensor) -> list[torch.Tensor]:
    """Run a graph as a user does who has only the file and its card."""
    path = card.with_suffix("")
    if path.suffix == ".pt2":
        return list(torch.export.load(path).module()(*values))
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [entry["name"] for entry in json.loads(card.read_text())["inputs"]]
    feeds = {name: v.numpy() for name, v in zip(names, values, strict=True)}
    return [torch.from_numpy(found) for found in session.run(None, feeds)]


def _check(backbone: Backbone, card: Path, size: tuple[int, ...]) -> dict:
    """Compare a graph with its backbone on values with a gap, and return the card."""
    facts = json.loads(card.read_text())
    batch = {}
    for entry in facts["inputs"]:
        modality = backbone.modalities[entry["name"]]
        mean, std = (torch.tensor(m) for m in (modality.mean, modality.std))
        values = torch.randn(5, len(mean), *size) * std.view(1, -1, 1, 1) + mean.view(1, -1, 1, 1)
        values[1, :, :3, :5] = float("nan")
        batch[entry["name"]] = values
    with torch.no_grad():
        wanted = backbone.eval()(batch)
        found = _run(card, *batch.values())
    assert len(found) == len(facts["outputs"])
    for entry, value in zip(facts["outputs"], found, strict=True):
        name, kind = entry["name"].split(".")
        expected = getattr(wanted, kind)[name]
        assert value.shape[-1] == entry["width"]
        torch.testing.assert_close(value, expected, atol=1e-4, rtol=1e-4)
    assert facts["check"]["largest_difference"] <= 1e-4 * facts["check"]["largest_value"]
    return facts


@pytest.mark.slow
def test_a_program_of_a_vit_takes_raw_values_of_other_sizes(tmp_path: Path) -> None:
    backbone = _vit()
    card = export_graph(backbone, tmp_path, format="torch_export", licence="MIT")
    facts = _check(backbone, card, (24, 40))
    (entry,) = facts["inputs"]
    assert entry["bands"] == ["a", "b", "c"] and entry["unit"] == "arbitrary"
    assert (entry["size"], entry["size_is_free"], entry["dtype"]) == ([16, 16], True, "float32")
    assert [out["name"] for out in facts["outputs"]] == ["img.pooled", "img.tokens"]
    assert facts["licence"] == "MIT"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["encoder.pt2", "encoder.pt2.json"]
    with pytest.raises(WeightsError, match="overwrite"):
        export_graph(backbone, tmp_path, format="torch_export")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "transformer", "resnet18"])
def test_onnx_of_one_image(tmp_path: Path, name: str) -> None:
    backbone = _vit(2) if name == "vit" else _encoder(name)
    facts = _check(backbone, export_graph(backbone, tmp_path), (24, 40))
    assert facts["inputs"][0]["size_is_free"] is True


@pytest.mark.slow
def test_a_program_of_a_resnet_has_one_size_and_says_so(tmp_path: Path) -> None:
    backbone = _encoder("resnet18")
    card = export_graph(backbone, tmp_path, format="torch_export")
    (entry,) = _check(backbone, card, (64, 64))["inputs"]
    assert (entry["size"], entry["size_is_free"]) == ([64, 64], False)


@pytest.mark.slow
@pytest.mark.parametrize("names", [["s2"], ["s1", "s2"]])
def test_onnx_of_croma(tmp_path: Path, names: list[str]) -> None:
    backbone = _croma()
    facts = _check(backbone, export_graph(backbone, tmp_path, modalities=names, size=16), (24, 32))
    outputs = [f"{n}.{k}" for n in [*names, "joint"] for k in ("pooled", "tokens")]
    assert [out["name"] for out in facts["outputs"]] == outputs[: 2 if len(names) == 1 else None]


@pytest.mark.parametrize(
    ("backbone", "options", "message"),
    [
        (_croma, {"size": 16, "modalities": ["s3"]}, "no 's3'. It knows s1, s2"),
        (_croma, {"modalities": ["s2"]}, "'s2' has none of its own.*--size"),
        (_vit, {"format": "onx"}, "'onx' is not one of onnx, torch_export. Did you mean 'onnx'"),
        (_vit, {"size": (16, 16, 16)}, "size: got .16, 16, 16., expected one number, or 2"),
    ],
)
def test_what_is_asked_wrongly_is_refused(tmp_path, backbone, options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        export_graph(backbone(), tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_what_has_no_graph_is_refused_with_the_way_out(tmp_path: Path) -> None:
    sizes = {"width": 24, "depth": 1, "heads": 2}
    series = ViTBackbone(_image(kind="series"), architecture=sizes, patch_size=8)
    with pytest.raises(ConfigError, match=r"'img' is of kind 'series'.*load_backbone"):
        export_graph(series, tmp_path)
    item = ViTBackbone(_image(), architecture=sizes, patch_size=8, normalization="item")
    with pytest.raises(ConfigError, match=r"normalization.img: 'item' depends on limits"):
        export_graph(item, tmp_path)
    change = _segmentation()
    change.kind = "change"
    with pytest.raises(ConfigError, match="task of change compares two dates.*--backbone"):
        export_graph(change, tmp_path)
    flex = _vit()
    set_attention_path(flex, "flex")
    with pytest.raises(ConfigError, match=r"FlexAttention.*set_attention_path.*'fused'"):
        export_graph(flex, tmp_path)


def test_a_program_on_a_full_disk_is_an_error_of_python(tmp_path: Path, monkeypatch) -> None:
    """torch's writer of files called std::terminate, which no message can follow."""
    monkeypatch.setattr("torch.export.save", lambda program, file: file.write(program))
    _save_program(b"content", tmp_path / "a.pt2")
    assert (tmp_path / "a.pt2").read_bytes() == b"content"
    with pytest.raises(OSError, match="No space left on device"):
        _save_program(b"content" * 10_000, Path("/dev/full"))


@pytest.mark.slow
def test_a_graph_that_computes_something_else_is_not_kept(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("domainssl.backbones.graph.TOLERANCE", -1.0)
    with pytest.raises(WeightsError, match=r"img.pooled of 2 items of \(16, 16\) differs"):
        export_graph(_vit(), tmp_path, format="torch_export", dynamic_size=False)
    assert list(tmp_path.iterdir()) == []


TINY = ViTArchitecture(width=24, depth=1, heads=2)


def _volume() -> dict[str, Modality]:
    facts = {"channels": ("a",), "mean": (100.0,), "std": (10.0,), "size": (16, 16, 16)}
    return _image(kind="volume", spacing_mm=(1.0, 1.0, 2.0), **facts)


def _swin() -> SwinBackbone:
    sizes = SwinArchitecture(feature_size=6, depths=(1,) * 4, heads=(1,) * 4, window=2)
    return SwinBackbone(_image(**{**vars(_volume()["img"]), "size": (32,) * 3}), sizes, "zscore")


def _omnisat() -> OmniSatBackbone:
    fusion = {"depth": 1, "heads": 2}
    return OmniSatBackbone(_image(size=(32, 32)), {"img": 8}, (4, 4), 16, 2, fusion)


def _maestro() -> MAESTROBackbone:
    inputs = {"img": MAESTROInput(patch_size=8)}
    return MAESTROBackbone(
        _image(), inputs, width=24, depth=2, heads=2, head_dim=8, shared_depth=1,
        normalization="zscore",
    )  # fmt: skip


OTHERS = {
    "vit of volumes": lambda: ViTBackbone(_volume(), TINY, patch_size=8),
    "resnet of volumes": lambda: EncoderBackbone(
        _volume(), "monai:resnet10", {"widen": 0.125}, normalization="zscore"
    ),
    "contrasts": lambda: MultiContrastBackbone(
        _volume(), {"width": 24, "depth": 1, "heads": 2}, 8, "zscore"
    ),
    "swin": _swin,
    "omnisat": _omnisat,
    "maestro": _maestro,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_programs_of_volumes_and_of_other_methods(tmp_path: Path, name: str) -> None:
    """The export itself compares two numbers of items with PyTorch before it keeps a file."""
    torch.manual_seed(0)
    backbone = OTHERS[name]()
    card = export_graph(backbone, tmp_path, format="torch_export")
    facts = json.loads(card.read_text())
    assert facts["inputs"][0]["size_is_free"] is False
    assert facts["check"]["largest_difference"] <= 1e-4 * facts["check"]["largest_value"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet of volumes", "contrasts", "maestro"])
def test_onnx_of_volumes_and_of_other_methods(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    backbone = OTHERS[name]().eval()
    card = export_graph(backbone, tmp_path)
    modality = backbone.modalities["img"]
    mean = torch.tensor(modality.mean).view(-1, *[1] * len(modality.size))
    values = mean + 10 * torch.randn(3, modality.num_channels, *modality.size)
    with torch.no_grad():
        wanted = backbone({"img": values})
    pooled, tokens = _run(card, values)
    torch.testing.assert_close(pooled, wanted.pooled["img"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(tokens, wanted.tokens["img"], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "torch_export"])
def test_the_verb_writes_graphs(
    format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = _vit().eval()
    facts = {"name": "ViTBackbone", "arguments": backbone.arguments}
    state = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    torch.save({"backbone": facts, "state_dict": state}, tmp_path / "last.ckpt")
    words = ["export", "--checkpoint", str(tmp_path), "--output", str(tmp_path / "graph")]
    asked = ["--format", format, "--modalities", "img", "--size", "24", "16"]
    assert main([*words, *asked, "--licence", "MIT"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "in img: B C H W, a b c (arbitrary), float32, any size" in said
    assert "out img.pooled: B E, E=24" in said and "largest difference from PyTorch" in said
    (card,) = (tmp_path / "graph").glob("encoder.*.json")
    facts = _check(backbone, card, (32, 16))
    assert facts["licence"] == "MIT" and facts["inputs"][0]["size"] == [24, 16]
    assert facts["provenance"]["checkpoint"] == "last.ckpt"
    assert main([*words, *asked]) == 2
    assert "overwrite" in capsys.readouterr().err


@pytest.mark.slow
def test_the_graph_of_a_run_with_lora_says_what_the_merged_task_says(tmp_path, capsys) -> None:
    kept = task(tuning=Tuning(mode="lora"))
    for name, parameter in kept.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.validate(kept, DataLoader([batch()], batch_size=None), verbose=False)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    words = ["export", "--checkpoint", str(tmp_path), "--output", str(tmp_path / "graph")]
    assert main([*words, "--format", "torch_export"]) == 0
    said = capsys.readouterr().out
    assert "out  logits: B K, K=3" in said and f"classes: {', '.join(CLASSES)}" in said
    given = batch()["he"]
    graph = torch.export.load(tmp_path / "graph" / "task.pt2").module()
    assert main([*words, "--format", "torch_export", "--backbone", "--size", "16"]) == 0
    encoder = torch.export.load(tmp_path / "graph" / "encoder.pt2").module()
    with torch.no_grad():
        wanted = kept.eval().logits({"he": given})
        torch.testing.assert_close(graph(given)[0], wanted, atol=1e-4, rtol=1e-4)
        wanted = kept.backbone({"he": given}).pooled["he"]
        torch.testing.assert_close(encoder(given)[0], wanted, atol=1e-4, rtol=1e-4)


def _segmentation(head: str = "pyramid", **changes) -> SegmentationTask:
    modalities = _image(**changes)
    return SegmentationTask(
        ViTBackbone(modalities, {"width": 24, "depth": 1, "heads": 2}, patch_size=8),
        modalities=modalities, classes=CLASSES, head={"name": head, "width": 8},
    )  # fmt: skip


def _over_resenc(head: str) -> SegmentationTask:
    sizes = {"features": (4, 8), "blocks": (1, 1)}
    backbone = EncoderBackbone(_volume(), "resenc", sizes, normalization="zscore")
    return SegmentationTask(
        backbone, modalities=backbone.modalities, classes=CLASSES, head={"name": head}
    )


TASKS = {
    "linear": lambda: task(),
    "attentive": lambda: task(head={"kind": "attentive"}),
    "regression": lambda: RegressionTask(
        small(), modalities=MODALITIES, targets=("age",), loss={"mean": 50.0, "std": 9.0}
    ),
    "pyramid": _segmentation,
    "fpn": lambda: _segmentation("fpn", size=(32, 32)),
    "light": lambda: _segmentation("light", **vars(_volume()["img"])),
    "swin_unetr": lambda: _over_resenc("swin_unetr"),
    "unet": lambda: _segmentation("unet"),
    "unetr": lambda: _segmentation("unetr", **vars(_volume()["img"])),
    "upernet": lambda: _segmentation("upernet"),  # pools to fixed numbers of cells
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_the_graph_of_a_task_says_what_the_task_says(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    given = TASKS[name]().eval()
    card = export_graph(given, tmp_path, dynamic_size=name != "upernet")
    facts = json.loads(card.read_text())
    ((sensor, modality),) = given.backbone.modalities.items()
    is_free = modality.kind == "image" and name not in ("fpn", "upernet")  # fpn pads odd sizes
    assert facts["inputs"][0]["size_is_free"] is is_free
    size = (24, 40) if is_free else modality.size
    mean = torch.tensor(modality.mean).view(-1, *[1] * len(size))
    values = mean + 10 * torch.randn(5, modality.num_channels, *size)
    values[1, :, :3] = float("nan")
    with torch.no_grad():
        wanted = given.logits({sensor: values})
    (found,) = _run(card, values)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    axes = {2: "B K", 4: "B K H W", 5: "B K X Y Z"}[wanted.ndim]
    (out,) = facts["outputs"]
    assert (out["name"], out["axes"]) == ("numbers" if name == "regression" else "logits", axes)
    assert facts["task"]["names"] == list(given.classes) and out["width"] == len(given.classes)
    assert sorted(path.name for path in tmp_path.glob("task.onnx*"))[-1] == "task.onnx.json"


def test_the_verb_refuses_options_of_graphs_without_a_graph(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", "--checkpoint", str(tmp_path), "--output", str(tmp_path / "out")]
    for more in (["--size", "16"], ["--modalities", "s2"], ["--size", "16", "--format", "timm"]):
        assert main([*words, *more]) == 2
        assert "--modalities and --size belong to graphs" in capsys.readouterr().err
    assert main([*words, "--format", "onxx"]) == 2
    assert "invalid choice: 'onxx'" in capsys.readouterr().err
