from collections import Counter

import pytest

from unirl.lab import words
from unirl.lab.subsets.lesson import is_reserved
from unirl.lab.unified_visual import (
    GENERATION_SUBSETS,
    SUBSETS,
    WORDS,
    heldout_samples,
    kinds,
    make_lesson,
    make_sample,
    training_samples,
)
from unirl.lab.verifier import detect, parse_caption
from unirl.lab.world import COLORS, SHAPES, Item, PlacedObject, Scene, Spec, is_heldout, render

NUM_EACH = 120
MAX_TOKENS = 190
TOKENS_PER_PICTURE = 27


@pytest.fixture(scope="module")
def training():
    return {subset: list(training_samples(subset, NUM_EACH, seed=0)) for subset in SUBSETS}


@pytest.fixture(scope="module")
def heldout():
    return {subset: list(heldout_samples(subset, NUM_EACH, seed=0)) for subset in SUBSETS}


def segments(sample):
    return [segment for turn in sample.turns for segment in turn.segments]


def written(sample):
    """All of a sample as comparable values."""
    return [(s.text, None if s.image is None else s.image.tobytes(), s.in_loss) for s in segments(sample)]


def targets(sample):
    return [segment.image for segment in segments(sample) if segment.in_loss and segment.image is not None]


def shown_specs(image):
    """What a picture shows with all colours named, where the world has a caption for it."""
    objects = detect(image).objects
    items = tuple(Item(shape=found.shape, color=found.color) for found in objects)
    if len(items) == 1:
        return [Spec(category="colors", items=items)]
    if len(set(items)) == 1:
        return [Spec(category="counting", items=items)]
    return [Spec(category="color_attr", items=order) for order in (items, items[::-1]) if len(items) == 2]


@pytest.mark.parametrize("subset", SUBSETS)
def test_a_sample_depends_on_seed_subset_and_index_alone(subset, training):
    for index in (97, 3, 50):
        again = make_sample(subset, 0, index)
        assert again.id == training[subset][index].id
        assert written(again) == written(training[subset][index])
    assert written(make_sample(subset, 1, 3)) != written(training[subset][3])


def test_ids_are_unique(training, heldout):
    ids = [sample.id for part in (training, heldout) for samples in part.values() for sample in samples]
    assert len(set(ids)) == len(ids)


def test_every_word_is_in_the_vocabulary_and_every_word_of_it_occurs(training, heldout):
    texts = [s.text for part in (training, heldout) for samples in part.values() for x in samples for s in segments(x)]
    used = Counter(word for text in texts if text for word in text.split())
    assert set(used) == set(WORDS)
    assert all(text == " ".join(text.split()) for text in texts if text)


def test_the_vocabulary_is_small_and_extends_the_labs():
    assert len(set(WORDS)) == len(WORDS) < 200
    assert WORDS[: len(words.WORDS)] == words.WORDS


def test_samples_are_short(training, heldout):
    for part in (training, heldout):
        for sample in (sample for samples in part.values() for sample in samples):
            pictures = [segment for segment in segments(sample) if segment.image is not None]
            num_words = sum(len(segment.text.split()) for segment in segments(sample) if segment.text)
            assert len(pictures) <= 4
            assert num_words + TOKENS_PER_PICTURE * len(pictures) <= MAX_TOKENS


def test_only_the_last_reply_is_learned_and_all_of_it(training):
    for sample in (sample for samples in training.values() for sample in samples):
        *before, reply = sample.turns
        assert all(segment.in_loss for segment in reply.segments)
        assert not any(segment.in_loss for turn in before for segment in turn.segments)


def test_a_wrong_picture_of_its_own_is_not_learned(training):
    for sample in training["image_correction"]:
        assert [turn.role for turn in sample.turns] == ["user", "assistant", "user", "assistant"]
        (wrong,) = sample.turns[1].segments
        assert wrong.image is not None
        assert not wrong.in_loss


REPLIES = {  # Of text and pictures in turn.
    "image_generation": "TP",
    "image_editing": "TP",
    "image_correction": "TP",
    "mm_reasoning_o": "TPT",
    "mm_reasoning_mm": "TPT",
    "mm_reasoning_t": "TPT",
    "understanding": "T",
    "text_reasoning": "T",
    "normal": "P",
    "mm_reasoning_t_direct": "T",
}


def test_replies_alternate_as_in_the_paper(training):
    for subset, samples in training.items():
        for sample in samples:
            reply = "".join("P" if segment.text is None else "T" for segment in sample.turns[-1].segments)
            assert reply == REPLIES.get(subset, "TP" * (len(reply) // 2)), subset


def test_training_pictures_never_show_a_held_out_caption(training):
    images = [image for samples in training.values() for sample in samples for image in targets(sample)]
    assert len(images) > 1000
    assert not any(is_heldout(spec) for image in images for spec in shown_specs(image))


def test_training_captions_are_never_held_out(training):
    for sample in training["normal"]:
        assert not is_heldout(parse_caption(sample.turns[0].segments[0].text.removeprefix("draw : ")))
    for subset in SUBSETS:
        assert not any(is_reserved(make_lesson(subset, 0, index)[1].key) for index in range(NUM_EACH))


@pytest.mark.parametrize("subset", SUBSETS)
def test_held_out_samples_are_about_held_out_captions(subset):
    assert all(is_heldout(make_lesson(subset, 0, index, heldout=True)[1].key) for index in range(NUM_EACH))


@pytest.mark.parametrize("subset", SUBSETS)
def test_kinds_are_balanced_and_single_objects_never_held_out(subset, training, heldout):
    for part, names in ((training, kinds(subset)), (heldout, kinds(subset, heldout=True))):
        counts = Counter(sample.source.removeprefix("lab/") for sample in part[subset])
        assert set(counts) == set(names)
        assert max(counts.values()) - min(counts.values()) <= 1
    assert "single_object" not in kinds(subset, heldout=True)


def test_samples_rarely_repeat(training):
    for subset in GENERATION_SUBSETS:
        distinct = {tuple(written(sample)) for sample in training[subset]}
        assert len(distinct) > 0.8 * NUM_EACH, subset


def test_pictures_are_made_of_the_patches_of_the_world(training):
    corners = [(row, column) for row in range(4) for column in range(4)]
    kinds_of_objects = [(shape, color) for shape in SHAPES for color in COLORS]
    known = {tile for kind in kinds_of_objects for corner in corners for tile in patches(lone(*kind, *corner))}
    images = [s.image for samples in training.values() for x in samples for s in segments(x) if s.image is not None]
    assert {patch for image in images for patch in patches(image)} <= known


def lone(shape, color, row, column):
    placed = PlacedObject(shape=shape, color=color, row=row, column=column)
    return render(Scene(spec=Spec(category="colors", items=()), objects=(placed,)))


def patches(image):
    tiles = image.reshape(5, 4, 5, 4, 3).swapaxes(1, 2).reshape(25, 48)
    return {tile.tobytes() for tile in tiles}


def test_the_control_asks_what_the_drawn_form_asks(training, heldout):
    for part in (training, heldout):
        pairs = zip(part["mm_reasoning_t"], part["mm_reasoning_t_direct"], strict=True)
        for drawn, direct in pairs:
            assert direct.turns[0].segments[0].text == f"do not draw . {drawn.turns[0].segments[0].text}"


def test_unknown_subsets_are_refused():
    with pytest.raises(ValueError, match="expected a subset of image_generation"):
        make_sample("image_generatoin", 0, 0)
