"""OmniSat against numbers made by running the published code."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_files import FOLDER, golden_files
from golden_files import Golden as GoldenFile
from grouped import grouped
from torch import Tensor

from domainssl.backbones.omnisat import OmniSatBackbone, SeriesArchitecture, published_name
from domainssl.losses.tokens import token_nce
from domainssl.modality import Modality
from domainssl.nn.calendar import Calendar, date_sinusoids
from domainssl.nn.filtering import filter_dates
from domainssl.nn.fusion import FusionBlock, ReadoutBlock
from domainssl.nn.masking import mask_from_noise
from domainssl.nn.norm import GlobalBatchNorm
from domainssl.objectives.base import Step
from domainssl.objectives.omnisat import (
    OmniSat,
    OmniSatArchitecture,
    OmniSatDraws,
    OmniSatOptions,
)

FILES = golden_files("omnisat")
ORIGIN = "2018-09-01"
ORIGIN_DAY = 17775  # of that date, in days since 1970-01-01
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def test_golden_files_exist() -> None:
    assert FILES, f"no omnisat_*.safetensors in {FOLDER}"


def ours(name: str) -> str:
    return name.replace("-", "_")


class Golden(GoldenFile):
    """One golden file, and the models it describes."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.names: list[str] = self.config["modalities"]
        self.semantics: dict[str, Any] = self.facts["semantics"]

    def state(self) -> dict[str, Tensor]:
        prefix = "state_dict/"
        return {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}

    def projector(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.config["projectors"][name]
        return found

    def is_series(self, name: str) -> bool:
        return self.projector(name)["class"] == "LTAE"

    def modalities(self) -> dict[str, Modality]:
        found = {}
        for name in self.names:
            kind = "series" if self.tensors[f"input/{name}"].ndim == 5 else "image"
            channels = tuple(f"band{i}" for i in range(self.tensors[f"input/{name}"].shape[-3]))
            found[ours(name)] = Modality(
                name=ours(name), kind=kind, channels=channels, value_unit="arbitrary"
            )  # type: ignore[arg-type]
        return found

    @property
    def grid(self) -> tuple[int, int]:
        side = math.isqrt(self.config["num_patches"])
        assert side**2 == self.config["num_patches"]
        return side, side

    def patch_sizes(self) -> dict[str, int]:
        return {ours(n): self.tensors[f"input/{n}"].shape[-1] // self.grid[0] for n in self.names}

    def series(self) -> SeriesArchitecture:
        every = [self.projector(n) for n in self.names if self.is_series(n)]
        if not every:
            return SeriesArchitecture()
        first = every[0]
        return SeriesArchitecture(
            heads=first["n_head"],
            key_width=first["d_k"],
            widths_in=tuple(first["mlp_in"]),
            widths_out=tuple(first["mlp"]),
            dropout=first["dropout"],
            input_norm=tuple(
                ours(n) for n in self.names if self.is_series(n) and self.projector(n)["in_norm"]
            ),
        )

    def calendar(self) -> dict[str, Calendar]:
        series = [n for n in self.names if self.is_series(n)]
        return {ours(n): Calendar(ORIGIN, self.projector(n)["T"]) for n in series}

    def build(self, reference: bool = True, **options: Any) -> OmniSat:
        c = self.config
        images = [self.projector(n) for n in self.names if not self.is_series(n)]
        model = OmniSat(
            dict(self.modalities()),
            **grouped(
                size="tiny",
                architecture=OmniSatArchitecture(
                    width=c["embed_dim"],
                    depth=c["depth"],
                    heads=c["num_heads"],
                    ffn_ratio=c["mlp_ratio"],
                    groups=images[0].get("gp_norm", 4) if images else 4,
                    dropout=c["drop_rate"],
                    attention_dropout=c["attn_drop_rate"],
                    drop_path=c["drop_path_rate"],
                    series=self.series(),
                ),
                patch_size=self.patch_sizes(),
                grid=self.grid,
                mask_ratio=self.semantics["mask_ratio"],
                kept_dates=self.semantics["date_threshold"],
                temperature=self.semantics["temperature"],
                calendar=self.calendar(),
                normalization="identity",
                reference=reference,
                loss_weights=self.semantics["loss_weights"],
                options=OmniSatOptions(**{**self.said_options(), **options}),
            ),
        )
        arguments = dict(model.backbone.arguments)
        model.backbone, report = OmniSatBackbone.from_reference(self.state(), arguments)
        assert not report.missing
        assert not report.unexpected
        model.load_pretraining_parts(self.state())
        return model

    def said_options(self) -> dict[str, Any]:
        """Return the options that the file says it was made with."""
        names = {"image_loss_on": "aerial_loss_on"}
        fields = [f.name for f in dataclasses.fields(OmniSatOptions)]
        said = {f: self.semantics.get(names.get(f, f)) for f in fields}
        return {f: value for f, value in said.items() if value is not None}

    def batch(self) -> dict[str, Any]:
        batch: dict[str, Any] = {}
        for name in self.names:
            batch[ours(name)] = self[f"input/{name}"]
            if f"input/{name}_dates" in self.tensors:
                dates = self[f"input/{name}_dates"]
                batch[f"{ours(name)}.dates"] = (dates + ORIGIN_DAY).int()
                batch[f"{ours(name)}.frames"] = dates > 0
        return batch

    def draws(self) -> OmniSatDraws:
        noise = self["mask/noise"]
        return OmniSatDraws(
            mask_from_noise(noise, int(noise.shape[1] * (1 - self.semantics["mask_ratio"])))
        )

    def hidden(self) -> dict[str, Tensor]:
        parts = self.draws().masking.removed.chunk(len(self.names), dim=1)
        return {ours(n): part for n, part in zip(self.names, parts, strict=True)}


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def assert_loss(actual: Tensor, expected: Tensor) -> None:
    assert float(actual.detach()) == pytest.approx(float(expected), rel=1e-4, abs=1e-5)


def assert_gradient(actual: Tensor | None, expected: Tensor, name: str) -> None:
    assert actual is not None, name
    bound = 1e-4 * float(expected.abs().max())
    assert float((actual - expected).abs().max()) <= bound, name


def assert_reconstruction(step: Step, golden: Golden, prefix: str, suffix: str) -> None:
    for name in golden.names:
        loss = step.losses[f"reconstruction_{ours(name)}"]
        assert_loss(loss, golden[f"{prefix}{name}{suffix}"])


def test_masks_are_exact(golden: Golden) -> None:
    masking = golden.draws().masking
    assert torch.equal(masking.removed.float(), golden["mask/mask"])
    assert torch.equal(masking.restore, golden["mask/ids_restore"])


def test_buckets_are_exact(golden: Golden) -> None:
    own, readout = golden.build().backbone.combiner.tables(len(golden.names))
    assert torch.equal(own, golden["output/rpe_bucket_self"])
    length = 1 + golden.config["num_patches"]
    assert torch.equal(readout[:, :length], golden["output/rpe_bucket_cross"])


def test_frozen_date_tables_are_the_sinusoids(golden: Golden) -> None:
    for name in (n for n in golden.names if golden.is_series(n)):
        table = golden.state().get(f"decoder.projector_{name}.temp_encoding.weight")
        golden.need(table is not None, f"date table of {name}")
        assert table is not None
        code = date_sinusoids(torch.arange(len(table)), table.shape[1], len(table))
        torch.testing.assert_close(code, table, **TOLERANCE)


def test_tokens_attention_and_pooling_indices(golden: Golden) -> None:
    model = golden.build().eval()
    with torch.no_grad():
        features, traces = model.backbone.encode_sensors(model.backbone.normalize(golden.batch()))
    for name in golden.names:
        expected = golden[f"output/tokens_{name}"]
        torch.testing.assert_close(features.tokens[ours(name)], expected, **TOLERANCE)
        if golden.is_series(name):
            expected = golden[f"output/attention_{name}"]
            torch.testing.assert_close(traces["attention"][ours(name)], expected, **TOLERANCE)
        else:
            indices = {f"output/pool_index_{i}": p.indices
                       for i, p in enumerate(traces["poolings"][ours(name)])}  # fmt: skip
            wanted = [n for n in golden.tensors if n.startswith("output/pool_index_")]
            golden.need(bool(wanted), "output/pool_index_*")
            assert all(torch.equal(indices[n], golden[n]) for n in wanted)


@pytest.mark.parametrize("path", ["fused", "math"])
def test_fusion_block_by_block(golden: Golden, path: str) -> None:
    model = golden.build().eval()
    seen: dict[str, Tensor] = {}
    combiner = model.backbone.combiner
    for i, block in enumerate(combiner.blocks):
        assert isinstance(block, FusionBlock | ReadoutBlock)
        block.attn.path = path  # type: ignore[assignment]
        block.register_forward_hook(lambda m, a, out, i=i: seen.update({f"block_{i}": out}))
        if i == 0:
            block.register_forward_hook(lambda m, a, out: seen.update({"combiner_input": a[0]}))
    with torch.no_grad():
        x = model.backbone.normalize(golden.batch())
        features = model.backbone.encode(x, replace=golden.hidden())
    for name, tensor in seen.items():
        torch.testing.assert_close(tensor, golden[f"output/{name}"], **TOLERANCE)
    fused = torch.cat([features.cls["joint"].unsqueeze(1), features.tokens["joint"]], dim=1)
    torch.testing.assert_close(fused, golden["output/mm_tokens"], **TOLERANCE)


def test_kept_dates_are_exact(golden: Golden) -> None:
    for name in (n for n in golden.names if golden.is_series(n)):
        chosen = filter_dates(
            golden[f"output/attention_{name}"],
            golden[f"input/{name}_dates"] > 0,
            golden.semantics["date_threshold"],
            drops_last=golden.semantics["date_filter_drops_last_valid"],
        )
        pairs = [
            (b, int(t))
            for b, (index, kept) in enumerate(zip(chosen.positions, chosen.kept, strict=True))
            for t in index[kept]
        ]
        assert pairs == [tuple(pair) for pair in golden[f"output/recon_index_{name}"].tolist()]


def test_losses_with_reference_true(golden: Golden) -> None:
    step = golden.build().eval()(golden.batch(), golden.draws())
    assert_reconstruction(step, golden, "loss/", "_reconstruction_loss")
    assert_loss(step.losses["contrastive"], golden["loss/contrastive_loss"])
    assert_loss(sum(step.losses.values(), torch.zeros(())), golden["loss/total"])


def test_reconstructions_of_images(golden: Golden) -> None:
    model = golden.build().eval()
    with torch.no_grad():
        x = model.backbone.normalize(golden.batch())
        features, traces = model.backbone.encode_sensors(x)
        features = model.backbone.fuse(features, golden.hidden())
    for name in (n for n in golden.names if not golden.is_series(n)):
        decoder = model.decoder[f"projector_{ours(name)}"]
        for _ in range(2):  # nothing is used up
            tokens = features.tokens["joint"].flatten(0, 1)
            predicted = decoder(tokens, traces["poolings"][ours(name)])
            expected = golden[f"output/reconstruct_{name}"].flatten(0, 1)
            torch.testing.assert_close(predicted, expected, **TOLERANCE)


def test_gradients(golden: Golden) -> None:
    model = golden.build().eval()
    step = model(golden.batch(), golden.draws())
    torch.stack(list(step.losses.values())).sum().backward()
    own = {}
    for name, parameter in model.named_parameters():
        if name.startswith("backbone."):
            own[published_name(name.removeprefix("backbone."), model.backbone.modalities)] = (
                parameter.grad
            )
        else:
            own[name.replace("_", "-").replace("projector-", "projector_")] = parameter.grad
    wanted = [n for n in golden.tensors if n.startswith("grad/")]
    golden.need(bool(wanted), "grad/*")
    for name in wanted:
        assert_gradient(own[name.removeprefix("grad/")], golden[name], name)


def without_dropout(model: OmniSat) -> OmniSat:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "drop_path"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model.train()


def test_training_mode_and_running_statistics(golden: Golden) -> None:
    model = without_dropout(golden.build())
    step = model(golden.batch(), golden.draws())
    assert_reconstruction(step, golden, "train/loss_", "_reconstruction")
    assert_loss(step.losses["contrastive"], golden["train/loss_contrastive"])
    state = model.backbone.to_reference()
    wanted = [n for n in golden.tensors if n.startswith("train/state_dict/")]
    golden.need(bool(wanted), "train/state_dict/*")
    for name in wanted:
        found = state[name.removeprefix("train/state_dict/")]
        torch.testing.assert_close(found, golden[name], **TOLERANCE)
    assert any(isinstance(m, GlobalBatchNorm) for m in model.modules())


def test_fine_tuning_with_a_subset_of_modalities(golden: Golden) -> None:
    names = golden.facts["ft"]["modalities"]
    backbone = golden.build().backbone.eval()
    own, _ = backbone.combiner.tables(len(names))
    assert torch.equal(own, golden["ft/rpe_bucket_self"])
    mine = [ours(n) for n in names]
    batch = {k: v for k, v in golden.batch().items() if k.split(".")[0] in mine}
    with torch.no_grad():
        features = backbone(batch)
    fused = torch.cat([features.cls["joint"].unsqueeze(1), features.tokens["joint"]], dim=1)
    torch.testing.assert_close(fused, golden["ft/tokens"], **TOLERANCE)
    assert torch.equal(features.pooled["joint"], features.cls["joint"])
    weight, bias = (golden[f"ft/state_dict/head.0.{n}"] for n in ("weight", "bias"))
    logits = torch.nn.functional.linear(features.pooled["joint"], weight, bias)
    torch.testing.assert_close(logits, golden["ft/logits"], **TOLERANCE)


def test_single_dates(golden: Golden) -> None:
    golden.need("mono/input" in golden.tensors, "mono/input")
    source, x = golden.facts["mono"]["encoder_modality"], golden["mono/input"]
    model = golden.build().eval()
    encoder = model.backbone.get_submodule(f"projector_{ours(source)}")
    channels = tuple(f"band{i}" for i in range(x.shape[1]))
    kinds = {"mono": Modality(name="mono", kind="image", channels=channels, value_unit="arbitrary")}
    arguments: dict[str, Any] = {**golden.build().arguments, "modalities": kinds}
    encoding = arguments["encoding"]
    encoding["patch_size"] = {"mono": x.shape[-1] // golden.grid[0]}
    encoding["architecture"]["series"]["input_norm"] = (
        ["mono"] if golden.projector(source)["in_norm"] else []
    )
    arguments["loss_weights"] = {"contrastive": 0.0}
    encoding["calendar"] = {}
    mono = OmniSat(**arguments).eval()
    mono.backbone.get_submodule("projector_mono").load_state_dict(encoder.state_dict())
    head = {n: golden[f"mono/state_dict/decode.0.{n}"] for n in ("weight", "bias")}
    mono.decoder["projector_mono"].decode[0].load_state_dict(head)  # type: ignore[union-attr, operator, index]
    features, traces = mono.backbone.encode_sensors({"mono": x})
    torch.testing.assert_close(features.tokens["mono"], golden["mono/tokens"], **TOLERANCE)
    features.tokens["joint"] = golden["output/mm_tokens"][:, 1:]
    hidden = torch.zeros(features.tokens["mono"].shape[:2], dtype=torch.bool)
    loss, picture = mono._rebuild_image("mono", {"mono": x}, features, traces, hidden)
    torch.testing.assert_close(picture.predicted, golden["mono/reconstruct"], **TOLERANCE)
    assert_loss(loss, golden["mono/loss"])


def test_contrast_alone(golden: Golden) -> None:
    cases = {n.split("/")[1] for n in golden.tensors if n.startswith("contrastive/")}
    golden.need(bool(cases), "contrastive/*")
    for case in cases:
        assert_contrast(golden, case)


def assert_contrast(golden: Golden, case: str) -> None:
    start = f"contrastive/{case}/input/"
    letters = sorted(n.removeprefix(start) for n in golden.tensors if n.startswith(start))
    inputs = [golden[f"contrastive/{case}/input/{c}"].clone().requires_grad_() for c in letters]
    tokens = torch.stack(inputs, dim=1)
    temperature = golden.semantics["temperature"]
    loss = token_nce(tokens, temperature=temperature)
    assert_loss(loss, golden[f"contrastive/{case}/loss"])
    loss.backward()
    for letter, x in zip(letters, inputs, strict=True):
        assert_gradient(x.grad, golden[f"contrastive/{case}/grad/{letter}"], letter)
    ranks = sum(n.startswith(f"contrastive/{case}/loss_local_rank") for n in golden.tensors)
    for rank, part in enumerate(tokens.detach().chunk(max(1, ranks))[:ranks]):
        local = token_nce(part, temperature=temperature, gather_keys="none")
        assert_loss(local, golden[f"contrastive/{case}/loss_local_rank{rank}"])


def test_the_layout_is_written_back(golden: Golden) -> None:
    model, state = golden.build(), golden.state()
    for name, tensor in model.backbone.to_reference().items():
        assert torch.equal(tensor, state.pop(name)), name
    assert all(name.startswith("decoder.") for name in state)
