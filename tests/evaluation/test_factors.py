"""Known factors are found in the part of an embedding that holds them, and in no other."""

import math

import pytest
import torch

from domainssl.evaluation.factors import explained_variance, factor_scores

N = 80


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_linear_factor_is_explained_and_an_unrelated_one_is_not():
    features = normal(N, 6)
    held = features @ torch.tensor([1.0, -2.0, 0.5, 0.0, 0.0, 1.0]) * 40 + 300
    assert explained_variance(features, held) > 0.99
    assert explained_variance(features, normal(N, seed=1)) < 0.1


def test_noise_beside_a_factor_leaves_its_share():
    features, noise = normal(2000, 3), normal(2000, seed=1)
    assert explained_variance(features, features[:, 0] + noise) == pytest.approx(0.5, abs=0.05)


def test_useless_dimensions_are_no_advantage():
    factor, few = normal(N, seed=1), normal(N, 4)
    many = torch.cat([few, normal(N, 200, seed=2)], dim=1)
    assert explained_variance(many, factor) < 0.1
    assert explained_variance(few, factor) < 0.1


def test_scale_and_offset_of_dimensions_do_not_matter():
    features, factor = normal(N, 5), normal(N, seed=1)
    factor = factor + features[:, 0]
    moved = features * torch.logspace(-3, 3, 5) + 1000
    first, second = (explained_variance(x, factor) for x in (features, moved.double()))
    assert second == pytest.approx(first, abs=0.01)


def test_classes_are_factors_too_whatever_their_numbers():
    labels = torch.arange(N) % 4
    features = torch.eye(4)[labels] + 0.1 * normal(N, 4)
    assert explained_variance(features, labels) > 0.9
    assert explained_variance(features, labels * 7 - 3) == explained_variance(features, labels)
    assert explained_variance(normal(N, 4, seed=1), labels) < 0.1


def test_every_part_is_scored_for_every_factor():
    common, unique = normal(N, 3), normal(N, 3, seed=1)
    factors = {"shared": common[:, 1] * 2, "own": unique.sum(1)}
    scores = factor_scores({"common": common, "unique": unique}, factors)
    assert scores["common"]["shared"] > 0.95 and scores["unique"]["own"] > 0.95
    assert scores["common"]["own"] < 0.2 and scores["unique"]["shared"] < 0.2


def test_more_dimensions_are_no_advantage_in_a_comparison_of_parts():
    small = normal(N, 2)
    large = torch.cat([normal(N, 6, seed=1), small], dim=1)  # two of eight hold the factor
    factors = {"factor": small.sum(1)}
    scores = factor_scores({"large": large, "small": small}, factors)
    assert scores["small"]["factor"] > 0.95 and scores["large"]["factor"] < 0.6
    whole = factor_scores({"large": large, "small": small}, factors, draws=0)
    assert whole["large"]["factor"] > 0.95


def test_a_factor_that_does_not_vary_has_no_score():
    assert math.isnan(explained_variance(normal(N, 3), torch.ones(N)))
    assert math.isnan(explained_variance(normal(3, 3), normal(3)))


def test_values_for_other_items_are_refused():
    with pytest.raises(ValueError, match=r"'common' has 80 items, factor 'wetness' has 64"):
        factor_scores({"common": normal(N, 3)}, {"wetness": normal(64)})
