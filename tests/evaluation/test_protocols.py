import numpy as np
import pytest
import torch

from domainssl.backbones.base import Features
from domainssl.evaluation import protocols
from domainssl.evaluation.comparison import Protocol, Sides, compare
from domainssl.evaluation.dense import majority, patch_labels, patch_tokens
from domainssl.evaluation.features import Items, load_items, save_items


def fit(noise=0.3, count=60, classes=3, width=16, seeds=(0, 1)):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(classes, width))
    labels = np.arange(count) % classes
    x, y = (centres[labels] + noise * rng.normal(size=(count, width)) for _ in range(2))
    x, y = protocols.standardized(x, y)
    return protocols.Fit(
        train=x, train_labels=labels, train_persons=np.arange(count), test=y, test_labels=labels,
        test_persons=np.arange(count), classes=classes, seeds=seeds,
    )  # fmt: skip


def value(found, metric):
    (one,) = [f for f in found if f.metric == metric]
    return one.score.over(np.ones((1, 60)))[0].mean()


WAYS = {
    "knn": (protocols.nearest_neighbours, "accuracy"),
    "linear": (protocols.linear, "balanced accuracy"),
    "mlp": (protocols.mlp, "accuracy"),
    "kmeans": (protocols.clustering, "matched accuracy"),
    "nmi": (protocols.clustering, "NMI"),
    "few": (lambda f: protocols.few_shot(f, 5), "accuracy"),
    "mAP": (protocols.image_retrieval, "mAP"),
}


@pytest.mark.parametrize("name", WAYS)
def test_separated_classes_are_found_and_noise_is_at_chance(name):
    way, metric = WAYS[name]
    assert value(way(fit()), metric) > 0.97
    (found,) = [f for f in way(fit(noise=1e4)) if f.metric == metric]
    assert found.score.over(np.ones((1, 60))).mean() == pytest.approx(found.chance, abs=0.2)


def test_retrieval_leaves_out_items_of_the_same_person():
    base = fit()
    alone = protocols.Fit(**{**vars(base), "test_persons": base.test_labels})
    hits = protocols.image_retrieval(alone)
    assert all(np.isnan(f.score.over(np.ones((1, 60)))).all() for f in hits)  # nobody else has it


def test_pairs_are_found_through_a_linear_map_and_shuffled_ones_are_not():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(80, 8)), rng.normal(size=(60, 8))
    mixing = rng.normal(size=(8, 12))
    found = protocols.pair_retrieval((x, y), (x @ mixing, y @ mixing))
    assert {f.protocol for f in found} == {"cross-modal (aligned)"}  # widths differ
    assert value(found, "R@1") == 1
    shuffled = protocols.pair_retrieval((x, y), (x @ mixing, (y @ mixing)[::-1]))
    assert value(shuffled, "R@1") < 0.1
    direct = protocols.pair_retrieval((x, y), (x, y))
    assert {f.protocol for f in direct} == {"cross-modal (aligned)", "cross-modal (direct)"}


def test_regions_are_found_among_those_of_other_persons_by_another_source():
    turned = np.array([[1.0, 0], [0, 1], [-1, 0], [0, -1]])  # four regions, one per direction
    queries = protocols.Regions(
        features=96 + 32 * turned, classes=np.array([0, 1, 0, 1]), persons=np.arange(4)
    )
    gallery = protocols.Regions(  # of another level and scale
        features=-4 + 0.25 * turned, classes=np.array([0, 1, 1, 2]), persons=np.array([9, 1, 8, 7])
    )
    found = {f.metric: f for f in protocols.source_retrieval("anatomy", queries, gallery)}
    assert {f.protocol for f in found.values()} == {"cross-source (anatomy)"}
    scores = {m: f.score.over(np.eye(4)).squeeze(1) for m, f in found.items()}
    # 0: its own direction, of its class; 1: without person 1 the hit comes after row 0, as near;
    # 2: the hit is opposite; 3: hits are third and last
    assert scores["R@1"].tolist() == [1, 0, 0, 0]
    assert scores["R@5"].tolist() == [1, 1, 1, 1]
    assert scores["mAP"] == pytest.approx([1, 1 / 2, 1 / 4, (1 / 3 + 2 / 4) / 2])
    assert found["mAP"].chance == pytest.approx((1 / 4 + 1 / 3 + 1 / 4 + 2 / 4) / 4)


def scans(width: int = 6) -> Items:
    """Eight scans, four by each scanner, with two organs in each; scanners differ in level."""
    rng, numbers = np.random.default_rng(0), np.arange(8)
    organs = rng.normal(size=(3, width))
    sources, classes = numbers % 2, numbers // 2 % 2
    patch_items = np.repeat(numbers, 6)
    patch_labels = np.tile([0, 0, 1, 1, 2, 2], 8)
    patches = organs[patch_labels] + 0.01 * rng.normal(size=(48, width))
    patches = patches * (1 + sources[patch_items, None]) + 50 * sources[patch_items, None]
    return Items(
        ids=[f"e{n}" for n in numbers], labels=classes, persons=numbers,
        present={"scan": np.ones(8, bool)}, sources={"scan": sources},
        pooled={"scan": organs[classes] * (1 + sources[:, None])},
        patches={"scan": patches}, patch_labels={"scan": patch_labels},
        patch_items={"scan": patch_items},
    )  # fmt: skip


def test_scans_are_compared_across_sources_by_class_and_by_organ(tmp_path):
    save_items(tmp_path / "items.safetensors", scans(), "key")
    items = load_items(tmp_path / "items.safetensors", "key")
    assert items is not None and items.sources["scan"].tolist() == [0, 1] * 4
    settings, notes = Protocol(names=("cross_source",), resamples=20), []
    names, sides = {"scan": ("ct", "mr")}, {"one": Sides(train=items, test=items)}
    rows = compare(sides, {"one": [("scan",)]}, [0, 1], settings, notes, source_names=names)
    assert {(r.features, r.protocol) for r in rows} == {
        (f"scan: {way}", f"cross-source ({what})")
        for way in ("ct to mr", "mr to ct") for what in ("class", "anatomy")
    }  # fmt: skip
    assert all(r.value == 1 for r in rows if r.metric in ("R@1", "mAP")) and notes == []
    # four scans of either, two organs of each; background is none
    assert {r.test_items for r in rows if "anatomy" in r.protocol} == {8}
    assert {r.chance for r in rows if r.metric == "mAP"} == {0.5}
    items.sources["scan"][:] = 0
    rows = compare(sides, {"one": [("scan",)]}, [0, 1], settings, notes, source_names=names)
    assert rows == [] and "ct to mr, by anatomy: fewer than two classes" in notes[2]


def test_few_shot_needs_as_many_items_of_each_class():
    with pytest.raises(ValueError, match="fewer than 30"):
        protocols.few_shot(fit(), 30)


def test_patches_take_the_class_of_most_of_their_pixels():
    mask = torch.tensor([[[0, 0, 1, 1], [0, 2, 1, 1], [-1, -1, 2, 2], [-1, 0, 2, 0]]])
    assert majority(mask, (2, 2)).tolist() == [[[0, 1], [-1, 2]]]
    assert majority(mask.unsqueeze(-1).expand(-1, -1, -1, 2), (2, 2, 1)).tolist() == [
        [[[0], [1]], [[-1], [2]]]
    ]
    tokens = torch.arange(4.0).reshape(1, 4, 1)
    valid = torch.tensor([[True, False, True, True]])
    values, items, labels = patch_labels(tokens, valid, (2, 2), mask, 64)
    assert (values.squeeze(1).tolist(), items.tolist(), labels.tolist()) == ([0, 3], [0, 0], [0, 2])


def test_dates_of_a_series_are_averaged_where_patches_are_valid():
    tokens = torch.tensor([1.0, 10.0, 3.0, 20.0]).reshape(1, 4, 1)  # two dates, two patches
    valid = torch.tensor([[True, True, True, False]])
    features = Features(
        tokens={"s2": tokens}, grid={"s2": (2, 1, 2)}, token_valid={"s2": valid},
        dates={"s2": torch.zeros(1, 2, dtype=torch.int32)},
    )  # fmt: skip
    found = patch_tokens(features, ("s2",), {})
    assert found is not None
    values, is_valid, grid = found
    assert values.flatten().tolist() == [2, 10] and is_valid.all() and grid == (1, 2)


def test_dense_probe_measures_iou_over_all_patches():
    x = np.array([[0.0], [1.0]] * 20)
    labels = np.array([0, 1] * 20)
    found = protocols.patch_probe((x, labels), (x, labels, np.arange(40) // 10), 4, 2)
    assert [f.score.over(np.ones((1, 4)))[0, 0] for f in found] == [1, 1]
