"""The grammar against hand-written replies, and its batched form against the plain one on random histories."""

import dataclasses

import numpy as np
import pytest
import torch

from unirl.models.interleaved import ImageMarkup
from unirl.rollout.interleaved_grammar import ANY_CODE, BatchGrammar, Grammar
from unirl.types import TokenKind

TEXT, CODE, BEGIN, GEOMETRY, ROW_END, END = (
    TokenKind.TEXT, TokenKind.CODE, TokenKind.BEGIN, TokenKind.GEOMETRY, TokenKind.ROW_END, TokenKind.END,
)  # fmt: skip
ROWS = ImageMarkup(
    begin=10, end=13, geometry=lambda rows, columns: (rows, columns, 11), row_end=14, before_end=(15,)
)  # fmt: skip
PLAIN = ImageMarkup(begin=10, end=13)


@pytest.fixture(params=[PLAIN, ROWS], ids=["codes alone", "rows and geometry"])
def grammar(request, make_layout):
    return Grammar.of(make_layout(request.param), 2, 3)


@pytest.fixture
def make_layout(chat_layout):
    """Ids 0 to 9 are words, 1 the end, 10 to 15 marks, 16 to 23 codes."""
    return lambda image: chat_layout(image, size=24, codes=range(16, 24), words=range(1, 10), end=1)


def random_history(generator, length):
    """Any ids, most of them of an image."""
    return generator.choice([2, 3, 1, 10, 11, 13, 14, 15, *range(16, 24)], length).tolist()


def written(grammar, generator, num_tokens, max_tokens=10**6):
    """A history that keeps to the rules."""
    ids, place = [], 0
    for _ in range(num_tokens):
        choices = np.flatnonzero(grammar.may_follow(place, may_begin=len(ids) + grammar.room(0) <= max_tokens))
        ids.append(int(grammar.begin if grammar.begin in choices and generator.random() < 0.3 else
                       generator.choice(choices[choices != grammar.end] if len(choices) > 1 else choices)))  # fmt: skip
        place = grammar.advance(place, ids[-1])
    return ids


def test_an_images_ids_come_in_their_order(make_layout):
    grammar = Grammar.of(make_layout(ROWS), 2, 3)
    assert grammar.block == (10, 2, 3, 11, -1, -1, -1, 14, -1, -1, -1, 14, 15, 13)
    ids, place = [4, *(id if id != ANY_CODE else 20 for id in grammar.block), 5], 0
    for id in ids:
        allowed = set(np.flatnonzero(grammar.may_follow(place, may_begin=True)).tolist())
        inside = {id} if id < 16 else set(range(16, 24))
        assert allowed == ({*range(1, 10), 10} if place == 0 else inside)
        place = grammar.advance(place, id)
    assert place == 0
    kinds = [TEXT, BEGIN, *[GEOMETRY] * 3, CODE, CODE, CODE, ROW_END, CODE, CODE, CODE, ROW_END, ROW_END, END, TEXT]
    assert grammar.kinds(ids).tolist() == kinds
    assert grammar.kinds(ids[4:], grammar.place(ids[:4])).tolist() == kinds[4:]


def test_begin_is_allowed_where_there_is_room(grammar):
    assert not grammar.may_follow(0, may_begin=False)[grammar.begin]
    assert grammar.may_follow(0, may_begin=False).sum() == grammar.drawable_text.sum() - 1


def test_batched_rules_equal_the_plain_ones_on_any_history(grammar):
    generator, batch = np.random.default_rng(0), BatchGrammar(grammar, torch.device("cpu"))
    histories = [random_history(generator, 40) for _ in range(150)]
    histories += [written(grammar, generator, 40) for _ in range(150)]
    may_begin = generator.random((300, 40)) < 0.5
    places = batch.places(torch.tensor(histories))
    for row, history in enumerate(histories):
        assert places[row].tolist() == [grammar.place(history[: n + 1]) for n in range(40)]
    for column in (0, 17, 39):
        allowed = batch.may_follow(places[:, column], torch.from_numpy(may_begin[:, column]))
        codes = batch.draws_code(places[:, column])
        for row, place in enumerate(places[:, column].tolist()):
            plain = grammar.may_follow(place, may_begin=bool(may_begin[row, column]))
            assert np.array_equal(allowed[row].numpy(), plain)
            assert bool(codes[row]) == (grammar.block[place] == ANY_CODE)


def test_the_place_depends_on_the_tail_alone(grammar):
    generator = np.random.default_rng(1)
    for _ in range(100):
        history = written(grammar, generator, int(generator.integers(1, 60)))
        assert grammar.place(history) == grammar.place(history[-len(grammar.block) :])
        opened = grammar.open_image(history, "request 0")
        assert len(opened) == grammar.place(history) == grammar.place(opened)
        assert not opened or history[-len(opened) :] == opened


def test_a_closed_image_of_another_grid_is_history_like_any_other(grammar, make_layout):
    for rows, columns in ((1, 2), (4, 5)):
        other = Grammar.of(make_layout(ROWS if len(grammar.block) > 8 else PLAIN), rows, columns)
        image = [20 if id == ANY_CODE else id for id in other.block]
        assert grammar.open_image([4, *image], "request 0") == []
        assert grammar.open_image([4, *image, 5, grammar.begin], "request 0") == [grammar.begin]


def test_an_image_begun_with_another_grid_is_refused(make_layout):
    grammar = Grammar.of(make_layout(ROWS), 2, 3)
    with pytest.raises(ValueError, match=r"request 0: expected a prompt that ends in text or within an image of 2 x 3"):
        grammar.open_image([4, 10, 3, 3, 11], "request 0")


def test_a_reply_is_read_back(grammar):
    image = [16 + n % 8 if id == ANY_CODE else id for n, id in enumerate(grammar.block)]
    codes = np.array([id - 16 for id, wanted in zip(image, grammar.block, strict=True) if wanted == ANY_CODE])
    segments = grammar.parse([4, 5, *image, *image, 6, 1])
    assert [None if s.text_ids is None else s.text_ids.tolist() for s in segments] == [[4, 5], None, None, [6]]
    assert np.array_equal(segments[1].codes, codes.reshape(2, 3))
    resumed = grammar.parse([*image[3:], 1], image[:3])
    assert len(resumed) == 1
    assert np.array_equal(resumed[0].codes, codes.reshape(2, 3))
    assert grammar.parse([]) == grammar.parse([1]) == ()


def test_what_breaks_the_rules_is_no_reply(grammar):
    image = [20 if id == ANY_CODE else id for id in grammar.block]
    swapped = [*image[:-2], 4, image[-1]]
    for wrong in (image[:-1], [*image[:-2], image[-1]], swapped, [4, 20], [4, 0], [4, 1, 5], [1, *image], [4, 13]):
        assert not grammar.is_well_formed(wrong), wrong
    generator = np.random.default_rng(2)
    for _ in range(50):
        ids = written(grammar, generator, 60)
        assert grammar.is_well_formed(ids[: len(ids) - grammar.place(ids)])


def test_a_grid_has_two_sides(make_layout):
    with pytest.raises(ValueError, match="grid: expected positive rows and columns of image codes; got 0 x 3"):
        Grammar.of(make_layout(PLAIN), 0, 3)


def test_what_a_drawing_may_be_is_said_at_once():
    from unirl.rollout.interleaved_law import Drawing

    for wrong, message in (({"temperature": -1.0}, "temperature: expected 0 or more"), ({"top_p": 0.0}, "top_p: exp")):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(Drawing(), **wrong)
