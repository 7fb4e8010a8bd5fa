import pytest

from unirl.lab.competence import measure_reconstruction, wilson_interval
from unirl.lab.exam import make_exam
from unirl.lab.plain_sampling import PlainJanus
from unirl.lab.world import HELDOUT_CATEGORIES, is_heldout


def test_equal_exams_for_equal_arguments_and_only_heldout_captions():
    exam = make_exam(40)
    assert exam.scenes == make_exam(40).scenes
    assert exam.scenes[:20] != make_exam(20, seed=1).scenes
    assert all(is_heldout(scene.spec) for scene in exam.scenes)
    assert [scene.spec.category for scene in exam.scenes[:5]] == list(HELDOUT_CATEGORIES)


def test_wilson_interval_matches_the_textbook():
    low, high = wilson_interval(0.5, 100)
    assert (round(low, 4), round(high, 4)) == (0.4038, 0.5962)
    assert wilson_interval(0.0, 50)[0] == 0.0
    assert wilson_interval(1.0, 50)[1] == pytest.approx(1.0)


def test_a_random_model_reconstructs_nothing(random_model):
    assert measure_reconstruction(PlainJanus(random_model), make_exam(10))["reconstruction_exact"] == 0.0


def test_the_shipped_vq_reconstructs_almost_everything(base):
    scores = measure_reconstruction(PlainJanus(base), make_exam(120))
    assert scores["reconstruction_exact"] >= 0.95
    assert scores["reconstruction_same_objects"] == pytest.approx(scores["reconstruction_exact"], abs=0.05)
