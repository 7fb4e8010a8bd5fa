import numpy as np

from unirl.data.seen_sequences import SeenSequences
from unirl.types import TokenKind, TokenSequence

PLACE = 9
"""Where a feature of a picture goes."""


def talk(name, prompt, reply, pixels=()):
    ids = np.array([*prompt, *reply], np.int32)
    in_loss = np.arange(len(ids)) >= len(prompt)
    kinds = np.where(ids == PLACE, TokenKind.PLACEHOLDER, TokenKind.TEXT).astype(np.uint8)
    return TokenSequence(id=name, ids=ids, kinds=kinds, in_loss=in_loss, pixels=pixels)


def filled(value):
    """A picture of one shade."""
    return np.full((2, 2, 3), value, np.uint8)


A, B, C = (talk(name, [1, place], [7, 8]) for place, name in enumerate("abc", start=2))


def repeated(seen, step, *sequences, epoch=0):
    return seen.look(step, epoch, sequences)["sft/repeated_fraction"]


def leaked(heldout, *sequences):
    return SeenSequences(heldout, most_uses=1).look(1, 0, sequences)["sft/num_leaked"]


def test_each_may_come_once_an_epoch():
    seen = SeenSequences([], most_uses=1)
    assert repeated(seen, 1, A, B) == 0
    assert repeated(seen, 2, C, A) == 0.5
    assert repeated(seen, 3, A, B, epoch=1) == 0


def test_a_weight_lets_them_come_again():
    seen = SeenSequences([], most_uses=2)
    assert [repeated(seen, step, A) for step in (1, 2, 3)] == [0, 0, 1]


def test_a_step_that_is_made_again_counts_once():
    seen = SeenSequences([], most_uses=1)
    assert [repeated(seen, step, own) for step, own in ((1, A), (2, B), (2, B), (1, A), (2, B))] == [0] * 5


def test_equal_words_under_another_name_are_another_conversation():
    assert repeated(SeenSequences([], most_uses=1), 1, A, talk("other", [1, 2], [7, 8])) == 0


def test_a_prompt_that_is_held_out_is_known_whatever_the_name_and_the_reply():
    assert leaked([A, B], talk("other", [1, 2], [5]), C) == 1
    assert leaked([A, B], C) == leaked([], A) == 0


def test_a_prompt_that_several_share_tells_none_of_them():
    again = talk("again", [1, 2], [5])
    assert leaked([A, again], talk("other", [1, 2], [6])) == 0
    assert leaked([A, again], talk("other", [1, 2], [5])) == 1


def test_a_picture_that_is_seen_by_its_pixels_counts():
    white, black = (talk("p", [1, PLACE, PLACE, 2], [7], (filled(value),)) for value in (255, 0))
    assert leaked([white], black) == 0
    assert leaked([white, black], white) == 1


def test_a_picture_behind_the_first_target_is_no_part_of_the_prompt():
    prompt, reply = [1, PLACE, PLACE, 2], [7, 3, PLACE, PLACE, 4]
    one, other = (talk(name, prompt, reply, (filled(255), filled(value))) for name, value in (("one", 1), ("two", 2)))
    assert leaked([one], other) == leaked([one], talk("p", prompt, [5], (filled(255),))) == 1
    assert leaked([one, other], talk("p", prompt, reply, (filled(255), filled(3)))) == 0
