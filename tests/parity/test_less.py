"""LESS ViT and Hyper-MAE against numbers made by running the published code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_files import FOLDER, IS_OURS, Golden, close_gradient, golden_files
from torch import Tensor

from domainssl.modality import Modality
from domainssl.objectives.hyper_mae import (
    HyperMAE,
    HyperMAEDraws,
    HyperMAEEncoding,
    HyperMAEOptions,
    HyperMAEPass,
)

FILES = golden_files("less")
GROUPS = {"optical": "reflectance", "radar": "db"}
SEEN = {"multi": ("optical", "radar"), "optical": ("optical",), "radar": ("radar",)}


def test_golden_files_exist() -> None:
    assert FILES or not IS_OURS, f"no less_*.safetensors in {FOLDER}"


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


@pytest.fixture(scope="module")
def model(golden: Golden) -> HyperMAE:
    c = golden.config
    waves: dict[str, list[float]] = golden.facts["wavelengths_nm"]
    size = golden["input.optical"].shape[-2:]
    known = {
        name: Modality(
            name=name, kind="image", channels=tuple(f"b{i}" for i in range(len(waves[name]))),
            value_unit=unit, size=tuple(size), gsd_m=golden.facts["resolution_m"],
            wavelengths_nm=tuple(waves[name]), mean=(0.0,) * len(waves[name]),
            std=(1.0,) * len(waves[name]),
        )
        for name, unit in GROUPS.items()
    }  # fmt: skip
    encoding: dict[str, Any] = {
        "architecture": {
            "width": c["embed_dim"], "depth": c["depth"], "heads": c["num_heads"],
            "channel_width": c["channel_embed_dims_per_head"], "ranks": c["rank"],
            "layer_scale": c["init_values"], "decoder_width": c["decoder_embed_dim"],
            "decoder_depth": c["decoder_depth"], "decoder_heads": c["decoder_num_heads"],
        },
        "patch_size": c["patch_size"],
        "radius_m": c["attention_radius"] if c["use_perception_field_mask"] else None,
        "normalization": "identity",
    }  # fmt: skip
    assert c["decoder_channel_embed_dims_per_head"] == c["channel_embed_dims_per_head"]
    made = HyperMAE(
        known,
        HyperMAEEncoding(**encoding),
        context_size=tuple(size),
        mask_ratio=c["mask_ratio"],
        band_mask_ratio=c["channel_mask_ratio"],
        options=HyperMAEOptions(
            reference=True, target_norm="patch" if c["norm_pix_loss"] else "none"
        ),
    )
    state = golden.below("state.")
    loaded, report = type(made.backbone).from_reference(state, made.backbone.arguments)
    assert not report.missing and not report.unexpected
    made.backbone.load_state_dict(loaded.state_dict())
    made.load_pretraining_parts(state)
    written = made.to_reference()
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in state.items())
    return made.train()


def _batch(golden: Golden) -> dict[str, Tensor]:
    return {name: golden[f"input.{name}"] for name in GROUPS}


def _close(golden: Golden, ours: Tensor, theirs: Tensor) -> None:
    bound = golden.facts["tolerance"]
    torch.testing.assert_close(ours, theirs.reshape(ours.shape), rtol=bound, atol=bound)


@pytest.mark.parametrize("name", ["both", *GROUPS])
def test_the_encoder(golden: Golden, model: HyperMAE, name: str) -> None:
    model.eval()
    batch = {n: v for n, v in _batch(golden).items() if name in ("both", n)}
    encoded = model.backbone.encode_seen(model.backbone.normalize(batch))
    _close(golden, encoded.tokens, golden[f"encoder.{name}"])
    features = model.backbone(batch)
    _close(golden, features.cls[next(iter(batch))], golden[f"encoder.{name}"][:, 0, 0])
    model.train()


def _pass(golden: Golden, name: str) -> HyperMAEPass:
    bands, patches = golden[f"{name}.band_restore"], golden[f"{name}.patch_restore"]
    hidden = golden[f"{name}.band_mask"].bool(), golden[f"{name}.patch_mask"].bool()
    kept = [int((~mask[0]).sum()) for mask in hidden]
    return HyperMAEPass(
        keep_bands=bands.argsort(1)[:, : kept[0]],
        restore_bands=bands,
        hidden_bands=hidden[0],
        keep_patches=patches.argsort(1)[:, : kept[1]],
        restore_patches=patches,
        hidden_patches=hidden[1],
    )


@pytest.mark.parametrize("name", SEEN)
def test_masked_encoder_and_decoder(golden: Golden, model: HyperMAE, name: str) -> None:
    x, drawn = model.backbone.normalize(_batch(golden)), _pass(golden, name)
    encoded = model.backbone.encode_seen(x, SEEN[name], drawn.keep_bands, drawn.keep_patches)
    _close(golden, encoded.tokens, golden[f"{name}.latent"])
    found = model.decoder(encoded, drawn, tuple(GROUPS), model.backbone)
    _close(golden, torch.cat(list(found.values()), 1), golden[f"{name}.reconstruction"])


def test_losses_and_gradients(golden: Golden, model: HyperMAE) -> None:
    model.zero_grad()
    draws = HyperMAEDraws(passes={"+".join(GROUPS): _pass(golden, "multi")})
    step = model(_batch(golden), draws)
    _close(golden, step.losses["patches"], golden["multi.loss_patches"])
    _close(golden, step.losses["bands"], golden["multi.loss_bands"])
    torch.stack(list(step.losses.values())).sum().backward()
    ours = {
        "encoder.blocks.0.attn.channel_branch.qk.weight":
            model.backbone.transformer.blocks[0].attention.channels.qk.weight,
        "encoder.optical_patch_embed.proj.0.weight": model.backbone.embed["optical"].up.weight,
        "encoder.blocks.1.low_dim_pool.spatial_pool.kv.weight":
            model.backbone.transformer.blocks[1].attention.position_pool.kv.weight,
        "decoder.mask_token": model.decoder.mask_token,
    }  # fmt: skip
    for name, tensor in golden.below("grad.").items():
        close_gradient(
            None if ours[name].grad is None else ours[name].grad.reshape(tensor.shape), tensor
        )


def test_draws_keep_as_many_as_published(golden: Golden, model: HyperMAE) -> None:
    from domainssl.objectives.base import Generators

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    drawn = model.draw(_batch(golden), Generators(generator(), generator())).passes
    one = drawn["+".join(GROUPS)]
    for ours, name in ((one.hidden_bands, "band_mask"), (one.hidden_patches, "patch_mask")):
        assert torch.equal(ours.sum(1).float(), golden[f"multi.{name}"].sum(1))
