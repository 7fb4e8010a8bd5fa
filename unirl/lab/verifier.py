"""Judges a lab picture from its pixels alone, and reads a caption back into its spec.

Nearest palette colour per pixel, 8-connected components per colour, shape by the best overlap with every template.
Extra objects, off-palette pixels, oversized blobs and wrong counts all cost; tokens are never looked at.
"""

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unirl.lab.world import (
    BACKGROUND,
    COLORS,
    COUNT_WORDS,
    GLYPHS,
    IMAGE_PX,
    PALETTE,
    PLURALS,
    RELATIONS,
    SHAPES,
    Category,
    Item,
    Relation,
    Spec,
    relation_between,
)

COLOR_TOLERANCE = 60
"""L2 distance in RGB beyond which a pixel has no palette colour and is junk."""
MIN_IOU = 0.75
"""Overlap with the best template below which a component is an unknown object."""
MIN_OBJECT_PX = 8
"""Smaller components are junk pixels, not objects."""
MAX_OBJECT_SIDE_PX = 9
"""Wider or taller components match no template."""
FREE_JUNK_PX = 6
"""Junk that costs nothing: the VQ decoder leaves a few off-colour pixels."""
_JUNK_SCALE_PX = 60

_OFF_PALETTE = len(COLORS) + 1
_PALETTE_AND_BACKGROUND = np.array([*PALETTE.values(), BACKGROUND], np.int32)
_EXACT_GLYPHS = {mask.tobytes(): shape for shape, mask in GLYPHS.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundObject:
    """A component found in the pixels; shape None means that no template fits."""

    shape: str | None
    color: str
    centre: tuple[float, float]
    """(x, y) in pixels, y down, of the bounding box."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Detection:
    """What the pixels hold."""

    objects: tuple[FoundObject, ...]
    junk_px: int
    """Pixels of no palette colour, or in components too small to be an object."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How far a picture meets its spec."""

    exact: bool
    """Every item found once, nothing else, the relation holds, at most FREE_JUNK_PX junk pixels."""
    partial: float
    """In [0, 1]: F1 of the items, halved where the relation or the count is wrong, lowered by junk."""
    detection: Detection

    @property
    def reward(self) -> float:
        """(partial + exact) / 2: dense enough to learn from, and only an exact picture gets 1."""
        return (self.partial + self.exact) / 2


def detect(image: NDArray[np.uint8]) -> Detection:
    """The objects and the junk in an image uint8 [20, 20, 3].

    Raises:
        ValueError: any other dtype or shape.
    """
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape != (IMAGE_PX, IMAGE_PX, 3):
        got = f"{getattr(image, 'dtype', type(image).__name__)} {getattr(image, 'shape', '')}".strip()
        raise ValueError(
            f"expected a lab image, uint8 [{IMAGE_PX}, {IMAGE_PX}, 3]; got {got}; decode the model's own image tokens, "
            "or choose a reward made for other pictures"
        )
    distances = ((image[:, :, None].astype(np.int32) - _PALETTE_AND_BACKGROUND) ** 2).sum(-1)
    labels = np.where(distances.min(-1) > COLOR_TOLERANCE**2, _OFF_PALETTE, distances.argmin(-1))
    junk_px = int((labels == _OFF_PALETTE).sum())
    objects = []
    for index, color in enumerate(COLORS):
        for top, left, mask in _components(labels == index):
            area = int(mask.sum())
            if area < MIN_OBJECT_PX:
                junk_px += area
                continue
            height, width = mask.shape
            centre = (left + (width - 1) / 2, top + (height - 1) / 2)
            objects.append(FoundObject(shape=_best_shape(mask), color=color, centre=centre))
    return Detection(objects=tuple(objects), junk_px=junk_px)


def verify(spec: Spec, image: NDArray[np.uint8]) -> Verdict:
    """Whether the image uint8 [20, 20, 3] shows the spec, judged from pixels.

    Raises:
        ValueError: the image has another dtype or shape.
    """
    detection = detect(image)
    credit, found = _credit(spec.items, detection.objects)
    partial = 2 * credit / (len(spec.items) + len(detection.objects))
    complete = credit == len(spec.items) == len(detection.objects)
    arranged = True
    if spec.relation is not None:
        first, second = found[0], found[1]
        arranged = bool(first and second and relation_between(first.centre, second.centre) == spec.relation)
    elif spec.category == "counting":
        # Otherwise "always four copies" would earn 0.86 on counting prompts.
        arranged = len(detection.objects) == len(spec.items)
    if not arranged:
        partial /= 2
    partial *= max(0.0, 1 - max(0, detection.junk_px - FREE_JUNK_PX) / _JUNK_SCALE_PX)
    exact = complete and arranged and detection.junk_px <= FREE_JUNK_PX
    return Verdict(exact=exact, partial=partial, detection=detection)


def parse_caption(prompt: str) -> Spec:
    """The spec whose caption is exactly the prompt: the inverse of `world.caption`.

    Raises:
        ValueError: the prompt is not a caption of the lab's world.
    """
    text = prompt.removeprefix("a photo of ")
    spec = _parse_counting(text) or _parse_items(text) if text != prompt else None
    if spec is None:
        raise ValueError(
            "expected a lab caption such as 'a photo of two red circles' or 'a photo of a red circle left of a square' "
            f"(shapes {', '.join(SHAPES)}; colours {', '.join(COLORS)}); got {prompt!r}; the lab's verifier judges "
            "only its own captions, so choose another reward for free text"
        )
    return spec


_COLOR = rf"(?:({'|'.join(COLORS)}) )?"
_ITEM = rf"a {_COLOR}({'|'.join(SHAPES)})"
_COUNTING = re.compile(rf"(two|three|four) {_COLOR}({'|'.join(PLURALS.values())})")
_RELATION_OF: dict[str, Relation] = {str(relation): relation for relation in RELATIONS}
_ITEMS = re.compile(rf"{_ITEM}(?: (and|{'|'.join(RELATIONS)}) {_ITEM})?")


def _parse_counting(text: str) -> Spec | None:
    match = _COUNTING.fullmatch(text)
    if match is None:
        return None
    number, color, plural = match.groups()
    shape = next(shape for shape, word in PLURALS.items() if word == plural)
    count = next(count for count, word in COUNT_WORDS.items() if word == number)
    return Spec(category="counting", items=(Item(shape=shape, color=color),) * count)


def _parse_items(text: str) -> Spec | None:
    match = _ITEMS.fullmatch(text)
    if match is None:
        return None
    color, shape, link, other_color, other_shape = match.groups()
    first, second = Item(shape=shape, color=color), Item(shape=other_shape, color=other_color)
    if link is None:
        return Spec(category="colors" if color else "single_object", items=(first,))
    relation: Relation | None = _RELATION_OF.get(link)
    category = _pair_category(first, second, relation)
    return category and Spec(category=category, items=(first, second), relation=relation)


def _pair_category(first: Item, second: Item, relation: Relation | None) -> Category | None:
    """The category of a two-object caption; None for colour mentions that the world never makes."""
    if first.shape == second.shape:
        return None
    if relation is not None:
        return "position" if second.color is None else None
    if first.color is None:
        return "two_object"
    return "color_attr" if second.color not in (None, first.color) else None


def _credit(items: tuple[Item, ...], objects: tuple[FoundObject, ...]) -> tuple[float, list[FoundObject | None]]:
    """Credit 1 per item found whole and 0.5 per item found in shape or colour only, and the whole match of each item.

    Each object serves one item. Whole matches go first.
    """
    left = list(objects)
    found: list[FoundObject | None] = []
    for item in items:
        hit = next((o for o in left if o.shape == item.shape and item.color in (None, o.color)), None)
        found.append(hit)
        if hit is not None:
            left.remove(hit)
    credit = float(sum(hit is not None for hit in found))
    for item in (item for item, hit in zip(items, found, strict=True) if hit is None):
        half = next((o for o in left if o.shape == item.shape or (o.shape and o.color == item.color)), None)
        if half is not None:
            left.remove(half)
            credit += 0.5
    return credit, found


def _best_shape(mask: NDArray[np.bool_]) -> str | None:
    """The template with the highest IoU over all alignments, or None below MIN_IOU."""
    if mask.shape == (7, 7) and (shape := _EXACT_GLYPHS.get(mask.tobytes())):
        return shape
    if max(mask.shape) > MAX_OBJECT_SIDE_PX:
        return None
    scores: Counter[str] = Counter()
    padded = np.pad(mask, 3)
    area = int(mask.sum())
    for shape, glyph in GLYPHS.items():
        windows = np.lib.stride_tricks.sliding_window_view(padded, glyph.shape)
        overlap = (windows & glyph).sum((2, 3)).max()
        scores[shape] = overlap / (area + glyph.sum() - overlap)
    shape, iou = scores.most_common(1)[0]
    return shape if iou >= MIN_IOU else None


def _components(mask: NDArray[np.bool_]) -> list[tuple[int, int, NDArray[np.bool_]]]:
    """8-connected components in reading order: (top, left, crop of the component)."""
    open_pixels = dict.fromkeys(map(tuple, np.argwhere(mask).tolist()))
    components = []
    while open_pixels:
        stack = [open_pixels.popitem()[0]]
        pixels = []
        while stack:
            y, x = stack.pop()
            pixels.append((y, x))
            for near in ((y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)):
                if near in open_pixels:
                    del open_pixels[near]
                    stack.append(near)
        rows, columns = np.array(pixels).T
        crop = np.zeros((np.ptp(rows) + 1, np.ptp(columns) + 1), bool)
        crop[rows - rows.min(), columns - columns.min()] = True
        components.append((int(rows.min()), int(columns.min()), crop))
    return components
