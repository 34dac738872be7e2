"""SwinUNETR SSL against numbers made by running the published code on MONAI."""

from __future__ import annotations

import re

import pytest
import torch
from golden_files import FOLDER, golden_files
from golden_files import Golden as GoldenFile
from torch import Tensor

from domainssl.backbones.encoders.swin import SwinArchitecture
from domainssl.modality import Modality
from domainssl.nn.cutout import Boxes, CutOut, box_mask, box_noise, side_ranges
from domainssl.objectives.swinunetr_ssl import SwinEncoding, SwinUNETRSSL, SwinUNETRSSLOptions

FILES = golden_files("swinunetr_ssl")


def test_golden_files_exist() -> None:
    assert FILES, f"no swinunetr_ssl_*.safetensors in {FOLDER}"


class Golden(GoldenFile):
    """One golden file, and the objective it describes."""

    def below(self, prefix: str) -> dict[str, Tensor]:
        found = {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}
        self.need(bool(found), f"{prefix}*")
        return found

    def state(self) -> dict[str, Tensor]:
        """Return the weights under the names of the research code."""
        scale = self.facts["weight_scale"]
        return {n: t.float() * scale[n] for n, t in self.below("state_q/").items()}

    def volumes(self, name: str) -> Tensor:
        return self[name].float() / 255

    def architecture(self, merging: str = "standard") -> SwinArchitecture:
        c = self.config
        return SwinArchitecture(
            feature_size=c["feature_size"],
            depths=tuple(c["depths"]),
            heads=tuple(c["heads"]),
            window=c["window"],
            residual_convolution=any("layers1c" in n for n in self.tensors),
            merging=merging,  # type: ignore[arg-type]
        )

    def build(self, merging: str = "standard") -> SwinUNETRSSL:
        c, terms = self.config, ("rotation", "contrastive", "reconstruction")
        names = tuple(f"c{i}" for i in range(c["in_channels"]))
        state = self.state()
        model = SwinUNETRSSL(
            {"ct": Modality(name="ct", kind="volume", channels=names, value_unit="arbitrary")},
            SwinEncoding(architecture=self.architecture(merging), normalization="scale(1)"),
            temperature=c["temperature"],
            embedding=len(state["contrastive_head.bias"]),
            loss_weights=dict(zip(terms, c["loss_weights"], strict=True)),
            context_size=tuple(c["crop"]),
            options=SwinUNETRSSLOptions(reference=True),
        )
        encoder = {n.removeprefix("swinViT."): t for n, t in state.items() if n[:4] == "swin"}
        model.backbone.encoder.net.load_state_dict(encoder)
        model.load_pretraining_parts({n: t for n, t in state.items() if n[:4] != "swin"})
        return model

    def tolerance(self, name: str) -> float:
        """Return the last number of a tolerance's description before its scale."""
        said = next(text for names, text in self.facts["tolerances"].items() if name in names)
        return float(re.findall(r"\d(?:\.\d+)?e-\d+", said)[-1])

    def assert_output(self, actual: Tensor, expected: Tensor) -> None:
        bound = self.tolerance("hidden states") * max(1.0, float(expected.abs().max()))
        assert float((actual - expected).abs().max()) <= bound

    def assert_loss(self, actual: Tensor, expected: Tensor) -> None:
        rel = self.tolerance("losses")
        assert float(actual.detach()) == pytest.approx(float(expected), rel=rel)

    def assert_gradient(self, actual: Tensor | None, expected: Tensor, name: str) -> None:
        assert actual is not None, name
        bound = max(1e-6, self.tolerance("gradients") * float(expected.abs().max()))
        assert float((actual - expected).abs().max()) <= bound, name


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def _views(golden: Golden, model: SwinUNETRSSL) -> tuple[Tensor, Tensor, Tensor]:
    """Corrupted views, their classes and the turned crops, view 1 then view 2."""
    turns = torch.tensor(golden.config["rotations"])
    clean = golden.volumes("in/volume_u8")
    target = torch.cat([model.rotate(clean, view) for view in turns])
    seen = torch.cat([golden.volumes(f"in/augmented{view}_u8") for view in (1, 2)])
    assert torch.equal(golden["in/rotation"], turns)
    return seen, turns.flatten(), target


def _deepest(model: SwinUNETRSSL, views: Tensor) -> Tensor:
    return model._deepest({"ct": views})


def _thinned(maps: Tensor, expected: Tensor) -> Tensor:
    """Take every n-th voxel, as many as the file holds."""
    steps = [a // b for a, b in zip(maps.shape[2:], expected.shape[2:], strict=True)]
    return maps[:, :, :: steps[0], :: steps[1], :: steps[2]]


def test_hidden_states(golden: Golden) -> None:
    model = golden.build().eval()
    seen = _views(golden, model)[0][:1]
    with torch.no_grad():
        found = model.backbone.feature_pyramid({"ct": seen})["ct"]
    for level, expected in golden.below("out/hidden/").items():
        golden.assert_output(_thinned(found[int(level)], expected), expected)


def test_hidden_states_of_the_merging_before_monai_1_5(golden: Golden) -> None:
    wanted = golden.below("legacy_merging/hidden/")
    model = golden.build("legacy").eval()
    seen = _views(golden, model)[0][:1]
    with torch.no_grad():
        found = model.backbone.feature_pyramid({"ct": seen})["ct"]
    for level, expected in wanted.items():
        golden.assert_output(_thinned(found[int(level)], expected), expected)


def test_heads_losses_and_gradients_of_one_step(golden: Golden) -> None:
    model = golden.build().train()
    seen, turns, target = _views(golden, model)
    logits, vectors, predicted = model.heads(_deepest(model, seen))
    golden.assert_output(logits, golden["out/rotation_logits"])
    items = len(seen) // 2
    for view in (1, 2):
        golden.assert_output(
            vectors[(view - 1) * items : view * items], golden[f"out/contrast_{view}"]
        )
    sample = golden["out/reconstruction_sample"]
    golden.assert_output(_thinned(predicted, sample), sample)
    losses = model.losses(logits, vectors, predicted, turns=turns, target=target)
    weights = dict(zip(losses, golden.config["loss_weights"], strict=True))
    named = {"rotation": "rotation", "contrastive": "contrast", "reconstruction": "reconstruction"}
    for own, name in named.items():
        expected = golden[f"out/loss/{name}"]
        plain = [expected, expected * weights[own]]  # the file may hold it weighted or not
        assert any(
            float(losses[own].detach()) == pytest.approx(float(e), rel=golden.tolerance("losses"))
            for e in plain
        ), own
    total = torch.stack(list(losses.values())).sum()
    golden.assert_loss(total, golden["out/loss/total"])
    total.backward()
    parameters = {
        n.replace("backbone.encoder.net.", "swinViT.").replace("reconstruction_head.", "conv."): p
        for n, p in model.named_parameters()
    }
    for name, expected in golden.below("out/grad/").items():
        golden.assert_gradient(parameters[name].grad, expected, name)


def test_losses_on_given_values(golden: Golden) -> None:
    given = {n: t.clone() for n, t in golden.below("losses/in/").items()}
    for name in ("c1", "c2", "rec", "rotation"):
        given[name].requires_grad_()
    model = golden.build()
    losses = model.losses(
        given["rotation"],
        torch.cat([given["c1"], given["c2"]]),
        given["rec"],
        turns=given["label"],
        target=given["target"],
    )
    golden.assert_loss(losses["rotation"], golden["losses/rotation"])
    golden.assert_loss(losses["contrastive"], golden["losses/contrast"])
    golden.assert_loss(losses["reconstruction"], golden["losses/reconstruction"])
    torch.stack(list(losses.values())).sum().backward()
    for name, expected in golden.below("losses/grad/").items():
        golden.assert_gradient(given[name].grad, expected, name)


def test_rotations_are_exact(golden: Golden) -> None:
    model, x, turns = golden.build(), golden["rotate/in"], golden["rotate/class"]
    found = model.rotate(x.expand(len(turns), *x.shape[1:]), turns)
    assert torch.equal(found, golden["rotate/out"])


def _boxes(golden: Golden, kind: str) -> Boxes:
    both = golden[f"cut/{kind}/boxes"].unsqueeze(0)
    used = torch.ones(both.shape[:2], dtype=torch.bool)
    return Boxes(both[..., :3], both[..., 3:], used)


@pytest.mark.parametrize("kind", ["noise", "swap"])
def test_sides_of_boxes_are_drawn_from_the_published_ranges(golden: Golden, kind: str) -> None:
    expected = [tuple(row) for row in golden[f"cut/{kind}/size_ranges"].tolist()]
    assert side_ranges(golden.config["cut"]["size"], CutOut()) == expected


def test_noise_in_boxes_is_exact(golden: Golden) -> None:
    before, after, boxes = golden["cut/in"], golden["cut/noise/out"], _boxes(golden, "noise")
    inside = box_mask(boxes, before.shape[1:])
    assert torch.equal(torch.where(inside, after, before), after)
    scaled = box_noise(boxes, after.unsqueeze(0), CutOut())
    # the last box is complete, and its values run from 0 to 1 already
    place = tuple(slice(a, b) for a, b in zip(boxes.start[0, -1], boxes.stop[0, -1], strict=True))
    assert torch.equal(scaled[0][(slice(None), *place)], after[(slice(None), *place)])


def test_swapped_boxes_are_exact(golden: Golden) -> None:
    before, after = golden["cut/in"], golden["cut/swap/out"]
    inside = box_mask(_boxes(golden, "swap"), before.shape[1:])
    assert torch.equal(torch.where(inside, golden["cut/other"], before), after)
