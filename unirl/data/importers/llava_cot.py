"""LLaVA-CoT-100k: train.jsonl, and image.zip in parts, which stay as they are."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from unirl.data.archives import ZipImages
from unirl.data.interleaved_import import Draft, field_text, row_drafts, source_files
from unirl.data.tables import Row


def drafts(source: Path) -> Iterator[Draft]:
    """One conversation about one image each; the image opens the question.

    Args:
        source: folder with train.jsonl and image.zip.part-aa and so on, or image.zip.
    """
    (records,) = source_files(source / "train.jsonl")
    with ZipImages(source_files(source, "image.zip.part-*", "image.zip")) as images:
        yield from row_drafts(records, partial(_row, images=images))


def _row(row: Row, *, images: ZipImages) -> Row:
    return {
        "conversations": row.get("conversations"),
        "images": [images.read(field_text(row, "image"))],
        "subset": "understanding",
        "source": "llava_cot",
    }
