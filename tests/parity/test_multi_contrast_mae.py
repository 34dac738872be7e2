"""MultiContrastMAE against numbers made by running the released code of BM-MAE."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_files import FOLDER, golden_files, mask_from_keep
from safetensors.torch import load_file
from torch import Tensor

from domainssl.backbones.multi_contrast import ContrastTokens
from domainssl.modality import Modality, sides_of
from domainssl.nn.contrast_masking import contrast_masking
from domainssl.nn.patching import patchify
from domainssl.objectives.multi_contrast_mae import (
    MultiContrastArchitecture,
    MultiContrastDraws,
    MultiContrastEncoding,
    MultiContrastMAE,
    MultiContrastOptions,
)

GOLDEN = ("bmmae",)
FILES = golden_files("bmmae")
SIZES = {
    "hidden_size": "width", "num_layers": "depth", "num_heads": "heads", "mlp_dim": "hidden",
    "decoder_hidden_size": "decoder_width", "decoder_num_layers": "decoder_depth",
    "decoder_num_heads": "decoder_heads",
}  # fmt: skip


def test_golden_files_exist() -> None:
    assert FILES, f"no bmmae_*.safetensors in {FOLDER}"


def _sides(given: int | list[int]) -> int | tuple[int, ...]:
    return given if isinstance(given, int) else tuple(given)


class Golden:
    """One golden file, and the model it describes."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.tensors = load_file(path)
        self.config: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())["config"]
        self.weights = folder / "published.pt"
        torch.save(self.below("state/"), self.weights)
        self.names: list[str] = self.config["contrasts"]
        self.missing: str = self.config["missing"]

    def below(self, prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}

    def model(self, target_norm: str = "none") -> MultiContrastMAE:
        c = self.config["model"]
        values = self.tensors[f"in/{self.names[0]}"]
        size = sides_of(_sides(c["img_size"]), values.ndim - 2)
        # one width serves both: the decoder's feed-forward layers are as wide as the encoder's
        hidden = self.tensors["state/decoder.decoder_blocks.0.mlp.linear1.weight"].shape[0]
        architecture = {ours: c[theirs] for theirs, ours in SIZES.items()}
        channels = tuple(f"c{i}" for i in range(values.shape[1]))
        return MultiContrastMAE(
            {
                n: Modality(
                    name=n, kind="volume", channels=channels, value_unit="arbitrary", size=size
                )
                for n in self.names
            },
            encoding=MultiContrastEncoding(
                architecture=MultiContrastArchitecture(**architecture, decoder_hidden=hidden),
                patch_size=_sides(c["patch_size"]),
                normalization="identity",
                weights=str(self.weights),
            ),
            context_size=size,
            mask_ratio=c["masking_ratio"],
            options=MultiContrastOptions(
                reference=True, target_norm=target_norm, decoder_dropout=0.0
            ),
        )

    def batch(self, without: str | None = None) -> dict[str, Tensor]:
        return {n: self.tensors[f"in/{n}"] for n in self.names if n != without}

    def draws(self, group: str, without: str | None = None) -> MultiContrastDraws:
        names = [n for n in self.names if n != without]
        mask = torch.cat([self.tensors[f"{group}/mask/{n}"] for n in names], dim=1)
        kept = int((mask == 0).sum(1).max())
        assert ((mask == 0).sum(1) == kept).all()
        masking = mask_from_keep(mask.argsort(dim=1, stable=True)[:, :kept], mask.shape[1])
        seen = torch.ones_like(masking.keep, dtype=torch.bool)
        return MultiContrastDraws(
            keep=masking.keep, restore=masking.restore, seen=seen, removed=masking.removed
        )


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Golden:
    return Golden(request.param, tmp_path)


def assert_output(actual: Tensor, expected: Tensor) -> None:
    tolerance = 2e-5 * max(1.0, float(expected.abs().max()))
    difference = float((actual - expected).abs().max())
    assert difference <= tolerance, f"{difference} > {tolerance}"


@torch.no_grad()
def encode(
    model: MultiContrastMAE, batch: dict[str, Tensor], draws: MultiContrastDraws
) -> tuple[ContrastTokens, dict[str, Tensor]]:
    x = model.eval().backbone.normalize(batch)
    encoded = model.backbone.encode_seen(x, draws.keep, draws.seen)
    return encoded, model.predict(x, encoded, draws)


# group of the file, contrast that is left out of the batch, where the masks are
GROUPS = [("full", False, "full"), ("hidden_contrast", False, "hidden_contrast")]
GROUPS += [("absent", True, "hidden_contrast")]


@pytest.mark.parametrize(("group", "is_absent", "masks"), GROUPS)
def test_tokens_and_predictions(golden: Golden, group: str, is_absent: bool, masks: str) -> None:
    without = golden.missing if is_absent else None
    draws = golden.draws(masks, without)
    encoded, predictions = encode(golden.model(), golden.batch(without), draws)
    expected = golden.tensors[f"{group}/encoder_tokens"]
    assert_output(encoded.cls, expected[:, 0])
    order = f"{group}/ids_restore"
    if order in golden.tensors:  # other tokens: in the file's order, which it may not say
        shuffle = golden.tensors[order].argsort(1)[:, : draws.keep.shape[1]]
        places = draws.restore.gather(1, shuffle)
        tokens = encoded.tokens.gather(1, places.unsqueeze(-1).expand_as(encoded.tokens))
        assert_output(tokens, expected[:, 1:])
    wanted = golden.below(f"{group}/pred/")
    assert predictions.keys() == wanted.keys()
    for name, values in wanted.items():
        assert_output(predictions[name], values)


def test_the_content_of_a_hidden_contrast_does_not_matter(golden: Golden) -> None:
    draws = golden.draws("hidden_contrast")
    batch = golden.batch()
    other = {**batch, golden.missing: torch.full_like(batch[golden.missing], 9.0)}
    model = golden.model()
    for a, b in zip(
        encode(model, batch, draws)[1].values(),
        encode(model, other, draws)[1].values(),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("is_absent", [True, False])
def test_a_contrast_is_synthesised_as_the_authors_do(golden: Golden, is_absent: bool) -> None:
    name = golden.missing
    model = golden.model().eval()
    batch = golden.batch(name if is_absent else None)
    found = model.synthesise(batch, () if is_absent else (name,))
    mask = torch.stack([torch.full((len(found[name]),), n == name) for n in golden.names], 1)
    mask = mask.repeat_interleave(golden.tensors[f"full/mask/{name}"].shape[1], dim=1).long()
    kept = mask.argsort(dim=1, stable=True)[:, : int((mask[0] == 0).sum())]  # all of the others
    masking = mask_from_keep(kept, mask.shape[1])
    draws = MultiContrastDraws(
        keep=kept,
        restore=masking.restore,
        seen=torch.ones_like(kept, dtype=torch.bool),
        removed=masking.removed,
    )
    expected = encode(model, golden.batch(), draws)[1][name]
    assert found.keys() == {name} and found[name].shape == golden.batch()[name].shape
    assert_output(patchify(found[name], model.backbone.patch_size), expected)


LOSSES = [("full", False, "plain"), ("full", False, "norm"), ("absent", True, "")]


@pytest.mark.parametrize(("group", "is_absent", "norm"), LOSSES)
def test_losses_and_gradients(golden: Golden, group: str, is_absent: bool, norm: str) -> None:
    without = golden.missing if is_absent else None
    draws = golden.draws("hidden_contrast" if is_absent else group, without)
    model = golden.model("patch" if norm == "norm" else "none")
    losses = model(golden.batch(without), draws).losses
    infix = f"{norm}/" if norm else ""
    wanted = golden.below(f"{group}/loss/{infix}")
    total = float(wanted.pop("total"))
    assert {n.removeprefix("reconstruction_") for n in losses} == wanted.keys()
    for name, value in wanted.items():
        found = float(losses[f"reconstruction_{name}"].detach())
        assert found == pytest.approx(float(value), rel=1e-5)
    loss = torch.stack(list(losses.values())).sum()
    assert float(loss.detach()) == pytest.approx(total, rel=1e-5)
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            zero = torch.zeros_like(parameter)
            parameter.copy_(zero if parameter.grad is None else parameter.grad)
    own = model.to_reference()
    gradients = golden.below(f"{group}/grad/{infix}")
    assert gradients
    for name, expected in gradients.items():
        bound = max(1e-7, 1e-4 * float(expected.abs().max()))
        assert float((own[name] - expected).abs().max()) <= bound, name


def test_the_mask_rule_is_exact(golden: Golden) -> None:
    rule, found = golden.config["rule"], golden.below("mask_rule/")
    items, contrasts, tokens = found["noise"].shape
    assert (items, tokens) == (rule["batch"], rule["tokens"])
    kept = int(contrasts * tokens * (1 - rule["masking_ratio"]))
    masking = contrast_masking(
        found["shares"],
        found["noise"],
        found["noise_all"],
        torch.full((items,), kept),
        torch.ones(items, contrasts, dtype=torch.bool),
        kept,
    )
    assert torch.equal(masking.keep, found["ids_keep"])
    assert torch.equal(masking.restore, found["ids_restore"])
    mask = (
        found["mask"].flatten(1)
        if found["mask"].shape[0] == items
        else torch.cat([*found["mask"]], 1)
    )
    assert torch.equal(masking.removed, mask == 1)


def test_weights_are_written_as_they_were_read(golden: Golden) -> None:
    written = golden.model().to_reference()
    expected = golden.below("state/") | golden.below("state_extra/")
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        if "norm_cross_attn" not in name:
            torch.testing.assert_close(written[name], tensor, atol=1e-6, rtol=0, msg=name)
