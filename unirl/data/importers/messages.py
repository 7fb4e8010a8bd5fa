"""Chat rows that you have: .jsonl, .json or .parquet files, one or a folder of them."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from unirl.data.interleaved_import import Draft, row_drafts, source_files
from unirl.data.messages import COLUMNS, normalise, with_bytes
from unirl.data.tables import SUFFIXES, Row


def drafts(source: Path, *, images: Path | None = None) -> Iterator[Draft]:
    """Each row as it is.

    Args:
        source: file or folder.
        images: where image paths start; default the folder of the row's file.
    """
    for file in source_files(source, *(f"*{suffix}" for suffix in SUFFIXES)):
        yield from row_drafts(file, partial(_row, folder=images or file.parent), columns=COLUMNS)


def _row(row: Row, *, folder: Path) -> Row:
    return with_bytes(normalise(row), folder)
