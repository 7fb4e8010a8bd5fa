import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unirl.pairing import medoids as room
from unirl.pairing.check import clustering_faults
from unirl.pairing.medoids import cluster, medoids


def unit(rows):
    rows = np.asarray(rows, dtype=np.float64)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def slow_medoid(features, rows):
    """The lowest row whose summed inner product with all members is within the tie of the largest."""
    scores = [sum(float(features[i] @ features[j].astype(np.float64)) for j in rows) / len(rows) for i in rows]
    return next(row for row, score in zip(rows, scores, strict=True) if score >= max(scores) - 1e-6)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), num=st.integers(1, 40), distinct=st.integers(1, 40), wanted=st.integers(1, 45))
def test_each_medoid_is_its_clusters_most_central_member_and_none_is_empty(seed, num, distinct, wanted):
    generator = np.random.default_rng(seed)
    features = unit(generator.normal(size=(distinct, 6)))[generator.integers(distinct, size=num)]
    clustering = cluster(features, wanted, seed)
    assert len(clustering.medoids) == min(wanted, len(np.unique(features, axis=0)))
    assert len(set(clustering.medoids.tolist())) == len(clustering.medoids)
    for k, medoid in enumerate(clustering.medoids.tolist()):
        rows = np.flatnonzero(clustering.assignment == k).tolist()
        assert medoid == slow_medoid(features, rows)
    assert clustering_faults(features, clustering) == []
    assert medoids(features, wanted, seed).tolist() == sorted(clustering.medoids.tolist())


def test_hand_worked_cluster_of_three():
    # 0, 20 and 70 degrees: the mean points to 29.2 degrees, nearest is 20.
    angles = np.radians([0, 70, 20])
    features = unit(np.stack([np.cos(angles), np.sin(angles)], axis=1))
    assert medoids(features, 1, 0).tolist() == [2]


def test_both_members_of_a_cluster_of_two_are_equally_central_so_the_lower_row_is_taken():
    features = unit(np.random.default_rng(0).normal(size=(2, 512)))
    for rows in ([0, 1], [1, 0]):
        assert medoids(features[rows], 1, 0).tolist() == [0]


@pytest.mark.parametrize("seed", range(5))
def test_well_separated_groups_are_found(seed):
    generator = np.random.default_rng(seed)
    centres = unit(np.eye(6))
    features = unit(np.repeat(centres, 20, axis=0) + 0.02 * generator.normal(size=(120, 6)))
    assignment = cluster(features, 6, seed).assignment.reshape(6, 20)
    assert (assignment == assignment[:, :1]).all()
    assert sorted(assignment[:, 0].tolist()) == list(range(6))


def test_every_row_ends_at_its_nearest_mean():
    features = unit(np.random.default_rng(1).normal(size=(300, 8)))
    clustering = cluster(features, 12, 0)
    means = np.stack([features[clustering.assignment == k].astype(np.float64).mean(axis=0) for k in range(12)])
    gaps = ((features[:, None] - means[None]) ** 2).sum(axis=2)
    own = gaps[np.arange(300), clustering.assignment]
    assert (own <= gaps.min(axis=1) + 1e-6).all()


def test_the_seed_decides_and_block_size_does_not(monkeypatch):
    features = unit(np.random.default_rng(2).normal(size=(200, 16)))
    first = medoids(features, 10, 7)
    assert np.array_equal(first, medoids(features, 10, 7))
    assert not np.array_equal(first, medoids(features, 10, 8))
    monkeypatch.setattr(room, "BLOCK_ROWS", 13)
    assert np.array_equal(first, medoids(features, 10, 7))


def test_as_many_clusters_as_images_takes_every_distinct_image_once():
    features = unit(np.eye(4))[[0, 1, 1, 2, 0]]
    clustering = cluster(features, 99, 0)
    assert clustering.medoids.tolist() == [0, 1, 3]
    assert clustering.assignment.tolist() == [0, 1, 1, 2, 0]


def test_duplicates_share_a_cluster_even_with_signed_zeros():
    features = np.array([[1.0, 0.0], [1.0, -0.0], [0.0, 1.0]], dtype=np.float32)
    assert medoids(features, 3, 0).tolist() == [0, 2]


def test_images_too_near_for_float32_distances_still_give_every_cluster_a_medoid():
    # Distances between these rows all round to 0, so seeding runs out of mass and clusters run empty.
    features = np.stack([np.ones(9), np.arange(9) * 1e-5], axis=1).astype(np.float32)
    clustering = cluster(features, 5, 0)
    assert len(set(clustering.medoids.tolist())) == 5
    assert clustering_faults(features, clustering) == []


def test_a_run_cut_short_is_still_a_valid_clustering():
    features = unit(np.random.default_rng(3).normal(size=(300, 8)))
    clustering = cluster(features, 20, 0, max_iterations=1)
    assert len(clustering.medoids) == 20
    assert clustering_faults(features, clustering) == []


@pytest.mark.parametrize(("num", "wanted", "iterations"), [(0, 1, 1), (3, 0, 1), (3, 1, 0)])
def test_nothing_to_cluster_is_an_error(num, wanted, iterations):
    with pytest.raises(ValueError, match="num_clusters >= 1"):
        cluster(np.ones((num, 1), dtype=np.float32), wanted, 0, max_iterations=iterations)
