import re

import pytest

from unirl.lab.subsets import image_correction
from unirl.lab.verifier import detect, parse_caption, verify
from unirl.lab.world import COUNT_WORDS, PLURALS, render


def named_at_the_end(text):
    return re.fullmatch(r".*so draw (.*) \.", text)[1]


def test_a_wrong_picture_is_wrong_and_its_correction_right(lessons):
    for _, lesson in lessons(image_correction.KINDS):
        request, wrong = lesson.first_try
        spec = parse_caption(request.removeprefix("draw : "))
        rationale, drawing = lesson.reply
        assert not verify(spec, render(wrong)).exact
        assert verify(spec, render(drawing.scene)).exact
        assert f"a photo of {named_at_the_end(rationale)}" in request


def test_each_mistake_is_in_the_wrong_picture_and_mended_in_the_right_one(lessons):
    for _, lesson in lessons(image_correction.KINDS):
        wrong, right = (detect(render(scene)).objects for scene in (lesson.first_try[1], lesson.drawings[0].scene))
        texts = re.findall(r"\( \d \) (.*?) \.", lesson.reply[0])
        assert texts
        for text in texts:
            assert_mistake(text, wrong, right)


def assert_mistake(text, wrong, right):
    words = text.split()
    if text.startswith("the color of"):
        name = next(shape for shape, plural in PLURALS.items() if words[4] in (shape, plural))
        assert {o.color for o in wrong if o.shape == name} == {words[6]}
        assert {o.color for o in right if o.shape == name} == {words[-1]}
    elif text.startswith("the shape"):
        assert words[4] in {o.shape for o in wrong} - {o.shape for o in right}
        assert words[-1] in {o.shape for o in right} - {o.shape for o in wrong}
    elif text.startswith("the number"):
        assert (words[5], words[-1]) == (COUNT_WORDS[len(wrong)], COUNT_WORDS[len(right)])
    else:
        name, other = words[1], words[words.index("but") - 1]
        relation = " ".join(words[3 : words.index("the", 2)])
        for objects, said in ((wrong, relation), (right, text.split("must be ")[1].removesuffix(" it"))):
            spec = parse_caption(f"a photo of a {name} {said} a {other}")
            assert spec.relation == said
            centres = {o.shape: o.centre for o in objects}
            axis = int(said in ("above", "below"))
            gap = centres[name][axis] - centres[other][axis]
            assert (gap < 0) == (said in ("left of", "above"))


@pytest.mark.parametrize("kind", image_correction.KINDS)
def test_mistakes_are_numbered(kind, lessons):
    numbers = ["1", "2"] if kind == "two_mistakes" else ["1"]
    for _, lesson in lessons({kind: image_correction.KINDS[kind]}):
        assert re.findall(r"\( (\d) \)", lesson.reply[0]) == numbers
