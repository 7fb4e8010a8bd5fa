import random

from unirl.lab.subsets.riddles import COLORED_THINGS, NUMBER_CLUES, SHAPE_CLUES, color_clue, item_riddle, make_riddle
from unirl.lab.world import CATEGORIES, COLORS, COUNT_WORDS, PLURALS, SHAPES, Item, make_spec


def test_every_shape_colour_and_count_has_clues():
    assert set(SHAPE_CLUES) == set(SHAPES)
    assert set(COLORED_THINGS) == set(COLORS)
    assert set(NUMBER_CLUES) == {2, 3, 4}


def test_a_clue_never_names_what_it_hides():
    for shape, clues in SHAPE_CLUES.items():
        assert all(shape not in clue.split() and shape in fact.split() for clue, fact in clues)
    for number, clues in NUMBER_CLUES.items():
        assert all(COUNT_WORDS[number] not in clue.split() for clue in clues)


def test_a_riddle_hides_the_shape_the_colour_or_both():
    rng, item = random.Random(0), Item(shape="triangle", color="green")
    riddles = [item_riddle(rng, item) for _ in range(100)]
    assert {len(riddle.facts) for riddle in riddles} == {1}
    assert {"triangle" in riddle.words for riddle in riddles} == {True, False}
    both = item_riddle(rng, item, both=True)
    assert not {"triangle", "green"} & set(both.words.split())
    assert {"triangle", "green"} <= set(both.solution.split())


def test_facts_and_words_together_name_all_that_a_spec_asks_for():
    rng = random.Random(1)
    for spec in (make_spec(rng, category) for category in CATEGORIES for _ in range(100)):
        riddle = make_riddle(rng, spec)
        known = {*riddle.words.split(), *riddle.solution.split()}
        assert riddle.facts, riddle
        for item in spec.items:
            assert {item.shape, PLURALS[item.shape]} & known
            assert item.color is None or item.color in known
        if spec.category == "counting":
            assert riddle.facts[-1].split()[-1] == COUNT_WORDS[len(spec.items)]


def test_a_colour_is_told_by_a_thing():
    riddle = color_clue(random.Random(0), "green")
    assert (riddle.words, riddle.facts) in {
        ("the color of grass", ("grass is green",)),
        ("the color of a leaf", ("a leaf is green",)),
    }
