import random

import numpy as np
import pytest

from unirl.lab.noise import NoiseRates, noisy_answer, noisy_spec, true_answer
from unirl.lab.world import caption, describe, is_heldout, make_question, sample_scene


@pytest.fixture(scope="module")
def asked():
    rng = random.Random(0)
    return [(scene := sample_scene(rng), make_question(rng, scene)) for _ in range(1500)]


def differing_words(one, other):
    return set(one.split()) ^ set(other.split())


def test_a_noisy_caption_changes_something_and_is_never_held_out(asked):
    rng = random.Random(1)
    for scene, _ in asked:
        changed = noisy_spec(rng, scene.spec)
        assert caption(changed) != caption(scene.spec)
        assert not is_heldout(changed)
        assert changed.category == scene.spec.category


def test_zero_rates_give_the_true_answer(asked):
    rng = random.Random(2)
    silent = NoiseRates(caption=0, belief=0, letter=0)
    for scene, question in asked:
        answer = noisy_answer(rng, scene, question, silent)
        assert answer == true_answer(scene, question)
        assert answer.description == describe(scene)


def test_a_wrong_belief_is_consistent(asked):
    rng = random.Random(3)
    for scene, question in asked:
        answer = noisy_answer(rng, scene, question, NoiseRates(caption=0, belief=1, letter=0))
        assert answer.word != question.word
        assert answer.word == question.choices["ABCD".index(answer.letter)]
        if question.asks in ("color", "shape", "relation") and len(scene.objects) <= 2:
            assert answer.word in answer.description.split()
        assert answer.description != describe(scene)


def test_a_wrong_letter_leaves_the_word_alone(asked):
    rng = random.Random(4)
    for scene, question in asked[:300]:
        answer = noisy_answer(rng, scene, question, NoiseRates(caption=0, belief=0, letter=1))
        assert answer.word == question.word
        assert answer.letter != question.letter


def test_default_rates_are_met(asked):
    rng = random.Random(5)
    wrong = [noisy_answer(rng, *pair, NoiseRates()).letter != pair[1].letter for pair in asked]
    # A letter is right when belief and letter are both clean, or when a wrong letter undoes a wrong belief.
    expected = 1 - (0.78 * 0.75 + 0.22 * 0.25 / 3)
    assert np.mean(wrong) == pytest.approx(expected, abs=0.04)
