"""Captioned photos of LAION as requests to draw them: the generation half of UnifiedVisual's NormalData baseline."""

from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path

from unirl.data.atomic import DataError
from unirl.data.interleaved_import import Draft, field_text, key_of, source_files
from unirl.data.messages import exchange
from unirl.data.records import read_image_file
from unirl.data.tables import Row, stream_rows

_COLUMNS = ("TEXT", "hash")
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_ROWS_PER_FOLDER = 10_000
_REQUESTS = (
    ("Generate an image of {}.", "Here is the image:"),
    ("Generate an image that shows {}.", "This is the image you asked for:"),
    ("Draw {}.", "Here is my drawing:"),
    ("Please make a picture of {}.", "I made this picture:"),
    ("I would like to see {}.", "Here is what it could look like:"),
    ("Create an image to go with this caption: {}", "This image goes with the caption:"),
    ("Show me {}.", "Here it is:"),
    ("Can you picture this? {}", "I picture it like this:"),
    ("Turn this description into an image: {}", "The description as an image:"),
    ("Give me an image for the words: {}", "An image for these words:"),
)


def drafts(source: Path, *, images: Path) -> Iterator[Draft]:
    """A request and its image; which wording is taken depends on the record alone.

    Args:
        source: parquet file with TEXT and, if images are named by it, hash; or a folder of such files.
        images: folder of downloaded files, named HASH, ROW, or 00012/000123456 (row number in folders of 10,000), with
            any of the suffixes .jpg, .jpeg, .png, .webp. Rows are counted from 0 through all files.
    """
    rows = count()
    for file in source_files(source, "*.parquet", "**/*.parquet"):
        for row in stream_rows(file, _COLUMNS):
            if isinstance(row, dict):
                place = next(rows)
                yield Draft(str(place), partial(_row, row, place, images))


def _row(row: Row, place: int, images: Path) -> Row:
    caption = " ".join(field_text(row, "TEXT").split())
    request, answer = _REQUESTS[key_of(str(place), 0) % len(_REQUESTS)]
    asked = request.format(caption.removesuffix(".") if request.endswith("{}.") else caption)
    return exchange(
        [asked], [answer, _image(row.get("hash"), place, images)], subset="image_generation", source="laion_normal"
    )


def _image(key: object, place: int, images: Path) -> bytes:
    stems = [f"{key}"] * (key is not None) + [f"{place}", f"{place // _ROWS_PER_FOLDER:05d}/{place:09d}"]
    for name in (f"{stem}{suffix}" for stem in stems for suffix in _SUFFIXES):
        if (images / name).is_file():
            return read_image_file(images, name)
    raise DataError(f"expected an image named {' or '.join(stems)} in {images}; got none; download it or drop the row")
