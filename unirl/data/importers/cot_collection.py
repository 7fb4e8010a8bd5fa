"""CoT-Collection: one JSON object of 1.8 million text records, read as a stream."""

from collections.abc import Iterator
from pathlib import Path

from unirl.data.interleaved_import import Draft, field_text, row_drafts, source_files
from unirl.data.messages import exchange
from unirl.data.tables import Row


def drafts(source: Path) -> Iterator[Draft]:
    """The instruction, then the rationale and the answer.

    Args:
        source: CoT_collection_en.json, or a folder that holds it.
    """
    (records, *_) = source_files(source, "**/CoT_collection_en.json")
    yield from row_drafts(records, _row)


def _row(row: Row) -> Row:
    answer = f"{field_text(row, 'rationale')}\n\nThe answer is: {field_text(row, 'target')}"
    return exchange([field_text(row, "source")], [answer], subset="understanding", source="cot_collection")
