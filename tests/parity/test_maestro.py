"""MAESTRO against numbers made by running the published code."""

from __future__ import annotations

import datetime
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_files import FOLDER, golden_files
from grouped import grouped
from safetensors.torch import load_file
from torch import Tensor

from domainssl.backbones.maestro.backbone import Layout, MAESTROBackbone, Raster
from domainssl.backbones.maestro.files import reference_name
from domainssl.backbones.maestro.inputs import MAESTROInput
from domainssl.losses.patch_groups import patch_group_statistics
from domainssl.modality import Modality
from domainssl.nn.dates import calendar, decimal_year, encode_dates
from domainssl.nn.metric_positions import metric_positions
from domainssl.nn.structured import first_usable, hide_lowest, structured_mask
from domainssl.objectives.base import Generators
from domainssl.objectives.maestro import (
    MAESTRO,
    MAESTROArchitecture,
    MAESTRODraws,
    MAESTROMasking,
)

FILES = golden_files("maestro")
KINDS = {"mod": "modality", "bands": "bands", "dates": "dates", "loc": "locations"}


def test_golden_files_exist() -> None:
    assert FILES, f"no maestro_*.safetensors in {FOLDER}"


def days(dates: Tensor) -> Tensor:
    """Year and day of the year to days since 1970-01-01."""
    flat = [
        (datetime.date(int(y), 1, 1) - datetime.date(1970, 1, 1)).days + int(d) - 1
        for y, d, _ in dates.reshape(-1, 3)
    ]
    return torch.tensor(flat, dtype=torch.int32).view(dates.shape[:-1])


class Golden:
    """One configuration of a golden file: its numbers, and the model it describes."""

    def __init__(self, path: Path, variant: str | None) -> None:
        tensors = load_file(path)
        self.facts: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
        prefix = f"variant/{variant}/" if variant else ""
        self.everything = tensors
        self.tensors = {n.removeprefix(prefix): t for n, t in tensors.items() if prefix in n}
        self.config = self.facts["variants"][variant] if variant else self.facts["main"]
        self.names = [m for m, _ in self.config["resolved"]["groups"]]

    def __getitem__(self, name: str) -> Tensor:
        self.need(name in self.tensors, name)
        return self.tensors[name]

    def need(self, found: bool, name: str) -> None:
        """Skip what this configuration does not have."""
        if not found:
            pytest.skip(f"this golden file has no {name}")

    def state(self) -> dict[str, Tensor]:
        prefix = "state_dict/"
        return {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}

    def bands(self, name: str) -> tuple[tuple[str, ...], list[list[str]]]:
        """Return channels and token groups: the dataset has put bands in order already."""
        channels = [f"b{i}" for i in range(self[f"input/{name}"].shape[2])]
        bands = self.config["modalities"][name]["bands"]
        sizes = [bands] if isinstance(bands, int) else [len(group) for group in bands]
        rest = iter(channels)
        return tuple(channels), [list(itertools.islice(rest, size)) for size in sizes]

    def modalities(self) -> dict[str, Modality]:
        found = {}
        for name in self.names:
            size = tuple(self[f"input/{name}"].shape[-2:])
            found[name] = Modality(
                name=name,
                kind="series",
                channels=self.bands(name)[0],
                value_unit="arbitrary",
                size=size,
            )
        return found

    def inputs(self) -> dict[str, MAESTROInput]:
        resolved, chosen = self.config["resolved"], {}
        groups = dict(resolved["groups"])
        for name in self.names:
            given = self.config["modalities"][name]
            chosen[name] = MAESTROInput(
                patch_size=given["patch"],
                group=groups[name],
                embedding=resolved["patch_embed_of_modality"][name],
                token_bands=self.bands(name)[1],
                target_bands=resolved["norm_bands"][name],
                image_size=given["image_size"],
                interpolation=self.config["interpolate"],
                is_elevation=bool(given.get("rescale_elev")),
            )
        return chosen

    def build(self, **changes: Any) -> MAESTRO:
        s, mask = self.config["size"], self.config["mask"]
        model = MAESTRO(
            dict(self.modalities()),
            **grouped(
                inputs=self.inputs(),
                architecture=MAESTROArchitecture(
                    width=s["embed_dim"],
                    depth=s["depth"],
                    heads=s["heads"],
                    head_dim=s["dim_head"],
                    ffn_ratio=s["mlp_ratio"],
                    decoder_width=s["decoder_dim"],
                    decoder_depth=s["decoder_depth"],
                    decoder_heads=s["decoder_heads"],
                    decoder_head_dim=s["decoder_dim_head"],
                    decoder_ffn_ratio=s["decoder_mlp_ratio"],
                ),
                fusion=self.config["fusion_mode"],
                shared_depth=self.config["inter_depth"],
                masking=MAESTROMasking(
                    ratio=mask["mask_ratio"],
                    scale=mask["mask_scale"],
                    modality=mask["mask_mod"],
                    bands=mask["mask_bands"],
                    dates=mask["mask_dates"],
                    locations=mask["mask_loc"],
                ),
                position_cells=self.config["resolved"]["grid_pos_enc"],
                **{"loss": self.config["loss"], "reference": True, **changes},
            ),
        )
        backbone, report = MAESTROBackbone.from_reference(
            self.state(), model.backbone.arguments, self.modalities()
        )
        assert not report.missing
        model.backbone = backbone
        assert not model.load_pretraining_parts(self.state()).missing
        return model

    def batch(self) -> dict[str, Tensor]:
        batch = {}
        for name in self.names:
            dates = self[f"input/{name}_dates"]
            batch[name] = self[f"input/{name}"]
            batch[f"{name}.dates"] = days(dates)
            batch[f"{name}.hours"] = dates[..., 2].float()
        return batch

    def prepare(self, model: MAESTRO, monkeypatch: pytest.MonkeyPatch) -> dict[str, Raster]:
        """Prepare the batch with the file's reference date, which is that of no modality."""
        self.set_reference(monkeypatch)
        return model.backbone.prepare(model.backbone.normalize(self.batch()))

    def set_reference(self, monkeypatch: pytest.MonkeyPatch) -> None:
        date = decimal_year(days(self["input/ref_date"]))
        monkeypatch.setattr(MAESTROBackbone, "_reference_date", lambda *_: date)

    def draws(self, model: MAESTRO, rasters: dict[str, Raster]) -> MAESTRODraws:
        final = {
            n.removeprefix("mask/final/"): t
            for n, t in self.tensors.items()
            if n.startswith("mask/final/")
        }
        kept = {n: int((~t[0]).sum()) for n, t in final.items()}
        return MAESTRODraws(model.backbone.split(final, rasters), kept)


CASES = [
    pytest.param((path, variant), id=f"{path.stem}-{variant or 'main'}")
    for path in FILES
    for variant in [None, *json.loads(path.with_suffix(".json").read_text())["variants"]]
]


@pytest.fixture(params=CASES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(*request.param)


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def alone(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param, None)


def assert_output(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)


def test_prepared_values_and_codes(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    model = golden.build()
    rasters = golden.prepare(model, monkeypatch)
    golden.need(f"output/input_resized/{golden.names[0]}" in golden.tensors, "intermediates")
    for name, raster in rasters.items():
        assert_output(raster.values, golden[f"output/input_resized/{name}"])
    with torch.no_grad():
        tokens = model.backbone.embed_patches(rasters)
    for sequence, joined in model.backbone.join(tokens, rasters).items():
        assert_output(joined, golden[f"output/tokens/{sequence}"])
    coded = {n: t + model.backbone.codes(rasters[n], model.backbone.width)
             for n, t in tokens.items()}  # fmt: skip
    for sequence, joined in model.backbone.join(coded, rasters).items():
        assert_output(joined, golden[f"output/enc_in/{sequence}"])


def test_sequences_split_into_what_was_joined(
    golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = golden.build()
    rasters = golden.prepare(model, monkeypatch)
    parts = {n: torch.rand(r.token_valid.shape) for n, r in rasters.items()}
    again = model.backbone.split(model.backbone.join(parts, rasters), rasters)
    for name, part in parts.items():
        assert torch.equal(again[name], part)


def test_encoders_decoders_and_reconstructions(
    golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = golden.build().eval()
    rasters = golden.prepare(model, monkeypatch)
    draws = golden.draws(model, rasters)
    with torch.no_grad():
        encoded = model.backbone.encode_visible(rasters, draws.hidden, draws.kept)
        decoded = model.decode(encoded, rasters)
    joined = model.backbone.join(decoded, rasters)
    for sequence, tokens in encoded.tokens.items():
        if f"output/enc_out/{sequence}" in golden.tensors:
            assert_output(tokens, golden[f"output/enc_out/{sequence}"])
            assert_output(joined[sequence], golden[f"output/dec_out/{sequence}"])
    for name, raster in rasters.items():
        head = model.heads[model.backbone.embedding_of(name)]
        pixels = head(decoded[name], model._pixels(name)).detach()
        assert_output(pixels, cut(golden[f"output/rec/{name}"], raster))


def cut(x: Tensor, raster: Layout) -> Tensor:
    """(B, D, C, H, W) -> (B, D * L, P, C)."""
    h, w = raster.grid
    b, d, c = x.shape[:3]
    x = x.view(b, d, c, h, x.shape[3] // h, w, x.shape[4] // w).permute(0, 1, 3, 5, 4, 6, 2)
    return x.reshape(b, d * h * w, -1, c)


def test_targets(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    model = golden.build()
    rasters = golden.prepare(model, monkeypatch)
    golden.need(f"output/target/{golden.names[0]}" in golden.tensors, "targets")
    for name, raster in rasters.items():
        patches, valid = model.patches(raster, name)
        mean, scale = model._statistics(patches, valid, name)
        expected = cut(golden[f"output/target/{name}"], raster)
        assert_output((patches - mean) / scale, expected)


@pytest.mark.parametrize("loss", [None, "l1_norm", "l2_norm", "l1", "l2"])
def test_losses_with_reference_true(
    golden: Golden, loss: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden.need(f"loss/{loss or 'total'}" in golden.tensors, f"loss {loss}")
    model = golden.build(**({"loss": loss} if loss else {}))
    rasters = golden.prepare(model, monkeypatch)
    losses = model(golden.batch(), golden.draws(model, rasters)).losses
    total = torch.stack(list(losses.values())).sum()
    assert_output(total.detach(), golden[f"loss/{loss or 'total'}"].squeeze())
    if loss is None:
        weights = {n: float(golden[f"loss/weight/{n}"]) for n in golden.names}
        for name, weight in weights.items():
            expected = golden[f"loss/per_modality/{name}"] * weight / sum(weights.values())
            assert_output(losses[f"reconstruction_{name}"].detach(), expected.squeeze())


def test_our_options_change_nothing_where_all_is_valid(
    golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = golden.build(reference=False)
    rasters = golden.prepare(model, monkeypatch)
    losses = model(golden.batch(), golden.draws(model, rasters)).losses
    assert_output(torch.stack(list(losses.values())).sum().detach(), golden["loss/total"].squeeze())


def test_gradients(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    model = golden.build()
    rasters = golden.prepare(model, monkeypatch)
    step = model(golden.batch(), golden.draws(model, rasters))
    torch.stack(list(step.losses.values())).sum().backward()
    own = {f"model.{reference_name(n)}": p.grad for n, p in model.named_parameters()}
    wanted = {n.removeprefix("grad/"): t for n, t in golden.tensors.items() if n.startswith("grad")}
    golden.need(bool(wanted), "grad/*")
    for name, expected in wanted.items():
        gradient = own[name]
        assert gradient is not None, name
        torch.testing.assert_close(gradient.view_as(expected), expected, rtol=1e-3, atol=1e-6)


def test_structured_masks_follow_from_their_draws(
    golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = golden.build()
    rasters = golden.prepare(model, monkeypatch)
    golden.need("mask/draw/0/" in "".join(golden.tensors), "mask/draw/*")
    count = 1 + max(int(n.split("/")[2]) for n in golden.tensors if n.startswith("mask/draw/"))
    for sequence, names in model.backbone.sequences(golden.names).items():
        passes = []
        for i in range(count):
            masks = []
            for name in names:
                axes = rasters[name].axes
                rates = model.rates(name, axes, len(names) == 1)
                found = {
                    ours: golden.tensors[f"mask/draw/{i}/{name}/{theirs}"]
                    for theirs, ours in KINDS.items()
                    if f"mask/draw/{i}/{name}/{theirs}" in golden.tensors
                }
                assert found.keys() == rates.keys()
                masks.append(structured_mask(axes, found, rates))
            passes.append(torch.cat(masks, dim=1))
        structure = first_usable(torch.stack(passes), torch.ones_like(passes[0]))
        assert torch.equal(structure, golden[f"mask/struct/{sequence}"])


def test_final_masks_are_exact(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    model = golden.build()
    rasters = golden.prepare(model, monkeypatch)
    for sequence, names in model.backbone.sequences(golden.names).items():
        structure = golden[f"mask/struct/{sequence}"]
        ratio = model.ratio(sum(rasters[n].dates * rasters[n].band_groups for n in names))
        hidden = hide_lowest(
            golden[f"mask/noise/{sequence}"], structure, torch.ones_like(structure), ratio,
            "ordered",
        )  # fmt: skip
        assert torch.equal(hidden, golden[f"mask/final/{sequence}"])


def test_drawn_masks_hide_as_many_tokens_as_the_reference(
    golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = golden.build(reference=False)
    rasters = golden.prepare(model, monkeypatch)
    generator = torch.Generator().manual_seed(0)
    drawn = model.draw(golden.batch(), Generators(generator, generator))
    wanted = golden.draws(model, rasters)
    assert drawn.kept == wanted.kept
    for sequence, hidden in model.backbone.join(drawn.hidden, rasters).items():
        expected = model.backbone.join(wanted.hidden, rasters)[sequence].sum(1)
        assert torch.equal(hidden.sum(1), expected)


def test_hidden_values_are_those_of_the_reference(
    golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = golden.build()
    rasters = golden.prepare(model, monkeypatch)
    golden.need(f"mask/pixel/{golden.names[0]}" in golden.tensors, "mask/pixel/*")
    hidden = golden.draws(model, rasters).hidden
    for name, raster in rasters.items():
        expected = cut(golden[f"mask/pixel/{name}"], raster)
        counted = model.counted(hidden[name], raster, name).expand_as(expected)
        assert torch.equal(counted, expected)


def test_tokens_of_all_places_feed_the_published_head(
    golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden.need(golden.config["type_head"] == "attentive", "attentive head")
    targets = golden.config["resolved"]["targets"]
    names = [f"output/logits/{t}" for t, fact in targets.items() if "classif" in fact["type"]]
    name = next((n for n in names if n in golden.tensors), None)
    golden.need(name is not None, "classification logits")
    golden.set_reference(monkeypatch)
    backbone = golden.build().backbone.eval()
    target, state = str(name).rsplit("/", 1)[1], golden.state()
    head = {k.split(f"heads.{target}.")[1]: v for k, v in state.items() if f".{target}." in k}
    with torch.no_grad():
        features = backbone(golden.batch())
        tokens = torch.cat([features.tokens[n] for n in golden.names], dim=1)
        logits = attentive_head(tokens, head)
    assert_output(logits, golden[str(name)])


def attentive_head(tokens: Tensor, head: dict[str, Tensor]) -> Tensor:
    """Attentive pooling with 8 heads and a linear layer, as in section 8 of the reference."""
    width, heads = tokens.shape[-1], 8  # a constant of the published head

    def norm(x: Tensor, name: str) -> Tensor:
        weight, bias = head[f"reduce.{name}.weight"], head[f"reduce.{name}.bias"]
        return torch.nn.functional.layer_norm(x, (width,), weight, bias)

    k, v = (norm(tokens, "norm") @ head["reduce.to_kv.weight"].T).chunk(2, dim=-1)
    split = (len(tokens), -1, heads, width // heads)
    query = head["reduce.query"].view(heads, width // heads)
    scores = torch.einsum("bnhd,hd->bhn", k.reshape(split), query) * (width // heads) ** -0.5
    pooled = torch.einsum("bhn,bnhd->bhd", scores.softmax(-1), v.reshape(split)).flatten(1)
    return norm(pooled, "norm_fc") @ head["linear.weight"].T + head["linear.bias"]


def test_patch_group_statistics(alone: Golden) -> None:
    for name, case in alone.facts["pgn"].items():
        x, expected = alone[f"pgn/{name}/input"], alone[f"pgn/{name}/target"]
        grid = (x.shape[3] // case["patch"], x.shape[4] // case["patch"])
        raster = Layout(grid=grid, dates=x.shape[1], band_groups=1, token_valid=x[:, :, 0] == 0)
        patches = cut(x, raster)
        mean, scale = patch_group_statistics(patches, case["groups"])
        actual, wanted = (patches - mean) / scale, cut(expected, raster)
        said = alone.facts["tolerance"]
        tolerance = said.get(f"pgn/{name}/*", said["output/*, loss/*, pgn/*"])
        torch.testing.assert_close(
            actual, wanted, rtol=float(tolerance["rtol"]), atol=float(tolerance["atol"])
        )


def test_positions_of_all_published_grids(alone: Golden) -> None:
    facts, seen = alone.facts["posenc"], 0
    for name, expected in alone.tensors.items():
        if name.startswith("posenc/"):
            _, dataset, grid = name.split("/")
            side, cells = int(grid.removeprefix("grid")), facts["grid_pos_enc"][dataset]
            actual = metric_positions((side, side), (cells, cells), facts["dim"])
            torch.testing.assert_close(actual, expected, rtol=0, atol=5e-5)
            seen += 1
    assert seen


def test_equal_patches_on_the_ground_have_equal_positions() -> None:
    treesat = metric_positions((3, 3), (96, 96), 24)
    naip = metric_positions((6, 6), (192, 192), 24).view(6, 6, 24)[:3, :3].flatten(0, 1)
    torch.testing.assert_close(treesat, naip)


def test_date_encodings(alone: Golden) -> None:
    dates, reference = alone["dateenc/dates"], alone["dateenc/ref_date"]
    # the file holds day 366 of a year that has 365, which no date has
    start = decimal_year(days(reference))
    code = encode_dates(dates[..., 0], dates[..., 1], dates[..., 2], start)
    facts = alone.facts["dateenc"]
    assert code.shape[-1] == facts["date_dim"]
    wide = torch.nn.functional.pad(code, (facts["dim"] - facts["date_dim"], 0)).unsqueeze(2)
    for groups in (1, 2):
        every = wide.repeat(1, groups, facts["grid"] ** 2, 1)
        assert_output(every, alone[f"dateenc/out_g{groups}"])


def test_calendar_knows_leap_years() -> None:
    start = datetime.date(1970, 1, 1)
    dates = [start + datetime.timedelta(days=n) for n in range(-26000, 60000, 17)]
    dates += [datetime.date(y, m, d) for y in (1900, 2000, 2020, 2100)
              for m, d in ((1, 1), (2, 28), (3, 1), (12, 31))]  # fmt: skip
    year, day = calendar(torch.tensor([(date - start).days for date in dates]))
    assert year.tolist() == [date.year for date in dates]
    assert day.tolist() == [date.timetuple().tm_yday for date in dates]
