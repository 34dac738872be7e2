"""Rates by layer, rules of weight decay, and whose gradients are clipped."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from domainssl.errors import ConfigError
from domainssl.training.optimization import (
    Optimization,
    clip_gradients,
    decay_weights,
    make_optimizer,
    parameter_groups,
)

NAMES = (
    "backbone.embed.weight", "backbone.class_token", "backbone.blocks.0.norm1.weight",
    "backbone.blocks.0.qkv.weight", "backbone.blocks.1.qkv.weight", "backbone.norm.weight",
    "head.last_layer.weight_g", "head.mlp.0.bias",
)  # fmt: skip
ONE_AXIS = {"backbone.blocks.0.norm1.weight", "backbone.norm.weight", "head.mlp.0.bias"}


def named() -> list[tuple[str, nn.Parameter]]:
    return [(n, nn.Parameter(torch.ones((2,) if n in ONE_AXIS else (2, 2)))) for n in NAMES]


def names_in(groups: list[dict], parameters: list[tuple[str, nn.Parameter]]) -> list[list[str]]:
    of = {id(p): name for name, p in parameters}
    return [[of[id(p)] for p in group["params"]] for group in groups]


@pytest.mark.parametrize(
    ("rule", "free"),
    [
        ("no_tokens", {*ONE_AXIS, "backbone.class_token"}),
        ("vectors", ONE_AXIS),
        ("names", ONE_AXIS),
    ],
)
def test_rules_of_weight_decay(rule, free):
    parameters = named()
    groups = parameter_groups(parameters, Optimization(decay_rule=rule, weight_decay=0.3))
    decayed, rest = names_in(groups, parameters)
    assert (set(rest), [g["weight_decay"] for g in groups]) == (free, [0.3, 0.0])
    assert set(decayed) | set(rest) == set(NAMES)


def test_dinov2_decays_vectors_that_are_called_neither_bias_norm_nor_gamma():
    scale = [("backbone.scale", nn.Parameter(torch.ones(3)))]
    assert len(parameter_groups(scale, Optimization(decay_rule="names"))[0]["params"]) == 1
    assert len(parameter_groups(scale, Optimization(decay_rule="vectors"))[1]["params"]) == 1


def test_rates_fall_towards_the_first_layer_and_patches_have_a_share_of_their_own():
    parameters = named()
    options = Optimization(lr=1.0, layer_decay=0.5, patch_embedding_lr=0.2)
    groups = parameter_groups(parameters, options)
    rates = {
        name: group.get("lr", 1.0)
        for group, names in zip(groups, names_in(groups, parameters), strict=True)
        for name in names
    }
    assert rates == {
        "backbone.embed.weight": pytest.approx(0.025), "backbone.class_token": 0.125,
        "backbone.blocks.0.norm1.weight": 0.25, "backbone.blocks.0.qkv.weight": 0.25,
        "backbone.blocks.1.qkv.weight": 0.5, "backbone.norm.weight": 1.0,
        "head.last_layer.weight_g": 1.0, "head.mlp.0.bias": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize("names", [
    ("patch_embed.proj", "layers1.0.blocks.0.norm1", "layers1.0.blocks.1.norm1",
     "layers2.0.blocks.0.norm1", "layers2.0.blocks.1.norm1", "norm"),
    ("stem.convs.0.conv", "stages.0.blocks.0.conv1", "stages.0.blocks.1.conv1",
     "stages.1.blocks.0.conv1", "stages.1.blocks.1.conv1", "head_norm"),
    ("patch_embed.proj", "blocks.0.attn", "blocks.1.mlp.layers.1", "blocks.2.attn",
     "blocks.3.mlp.layers.0", "norm"),
    ("conv1", "layer1.0.conv1", "layer1.1.conv2", "layer2.0.conv1", "layer2.1.bn1", "last"),
], ids=["swin", "stages", "vit", "resnet"])  # fmt: skip
def test_rates_fall_over_stages_and_their_blocks(names):
    parameters = [(f"backbone.net.{n}.weight", nn.Parameter(torch.ones(2, 2))) for n in names]
    beside = f"backbone.net.{names[3].split('.0.')[0].split('.attn')[0]}.downsample.weight"
    parameters.append((beside, nn.Parameter(torch.ones(2, 2))))
    groups = parameter_groups(parameters, Optimization(lr=1.0, layer_decay=0.5))
    rates = {id(p): g.get("lr", 1.0) for g in groups for p in g["params"]}
    found = [rates[id(parameter)] for _, parameter in parameters]
    assert found == [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 1 / 4]


def test_rates_by_layer_need_blocks():
    plain = [("backbone.conv.weight", nn.Parameter(torch.ones(2, 2)))]
    with pytest.raises(ConfigError, match="no transformer blocks"):
        parameter_groups(plain, Optimization(layer_decay=0.9))


def test_weight_decay_follows_half_a_cosine_in_the_decayed_groups():
    options = Optimization(weight_decay=0.04, final_weight_decay=0.4, layer_decay=0.9)
    groups = make_optimizer(named(), options).param_groups
    for step, expected in ((0, 0.04), (50, 0.22), (100, 0.4)):
        decay_weights(groups, options, step, 100)
        half = len(groups) // 2
        assert [g["weight_decay"] for g in groups[:half]] == [pytest.approx(expected)] * half
        assert [g["weight_decay"] for g in groups[half:]] == [0.0] * half


@pytest.mark.parametrize(
    ("who", "norms"),
    [
        ("tensor", [1.0, 1.0, 0.5]),
        ("part", [0.6, 0.8, 0.5]),
        ("all", [3 / 25.25**0.5, 4 / 25.25**0.5, 0.5 / 25.25**0.5]),
    ],
)
def test_whose_gradients_are_clipped(who, norms):
    parameters = [(n, nn.Parameter(torch.zeros(1))) for n in ("backbone.a", "backbone.b", "head.c")]
    for (_, p), size in zip(parameters, (3.0, 4.0, 0.5), strict=True):
        p.grad = torch.tensor([size])
    clip_gradients(parameters, Optimization(clip=1.0, clip_by=who))
    found = [float(p.grad) for _, p in parameters if p.grad is not None]
    assert found == pytest.approx(norms, rel=1e-5)


def test_the_first_step_of_a_warm_up_from_zero_has_no_rate():
    options = Optimization(warmup_steps=5, warmup_start="zero")
    assert [options.scale(step, 20) for step in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]


def test_a_polynomial_fall_and_nesterovs_momentum_are_those_of_nnssl():
    options = Optimization(
        optimizer="sgd", lr=0.01, momentum=0.99, warmup_fraction=0, fall="polynomial"
    )
    assert options.scale(250, 1000) == pytest.approx(0.75**0.9)
    ours, theirs = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    optimizer = make_optimizer([("w", ours)], options)
    reference = torch.optim.SGD(
        [theirs], lr=0.01, momentum=0.99, nesterov=True, weight_decay=options.weight_decay
    )
    for step in range(3):
        for parameter, each in ((ours, optimizer), (theirs, reference)):
            parameter.grad = torch.full((2, 2), 1.0 + step)
            each.step()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["lr", "weight_decay", "eps", "clip", "lr_bias"])
def test_numbers_without_end_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}.*inf"):
        Optimization(**{name: float("inf")})
