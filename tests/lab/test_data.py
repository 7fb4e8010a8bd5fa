import numpy as np

from unirl.lab.data import make_generation, make_heldout, make_understanding
from unirl.lab.verifier import parse_caption, verify
from unirl.lab.world import CATEGORIES, HELDOUT_CATEGORIES, LETTERS, is_heldout


def test_equal_seeds_give_equal_records():
    assert [s.prompt for s in make_generation(40, 1)] == [s.prompt for s in make_generation(40, 1)]
    assert [s.question for s in make_understanding(40, 1)] != [s.question for s in make_understanding(40, 2)]


def test_training_prompts_are_never_held_out_and_match_their_pictures():
    for sample in make_generation(500, 0):
        spec = parse_caption(sample.prompt)
        assert not is_heldout(spec)
        assert verify(spec, sample.image).exact
        assert sample.class_name == spec.category


def test_training_questions_cover_all_categories_with_unique_ids():
    samples = make_understanding(500, 0)
    assert {sample.category for sample in samples} == set(CATEGORIES)
    assert len({sample.id for sample in samples}) == 500


def test_letters_of_the_gold_answers_are_balanced():
    letters = [sample.answer for sample in make_understanding(2000, 0)]
    shares = [letters.count(letter) / len(letters) for letter in LETTERS]
    assert np.allclose(shares, 0.25, atol=0.04)


def test_heldout_samples_are_held_out_and_balanced():
    understanding, generation = make_heldout()
    assert len(understanding) == len(generation) == 480
    assert all(is_heldout(parse_caption(sample.prompt)) for sample in generation)
    categories = [sample.category for sample in understanding]
    assert {category: categories.count(category) for category in categories} == dict.fromkeys(HELDOUT_CATEGORIES, 96)
    assert all((u.image == g.image).all() for u, g in zip(understanding, generation, strict=True))
