from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from unirl.pairing.certificate import Clustering
from unirl.pairing.check import clustering_faults, matching_faults
from unirl.pairing.matching import match
from unirl.pairing.medoids import cluster

ORDERS = ["similarity", "input"]


@pytest.fixture
def features():
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(80, 12)) + 0.6
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return rows[:40], rows[40:]


def only(matching, rows):
    return replace(
        matching,
        gen_index=matching.gen_index[rows],
        und_index=matching.und_index[rows],
        similarity=matching.similarity[rows],
    )


def with_pairs(matching, gen_features, und_features, pairs):
    """The matching with other pairs, honestly scored and put in its order."""
    scored = [
        (g, u, float(sum(Fraction(float(x)) * Fraction(float(y)) for x, y in zip(a, b, strict=True))))
        for g, u in pairs
        for a, b in [(gen_features[g], und_features[u])]
    ]
    scored.sort(key=lambda p: (-p[2], p[0], p[1]) if matching.order == "similarity" else p[0])
    gen, und, similarity = (np.array(x) for x in zip(*scored, strict=True))
    return replace(matching, gen_index=gen, und_index=und, similarity=similarity)


@pytest.mark.parametrize("order", ORDERS)
def test_a_greedy_matching_has_no_fault(features, order):
    assert matching_faults(*features, match(*features, order=order)) == []


@pytest.mark.parametrize("order", ORDERS)
def test_leaving_out_any_pair_is_noticed(features, order):
    matching = match(*features, order=order)
    for left_out in range(len(matching.gen_index)):
        part = only(matching, np.arange(len(matching.gen_index)) != left_out)
        assert any("passed over" in fault for fault in matching_faults(*features, part))


@pytest.mark.parametrize("order", ORDERS)
def test_exchanging_the_partners_of_any_two_pairs_is_noticed(features, order):
    matching = match(*features, order=order, threshold=-1.0)
    pairs = list(zip(matching.gen_index.tolist(), matching.und_index.tolist(), strict=True))
    for first in range(0, len(pairs), 7):
        for second in range(first + 1, len(pairs), 5):
            changed = pairs.copy()
            changed[first], changed[second] = (pairs[first][0], pairs[second][1]), (pairs[second][0], pairs[first][1])
            claim = with_pairs(matching, *features, changed)
            assert any("passed over" in fault for fault in matching_faults(*features, claim))


def test_the_matching_of_one_order_is_refused_under_the_other(features):
    by_similarity = match(*features)
    rows = np.argsort(by_similarity.gen_index)
    assert matching_faults(*features, replace(only(by_similarity, rows), order="input"))


def test_a_sample_of_rows_proves_those_rows_and_no_others(features):
    matching = match(*features)
    lost = int(matching.gen_index[0])
    part = only(matching, np.arange(len(matching.gen_index)) != 0)
    assert matching_faults(*features, part, np.array([lost]))
    untouched = np.array([g for g in range(40) if g != lost and not matching_faults(*features, part, np.array([g]))])
    assert matching_faults(*features, part, untouched) == []


def test_ties_must_go_to_the_lowest_rows():
    same = np.full((2, 4), 0.5, dtype=np.float32)
    for order in ORDERS:
        matching = match(same, same, order=order)
        assert matching_faults(same, same, matching) == []
        crossed = replace(matching, und_index=matching.und_index[::-1].copy())
        assert matching_faults(same, same, crossed) == ["generation 0 and understanding 0 (1.000000) were passed over"]


def test_lies_about_single_pairs_are_named(features):
    matching = match(*features)
    twice = only(matching, np.array([0, 0, 1]))
    assert any("used twice" in fault for fault in matching_faults(*features, twice))
    outside = replace(matching, und_index=np.where(matching.und_index == matching.und_index[0], 40, matching.und_index))
    assert "understanding row outside 0..39" in matching_faults(*features, outside)
    better = replace(matching, similarity=matching.similarity + 1e-12)
    assert any("claims similarity" in fault for fault in matching_faults(*features, better))
    stricter = replace(matching, threshold=0.99)
    assert any("below 0.99" in fault for fault in matching_faults(*features, stricter))
    backwards = only(matching, np.arange(len(matching.gen_index))[::-1])
    assert matching_faults(*features, backwards) == ["pairs are not in the order similarity"]


def test_a_clustering_has_no_fault_and_a_wrong_medoid_is_named(features):
    clustering = cluster(features[0], 6, 0)
    assert clustering_faults(features[0], clustering) == []
    sizes = np.bincount(clustering.assignment)
    crowded = int(sizes.argmax())
    others = [r for r in np.flatnonzero(clustering.assignment == crowded) if r != clustering.medoids[crowded]]
    for other in others:
        medoids = clustering.medoids.copy()
        medoids[crowded] = other
        faults = clustering_faults(features[0], replace(clustering, medoids=medoids))
        assert faults == [
            f"cluster {crowded}: medoid {other} is not its most central image {clustering.medoids[crowded]}"
        ]


def test_a_medoid_of_another_cluster_is_a_fault(features):
    clustering = cluster(features[0], 6, 0)
    medoids = clustering.medoids[[1, 0, 2, 3, 4, 5]]
    assert len(clustering_faults(features[0], replace(clustering, medoids=medoids))) == 2


def test_an_empty_cluster_is_a_fault(features):
    clustering = cluster(features[0], 6, 0)
    emptied = np.where(clustering.assignment == 5, 4, clustering.assignment)
    assert clustering_faults(features[0], replace(clustering, assignment=emptied)) == [
        "assignments do not fill clusters 0..5"
    ]


def test_a_clustering_of_other_images_is_a_fault(features):
    assert clustering_faults(features[0][:-1], cluster(features[0], 6, 0)) == ["39 images but 40 assignments"]


def test_duplicates_in_different_clusters_are_a_fault():
    rows = np.array([[1.0, 0.0], [1.0, -0.0], [0.0, 1.0]], dtype=np.float32)
    split = Clustering(medoids=np.array([0, 1]), assignment=np.array([0, 1, 1]))
    assert "image 1 equals an image of cluster 0" in clustering_faults(rows, split)
