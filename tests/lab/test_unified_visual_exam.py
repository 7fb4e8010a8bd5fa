from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import unirl.lab
from unirl.lab.subsets.arrangements import scene_of
from unirl.lab.subsets.lesson import Fact
from unirl.lab.unified_visual import SUBSETS
from unirl.lab.unified_visual_exam import grade, is_well_formed, judge, make_exam, read_answer, summarize
from unirl.lab.world import BACKGROUND, PlacedObject, is_heldout, render
from unirl.models.lumina_vq import ImageSizes, LuminaVq
from unirl.types import Segment

NUM_EACH = 24
SHIPPED = Path(unirl.lab.__file__).parent / "checkpoints" / "lumina_dimoo"


@pytest.fixture(scope="module")
def exam():
    return make_exam(NUM_EACH)


def of(exam, subset):
    return [item for item in exam if item.subset == subset]


def with_pictures(reply, change):
    return tuple(s if s.image is None else Segment(image=change(s.image)) for s in reply)


def noisy(image):
    rng = np.random.default_rng(0)
    pixels = image.astype(int) + rng.normal(0, 8, image.shape)
    pixels[rng.integers(20, size=4), rng.integers(20, size=4)] = 128
    return pixels.clip(0, 255).astype(np.uint8)


def test_equal_arguments_give_equal_exams(exam):
    again = make_exam(NUM_EACH)
    assert [item.id for item in again] == [item.id for item in exam]
    assert [item.wanted for item in again] == [item.wanted for item in exam]
    assert [item.wanted for item in make_exam(NUM_EACH, seed=1)] != [item.wanted for item in exam]


def test_every_subset_is_examined_equally(exam):
    assert [len(of(exam, subset)) for subset in SUBSETS] == [NUM_EACH] * len(SUBSETS)
    assert {item.subset for item in make_exam(2, subsets=("normal", "mm_internet"))} == {"normal", "mm_internet"}


def test_a_perfect_reply_scores_one_everywhere(exam):
    for item in exam:
        scores = grade(item, item.reply)
        assert set(scores.values()) == {1.0}, (item.id, scores)


def test_slightly_noisy_pixels_cost_nothing_exact(exam):
    for item in exam:
        scores = grade(item, with_pictures(item.reply, noisy))
        assert all(score > 0.9 for score in scores.values()), (item.id, scores)


def test_pictures_decoded_from_image_codes_are_judged_as_drawn(exam):
    vq = LuminaVq(SHIPPED, ImageSizes.load(SHIPPED))
    drawn = [segment.image for item in exam for segment in item.reply if segment.image is not None]
    decoded = vq.decode(vq.encode(drawn))
    assert any((a != b).any() for a, b in zip(drawn, decoded, strict=True))
    images = iter(decoded)
    scores = summarize(exam, [with_pictures(item.reply, lambda _: next(images)) for item in exam])
    assert min(scores.values()) > 0.95, scores


@pytest.mark.parametrize("subset", SUBSETS)
def test_silence_scores_nothing(subset, exam):
    for item in of(exam, subset):
        assert set(grade(item, ()).values()) <= {0.0, None}


@pytest.mark.parametrize("subset", SUBSETS)
def test_garbage_scores_nothing(subset, exam):
    rng = np.random.default_rng(0)
    for item in of(exam, subset):
        noise = with_pictures(item.reply, lambda image: rng.integers(0, 256, image.shape, np.uint8))
        garbled = [Segment(text="red red draw <answer>") if s.text else s for s in noise]
        scores = grade(item, garbled)
        if item.answer is not None:
            assert scores.pop("well_formed") == 0.0
        else:
            scores.pop("well_formed")
        assert set(scores.values()) <= {0.0, None}, (item.id, scores)


@pytest.mark.parametrize("subset", SUBSETS)
def test_replies_of_other_items_score_little(subset, exam):
    items = of(exam, subset)
    scores = summarize(items, [item.reply for item in items[1:] + items[:1]])
    exact = [v for name, v in scores.items() if name.endswith(("exact", "corrected", "in_order", "reached"))]
    assert all(score < 0.35 for score in exact), scores
    answers = [v for name, v in scores.items() if "answer" in name and "given" not in name]
    assert all(score < 0.6 for score in answers), scores


def test_a_blank_picture_is_wrong(exam):
    blank = np.full((20, 20, 3), BACKGROUND, np.uint8)
    for item in (item for item in exam if item.wanted):
        assert all(judge(blank, wanted)[0] == 0 for wanted in item.wanted)


def test_a_repeated_wrong_picture_is_told_from_a_corrected_one(exam):
    for item in of(exam, "image_correction"):
        wrong = item.prompt[1].images[0]
        scores = grade(item, with_pictures(item.reply, lambda _, wrong=wrong: wrong))
        assert scores["corrected"] == 0
        assert scores["wrong_replaced"] == 0
        assert scores["rationale_right"] == 1


def test_an_edit_must_leave_the_rest_in_its_place(exam):
    for item in of(exam, "image_editing"):
        (scene,) = item.wanted
        moved = [replace(o, column=3 - o.column) for o in scene.objects]
        score = judge(render(scene_of(moved)), scene)
        assert score[0] == float({*moved} == {*scene.objects})


def test_a_crop_with_the_whole_picture_is_no_crop(exam):
    for item in of(exam, "mm_reasoning_o"):
        whole = item.prompt[0].images[0]
        scores = grade(item, with_pictures(item.reply, lambda _, whole=whole: whole))
        assert scores["crop_exact"] == 0
        assert 0 < scores["crop_partial"] < 1
        assert scores["answer_right"] == 1


def test_the_answer_is_counted_apart_where_the_drawing_is_wrong(exam):
    item = of(exam, "mm_reasoning_t")[0]
    scores = grade(item, with_pictures(item.reply, lambda image: image[::-1, ::-1]))
    if scores["drawing_exact"] == 0:
        assert scores["answer_given_right_drawing"] is None
    assert scores["answer_with_drawing"] == 1


def test_steps_in_the_wrong_order_are_not_in_order(exam):
    for item in of(exam, "mm_internet"):
        texts, pictures = item.reply[::2], item.reply[1::2]
        swapped = [s for pair in zip(texts, pictures[::-1], strict=True) for s in pair]
        scores = grade(item, swapped)
        assert scores["well_formed"] == 1
        assert scores["steps_in_order"] == 0
        assert scores["goal_reached"] == 0
        renumbered = [s for pair in zip(texts[::-1], pictures, strict=True) for s in pair]
        assert grade(item, renumbered)["steps_in_order"] == 0


def test_a_picture_too_many_is_ill_formed_and_earns_nothing(exam):
    item = of(exam, "normal")[0]
    blank = Segment(image=np.full((20, 20, 3), BACKGROUND, np.uint8))
    scores = grade(item, (blank, *item.reply))
    assert scores["well_formed"] == 0
    assert scores["picture_exact"] == 0


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("it is red : red A <answer> A </answer>", "A"),
        ("<answer> B </answer> so <answer> A </answer>", None),
        ("<answer> E </answer>", None),
        ("<answer> A </answer> then", None),
        ("A", None),
    ],
)
def test_an_answer_is_read_only_where_it_is_whole_and_alone(text, letter):
    assert read_answer((Segment(text=text),)) == letter


def test_a_picture_after_the_answer_hides_it(exam):
    item = of(exam, "mm_reasoning_o")[0]
    reply = (*item.reply, Segment(image=np.full((20, 20, 3), BACKGROUND, np.uint8)))
    assert read_answer(reply) is None
    assert not is_well_formed(item, reply)


def test_a_fact_is_judged_from_pixels():
    image = render(scene_of((PlacedObject(shape="circle", color="red", row=0, column=0),)))
    assert judge(image, Fact(asks="color", word="red")) == (1.0, 1.0)
    assert judge(image, Fact(asks="count", word="two")) == (0.0, 0.0)


def test_a_picture_of_another_size_is_refused(exam):
    item = of(exam, "normal")[0]
    with pytest.raises(ValueError, match="expected a lab image"):
        grade(item, (Segment(image=np.zeros((8, 8, 3), np.uint8)),))


def test_pictures_that_are_asked_for_are_held_out(exam):
    for item in of(exam, "normal") + of(exam, "image_generation"):
        ((spec,),) = item.wanted
        assert is_heldout(spec)


def test_a_mean_leaves_out_what_was_not_judged(exam):
    items = of(exam, "image_correction")[:2]
    scores = summarize(items, [items[0].reply, ()])
    assert scores["image_correction/corrected"] == 0.5
    assert scores["image_correction/wrong_replaced"] == 1.0
