import math

import numpy as np
import pytest
import torch

from domainssl.evaluation.probes import (
    knn_accuracy,
    label_splits,
    linear_probe_accuracy,
    standardize,
)
from domainssl.evaluation.raw import PERCENTILES, band_statistics
from domainssl.evaluation.report import (
    Collected,
    count_classes,
    has_classes,
    measure,
    measure_raw,
    table,
)
from domainssl.evaluation.retrieval import Side, class_retrieval, recall_at_1
from domainssl.evaluation.spread import embedding_std, rankme
from domainssl.modality import Modality


def clusters(n=60, classes=3, dim=16, noise=0.3):
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, dim, generator=g)
    return centres[labels] + noise * torch.randn(n, dim, generator=g), labels


def test_separated_classes_are_found_by_neighbours_and_probe():
    features, labels = clusters()
    assert knn_accuracy(features, labels) == 1
    assert linear_probe_accuracy(features, labels) == 1


def test_noise_is_at_chance():
    features = torch.randn(300, 16, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(300) % 3
    assert knn_accuracy(features, labels) == pytest.approx(1 / 3, abs=0.1)
    assert linear_probe_accuracy(features, labels) == pytest.approx(1 / 3, abs=0.1)


def test_an_item_does_not_vote_for_itself():
    features = torch.eye(6)
    assert knn_accuracy(features, torch.arange(6)) == 0


def test_scores_ignore_offset_and_scale_of_dimensions():
    features, labels = clusters(noise=1.5)
    other = features * torch.logspace(-3, 3, 16) + 100
    assert knn_accuracy(other, labels) == pytest.approx(knn_accuracy(features, labels), abs=0.02)


def test_labels_may_be_any_integers():
    features, labels = clusters()
    assert knn_accuracy(features, labels * 7 - 3) == 1
    assert linear_probe_accuracy(features, labels * 7 - 3) == 1


def test_splits_are_fixed_disjoint_and_balanced():
    labels = torch.tensor([0] * 30 + [1] * 8 + [2])
    first, again = (list(label_splits(labels)) for _ in range(2))
    assert len(first) == 5
    for (train, test), (train_again, _) in zip(first, again, strict=True):
        assert train.tolist() == train_again.tolist()
        assert not set(train) & set(test)
        assert labels[train].bincount().tolist() == [10, 4]  # half of the 8, none of the single
    assert first[0][0].tolist() != first[1][0].tolist()


def test_a_probe_without_two_classes_is_nan():
    assert math.isnan(linear_probe_accuracy(torch.randn(10, 4), torch.zeros(10, dtype=torch.long)))


def test_constant_dimensions_become_zero():
    x = torch.cat([torch.randn(20, 2), torch.full((20, 1), 1e6)], dim=1)
    out = standardize(x)
    assert out[:, 2].abs().max() == 0
    torch.testing.assert_close(out[:, :2].std(0, correction=0), torch.ones(2))


def test_retrieval_finds_partners_and_is_blind_to_offsets():
    a = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    assert recall_at_1(a, a + 5) == 1
    assert recall_at_1(a, a.flip(0)) == 0


def test_retrieval_of_unrelated_vectors_is_at_chance():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 500, 8, generator=g)
    assert recall_at_1(a, b) < 5 / 500


def side(features, labels, groups=None):
    labels = torch.tensor(labels)
    groups = torch.arange(len(labels)) if groups is None else torch.tensor(groups)
    return Side(features=torch.tensor(features), labels=labels, groups=groups)


def test_class_retrieval_counts_how_early_the_class_comes():
    queries = side([[1.0, 0.0], [-1.0, 0.0]], [0, 1], [10, 11])
    gallery = side([[9.0, 0.1], [7.0, -0.1], [-7.0, 0.1], [-9.0, -0.1]], [0, 1, 0, 1])
    found = class_retrieval(queries, gallery, k=2)
    # from either side: hit, miss, hit, miss (or the reverse within a pair of equal distance)
    ranks = {0: (1, 3), 1: (1, 3)}
    expected = sum((1 / a + 2 / b) / 2 for a, b in ranks.values()) / 2
    assert found == pytest.approx({"P@1": 1.0, "P@2": 0.5, "mAP": expected, "chance": 0.5})


def test_class_retrieval_is_blind_to_level_and_scale_of_a_side():
    features, labels = clusters(n=80, noise=0.2)
    first = Side(features=features[:40], labels=labels[:40], groups=torch.arange(40))
    other = Side(features=features[40:] * 7 + 100, labels=labels[40:], groups=torch.arange(40, 80))
    found = class_retrieval(first, other)
    assert found["mAP"] > 0.95 and found["P@5"] > 0.95


def test_class_retrieval_of_unrelated_vectors_is_at_chance():
    g = torch.Generator().manual_seed(0)
    sides = [
        Side(
            features=torch.randn(400, 8, generator=g),
            labels=torch.arange(400) % 4,
            groups=torch.arange(400) + start,
        )
        for start in (0, 400)
    ]
    found = class_retrieval(*sides)
    assert found["chance"] == pytest.approx(0.25)
    assert found["mAP"] == pytest.approx(0.25, abs=0.03)


def test_class_retrieval_leaves_out_scans_of_the_same_patient():
    queries = side([[1.0, 0.0], [-1.0, 0.0]], [0, 1], [3, 4])
    features = [[1.0, 0.1], [0.5, -0.1], [-0.5, 0.1], [-1.0, -0.1]]
    found = class_retrieval(queries, side(features, [0, 1, 0, 1], [3, 5, 6, 4]), k=1)
    assert found["P@1"] == 0 and found["chance"] == pytest.approx(1 / 3)
    alone = class_retrieval(queries, side(features, [0, 2, 2, 2], [3, 5, 6, 7]), k=1)
    assert all(math.isnan(value) for value in alone.values())  # no query has a candidate


def test_scans_of_one_source_are_looked_up_among_those_of_another():
    features, labels = clusters(n=80, noise=0.2)
    source = torch.arange(80) // 40
    moved = features + 50 * source.unsqueeze(1)
    found = Collected(
        features={"scan": moved}, raw={"scan": moved[:, :2]}, labels=labels,
        present={"scan": torch.ones(80, dtype=torch.bool)},
        sources={"scan": source}, source_names={"scan": ("ct", "mr")},
    )  # fmt: skip
    scores = measure(found, ("scan",), "val/", 10)
    assert scores["val/retrieval/ct-mr/mAP"] > 0.95 and scores["val/retrieval/mr-ct/P@1"] > 0.95
    raw = measure_raw(found, ("scan",))
    assert 0.3 < raw["val/raw/retrieval/ct-mr/mAP"] < 0.95
    text = str([list(c.cells) for c in table({**scores, **raw}, 80, 3).columns])
    assert "ct → mr" in text and "mAP" in text
    unknown = Collected(
        features={"scan": moved}, present=found.present,
        sources={"scan": source}, source_names={"scan": ("ct", "mr")},
    )  # fmt: skip
    without = measure(unknown, ("scan",))
    assert not [key for key in without if "retrieval" in key]
    assert table(without, 80, 0).caption is None  # there is no share to trust or not
    assert "80 items" in str(table(scores, 80, 3).caption)


def test_collapsed_features_have_no_std_and_rank_one():
    same = torch.ones(40, 8)
    assert embedding_std(same) == pytest.approx(0, abs=1e-6)
    assert rankme(same) == pytest.approx(1, abs=1e-3)
    spread = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    assert embedding_std(spread) == pytest.approx(1, abs=0.01)
    assert rankme(spread) == pytest.approx(8, abs=0.05)


def test_rank_counts_the_directions_in_use():
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(16, 3, generator=g)).Q
    features = torch.linalg.qr(torch.randn(200, 3, generator=g)).Q @ basis.T
    assert rankme(features) == pytest.approx(3, abs=1e-3)


def test_band_statistics_use_valid_pixels_only():
    modality = Modality(name="s2", kind="image", channels=("a", "b"), value_unit="dn", size=(2, 2))
    x = torch.tensor([[[[1.0, 3.0], [99.0, 99.0]], [[2.0, 2.0], [float("nan"), 0.0]]]])
    valid = torch.tensor([[[True, True], [False, False]]])
    out = band_statistics({"s2": x, "s2.valid": valid}, modality)
    assert out[:, :4].tolist() == [[2.0, 2.0, 1.0, 0.0]]
    five = [1.1, 1.5, 2.0, 2.5, 2.9]  # of 1 and 3
    assert out[0, 4:].tolist() == pytest.approx([n for pair in five for n in (pair, 2.0)])


def test_band_statistics_of_a_series_and_of_nothing_valid():
    modality = Modality(name="s1", kind="series", channels=("a",), value_unit="db", size=(1, 1))
    x = torch.tensor([[1.0, 5.0], [7.0, 7.0]]).reshape(2, 2, 1, 1, 1)
    valid = torch.tensor([[True, True], [False, False]]).reshape(2, 2, 1, 1)
    out = band_statistics({"s1": x, "s1.valid": valid}, modality)
    assert out.shape == (2, 7) and out[:, :2].tolist() == [[3.0, 2.0], [0.0, 0.0]]
    assert out[1].tolist() == [0.0] * 7


def test_percentiles_are_those_of_numpy_over_valid_values():
    modality = Modality(name="s2", kind="image", channels=("a",), value_unit="dn", size=(5, 5))
    x = torch.randn(3, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    valid = torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(1)) > 0.4
    out = band_statistics({"s2": x, "s2.valid": valid}, modality)
    for row in range(3):
        values = x[row, 0][valid[row]].double().numpy()
        assert out[row, 2:].tolist() == pytest.approx(np.percentile(values, PERCENTILES), abs=1e-6)


def test_items_of_unknown_class_do_not_count():
    features, labels = clusters()
    present = torch.ones(80, dtype=torch.bool)
    x = torch.cat([features, torch.zeros(20, 16)])
    unknown = torch.cat([labels, torch.full((20,), -1)])
    found = Collected(features={"ct": x}, present={"ct": present}, labels=unknown)
    scores = measure(found, ("ct",), "val/", 10)
    assert scores["val/knn/ct"] == 1 and scores["val/probe/ct"] == 1
    assert count_classes(unknown) == 3 and not has_classes(torch.tensor([-1, 0, 0]))
