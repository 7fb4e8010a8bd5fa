"""The closed vocabularies of the lab's texts; words and punctuation stand apart, joined by one blank."""

from unirl.lab.world import COLORS, COUNT_WORDS, LETTERS, PLURALS, SHAPES

WORDS = (
    *(":", "<think>", "</think>", "<answer>", "</answer>", "?"),
    *("a", "photo", "of", "and", "left", "right", "above", "below"),
    *("what", "shape", "is", "shown", "color", "the", "how", "many", "with", "where", "from"),
    *LETTERS,
    *COUNT_WORDS.values(),
    *COLORS,
    *SHAPES,
    *PLURALS.values(),
)
