import numpy as np
import pytest
from sklearn.metrics import (
    adjusted_rand_score,
    average_precision_score,
    balanced_accuracy_score,
    normalized_mutual_info_score,
)

from domainssl.evaluation.scores import AveragePrecision, Partition, Rate, interval, resampled


def ones(count):
    return np.ones((1, count))


@pytest.mark.parametrize("seed", range(3))
def test_clusters_are_scored_as_scikit_learn_does(seed):
    rng = np.random.default_rng(seed)
    classes, clusters = rng.integers(0, 4, 60), rng.integers(0, 5, 60)
    clusters[:30] = classes[:30]
    nmi = Partition(clusters[None], classes, "nmi").over(ones(60))[0, 0]
    ari = Partition(clusters[None], classes, "ari").over(ones(60))[0, 0]
    assert nmi == pytest.approx(normalized_mutual_info_score(classes, clusters))
    assert ari == pytest.approx(adjusted_rand_score(classes, clusters))


def test_a_weighting_counts_items_as_often_as_they_are_drawn():
    rng = np.random.default_rng(0)
    classes, found = rng.integers(0, 3, 40), rng.integers(0, 3, 40)
    weights = rng.multinomial(40, np.full(40, 1 / 40), size=2)
    repeated = [np.repeat(np.arange(40), row) for row in weights]
    score = Rate.per_class(found[None], classes, 3).over(weights.astype(float))[:, 0]
    assert score == pytest.approx(
        [balanced_accuracy_score(classes[rows], found[rows]) for rows in repeated]
    )
    agree = Partition(found[None], classes, "nmi").over(weights.astype(float))[:, 0]
    assert agree == pytest.approx(
        [normalized_mutual_info_score(classes[rows], found[rows]) for rows in repeated]
    )


def test_average_precision_is_that_of_scikit_learn_with_ties_weights_and_unknown_labels():
    rng = np.random.default_rng(0)
    has = (rng.random((50, 3)) < 0.3).astype(float)
    chances = np.round(rng.random((1, 50, 3)) + 0.3 * has, 1)  # many ties
    known = rng.random((50, 3)) < 0.9
    weights = rng.multinomial(50, np.full(50, 1 / 50), size=4).astype(float)
    score = AveragePrecision(chances, has, known)
    for row, found in zip(weights, score.per_class(weights)[:, 0], strict=True):
        wanted = [
            average_precision_score(
                has[known[:, k], k], chances[0, known[:, k], k], sample_weight=row[known[:, k]]
            )
            for k in range(3)
        ]
        assert found == pytest.approx(wanted)
        assert score.over(row[None])[0, 0] == pytest.approx(np.mean(wanted))
    alone = AveragePrecision(chances, np.zeros_like(has), known)
    assert np.isnan(alone.over(weights)).all()


def test_accuracy_has_the_interval_of_a_binomial():
    hits = (np.arange(400) % 4 != 0).astype(float)  # 75 %
    draws = Rate.of_hits(hits[None]).over(resampled(np.arange(400), 4000, seed=0))[:, 0]
    low, high = interval(draws)
    half = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert (low, high) == (
        pytest.approx(0.75 - half, abs=0.006),
        pytest.approx(0.75 + half, abs=0.006),
    )


def test_persons_are_drawn_with_all_their_items():
    persons = np.repeat(np.arange(10), 4)
    weights = resampled(persons, 50, seed=0)
    assert (weights.reshape(50, 10, 4).std(2) == 0).all() and (weights.sum(1) == 40).all()
    hits = np.repeat(np.arange(10) % 2, 4).astype(float)
    wide = interval(Rate.of_hits(hits[None]).over(resampled(persons, 2000, 0))[:, 0])
    narrow = interval(Rate.of_hits(hits[None]).over(resampled(np.arange(40), 2000, 0))[:, 0])
    assert wide[1] - wide[0] > 1.6 * (narrow[1] - narrow[0])  # twice, for four equal items each


def test_queries_without_an_answer_do_not_count():
    score = Rate.of_hits(np.array([[1.0, np.nan, 0.0]]))
    assert score.over(ones(3))[0, 0] == 0.5
