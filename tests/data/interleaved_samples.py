"""Small interleaved samples and image files for the tests of several modules."""

import io

import numpy as np
from PIL import Image

from unirl.types import InterleavedSample, Segment, Turn


def picture(seed=0, height=6, width=8):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def encoded(seed=0, height=6, width=8, form="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(picture(seed, height, width)).save(buffer, format=form)
    return buffer.getvalue()


def edit(name="e0", seed=0):
    """An edit: image and instruction, then words and the edited image."""
    user = Turn(role="user", segments=(Segment(image=picture(seed)), Segment(text="make it blue")))
    answer = (Segment(text="Blue it is.", in_loss=True), Segment(image=picture(seed + 1), in_loss=True))
    return InterleavedSample(
        id=name, turns=(user, Turn(role="assistant", segments=answer)), subset="image_editing", source="made"
    )


def same(a, b):
    """Whether two samples are equal, pixels included."""
    if (a.id, a.subset, a.source, [t.role for t in a.turns]) != (b.id, b.subset, b.source, [t.role for t in b.turns]):
        return False
    pairs = [(s, t) for u, v in zip(a.turns, b.turns, strict=True) for s, t in zip(u.segments, v.segments, strict=True)]
    return all(
        s.text == t.text and s.in_loss == t.in_loss and (s.image is None or np.array_equal(s.image, t.image))
        for s, t in pairs
    )


def outline(sample):
    """Roles with their texts, image shapes and what is learned (+), for comparing by eye."""
    return [
        (turn.role, *(("+" if s.in_loss else "-") + (s.text or str(s.image.shape[:2])) for s in turn.segments))
        for turn in sample.turns
    ]
