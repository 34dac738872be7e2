"""data2vec 1.0 (BEiT) against numbers made by running the published code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_files import FOLDER, Golden, close, close_gradient, golden_files
from safetensors.torch import load_file
from torch import Tensor, nn

from domainssl._torch import follow
from domainssl.backbones.beit import BEiTArchitecture, BEiTBackbone
from domainssl.losses.latent import layer_targets, masked_regression, spread_penalty
from domainssl.modality import Modality

GOLDEN = ("data2vec",)
FILES = golden_files("data2vec")


def test_golden_files_exist() -> None:
    assert FILES, "no data2vec_*.safetensors"


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def near(ours: Tensor, expected: Tensor) -> None:
    bound = 2e-5 * max(1.0, float(expected.abs().max()))
    assert ours.shape == expected.shape
    assert float((ours.detach() - expected).abs().max()) <= bound


def built(golden: Golden, who: str) -> BEiTBackbone:
    """Return the backbone of the golden file, read as a published file."""
    m = golden.config["model"]
    image = Modality(
        name="m", kind="image", channels=tuple(f"c{n}" for n in range(m["in_chans"])),
        value_unit="arbitrary", size=tuple(m["img_size"]),
    )  # fmt: skip
    architecture = BEiTArchitecture(
        width=m["embed_dim"], depth=m["depth"], heads=m["num_heads"], mlp_ratio=m["mlp_ratio"],
        qkv_bias=m["qkv_bias"], init_values=m["init_values"],
        shared_bias=m["use_shared_rel_pos_bias"],
    )  # fmt: skip
    variant: dict[str, Any] = {
        "architecture": architecture, "patch_size": m["patch_size"],
        "image_size": tuple(m["img_size"]), "normalization": "identity",
    }  # fmt: skip
    state = {"model": golden.below(f"state/{who}/")}
    return BEiTBackbone.from_reference(state, variant, {"m": image})[0].train()


def test_layers_of_the_teacher(golden: Golden) -> None:
    _, ends, branches = built(golden, "teacher").eval().encode_layers({"m": golden["in/image"]})
    for kind, found in (("end", ends), ("fc", branches)):
        for number, layer in enumerate(found):
            near(layer, golden[f"teacher_layer/{kind}/{number}"])


def variants() -> list[Any]:
    return [
        pytest.param(path, name, id=f"{path.stem}-{name}")
        for path in FILES
        for name in Golden(path).config["variants"]
    ]


@pytest.mark.parametrize(("path", "name"), variants())
def test_prediction_target_loss_and_gradient(path: Any, name: str) -> None:
    golden = Golden(path)
    c, options = golden.config, golden.config["variants"][name]
    mask, x = golden["in/mask"].bool().flatten(1), {"m": golden["in/image"]}
    student, teacher = built(golden, "student"), built(golden, "teacher").eval()
    state = golden.below("state/student/")
    head = nn.Linear(c["model"]["embed_dim"], c["model"]["embed_dim"])
    head.load_state_dict({n: state[f"lm_head.{n}"] for n in ("weight", "bias")})
    with torch.no_grad():
        _, ends, branches = teacher.encode_layers(x)
    layers = {"end": ends, "fc": branches}[options["layer_results"]]
    target = layer_targets(
        [layers[n] for n in c["target_layers"]],
        "layer" if options["target_layer_norm_last"] else "none",
        last_norm=options["post_target_layer_norm"],
    )
    near(target[mask], golden[f"{name}/target"])
    prediction = head(student.encode_layers(x, mask)[0].tokens["m"])
    near(prediction[mask], golden[f"{name}/prediction"])
    beta = None if options.get("l2_loss") else options["l1_beta"]
    loss = masked_regression(prediction, target, mask, beta)
    if options.get("var_w0"):
        spread = spread_penalty(prediction.flatten(0, 1), mask.flatten(), options["var_margin0"])
        loss = loss + options["var_w0"] * spread
    close(loss.detach(), golden[f"{name}/loss"], rtol=1e-5)
    loss.backward()
    parameters = dict(student.named_parameters())
    parameters |= {f"lm_head.{n}": p for n, p in head.named_parameters()}
    for own, expected in golden.below(f"{name}/grad/").items():
        close_gradient(parameters[own].grad, expected)


def test_the_teacher_follows(golden: Golden) -> None:
    for name in golden.config["variants"]:
        for own, after in golden.below(f"{name}/ema_after/").items():
            teacher, student = (golden[f"state/{who}/{own}"] for who in ("teacher", "student"))
            apart = student.double() - teacher.double()
            moved = after.double() - teacher.double()
            share = float((moved * apart).sum() / apart.square().sum())  # not in the json
            assert 0 < share < 0.5
            ours = [teacher.clone()]
            follow(ours, [student], 1 - share)
            close(ours[0], after, rtol=1e-6, atol=1e-7)


def test_files_round_trip(golden: Golden) -> None:
    written, state = built(golden, "student").to_reference(), golden.below("state/student/")
    kept = {n for n in state if not n.startswith("lm_head.") and not n.endswith("_index")}
    assert set(written) == kept and all(torch.equal(written[n], state[n]) for n in kept)


@pytest.mark.parametrize(("form", "norm"), [("v1", "layer"), ("v2", "instance")])
def test_targets(form: str, norm: Any) -> None:
    tensors = load_file(FOLDER / "losses.safetensors")
    ours = layer_targets(list(tensors["data2vec_targets/input/layers"]), norm)
    close(ours, tensors[f"data2vec_targets/aux/{form}"], rtol=1e-9, atol=1e-12)
