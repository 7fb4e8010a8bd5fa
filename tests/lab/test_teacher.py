import random

import numpy as np
import pytest

from unirl.lab.teacher import Teacher, TeacherRefusalError
from unirl.lab.verifier import parse_caption, verify
from unirl.lab.world import LETTERS, caption, is_heldout, make_question, render, sample_scene


@pytest.fixture(scope="module")
def records():
    rng = random.Random(0)
    scenes = [sample_scene(rng) for _ in range(400)]
    return [(scene, make_question(rng, scene), render(scene)) for scene in scenes]


@pytest.fixture(scope="module")
def heldout_records():
    rng = random.Random(1)
    scenes = [sample_scene(rng, heldout=True) for _ in range(200)]
    return [(scene, make_question(rng, scene), render(scene)) for scene in scenes]


def test_a_completed_caption_is_true_answers_the_question_and_is_for_training(records):
    teacher = Teacher()
    for _, question, image in records:
        prompt = teacher.complete_generation(image, question.text, question.word)
        assert verify(parse_caption(prompt), image).exact
        assert not is_heldout(parse_caption(prompt))
        check = teacher.verify(image, question.text, question.choices, question.letter, prompt)
        assert check.ok, check.reason
    assert sum(teacher.num_refused.values()) == 0
    assert teacher.num_heldout_avoided > 0


def test_a_completed_question_has_its_answer_in_the_caption(records):
    teacher = Teacher()
    for scene, _, image in records:
        prompt = caption(scene.spec)
        question, choices, letter = teacher.complete_understanding(image, prompt)
        check = teacher.verify(image, question, choices, letter, prompt)
        # A question may ask for a detail that the caption leaves open; then only that may be reported.
        assert check.ok or check.reason.startswith("poor caption"), check.reason
        assert choices[LETTERS.index(letter)]


def test_heldout_prompts_are_refused_and_counted(heldout_records):
    teacher = Teacher()
    for scene, _, image in heldout_records[:20]:
        with pytest.raises(TeacherRefusalError, match="held-out caption"):
            teacher.complete_understanding(image, caption(scene.spec))
    assert teacher.num_refused["held-out caption"] == 20


def test_heldout_scenes_never_leak_their_captions_unless_allowed(heldout_records):
    strict, permissive = Teacher(), Teacher(allow_heldout=True)
    leaked = [is_heldout(parse_caption(caption_or_refusal(strict, r) or "a photo of a cross")) for r in heldout_records]
    assert not any(leaked)
    assert 0 < strict.num_refused["held-out caption"] < 100
    leaked = [is_heldout(parse_caption(caption_or_refusal(permissive, record))) for record in heldout_records]
    assert sum(leaked) > 20
    assert permissive.num_refused["held-out caption"] == 0


def caption_or_refusal(teacher, record):
    _, question, image = record
    try:
        return teacher.complete_generation(image, question.text, question.word)
    except TeacherRefusalError:
        return None


def test_completions_do_not_depend_on_order_or_on_other_records(records):
    first, second = Teacher(seed=3), Teacher(seed=3)
    forward = [first.complete_generation(image, q.text, q.word) for _, q, image in records[:50]]
    backward = [second.complete_generation(image, q.text, q.word) for _, q, image in reversed(records[:50])]
    assert forward == backward[::-1]


@pytest.mark.parametrize(
    ("question", "answer", "kind"),
    [
        ("what color is the square ?", "blue", "wrong answer"),
        ("what color is the circle ?", "red", "wrong answer"),
        ("why is the square red ?", "red", "unknown question"),
    ],
)
def test_bad_records_are_refused_with_their_kind(question, answer, kind):
    scene = next(s for s in scenes_of("colors") if caption(s.spec) == "a photo of a red square")
    teacher = Teacher()
    with pytest.raises(TeacherRefusalError) as caught:
        teacher.complete_generation(render(scene), question, answer)
    assert caught.value.kind == kind
    assert teacher.num_refused[kind] == 1


def test_a_picture_without_lab_objects_is_refused():
    teacher = Teacher()
    with pytest.raises(TeacherRefusalError, match="unreadable picture"):
        teacher.complete_generation(np.full((20, 20, 3), 235, np.uint8), "what shape is shown ?", "square")


def test_a_caption_of_another_picture_is_refused(records):
    teacher = Teacher()
    scene, other = records[0][0], next(r for r in records if caption(r[0].spec) != caption(records[0][0].spec))
    with pytest.raises(TeacherRefusalError, match="wrong caption"):
        teacher.complete_understanding(other[2], caption(scene.spec))


def test_verify_says_what_disagrees(records):
    teacher = Teacher()
    scene, question, image = next(r for r in records if r[0].spec.category == "colors")
    prompt = caption(scene.spec)
    wrong_letter = next(letter for letter in LETTERS if letter != question.letter)
    assert "wrong answer" in teacher.verify(image, question.text, question.choices, wrong_letter, prompt).reason
    assert "expected a letter" in teacher.verify(image, question.text, question.choices, "E", prompt).reason
    bare = f"a photo of a {scene.objects[0].shape}"
    assert "poor caption" in teacher.verify(image, question.text, question.choices, question.letter, bare).reason
    other = "a photo of four red crosses"
    assert "wrong caption" in teacher.verify(image, question.text, question.choices, question.letter, other).reason


def scenes_of(category):
    rng = random.Random(9)
    while True:
        yield sample_scene(rng, category)
