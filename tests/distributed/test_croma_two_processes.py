"""CROMA on two ranks has the loss and the gradients of one process on the joined batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from grouped import grouped
from ranks import run_ranks
from torch import Tensor

from domainssl.distributed import rank, world_size
from domainssl.nn.masking import Masking, mask_from_noise
from domainssl.objectives.croma import CROMA, CROMADraws, CROMAOptions

# Items of each rank, whether keys carry gradients, which items lack s2.
CASES: dict[str, dict[str, Any]] = {
    "even": {"sizes": (3, 3), "gather": "grad", "absent": []},
    "constant_keys": {"sizes": (3, 3), "gather": "detach", "absent": []},
    "uneven": {"sizes": (4, 1), "gather": "grad", "absent": []},
    "absent_in_samples": {"sizes": (3, 3), "gather": "grad", "absent": [0, 4]},
    "absent_on_a_rank": {"sizes": (3, 2), "gather": "grad", "absent": [3, 4]},
    "absent_everywhere": {"sizes": (2, 2), "gather": "grad", "absent": [0, 1, 2, 3]},
}


def _model(gather: str) -> CROMA:
    torch.manual_seed(0)

    def some(name: str, bands: int) -> dict[str, Any]:
        channels = [f"{name}_{i}" for i in range(bands)]
        return {"name": name, "kind": "image", "channels": channels, "value_unit": "arbitrary"}

    return CROMA(
        {"s1": some("s1", 2), "s2": some("s2", 3)},
        **grouped(
            size="tiny",
            context_size=24,
            normalization="identity",
            options=CROMAOptions(contrast_gather=gather),  # type: ignore[arg-type]
        ),
    )


def _joined(case: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(5)
    size = sum(case["sizes"])
    present = torch.ones(size, dtype=torch.bool)
    present[case["absent"]] = False
    valid = torch.rand(size, 24, 24, generator=generator) > 0.1
    batch = {
        "s1": torch.rand(size, 2, 24, 24, generator=generator),
        "s2": torch.rand(size, 3, 24, 24, generator=generator),
        "s1.valid": valid,
        "s2.present": present,
    }
    return batch, torch.rand(2, size, 9, generator=generator)


def _step(
    case: dict[str, Any], start: int, stop: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    batch, noise = _joined(case)
    masks: list[Masking] = [mask_from_noise(n[start:stop], 4) for n in noise]
    model = _model(case["gather"])
    step = model({k: v[start:stop] for k, v in batch.items()}, CROMADraws(*masks))
    torch.stack(list(step.losses.values())).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: loss.detach() for n, loss in step.losses.items()}, grads


def run_all_cases() -> dict[str, Any]:
    """Run every case on this rank; gradients and losses are averaged as training does."""
    results = {}
    for name, case in CASES.items():
        start = sum(case["sizes"][: rank()])
        losses, grads = _step(case, start, start + case["sizes"][rank()])
        for tensor in (*losses.values(), *grads.values()):
            dist.all_reduce(tensor)
            tensor /= world_size()
        results[name] = {"losses": losses, "grads": grads}
    return results


@pytest.fixture(scope="module")
def two_ranks() -> dict[str, Any]:
    first, second = run_ranks(run_all_cases)
    assert first.keys() == second.keys() == CASES.keys()
    return dict(first)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one_process(two_ranks: dict[str, Any], name: str) -> None:
    case = CASES[name]
    losses, grads = _step(case, 0, sum(case["sizes"]))
    for term, loss in losses.items():
        torch.testing.assert_close(two_ranks[name]["losses"][term], loss, rtol=1e-5, atol=1e-6)
    assert two_ranks[name]["grads"].keys() == grads.keys()
    for parameter, grad in grads.items():
        ours = two_ranks[name]["grads"][parameter]
        torch.testing.assert_close(ours, grad, rtol=1e-4, atol=1e-6, msg=f"{name}: {parameter}")


def test_without_any_pair_the_loss_is_an_exact_connected_zero(two_ranks: dict[str, Any]) -> None:
    result = two_ranks["absent_everywhere"]
    assert all(float(loss) == 0 for loss in result["losses"].values())
    assert all(float(grad.abs().max()) == 0 for grad in result["grads"].values())
    assert len(result["grads"]) == len(list(_model("grad").parameters()))
