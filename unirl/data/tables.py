"""Rows of files, one by one, in the memory of a few: parquet, JSON lines, one big JSON value.

Rows are plain values; what their columns mean is not known here.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from unirl.data.atomic import DataError, atomic_file

Row = dict[str, Any]

SUFFIXES = (".parquet", ".jsonl", ".json")
_ROWS_PER_GROUP = 256
_BYTES_PER_GROUP = 2**25
_ROWS_PER_READ = 32
_LONGEST_LINE = 2**28
_DAMAGED = (OSError, pa.ArrowException, UnicodeDecodeError)


def write_table(path: Path, rows: Iterable[Row], schema: pa.Schema) -> int:
    """Write rows to a parquet file, streaming, whole or not at all; returns their number.

    Raises:
        DataError: the file cannot be written, e.g. the disk is full.
    """
    count = 0
    with (
        atomic_file(path) as file,
        pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer,
    ):
        for group in _groups(rows):
            writer.write_table(pa.Table.from_pylist(group, schema))
            count += len(group)
    return count


def open_table(path: Path) -> pq.ParquetFile:
    """A parquet file, its page checksums verified while it is read; to be closed.

    Raises:
        DataError: it is missing or no parquet file.
    """
    try:
        table = pq.ParquetFile(path, page_checksum_verification=True)
        _ = table.schema_arrow.names  # made from the footer on first use, which may fail
    except _DAMAGED as error:
        raise DataError(
            f"{path}: expected a parquet file of samples; got: {error}; check the path or write it again"
        ) from error
    return table


def table_rows(
    table: pq.ParquetFile, path: Path, *, columns: Sequence[str] | None = None, types: pa.Schema | None = None
) -> Iterator[Row]:
    """The rows of an open table.

    Args:
        table: what `open_table` gave.
        path: its name in messages.
        columns: those to read; None for all.
        types: columns to read and what to cast them to, instead of `columns`.

    Raises:
        DataError: it is damaged, or a column is of a type that cannot be cast.
    """
    wanted = columns if types is None else types.names
    count = 0
    try:
        for batch in table.iter_batches(_ROWS_PER_READ, columns=wanted):
            cast = batch if types is None else batch.select(types.names).cast(types)
            count += len(cast)
            yield from cast.to_pylist()
    except _DAMAGED as error:
        shown = ", ".join(f"{field.name} {field.type}" for field in types or table.schema_arrow)
        raise DataError(
            f"{path}: expected readable columns {shown}; got: {error}; "
            "the file is damaged or of another layout: write it again"
        ) from error
    if count != table.metadata.num_rows:
        raise DataError(
            f"{path}: expected {table.metadata.num_rows} rows, as its footer says; got {count}; "
            "the file is damaged: write it again"
        )


def stream_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[Row | DataError]:
    """The rows of a .parquet, .jsonl or .json file; a line that is no record stands as its error.

    A .json file is a list of records, or an object of records, whose keys then are the ids of those without one.

    Args:
        path: file to read.
        columns: those to read of a parquet file, where it has them; None for all.

    Raises:
        DataError: the file is missing, of another kind, or damaged so that the rest cannot be read.
    """
    if not path.is_file():
        raise DataError(f"{path}: expected a file; got {'a folder' if path.is_dir() else 'none'}; check the path")
    match path.suffix.lower():
        case ".parquet":
            with open_table(path) as table:
                names = table.schema_arrow.names
                yield from table_rows(table, path, columns=[n for n in names if columns is None or n in columns])
        case ".jsonl":
            yield from _json_lines(path)
        case ".json":
            yield from _json_records(path)
        case suffix:
            raise DataError(
                f"{path}: expected one of {', '.join(SUFFIXES)}; got {suffix or 'none'!r}; convert the file"
            )


def write_json_lines(path: Path, rows: Iterable[Row]) -> int:
    """Write rows to a .jsonl file, streaming, whole or not at all; returns their number.

    Raises:
        DataError: the file cannot be written, e.g. the disk is full.
    """
    count = 0
    with atomic_file(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            count += 1
    return count


def _groups(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows in groups that end at a number of rows or of bytes, since images decide what a row weighs."""
    group: list[Row] = []
    size = 0
    for row in rows:
        group.append(row)
        size += _num_bytes(row)
        if len(group) == _ROWS_PER_GROUP or size >= _BYTES_PER_GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def _num_bytes(value: Any) -> int:
    if isinstance(value, bytes | str):
        return len(value)
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return 0
    return sum(map(_num_bytes, value))


def _json_lines(path: Path) -> Iterator[Row | DataError]:
    with path.open("rb") as file:
        while line := file.readline(_LONGEST_LINE):
            if len(line) == _LONGEST_LINE:
                raise DataError(
                    f"{path}: expected one record a line; got a line of {_LONGEST_LINE} bytes or more; "
                    "name a single JSON value .json"
                )
            if not line.isspace():
                yield _parsed(line)


def _parsed(line: bytes) -> Row | DataError:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        cut = "" if line.endswith(b"\n") else ", the file's last, perhaps cut off"
        return DataError(
            f"expected a JSON object on the line{cut}; got {_shown(line)} ({error}); repair or drop the line"
        )
    return _record(value)


def _record(value: Any) -> Row | DataError:
    if isinstance(value, dict):
        return value
    return DataError(f"expected a record as a JSON object; got {_shown(value)}; repair or drop it")


def _json_records(path: Path) -> Iterator[Row | DataError]:
    import ijson

    with path.open("rb") as file:
        start = next((byte for byte in _bytes_of(file) if not byte.isspace()), b"")
        if not start:
            raise DataError(f"{path}: expected one JSON list or object of records; got an empty file; copy it again")
        file.seek(0)
        try:
            if start == b"[":
                yield from map(_record, ijson.items(file, "item", use_float=True))
            else:
                for key, value in ijson.kvitems(file, "", use_float=True):
                    yield {"id": key} | value if isinstance(value, dict) else _record(value)
        except (ijson.JSONError, UnicodeDecodeError) as error:
            raise DataError(
                f"{path}: expected one whole JSON list or object of records; got: {error}; "
                "it is cut off or damaged: copy it again"
            ) from error


def _bytes_of(file: IO[bytes]) -> Iterator[bytes]:
    return iter(lambda: file.read(1), b"")


def _shown(value: Any) -> str:
    text = value.decode(errors="replace") if isinstance(value, bytes) else repr(value)
    return repr(text if len(text) <= 40 else f"{text[:40]}...")
