"""Sealed normalisation: every form, and what invalid or absent values become."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from domainssl.errors import ConfigError, DataError
from domainssl.modality import Modality
from domainssl.nn.normalization import Form, Normalizer

S2 = Modality(
    name="s2",
    kind="image",
    channels=("B02", "B03"),
    value_unit="dn",
    mean=(100.0, 200.0),
    std=(10.0, 20.0),
)


def _batch(value: float = 110.0) -> dict[str, Any]:
    return {"s2": torch.full((1, 2, 1, 1), value)}


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("identity", [110.0, 110.0]),
        ("zscore", [1.0, -4.5]),
        ("mean2std", [0.75, 0.0]),
        ("mean2std8", [191 / 255, 0.0]),
        ("scale(10)", [11.0, 11.0]),
        ("log(2)", [2.3502402, 2.3502402]),
        ("window(100,140)", [0.25, 0.25]),
    ],
)
def test_forms(form: str, expected: list[float]) -> None:
    out = Normalizer({"s2": S2}, form)(_batch())["s2"]
    torch.testing.assert_close(out.flatten(), torch.tensor(expected))


@pytest.mark.parametrize(
    "form", ["identity", "zscore", "mean2std", "scale(10)", "log(2)", "window(100,140)"]
)
def test_what_was_normalised_can_be_undone(form: str) -> None:
    normalizer = Normalizer({"s2": S2}, form)
    raw = torch.tensor([[[[105.0, 119.0]], [[170.0, 239.0]]]])
    if form.startswith("window"):
        raw[:, 1] = raw[:, 0]
    assert normalizer.can_undo("s2")
    torch.testing.assert_close(normalizer.undo(normalizer({"s2": raw})["s2"], "s2"), raw)


def test_forms_of_items_and_batches_cannot_be_undone() -> None:
    assert not Normalizer({"s2": S2}, "item").can_undo("s2")
    assert not Normalizer({"s2": S2}, "batch").can_undo("s2")


def test_item_limits_come_with_the_batch() -> None:
    normalizer = Normalizer({"s2": S2}, "item")
    limits = torch.tensor([[[100.0, 120.0], [0.0, 220.0]]])
    out = normalizer({**_batch(), "s2.window": limits})["s2"]
    assert out.flatten().tolist() == [0.5, 0.5]
    with pytest.raises(DataError, match="s2.window is missing"):
        normalizer(_batch())


@pytest.mark.parametrize("form", ["mean2std", "batch", "zscore"])
def test_invalid_and_absent_values_become_zero_and_change_nothing_else(form: str) -> None:
    normalizer = Normalizer({"s2": S2}, form)
    x = torch.randn(2, 2, 4, 4) * 20 + 150
    valid = torch.rand(2, 4, 4) > 0.3
    present = torch.tensor([True, False])
    outs = []
    for filler in (0.0, 5e3):
        filled = torch.where(valid.unsqueeze(1) & present.view(2, 1, 1, 1), x, filler)
        batch = {"s2": filled, "s2.valid": valid, "s2.present": present}
        outs.append(normalizer(batch)["s2"])
    assert torch.equal(outs[0], outs[1])
    assert (outs[0][1] == 0).all()
    assert (outs[0][0][:, ~valid[0]] == 0).all()


def test_integer_input_is_normalised_in_float32() -> None:
    out = Normalizer({"s2": S2}, "zscore")({"s2": torch.full((1, 2, 1, 1), 110, dtype=torch.int16)})
    assert out["s2"].dtype == torch.float32


def test_series_scale_the_right_axis() -> None:
    series = Modality(
        name="s2",
        kind="series",
        channels=("B02", "B03"),
        value_unit="dn",
        mean=(100.0, 200.0),
        std=(10.0, 20.0),
    )
    x = torch.full((1, 3, 2, 1, 1), 110.0)
    out = Normalizer({"s2": series}, "zscore")({"s2": x})["s2"]
    assert out[0, 2].flatten().tolist() == [1.0, -4.5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zscor", "Did you mean 'zscore'"),
        ("scale", "takes 1"),
        ("window(5,1)", "ascending order"),
        ("scale(0)", "divide by zero"),
        ("scale(a)", "no number"),
    ],
)
def test_forms_that_cannot_be_read_say_why(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Form.parse(text)


def test_a_form_that_needs_statistics_says_so() -> None:
    bare = Modality(name="ct", kind="volume", channels=("hu",), value_unit="hu")
    with pytest.raises(ConfigError, match="needs mean and std"):
        Normalizer({"ct": bare}, "zscore")


def test_statistics_are_in_the_state_dict() -> None:
    assert set(Normalizer({"s2": S2}, "mean2std").state_dict()) == {"mean_s2", "std_s2"}
