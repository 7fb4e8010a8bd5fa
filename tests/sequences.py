"""Random conversations as token sequences of a family's layout."""

import numpy as np

from unirl.types import Segment, Turn

PICTURE = np.zeros((4, 4, 3), np.uint8)
WORDS = ("draw", "a", "red", "green", "circle", "square", "is", "it", "here")


def random_turns(rng, *, text_only=False):
    """A user's turn and an assistant's; pictures of 2 x 2 codes, some of which are not to be learned."""

    def words(low, high):
        return " ".join(rng.choice(WORDS, rng.integers(low, high)))

    user = [Segment(text=words(1, 6))]
    answer = [Segment(text=words(1, 5), in_loss=True)]
    if not text_only:
        if rng.random() < 0.5:
            user.append(Segment(image=PICTURE))
        answer.append(Segment(image=PICTURE, in_loss=bool(rng.random() < 0.8)))
        if rng.random() < 0.5:
            answer.append(Segment(text=words(1, 4), in_loss=True))
    return Turn(role="user", segments=tuple(user)), Turn(role="assistant", segments=tuple(answer))


def random_sequences(layout, count, seed=0, *, text_only=False):
    """Conversations with random codes."""
    rng = np.random.default_rng(seed)
    made = []
    for index in range(count):
        turns = random_turns(rng, text_only=text_only)
        images = layout.images_to_code(turns)
        codes = [rng.integers(0, layout.vocabulary.num_codes, (2, 2)).astype(np.int32) for _ in images]
        made.append(layout.encode(turns, codes, id=f"s{index}"))
    return made
