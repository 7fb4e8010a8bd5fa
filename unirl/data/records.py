"""Understanding and generation samples on disk: one parquet file per task, images as PNG bytes or as files beside it.

The `image` column is struct<bytes, path>, which other tools read as an image column. Parquet holds plain values, so
reading a file never runs code from it.
"""

import hashlib
import io
import json
import logging
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from unirl.data.atomic import DataError, atomic_file
from unirl.data.tables import open_table, table_rows, write_table
from unirl.types import AnswerType, GenerationSample, UnderstandingSample

Sample = TypeVar("Sample", UnderstandingSample, GenerationSample)

SCHEMA_VERSION = 1
MAX_PIXELS = 2**26
_LYING = (5, 6, 7, 8)  # EXIF orientations that turn by a quarter
_FORMATS = ("PNG", "JPEG", "WEBP")
_SHOWN = 3
_LONGEST_SHOWN = 120

_FILE_NAMES = {UnderstandingSample: "understanding.parquet", GenerationSample: "generation.parquet"}
_ARROW_TYPES = {"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "choices": pa.list_(pa.string())}

# What Pillow's decoders raise on damaged bytes.
_DECODE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, IndexError, OverflowError, struct.error, zlib.error)

_ADDRESS = re.compile(r" <_io\.BytesIO object at 0x[0-9a-f]+>")
"""What Pillow says of bytes instead of a file name."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """One record that was left out, and why."""

    source: str
    """File or source the record came from."""
    row: int
    """Its position there, from 0."""
    id: str
    stage: Literal["reading", "duplicate", "teacher", "tokens"] = "reading"
    """Who left it out: the reader, the search for equal images, the teacher, or the encoder into tokens."""
    reason: str


class TooManyBadError(DataError):
    """More records are bad than the reader allows."""


def file_name(kind: type[Sample]) -> str:
    """The name of a task's table inside a folder: understanding.parquet or generation.parquet."""
    return _FILE_NAMES[kind]


def write_samples(path: Path, samples: Iterable[Sample], kind: type[Sample], *, images: Path | None = None) -> int:
    """Write samples to a parquet file, streaming, whole or not at all; returns their number.

    Args:
        path: file to write; replaced if it exists.
        samples: records of `kind`.
        kind: record class; it fixes the columns, also of an empty file.
        images: folder inside `path.parent` for PNG files named by content; None keeps the images in the table.

    Raises:
        DataError: the file cannot be written, e.g. the disk is full.
    """
    rows = (_to_row(sample, path.parent, images) for sample in samples)
    return write_table(path, rows, _schema(kind))


def read_samples(
    path: Path, kind: type[Sample], *, max_rejected_fraction: float = 0.01, rejected_log: Path | None = None
) -> tuple[list[Sample], list[Rejected]]:
    """All good samples of a file, and the bad ones with reasons.

    Args:
        path: parquet file, or a folder that holds the task's table.
        kind: record class to read.
        max_rejected_fraction: more bad records than this share of the rows stop the reading.
        rejected_log: file to name the bad records in, one JSON object a line, also when the reading stops.

    Raises:
        DataError: the file is missing, damaged, of another layout or version, or too many records are bad.
    """
    rejected: list[Rejected] = []
    try:
        return list(stream_samples(path, kind, rejected, max_rejected_fraction=max_rejected_fraction)), rejected
    finally:
        if rejected and rejected_log is not None:
            write_rejected(rejected_log, rejected)


def stream_samples(
    path: Path, kind: type[Sample], rejected: list[Rejected], *, max_rejected_fraction: float = 0.01
) -> Iterator[Sample]:
    """The good samples of a file one by one, in its order; bad ones are appended to `rejected`.

    Raises:
        DataError: as `read_samples`.
    """
    path = path / file_name(kind) if path.is_dir() else path
    ids: set[str] = set()
    row_number = -1
    with _open_table(path, kind) as table:
        for row in _rows(table, path, kind):
            row_number += 1
            try:
                sample = _from_row(row, kind, path.parent)
                if sample.id in ids:
                    raise DataError(f"expected an id of its own; got {sample.id!r} a second time; renumber the records")
            except ValueError as error:
                rejected.append(Rejected(source=path.name, row=row_number, id=str(row["id"] or ""), reason=str(error)))
                stop_if_too_many(path, rejected, max_rejected_fraction, table.metadata.num_rows)
                continue
            ids.add(sample.id)
            yield sample
    if rejected:
        _log.warning("%s: left out %d of %d records", path, len(rejected), row_number + 1)


def write_rejected(path: Path, rejected: Iterable[Rejected]) -> None:
    """Name rejected records in a file, one JSON object a line."""
    with atomic_file(path) as file:
        file.writelines(json.dumps(asdict(record)).encode() + b"\n" for record in rejected)


def stop_if_too_many(
    path: Path,
    rejected: Sequence[Rejected],
    max_fraction: float,
    num_rows: int,
    *,
    limit: str = "max_rejected_fraction",
) -> None:
    """End the reading when more than the allowed share of `num_rows` records are bad.

    Args:
        path: its name in messages.
        rejected: the bad records so far.
        max_fraction: the allowed share.
        num_rows: what it is a share of.
        limit: what a user sets it by.

    Raises:
        TooManyBadError: shows the first of them.
    """
    if len(rejected) > max_fraction * num_rows:
        shown = "; ".join(f"row {r.row} ({r.id}): {r.reason}" for r in rejected[:_SHOWN])
        raise TooManyBadError(
            f"{path}: expected at most {max_fraction:.2%} bad records of {num_rows}; got {len(rejected)}: {shown}. "
            f"Repair the data, or allow a larger {limit}"
        )


def read_image_file(folder: Path, name: str) -> bytes:
    """The bytes of an image file inside `folder`.

    Raises:
        DataError: the name is absolute or leads out of the folder, by itself or through a link, or no file is there.
    """
    path, shown = PurePosixPath(name), repr(name if len(name) <= _LONGEST_SHOWN else f"{name[:_LONGEST_SHOWN]}...")
    try:
        real = (folder / path).resolve() if "\0" not in name else Path("/")
        if not path.parts or path.is_absolute() or ".." in path.parts or not real.is_relative_to(folder.resolve()):
            raise DataError(
                f"expected image bytes or a path inside the table's folder; got {shown}; copy or hard-link it there"
            )
        if not real.is_file():
            raise DataError(f"expected an image file {shown}; got none there; restore it or drop the record")
        return real.read_bytes()
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise DataError(f"expected an image file {shown}; got: {reason}; restore it or drop the record") from error


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """Lossless PNG of an RGB image uint8 [height, width, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def decode_image(data: bytes, *, pixels: bool = True) -> NDArray[np.uint8]:
    """RGB pixels uint8 [height, width, 3] of PNG, JPEG or WebP bytes, turned upright; alpha is dropped.

    Args:
        data: the bytes of the file.
        pixels: False reads the size only and gives black pixels that take no memory.

    Raises:
        DataError: the bytes are damaged, of another format, of more than 8 bits a channel, or too many pixels.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS or image.mode[0] in "IF":
                raise DataError(
                    f"expected an 8-bit image of at most {MAX_PIXELS} pixels; got mode {image.mode}, "
                    f"{image.width} x {image.height}; convert or shrink it"
                )
            if not pixels:
                # The base class's reading, since that of PNG decodes the pixels to look for EXIF behind them.
                across = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1) in _LYING
                return np.broadcast_to(np.uint8(0), ((image.size if across else image.size[::-1]) + (3,)))
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except DataError:
        raise
    except (*_DECODE_ERRORS, Image.DecompressionBombError) as error:
        reason = _ADDRESS.sub("", str(error))
        got = f"{len(data)} bytes that do not decode ({reason})" if data else "0 bytes: the file is empty"
        raise DataError(
            f"expected a whole {', '.join(_FORMATS)} image; got {got}; replace or drop the record"
        ) from error


def image_key(image: NDArray[np.uint8]) -> str:
    """Sixteen hex digits that name an image by its size and pixels."""
    return hashlib.sha256(str(image.shape).encode() + np.ascontiguousarray(image).tobytes()).hexdigest()[:16]


def _schema(kind: type[Sample]) -> pa.Schema:
    columns = {column.name: _ARROW_TYPES.get(column.name, pa.string()) for column in fields(kind)}
    return pa.schema(columns, metadata={"unirl_schema_version": str(SCHEMA_VERSION), "unirl_record": kind.__name__})


def _to_row(sample: UnderstandingSample | GenerationSample, folder: Path, images: Path | None) -> dict[str, Any]:
    row = {column.name: getattr(sample, column.name) for column in fields(sample)}
    if sample.image is None:
        return row
    data, name = encode_png(sample.image), None
    if images is not None:
        target = images / f"{image_key(sample.image)}.png"
        name = target.relative_to(folder).as_posix()
        if not target.exists():
            with atomic_file(target) as file:
                file.write(data)
    row["image"] = {"bytes": data if name is None else None, "path": name}
    return row


def _from_row(row: dict[str, Any], kind: type[Sample], folder: Path) -> Sample:
    for column in fields(kind):
        if column.default is MISSING and row[column.name] is None:
            raise DataError(f"expected a value for {column.name!r}; got nothing; fill the column or drop the record")
    values = {name: value for name, value in row.items() if value is not None}
    if "image" in values:
        values["image"] = _load_image(values["image"], folder)
    if "choices" in values:
        values["choices"] = tuple(values["choices"])
        if None in values["choices"]:
            raise DataError(f"expected a text for every choice; got {values['choices']}; repair or drop the record")
    if values.get("answer_type", "text") not in get_args(AnswerType):
        raise DataError(f"expected answer_type of {get_args(AnswerType)}; got {values['answer_type']!r}; correct it")
    return kind(**values)


def _load_image(cell: dict[str, Any], folder: Path) -> NDArray[np.uint8]:
    return decode_image(cell["bytes"] if cell["bytes"] is not None else read_image_file(folder, cell["path"] or ""))


def _open_table(path: Path, kind: type[Sample]) -> pq.ParquetFile:
    table = open_table(path)
    metadata, names = table.schema_arrow.metadata or {}, table.schema_arrow.names
    version, record = metadata.get(b"unirl_schema_version", b"1"), metadata.get(b"unirl_record", kind.__name__.encode())
    missing = {column.name for column in fields(kind) if column.default is MISSING} - set(names)
    if version != str(SCHEMA_VERSION).encode() or record != kind.__name__.encode() or missing:
        table.close()
        raise DataError(
            f"{path}: expected {kind.__name__} records of schema version {SCHEMA_VERSION}; got {record.decode()} of "
            f"version {version.decode()}, columns missing: {sorted(missing) or 'none'}; convert it or name another"
        )
    return table


def _rows(table: pq.ParquetFile, path: Path, kind: type[Sample]) -> Iterator[dict[str, Any]]:
    schema = _schema(kind)
    present = [name for name in schema.names if name in table.schema_arrow.names]
    absent = dict.fromkeys(set(schema.names) - set(present))
    wanted = pa.schema([schema.field(name) for name in present])
    for row in table_rows(table, path, types=wanted):
        yield row | absent
