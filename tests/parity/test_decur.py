"""DeCUR and its siblings against numbers made by running the published code."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from golden_files import FOLDER, golden_files
from golden_files import Golden as GoldenFile
from grouped import grouped
from torch import Tensor, nn

from domainssl.backbones.encoders.backbone import EncoderSizes
from domainssl.backbones.encoders.nets import ResNetEncoder, ViTEncoder, make_encoder
from domainssl.losses.contrastive import info_nce, nt_xent
from domainssl.losses.decorrelation import barlow_twins, redundancy, standardize, vicreg
from domainssl.modality import Modality
from domainssl.nn.deformable import DeformableAttention
from domainssl.nn.norm import GlobalBatchNorm
from domainssl.nn.normalization import Normalizer
from domainssl.objectives.decur import DeCUR, DeCUROptions
from domainssl.training.lars import LARS

FILES = golden_files("decur")
VIEWS = {"s1": ("f1_1", "f1_2"), "s2": ("f2_1", "f2_2")}
FORMS = ("gram", "matrix")


def test_golden_files_exist() -> None:
    assert FILES, f"no decur_*.safetensors in {FOLDER}"


def some(name: str, bands: int) -> Modality:
    return Modality(
        name=name,
        kind="image",
        channels=tuple(f"{name}_{i}" for i in range(bands)),
        value_unit="arbitrary",
    )


class Golden(GoldenFile):
    """One golden file, and the objective it describes."""

    def head(self) -> dict[str, Tensor]:
        state = {
            n.removeprefix("state_dict/"): t
            for n, t in self.tensors.items()
            if n.startswith("state_dict/")
        }
        return {n: t for n, t in state.items() if not n.startswith("backbone_")}

    def build(self, **options: Any) -> DeCUR:
        """Build the objective; its encoder has the width of the file's features, no more."""
        c = self.config
        widths = [int(w) for w in c["projector"].split("-")]
        model = DeCUR(
            {"s1": some("s1", 2), "s2": some("s2", 13)},
            **grouped(
                encoder="transformer",
                sizes=EncoderSizes(width=c["projector_in"], depth=1, heads=1),
                projector=tuple(widths),
                common_ratio=c["dim_common"] / widths[-1],
                off_diagonal=c["lambda"],
                context_size=16,
                normalization="identity",
                options=DeCUROptions(**{"correlation_divisor": self.divisor, **options}),
            ),
        )
        assert model.common == c["dim_common"]
        for module in model.modules():
            if isinstance(module, GlobalBatchNorm):
                module.eps, module.momentum = c["bn_eps"], c["bn_momentum"]
        model.load_pretraining_parts(self.head())
        return model

    @property
    def divisor(self) -> str:
        """Return what the file's correlations are divided by."""
        choices = {self.config["N"]: "global", 4 * self.config["N"]: "4n"}
        return choices[self.config.get("divisor", self.config["N"])]

    def said(self, part: str, name: str, pattern: str) -> list[float]:
        """Return the numbers that a description of the file gives."""
        found = re.search(pattern, self.facts[part][name])
        assert found, f"{part}, {name}: nothing like {pattern!r}"
        return [float(number) for number in found.groups()]

    def tolerance(self, name: str) -> float:
        """Return the absolute tolerance of outputs, in units of max(1, max|b|)."""
        found = re.search(r"abs ([\d.e-]+)", self.facts["tolerances"].get(name, "abs 1e-3"))
        assert found, name
        return float(found[1])


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def assert_loss(actual: Tensor, expected: Tensor) -> None:
    assert float(actual.detach()) == pytest.approx(float(expected), rel=1e-5)


def assert_gradient(actual: Tensor | None, expected: Tensor, name: str) -> None:
    assert actual is not None, name
    bound = max(1e-6, 1e-4 * float(expected.abs().max()))
    assert float((actual - expected).abs().max()) <= bound, name


def assert_output(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    bound = tolerance * max(1.0, float(expected.abs().max()))
    assert float((actual - expected).abs().max()) <= bound


# -- projector and losses --------------------------------------------------------------------


def _projected(model: DeCUR, golden: Golden) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
    features = {n: golden[f"input/{n}"].clone().requires_grad_() for v in VIEWS.values() for n in v}
    z = {name: [model.project(features[n], name) for n in names] for name, names in VIEWS.items()}
    return features, z


def _rows(golden: Golden) -> dict[str, Tensor]:
    return dict.fromkeys(VIEWS, torch.ones(golden.config["N"], dtype=torch.bool))


def test_losses_gradients_and_buffers_of_one_step(golden: Golden) -> None:
    model = golden.build().train()
    features, z = _projected(model, golden)
    losses = model.losses(z, _rows(golden))
    assert_loss(3 * losses["intra_s1"], golden["loss/m1"])
    assert_loss(3 * losses["intra_s2"], golden["loss/m2"])
    assert_loss(3 * (losses["common"] + losses["unique"]), golden["loss/cross"])
    total = torch.stack(list(losses.values())).sum()
    assert_loss(total, golden["loss/total"])
    total.backward()
    for name, feature in features.items():
        assert_gradient(feature.grad, golden[f"grad_input/{name}"], name)
    parameters = dict(model.heads["shared"].named_parameters())
    wanted = [n for n in golden.tensors if n.startswith("grad/projector1.")]
    golden.need(bool(wanted), "grad/projector1.*")
    for name in wanted:
        own = name.removeprefix("grad/projector1.")
        assert_gradient(parameters[own].grad, golden[name], name)
    after = {n.removeprefix("module."): t for n, t in model.to_reference().items()}
    wanted = [n for n in golden.tensors if n.startswith("state_after/")]
    golden.need(bool(wanted), "state_after/*")
    for name in wanted:
        actual = after[name.removeprefix("state_after/")].float()
        torch.testing.assert_close(actual, golden[name], rtol=1e-4, atol=1e-6)


def test_the_paper_sums_the_four_terms(golden: Golden) -> None:
    model = golden.build(loss_form="paper_sum")
    _, z = _projected(model, golden)
    losses = model.losses(z, _rows(golden))
    expected = golden["loss/m1"] + golden["loss/m2"] + 2 * golden["loss/cross"]
    assert_loss(torch.stack(list(losses.values())).sum(), expected)


def test_the_published_divisor_assumes_four_ranks(golden: Golden) -> None:
    model = golden.build(correlation_divisor="4n")
    _, z = _projected(model, golden)
    found = model.losses(z, _rows(golden))["intra_s1"]
    a, b = (standardize(v) for v in z["s1"])
    terms = redundancy(a, b, divisor=4 * golden.config["N"])
    torch.testing.assert_close(3 * found, terms.weighted(golden.config["lambda"]))


@pytest.mark.parametrize("form", FORMS)
def test_losses_on_given_embeddings(golden: Golden, form: Any) -> None:
    z = {n: standardize(golden[f"zinput/{n}"]) for n in ("z1_1", "z1_2", "z2_1", "z2_2")}
    common = golden.config["dim_common"]
    pairs = {
        "m1": redundancy(z["z1_1"], z["z1_2"], form=form),
        "m2": redundancy(z["z2_1"], z["z2_2"], form=form),
        "common": redundancy(z["z1_1"][:, :common], z["z2_1"][:, :common], form=form),
        "unique": redundancy(z["z1_1"][:, common:], z["z2_1"][:, common:], target=0, form=form),
    }
    for name, terms in pairs.items():
        assert_loss(terms.diagonal, golden[f"zloss/{name}_on"])
        assert_loss(terms.off_diagonal, golden[f"zloss/{name}_off"])
        assert_loss(terms.weighted(golden.config["lambda"]), golden[f"zloss/{name}"])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["barlowtwins", "simclr", "clip", "vicreg"])
def test_baselines(golden: Golden, name: str, form: str) -> None:
    a, b = (golden[f"zinput/{n}"].clone().requires_grad_() for n in ("z1_1", "z2_1"))
    loss = _baseline(name, a, b, golden, form)
    loss.backward()
    assert_loss(loss, golden[f"baseline/{name}/loss"])
    assert_gradient(a.grad, golden[f"baseline/{name}/grad_z1"], "z1")
    assert_gradient(b.grad, golden[f"baseline/{name}/grad_z2"], "z2")


def _baseline(name: str, a: Tensor, b: Tensor, golden: Golden, form: Any) -> Tensor:
    if name == "barlowtwins":
        return barlow_twins(a, b, off_diagonal=golden.config["lambda"], form=form)
    part, entry = "part_C_baselines", f"baseline/{name}"
    if name == "vicreg":
        weights = golden.said(part, entry, r"coefficients ([\d.]+)/([\d.]+)/([\d.]+)")
        terms = vicreg(a, b, form=form)
        return torch.stack([w * t for w, t in zip(weights, terms, strict=True)]).sum()
    (temperature,) = golden.said(part, entry, r"temperature ([\d.]+)")
    if name == "simclr":
        return nt_xent(a, b, temperature)
    return info_nce(a, b, torch.tensor(1 / temperature), symmetric=False)


def test_steps_of_lars(golden: Golden) -> None:
    w, b = (nn.Parameter(golden[f"lars/{n}0"].clone()) for n in ("W", "b"))
    zero = nn.Parameter(torch.zeros_like(golden["lars/Z1"]))
    words = ("lr {} for 2-D", "{} for 1-D", "momentum {}", "eta {}", "weight decay {}")
    lr, lr_bias, momentum, eta, decay = (
        golden.said("part_D_lars", "lars/*", text.replace("{}", r"([\d.]*\d)"))[0] for text in words
    )
    groups = [
        {"params": [w, zero], "weight_decay": decay},
        {"params": [b], "lr": lr_bias, "adapt": False},
    ]
    optimizer = LARS(groups, lr=lr, momentum=momentum, trust=eta)
    steps = sum(bool(re.fullmatch(r"lars/gW\d+", n)) for n in golden.tensors)
    for step in range(steps):
        for name, parameter in (("W", w), ("Z", zero), ("b", b)):
            parameter.grad = golden[f"lars/g{name}{step}"].clone()
        optimizer.step()
        for name, parameter in (("W", w), ("Z", zero), ("b", b)):
            expected = golden[f"lars/{name}{step + 1}"]
            assert float((parameter - expected).abs().max()) <= 1e-6, (name, step)


# -- scaling and backbones -------------------------------------------------------------------


def test_eight_bit_scaling_is_exact(golden: Golden) -> None:
    values = {
        "s1_vv": ("norm/s1_db", -12.54847273, 5.25697717),
        "s1_vh": ("norm/s1_db", -20.19237134, 5.91150917),
        "s2_b4": ("norm/s2_dn", 1363.52445545, 1138.84957046),
    }
    for name, (source, mean, std) in values.items():
        modality = Modality(
            name="m",
            kind="table",
            channels=("a",),
            value_unit="arbitrary",
            mean=(mean,),
            std=(std,),
        )
        out = Normalizer({"m": modality}, "mean2std8")({"m": golden[source].unsqueeze(1)})["m"]
        assert torch.equal((out * 255).round().byte().squeeze(1), golden[f"norm/{name}_u8"])


def by_formula(module: nn.Module, golden: Golden) -> None:
    """Fill a module with the weights that the file's formula describes."""
    a, b, c, d = golden.facts["part_F_backbones"]["weight_formula"]["constants"]
    state = module.state_dict()
    keys = sorted(n for n in state if not n.endswith("num_batches_tracked"))
    for j, name in enumerate(keys):
        tensor = state[name]
        i = torch.arange(tensor.numel(), dtype=torch.int64)
        u = 2 * (((a * i * i + b * i + c * j + d) % 65521).double() / 65521) - 1
        if name.endswith("running_mean"):
            u = 0.1 * u
        elif name.endswith("running_var"):
            u = 1 + 0.2 * u
        elif name.endswith(("cls_token", "pos_embed", "rpe_table")):
            u = 0.5 * u
        elif tensor.ndim >= 2:
            u = math.sqrt(6 / math.prod(tensor.shape[1:])) * u
        elif name.endswith(".weight"):
            small = name.endswith(("bn3.weight", "downsample.1.weight"))
            u = (0.3 if small else 1.0) * (1 + 0.1 * u)
        else:
            u = 0.1 * u
        state[name] = u.view(tensor.shape).float()
    module.load_state_dict(state)


def waves(*shape: int) -> Tensor:
    n, c, y, x = torch.meshgrid(*(torch.arange(s).double() for s in shape), indexing="ij")
    inner = 0.11 * (y + 1) * (1 + 0.07 * c) + 0.07 * x * (1 + 0.05 * c) + 0.9 * n + 0.3 * c
    return (0.5 + 0.5 * torch.sin(inner)).float()


def encoder(name: str, bands: int, side: int, golden: Golden) -> Any:
    built = make_encoder(name, some("m", bands), {}, side)
    assert isinstance(built, ResNetEncoder | ViTEncoder)
    by_formula(built.net, golden)
    return built


def valid(x: Tensor) -> Tensor:
    return torch.ones(len(x), *x.shape[2:], dtype=torch.bool)


def modules(golden: Golden, pattern: str) -> list[tuple[str, str]]:
    """Return names and descriptions of the file's networks whose name fits."""
    said: dict[str, str] = golden.facts["part_F_backbones"]["modules"]
    found = [(n, text) for names, text in said.items() for n in names.split(" / ")]
    found = [(n, text) for n, text in found if re.fullmatch(pattern, n)]
    golden.need(bool(found), f"network {pattern}")
    return found


def input_of(text: str, bands: int | None = None) -> Tensor:
    """Return the input that a description gives the shape of; C stands for the bands."""
    found = re.search(r"input \[([\dC,]+)\]", text)
    assert found, text
    return waves(*(int(n) if n != "C" else bands or 0 for n in found[1].split(",")))


def bands_of(name: str) -> int:
    return {"s1": 2, "s2": 13}[re.findall(r"s[12]", name.removeprefix("vits"))[0]]


def test_resnets(golden: Golden) -> None:
    """Batch norm over few values magnifies rounding: in float64 ours is the same everywhere."""
    for name, text in modules(golden, r"rn\d+_s[12]"):
        bands, depth = bands_of(name), name.split("_")[0].removeprefix("rn")
        x = input_of(text, bands).double()
        net = encoder(f"resnet{depth}", bands, x.shape[-1], golden).double()
        for mode in ("eval", "train"):
            with torch.no_grad():
                pooled = net.train(mode == "train")(x, valid(x)).pooled
            expected = golden[f"output/{name}_{mode}_pooled"]
            assert_output(pooled, expected, golden.tolerance(f"pooled outputs {mode}"))


def attention(golden: Golden, name: str, text: str) -> DeformableAttention:
    """Build the block of a description, its weights filled by the formula."""
    found = re.search(r"(\d+) channels, .*stride (\d+), (\d+)x\d+.*table (\d+)x", text)
    assert found, f"{name}: {text}"
    width, stride, kernel, table = map(int, found.groups())
    block = DeformableAttention(width, (table + 1) // 2, kernel, stride)
    by_formula(block, golden)
    return block


def test_deformable_attention(golden: Golden) -> None:
    tolerance = golden.tolerance("rda, vit")
    for name, text in modules(golden, r"rda_l\d"):
        block, x = attention(golden, name, text), input_of(text)
        with torch.no_grad():
            where = block.positions(block.proj_q(x))
            out = block(x)
        wanted = [n for n in golden.tensors if n.startswith(f"output/{name}_channels")]
        golden.need(bool(wanted), f"output/{name}_channels*")
        for entry in wanted:
            first, last = (int(n) for n in entry.rsplit("channels", 1)[1].split("_"))
            assert_output(out[:, first : last + 1], golden[entry], tolerance)
        assert_output(where, golden[f"output/{name}_pos"][0], 1e-5)


def test_resnet_with_deformable_attention(golden: Golden) -> None:
    found = modules(golden, r"rda_l\d")
    blocks = nn.ModuleDict({n.removeprefix("rda_"): attention(golden, n, t) for n, t in found})
    for name, text in modules(golden, r"rn\d+_rda_s[12]_\d+"):
        depth, x = name.split("_")[0].removeprefix("rn"), input_of(text)
        net = encoder(f"resnet{depth}", x.shape[1], x.shape[-1], golden).eval()
        with torch.no_grad():
            pooled = net(x, valid(x), blocks).pooled
        assert_output(pooled, golden[f"output/{name}_eval_pooled"], golden.tolerance(name))


def test_vit_small(golden: Golden) -> None:
    for name, text in modules(golden, r"vits\d+_s[12]"):
        x = input_of(text)
        patch = name.split("_")[0].removeprefix("vits")
        net = encoder(f"vit_small_patch{patch}_224", x.shape[1], x.shape[-1], golden).eval()
        with torch.no_grad():
            out = net(x, valid(x))
        assert_output(out.pooled, golden[f"output/{name}_eval"], golden.tolerance("rda, vit"))
        assert torch.equal(out.pooled, out.cls)
