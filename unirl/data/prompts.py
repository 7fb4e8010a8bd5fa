"""The text of a pair set's samples, read in seconds since no image is decoded."""

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unirl.data.pair_store import PAIRS
from unirl.data.records import Sample, file_name
from unirl.types import GenerationSample, UnderstandingSample


def read_prompts(folder: Path, max_pairs: int | None = None) -> Iterator[UnderstandingSample | GenerationSample]:
    """The samples of the first `max_pairs` pairs, or of all; one black pixel stands for the image of a question.

    Args:
        folder: a pair set whose files were checked.
        max_pairs: pairs to read; None reads all.
    """
    pairs = pq.read_table(folder / PAIRS, columns=["und_id", "gen_id"]).slice(0, max_pairs)
    blank = np.zeros((1, 1, 3), np.uint8)
    for row in _rows(folder, UnderstandingSample, pairs["und_id"]):
        yield UnderstandingSample(**row | {"image": blank, "choices": tuple(row["choices"] or ())})
    for row in _rows(folder, GenerationSample, pairs["gen_id"]):
        yield GenerationSample(**row)


def _rows(folder: Path, kind: type[Sample], ids: pa.ChunkedArray) -> list[dict[str, Any]]:
    columns = [column.name for column in fields(kind) if column.name != "image"]
    chosen = pc.field("id").isin(ids.combine_chunks())
    return pq.read_table(folder / file_name(kind), columns=columns, filters=chosen).to_pylist()
