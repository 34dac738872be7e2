"""What every objective keeps, whatever its method (DESIGN, section 6)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import OBJECTIVES, build, rows, synthetic_batch, tensors
from ranks import run_ranks
from torch import Tensor

from domainssl import export_backbone, load_backbone
from domainssl.distributed import rank, world_size
from domainssl.nn.blocks import blocks_of, compile_blocks
from domainssl.objectives.base import Generators, Objective, Step

SIZE = 4


def _draws(model: Objective, batch: dict[str, Any], seed: int = 1) -> Any:
    def generator(value: int) -> torch.Generator:
        return torch.Generator().manual_seed(value)

    return model.draw(batch, Generators(generator(seed), generator(seed + 1)))


def _losses(step: Step) -> Tensor:
    return torch.stack(list(step.losses.values()))


@pytest.fixture(scope="module", params=OBJECTIVES)
def recipe(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(recipe: str) -> Objective:
    return build(recipe)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    if isinstance(value, list):
        return all(_is_plain(v) for v in value)
    return value is None or type(value) in (bool, int, float, str)


def test_hyperparameters_are_plain_and_rebuild_the_objective(recipe: str, model: Objective) -> None:
    assert _is_plain(dict(model.hparams))
    again = type(model)(**copy.deepcopy(dict(model.hparams)))
    assert again.arguments == model.arguments
    assert {n: p.shape for n, p in again.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }


def test_equal_draws_give_equal_losses(model: Objective) -> None:
    batch = synthetic_batch(model, SIZE)
    draws = _draws(model, batch)
    model.eval()
    assert torch.equal(_losses(model(batch, draws)), _losses(model(batch, draws)))
    assert _losses(model(batch, draws)).isfinite().all()


def test_all_randomness_comes_from_the_generators(model: Objective) -> None:
    batch = synthetic_batch(model, SIZE)
    torch.manual_seed(1)
    first = list(tensors(_draws(model, batch)))
    torch.manual_seed(2)
    second = list(tensors(_draws(model, batch)))
    assert first
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_batch_is_not_mutated(model: Objective) -> None:
    batch = synthetic_batch(model, SIZE)
    before = copy.deepcopy(batch)
    _losses(model(batch, _draws(model, batch), outputs=True)).sum().backward()
    assert batch.keys() == before.keys()
    for name, value in before.items():
        same = (
            torch.equal(batch[name], value) if isinstance(value, Tensor) else batch[name] == value
        )
        assert same, name


def test_no_parameter_is_a_scalar_so_that_it_can_be_sharded(model: Objective) -> None:
    assert [n for n, p in model.named_parameters() if p.ndim == 0] == []


def test_the_filler_of_invalid_pixels_and_absent_items_changes_nothing(model: Objective) -> None:
    batch = synthetic_batch(model, SIZE)
    name = next(iter(model.backbone.modalities))
    modality = model.backbone.modalities[name]
    batch[f"{name}.present"][0] = False
    other = copy.deepcopy(batch)
    gone = ~other[f"{name}.valid"]
    gone[0] = True
    other[name].masked_fill_(gone.unsqueeze(modality.channel_axis), 12345.0)
    draws = _draws(model, batch)
    assert torch.equal(_losses(model(batch, draws)), _losses(model(other, draws)))


@pytest.mark.parametrize("absent", [[1], [0, 1, 2, 3]], ids=["in_a_sample", "everywhere"])
def test_an_absent_modality_gives_finite_losses_and_gradients(
    model: Objective, absent: list[int]
) -> None:
    for name in model.backbone.modalities:
        batch = synthetic_batch(model, SIZE)
        batch[f"{name}.present"][absent] = False
        model.zero_grad()
        step = model(batch, _draws(model, batch))
        assert _losses(step).isfinite().all(), name
        _losses(step).sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        if len(absent) == SIZE:
            own = [p.grad for p in model.modality_parameters(name)]
            assert own
            assert all(g is None or float(g.abs().max()) == 0 for g in own), name


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_losses_are_float32_and_close_under_autocast(
    model: Objective, precision: torch.dtype
) -> None:
    batch = synthetic_batch(model, SIZE)
    draws = _draws(model, batch)
    with torch.no_grad():
        exact = _losses(model(batch, draws))
        with torch.autocast("cpu", dtype=precision):
            mixed = _losses(model(batch, draws))
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, exact, rtol=0.05, atol=0.05)


def test_every_loss_reaches_the_backbone(model: Objective) -> None:
    batch = synthetic_batch(model, SIZE)
    step = model(batch, _draws(model, batch))
    for name, loss in step.losses.items():
        model.zero_grad()
        loss.backward(retain_graph=True)
        total = sum(
            float(p.grad.abs().sum()) for p in model.backbone.parameters() if p.grad is not None
        )
        assert total > 0, name


def test_gradient_checkpointing_changes_no_gradient(recipe: str, model: Objective) -> None:
    batch = synthetic_batch(model, SIZE)
    draws = _draws(model, batch)
    _losses(model(batch, draws)).sum().backward()
    other = build(recipe)
    other.backbone.set_gradient_checkpointing(True)
    _losses(other(batch, draws)).sum().backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_the_backbone_works_with_every_single_modality(model: Objective) -> None:
    batch = synthetic_batch(model, SIZE)
    names = list(model.backbone.modalities)
    model.eval()
    for name in names:
        part = {
            k: v
            for k, v in batch.items()
            if k.split(".")[0] not in names or k.split(".")[0] == name
        }
        with torch.no_grad():
            features = model.backbone(part)
        assert features.pooled[name].shape == (SIZE, model.backbone.embed_dim[name])
        assert features.tokens[name].isfinite().all()


def test_a_card_that_is_written_and_read_gives_bit_equal_features(
    model: Objective, tmp_path: Path
) -> None:
    backbone = model.backbone.eval()
    export_backbone(backbone, tmp_path)
    loaded = load_backbone(tmp_path)
    batch = synthetic_batch(model, SIZE)
    with torch.no_grad():
        ours, theirs = backbone(batch), loaded(batch)
    for a, b in zip(tensors(ours), tensors(theirs), strict=True):
        assert torch.equal(a, b)


def _one_rank(recipe: str, start: int, stop: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = build(recipe)
    whole = synthetic_batch(model, SIZE)
    name = next(iter(model.backbone.modalities))
    whole[f"{name}.present"][3] = False
    draws = rows(_draws(model, whole), start, stop, SIZE)
    step = model(rows(whole, start, stop, SIZE), draws)
    _losses(step).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: loss.detach() for n, loss in step.losses.items()}, grads


def two_ranks(recipes: list[str]) -> dict[str, Any]:
    """Split the batch 3 and 1 over two ranks, average as data-parallel training does."""
    results = {}
    for recipe in recipes:
        start, stop = ((0, 3), (3, 4))[rank()]
        losses, grads = _one_rank(recipe, start, stop)
        for tensor in (*losses.values(), *grads.values()):
            torch.distributed.all_reduce(tensor)
            tensor /= world_size()
        results[recipe] = {"losses": losses, "grads": grads}
    return results


@pytest.fixture(scope="module")
def on_two_ranks() -> dict[str, Any]:
    return dict(run_ranks(two_ranks, OBJECTIVES)[0])


def test_two_processes_equal_one(on_two_ranks: dict[str, Any], recipe: str) -> None:
    losses, grads = _one_rank(recipe, 0, SIZE)
    for term, loss in losses.items():
        torch.testing.assert_close(on_two_ranks[recipe]["losses"][term], loss, rtol=1e-5, atol=1e-6)
    # what a batch norm subtracts has no gradient but rounding, in proportion to the largest one;
    # over four items it also amplifies rounding (in float64 the methods agree to 1e-9)
    rounding = 1e-6 * max(float(grad.abs().max()) for grad in grads.values())
    for name, grad in grads.items():
        ours = on_two_ranks[recipe]["grads"][name]
        bound = 3e-4 * float(grad.abs().max()) + max(1e-7, rounding)
        assert float((ours - grad).abs().max()) <= bound, name


def _one_of_each_block() -> list[str]:
    """Return an objective per kind of compiled blocks, whose code does not depend on the method."""
    found: dict[str, str] = {}
    for name in OBJECTIVES:
        kinds = {type(block).__qualname__ for block in blocks_of(build(name).backbone)}
        found.setdefault(str(sorted(kinds)), name)
    return list(found.values())


@pytest.mark.slow
def test_compiled_blocks_give_equal_losses() -> None:
    names = _one_of_each_block()
    assert len(names) >= 4
    for name in names:
        _compare_compiled(name)


def _compare_compiled(recipe: str) -> None:
    model = build(recipe)
    batch = synthetic_batch(model, SIZE)
    draws = _draws(model, batch)
    expected = _losses(model(batch, draws))
    expected.sum().backward()
    other = build(recipe)
    # blocks of several sizes one by one: code for any size takes SwinUNETR's five times as long
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        assert compile_blocks(other.backbone) > 0
        losses = _losses(other(batch, draws))
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6, msg=recipe)
        losses.sum().backward()
    # how far rounding carries: the same step on values that differ in their last digits
    near = build(recipe)
    names = near.backbone.modalities
    nudged = {k: v * (1 + 2**-22) if k in names else v for k, v in batch.items()}
    _losses(near(nudged, draws)).sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    rounding = 1e-5 * max(float(g.abs().max()) for g in grads)  # of gradients that cancel out
    models = (model.named_parameters(), other.parameters(), near.parameters())
    for (name, p), q, r in zip(*models, strict=True):
        if p.grad is not None:
            moved = 0.0 if r.grad is None else float((r.grad - p.grad).abs().max())
            bound = 1e-3 * float(p.grad.abs().max()) + rounding + 4 * moved
            assert float((q.grad - p.grad).abs().max()) <= bound, (recipe, name)
