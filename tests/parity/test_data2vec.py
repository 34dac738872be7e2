"""data2vec 1.0 (BEiT) against numbers made by running the published code."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from golden_files import FOLDER, Golden, close, close_gradient, golden_files
from safetensors.torch import load_file
from torch import Tensor, nn

from domainssl.backbones.beit import BEiTArchitecture, BEiTBackbone
from domainssl.losses.latent import layer_targets
from domainssl.modality import Modality
from domainssl.nn.views import Views
from domainssl.objectives.base import Generators
from domainssl.objectives.data2vec import (
    Data2Vec,
    Data2VecArchitecture,
    Data2VecEncoding,
    Data2VecLoss,
    Data2VecOptions,
    Data2VecTargets,
    Data2VecTeacher,
)

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


def share_of(golden: Golden, name: str) -> float:
    """Return the share by which the golden file's teacher moved; it is not in the json."""
    found = golden.below(f"{name}/ema_after/")
    sums = torch.zeros(2, dtype=torch.float64)
    for own, after in found.items():
        teacher, student = (golden[f"state/{who}/{own}"].double() for who in ("teacher", "student"))
        moved, apart = after.double() - teacher, student - teacher
        sums += torch.stack([(moved * apart).sum(), apart.square().sum()])
    share = float(sums[0] / sums[1])
    assert found and 0 < share < 0.5
    return share


def objective(golden: Golden, name: str) -> Data2Vec:
    """Return the objective of a variant, with the weights of student, head and teacher."""
    c, options = golden.config, golden.config["variants"][name]
    student = built(golden, "student")
    m, margin = c["model"], options.get("var_margin0")
    model = Data2Vec(
        {n: modality.to_dict() for n, modality in student.modalities.items()},
        Data2VecEncoding(
            size="tiny",
            architecture=Data2VecArchitecture(
                width=m["embed_dim"], depth=m["depth"], heads=m["num_heads"],
                mlp_ratio=m["mlp_ratio"], qkv_bias=m["qkv_bias"], init_values=m["init_values"],
                shared_bias=m["use_shared_rel_pos_bias"], drop_path=0.0, attention_dropout=0.0,
            ),
            patch_size=m["patch_size"],
            normalization="identity",
        ),
        views=Views(crop_area=(1.0, 1.0), crop_aspect=1.0, flip=0.0),
        teacher=Data2VecTeacher(momentum=1 - share_of(golden, name)),
        targets=Data2VecTargets(
            layers=c["target_layers"],
            output=options["layer_results"],
            norm="layer" if options["target_layer_norm_last"] else "none",
            last_norm=options["post_target_layer_norm"],
        ),
        loss=Data2VecLoss(
            beta=None if options.get("l2_loss") else options["l1_beta"],
            spread=options.get("var_w0", 0.0),
            **({} if margin is None else {"margin": margin}),
        ),
        context_size=tuple(m["img_size"]),
        options=Data2VecOptions(reference=True),
    )  # fmt: skip
    model.backbone.load_state_dict(student.state_dict())
    teacher: nn.Module = model.teacher["backbone"]  # type: ignore[assignment]
    teacher.load_state_dict(built(golden, "teacher").state_dict())
    state = golden.below("state/student/")
    model.head.load_state_dict({n: state[f"lm_head.{n}"] for n in ("weight", "bias")})
    return model.train()


@pytest.mark.parametrize(("path", "name"), variants())
def test_a_whole_step(path: Any, name: str) -> None:
    golden = Golden(path)
    model, batch = objective(golden, name), {"m": golden["in/image"]}
    mask = golden["in/mask"].bool()
    draws = model.draw(batch, Generators(*(torch.Generator().manual_seed(n) for n in (0, 1))))
    step = model(batch, dataclasses.replace(draws, mask=mask.flatten(1).unsqueeze(1)))
    rows = step.outputs["counted"]
    assert torch.equal(rows, mask.flatten())
    near(step.outputs["target"][rows], golden[f"{name}/target"])
    near(step.outputs["prediction"][rows], golden[f"{name}/prediction"])
    loss = torch.stack(list(step.losses.values())).sum()
    close(loss.detach(), golden[f"{name}/loss"], rtol=1e-5)
    loss.backward()
    parameters = dict(model.backbone.named_parameters())
    parameters |= {f"lm_head.{n}": p for n, p in model.head.named_parameters()}
    for own, expected in golden.below(f"{name}/grad/").items():
        close_gradient(parameters[own].grad, expected)
    model.after_step(step)
    for own, after in golden.below(f"{name}/ema_after/").items():
        close(model.teacher.get_parameter(f"backbone.{own}"), after, rtol=1e-6, atol=1e-7)


def test_files_round_trip(golden: Golden) -> None:
    written, state = built(golden, "student").to_reference(), golden.below("state/student/")
    kept = {n for n in state if not n.startswith("lm_head.") and not n.endswith("_index")}
    assert set(written) == kept and all(torch.equal(written[n], state[n]) for n in kept)


@pytest.mark.parametrize(("form", "norm"), [("v1", "layer"), ("v2", "instance")])
def test_targets(form: str, norm: Any) -> None:
    tensors = load_file(FOLDER / "losses.safetensors")
    ours = layer_targets(list(tensors["data2vec_targets/input/layers"]), norm)
    close(ours, tensors[f"data2vec_targets/aux/{form}"], rtol=1e-9, atol=1e-12)
