import numpy as np
import pytest

from unirl.lab.data import make_generation, make_understanding
from unirl.lab.features import NUM_FEATURES, embed


@pytest.fixture(scope="module")
def features():
    understanding = embed(np.stack([sample.image for sample in make_understanding(1200, 0)]))
    generation = embed(np.stack([sample.image for sample in make_generation(1200, 0)]))
    return understanding, generation


def test_features_are_unit_float32(features):
    assert features[0].dtype == np.float32
    assert features[0].shape == (1200, NUM_FEATURES)
    assert np.allclose(np.linalg.norm(features[0], axis=1), 1, atol=1e-6)


def test_a_picture_without_objects_is_like_no_other(features):
    blank = embed(np.full((1, 20, 20, 3), 235, np.uint8))
    assert np.isclose(np.linalg.norm(blank), 1)
    assert np.abs(features[0] @ blank[0]).max() == 0


def test_no_images_give_no_features():
    assert embed(np.zeros((0, 20, 20, 3), np.uint8)).shape == (0, NUM_FEATURES)


def test_retrieved_similarities_spread_around_the_threshold(features):
    similarities = features[0] @ features[1].T
    retrieved = []
    for row in similarities:
        best = int(row.argmax())
        retrieved.append(row[best])
        similarities[:, best] = -1
    assert 0.7 <= np.median(retrieved) <= 0.9
    assert 0.05 <= np.mean(np.array(retrieved) < 0.6) <= 0.3


def test_the_same_content_elsewhere_is_nearer_than_other_content():
    samples = make_generation(400, 3)
    vectors = embed(np.stack([sample.image for sample in samples]))
    same, other = [], []
    for i, one in enumerate(samples):
        for j, two in enumerate(samples[:i]):
            (same if one.prompt == two.prompt else other).append(vectors[i] @ vectors[j])
    assert np.mean(same) > np.mean(other) + 0.1


def test_wrong_images_are_refused():
    with pytest.raises(ValueError, match="expected a lab image"):
        embed(np.zeros((1, 32, 32, 3), np.uint8))
