"""Visual-CoT: questions whose answer rests on a part of the image, as UnifiedVisual's MM Reasoning (O)."""

import io
import math
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unirl.data.atomic import DataError
from unirl.data.interleaved_import import Draft, field_text, row_drafts, source_files
from unirl.data.messages import exchange
from unirl.data.records import decode_image, encode_png, read_image_file
from unirl.data.tables import Row

_LEAST_HALF_SIDE_PX = 112
_SLACK_PX = 1.0
_BOX_REQUEST = re.compile(r"\s*Please provide the bounding box[^.]*\.?\s*$", re.IGNORECASE)
_INTRODUCTION = "The question is about this part of the image:"
_CONCLUSION = "With this detail in view, the answer is: {}"

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 in pixels of the image."""


def drafts(source: Path, *, images: Path | None = None) -> Iterator[Draft]:
    """Image and question, then a sentence, the crop that the question is about, and the answer.

    Args:
        source: a file *_cot_train.jsonl or viscot_363k.json, or a folder with the former or else the latter.
        images: folder of the unpacked images, which lie in it, in a folder of their dataset, or in cot/ and such a
            folder; default the folder of the records.
    """
    for file in source_files(source, "**/*_cot_train.jsonl", "**/viscot_363k.json"):
        read = _conversation if file.suffix == ".json" else _metadata
        yield from row_drafts(file, partial(_row, read=read, folder=images or file.parent))


def crop(image: np.ndarray, box: Box) -> np.ndarray:
    """The square around a box, as the published model crops it, from pixels.

    Half its side is half the longer side of the box, at least 112 px; where it leaves the image it is shifted inside,
    and cut where the image is smaller.
    """
    x1, y1, x2, y2 = box
    half = max(_LEAST_HALF_SIDE_PX, (x2 - x1) / 2, (y2 - y1) / 2)
    spans = []
    for centre, size in (((y1 + y2) / 2, image.shape[0]), ((x1 + x2) / 2, image.shape[1])):
        start = round(max(0.0, min(centre - half, size - 2 * half)))
        spans.append(slice(start, min(size, start + math.ceil(2 * half))))
    return image[spans[0], spans[1]]


def _row(row: Row, *, read: Any, folder: Path) -> Row:
    question, answer, names, boxes, size = read(row)
    data = _load(folder, names)
    pixels = decode_image(data)
    part = crop(pixels, _hull(boxes, pixels, size))
    return exchange(
        [data, question],
        [_INTRODUCTION, _encoded(part, data), _CONCLUSION.format(answer)],
        subset="mm_reasoning_o",
        source="visual_cot",
    )


def _metadata(row: Row) -> tuple[str, str, list[str], Any, Any]:
    name, dataset = field_text(row, "image"), row.get("dataset")
    places = [name] + [f"{folder}{dataset}/{name}" for folder in ("", "cot/")] * bool(dataset)
    return (
        field_text(row, "question"),
        field_text(row, "answer"),
        places,
        row.get("bboxs"),
        (row.get("width"), row.get("height")),
    )


def _conversation(row: Row) -> tuple[str, str, list[str], Any, Any]:
    """A record of viscot_363k.json; its box in words is relative to a padded image and is not used."""
    turns, images = row.get("conversations"), row.get("image")
    if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(turn, dict) for turn in turns):
        raise DataError("expected conversations with a question and an answer; got none; drop the record")
    marked = images[-1] if isinstance(images, list) and images else None
    name, mark, corners = str(marked).partition("###")
    if not mark:
        raise DataError(f"expected an image path with ### and its box; got {str(marked)[:80]!r}; drop the record")
    question = _BOX_REQUEST.sub("", field_text(turns[0], "value").replace("<image>", "")).strip()
    box = [float(number) for number in re.findall(r"-?\d+\.?\d*", corners)]
    return question, field_text(turns[-1], "value"), [name, f"cot/{name}", name.removeprefix("cot/")], [box], None


def _hull(boxes: Any, image: np.ndarray, size: Any) -> Box:
    """The box around all boxes.

    Raises:
        DataError: there is none, it is not one inside the image, or the image is of another size than stated.
    """
    height, width = image.shape[:2]
    if size is not None and tuple(size) != (width, height):
        raise DataError(f"expected an image of {size} pixels as its record says; got {width} x {height}; drop it")
    if not isinstance(boxes, list) or not boxes or not all(_is_box(box) for box in boxes):
        raise DataError(f"expected boxes of four numbers x1, y1, x2, y2; got {str(boxes)[:80]}; drop the record")
    x1, y1 = (min(box[place] for box in boxes) for place in (0, 1))
    x2, y2 = (max(box[place] for box in boxes) for place in (2, 3))
    if not (-_SLACK_PX <= x1 < x2 <= width + _SLACK_PX and -_SLACK_PX <= y1 < y2 <= height + _SLACK_PX):
        raise DataError(
            f"expected a box inside the image of {width} x {height}; got {[x1, y1, x2, y2]}; drop the record"
        )
    return x1, y1, x2, y2


def _is_box(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(isinstance(x, int | float) and math.isfinite(x) for x in box)


def _load(folder: Path, names: list[str]) -> bytes:
    errors: list[DataError] = []
    for name in names:
        try:
            return read_image_file(folder, name)
        except DataError as error:
            errors.append(error)
    raise errors[0]


def _encoded(part: np.ndarray, original: bytes) -> bytes:
    """As JPEG where the photo was one, so that its crop is not many times larger."""
    if not original.startswith(b"\xff\xd8"):
        return encode_png(part)
    buffer = io.BytesIO()
    Image.fromarray(part).save(buffer, format="JPEG", quality=95)
    return buffer.getvalue()
