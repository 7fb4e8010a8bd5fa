"""MagicBrush: edits of real photos in parquet, one row a turn of an editing session."""

from collections.abc import Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from unirl.data.atomic import DataError
from unirl.data.interleaved_import import Draft, field_text, row_drafts, source_files
from unirl.data.messages import exchange
from unirl.data.tables import Row, stream_rows

_COLUMNS = ("img_id", "turn_index", "source_img", "instruction", "target_img")


def drafts(source: Path, *, sessions: bool = False) -> Iterator[Draft]:
    """Image and instruction, then the edited image.

    Args:
        source: a parquet file, or the folder of the download, of which the train split is taken.
        sessions: a session is one conversation, in which each edit starts from the answer before; else each turn is a
            sample that starts from its own source image.
    """
    files = source_files(source, "data/train-*.parquet", "train-*.parquet")
    if not sessions:
        for file in files:
            yield from row_drafts(file, _turn, columns=_COLUMNS)
        return
    rows = (row for file in files for row in stream_rows(file, _COLUMNS) if isinstance(row, dict))
    for name, turns in groupby(rows, key=lambda row: row.get("img_id")):
        yield Draft(f"session/{name}", partial(_session, list(turns)))


def _turn(row: Row) -> Row:
    return exchange(
        [_image(row, "source_img"), field_text(row, "instruction")],
        [_image(row, "target_img")],
        subset="image_editing",
        source="magicbrush",
    )


def _session(rows: list[Row]) -> Row:
    indices = [row.get("turn_index") for row in rows]
    if indices != list(range(1, len(rows) + 1)):
        raise DataError(f"expected turns 1, 2, 3, ... of one session in a row; got {indices}; import single turns")
    first, *others = map(_turn, rows)
    for turn in others:
        question, answer = turn["messages"]
        first["messages"] += [question | {"content": question["content"][1:]}, answer]
    return first


def _image(row: Row, column: str) -> bytes:
    cell: Any = row.get(column)
    if not isinstance(cell, dict) or not isinstance(cell.get("bytes"), bytes):
        raise DataError(f"expected image bytes under {column!r}; got none; download the parquet files anew")
    return cell["bytes"]
