import pytest

from unirl.lab.subsets import mm_reasoning_mm
from unirl.lab.subsets.arrangements import content
from unirl.lab.subsets.lesson import Fact, is_reserved
from unirl.lab.verifier import detect
from unirl.lab.world import COLORS, COUNT_WORDS, RELATIONS, SHAPES, Scene, describe, render


def test_a_recalled_picture_shares_what_is_asked_and_is_another(lessons):
    for _, lesson in lessons(mm_reasoning_mm.KINDS):
        scene, (drawing,) = lesson.prompt[0], lesson.drawings
        assert drawing.scene in mm_reasoning_mm.pool()
        assert drawing.wanted.holds(detect(render(scene)).objects)
        assert drawing.wanted.holds(detect(render(drawing.scene)).objects)
        assert content(scene.objects) != content(drawing.scene.objects)
        assert lesson.reply[0] == f"this is {describe(scene)} . another picture with {drawing.wanted} :"


def test_the_pool_has_a_picture_for_every_fact_whatever_is_shown():
    facts = [Fact(asks="count", word=word) for word in COUNT_WORDS.values()]
    facts += [Fact(asks="color", word=color) for color in COLORS] + [Fact(asks="shape", word=shape) for shape in SHAPES]
    facts += [Fact(asks="relation", word=relation, shape=shape) for relation in RELATIONS for shape in SHAPES]
    pool = mm_reasoning_mm.pool()
    assert len(pool) < 80
    for fact in facts:
        fitting = [scene for scene in pool if fact.holds(scene.objects)]
        assert len({frozenset(content(scene.objects).items) for scene in fitting}) >= 2, fact


def test_the_pool_holds_no_reserved_picture_and_is_always_the_same():
    assert not any(is_reserved(scene.spec) or is_reserved(content(scene.objects)) for scene in mm_reasoning_mm.pool())
    assert mm_reasoning_mm.pool.__wrapped__() == mm_reasoning_mm.pool()


def test_recall_prefers_what_is_most_alike(lessons):
    def alike(scene, other):
        return len({*content(scene.objects).items} & {*content(other.objects).items})

    for _, lesson in lessons(mm_reasoning_mm.KINDS):
        scene, (drawing,) = lesson.prompt[0], lesson.drawings
        fitting = [other for other in mm_reasoning_mm.pool() if drawing.wanted.holds(other.objects)]
        kinds = {*content(scene.objects).items}
        best = max(alike(scene, other) for other in fitting if {*content(other.objects).items} != kinds)
        assert alike(scene, drawing.scene) == best


def test_what_no_picture_shows_cannot_be_recalled():
    with pytest.raises(ValueError, match="add one to the pool"):
        mm_reasoning_mm.recall(Scene(spec=content(()), objects=()), Fact(asks="color", word="pink"))
