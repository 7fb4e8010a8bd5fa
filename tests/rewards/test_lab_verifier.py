import random

import numpy as np
import pytest

from tests.rewards.groups import answers, pictures, question
from unirl.lab.world import caption, make_scene, make_spec, render
from unirl.rewards.lab_verifier import LabVerifierReward


@pytest.fixture
def scene():
    rng = random.Random(0)
    return make_scene(rng, make_spec(rng, "color_attr"))


def test_the_right_picture_earns_one_and_a_blank_one_zero(scene):
    image = render(scene)
    swapped = image[..., ::-1].copy()
    scores = LabVerifierReward().score(pictures(caption(scene.spec), [image, np.full_like(image, 235), swapped]))
    assert scores.values[:2].tolist() == [1, 0]
    assert scores.judged.all()
    assert scores.details["exact"].tolist() == [1, 0, 0]
    assert scores.details["partial"][0] == 1
    np.testing.assert_allclose(scores.values, (scores.details["exact"] + scores.details["partial"]) / 2)


def test_a_prompt_that_is_no_caption_judges_nobody(scene):
    scores = LabVerifierReward().score(pictures("an owl in the rain", [render(scene)] * 2))
    assert not scores.judged.any()
    assert "an owl in the rain" in scores.problem


def test_answers_are_refused_with_the_place_to_look():
    with pytest.raises(ValueError, match=r"rewards\.generation"):
        LabVerifierReward().score(answers(question(), ["<answer> B </answer>"]))
