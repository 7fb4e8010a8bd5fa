"""Interleaved samples on disk: a .parquet or .jsonl file, or a store: a folder of parquet files with a manifest.

Images stand in the rows as bytes, or as files below the folder. messages.py tells what a row looks like.
"""

import hashlib
import heapq
import json
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from unirl.data.atomic import DataError, atomic_file
from unirl.data.checksums import check_file
from unirl.data.messages import COLUMNS, map_parts, normalise, to_json, to_row, to_sample
from unirl.data.records import Rejected, stop_if_too_many
from unirl.data.tables import Row, open_table, stream_rows, write_json_lines, write_table
from unirl.types import InterleavedSample

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
PROGRESS = "progress.json"
IMAGES = "images"
SINGLE = ("interleaved.parquet", "interleaved.jsonl")
"""What a folder without a manifest may hold instead."""

FEWEST_ROWS = 1000
"""Rows before which the share of bad ones is taken of this number, since the number of all may be unknown."""

_RECORD = InterleavedSample.__name__
_PART = pa.struct(
    {
        "type": pa.string(),
        "text": pa.string(),
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "loss": pa.bool_(),
    }
)
_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "subset": pa.string(),
        "source": pa.string(),
        "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.list_(_PART)})),
    },
    metadata={"unirl_schema_version": str(SCHEMA_VERSION), "unirl_record": _RECORD},
)

_log = logging.getLogger(__name__)


def stream_interleaved(
    path: Path,
    rejected: list[Rejected],
    *,
    max_rejected_fraction: float = 0.01,
    pixels: bool = True,
    only: Collection[str] | None = None,
) -> Iterator[InterleavedSample]:
    """The good samples of a store or a file one by one, in its order; bad ones are appended to `rejected`.

    Beside one sample, memory holds the ids of all.

    Args:
        path: store, .parquet, .jsonl or .json file, or a folder that holds one of `SINGLE`.
        rejected: takes what was left out.
        max_rejected_fraction: more bad records than this share stop the reading.
        pixels: False leaves images undecoded: black ones of the same size stand for them, so that lengths are quick to
            compute.
        only: ids to read; the images of others are not touched. None reads all.

    Raises:
        DataError: the path is missing, damaged, unfinished or of another version, or too many records are bad.
    """
    ids: set[str] = set()
    num_rows = 0
    for file in data_files(path):
        for place, row in enumerate(stream_rows(file, COLUMNS)):
            num_rows += 1
            try:
                normal = _normal(row, f"{file.stem}/{place}")
                if only is not None and normal["id"] not in only:
                    continue
                sample = to_sample(normal, file.parent, pixels=pixels)
                require_new(sample.id, ids)
            except ValueError as error:
                name = "" if isinstance(row, DataError) else str(row.get("id") or "")
                rejected.append(Rejected(source=file.name, row=place, id=name, reason=str(error)))
                stop_if_too_many(path, rejected, max_rejected_fraction, max(num_rows, FEWEST_ROWS))
                continue
            yield sample
    stop_if_too_many(path, rejected, max_rejected_fraction, num_rows)
    if rejected:
        _log.warning("%s: left out %d of %d records", path, len(rejected), num_rows)


def sample_of(row: Row | DataError, file: Path, place: int) -> InterleavedSample:
    """The sample of a row that `stream_rows` gave of `file` as number `place`.

    Raises:
        ValueError: it is no whole sample.
    """
    return to_sample(_normal(row, f"{file.stem}/{place}"), file.parent)


def similar_ids(path: Path, name: str, count: int = 3) -> list[str]:
    """Ids in a store or a file that contain `name`, first those that end in it after a slash.

    Raises:
        DataError: as `data_files`.
    """
    rows = ((file, place, row) for file in data_files(path) for place, row in enumerate(stream_rows(file, ["id"])))
    ids = (str(row.get("id") or f"{file.stem}/{place}") for file, place, row in rows if isinstance(row, dict))
    return heapq.nsmallest(count, (i for i in ids if name in i), key=lambda i: (not i.endswith(f"/{name}"), len(i), i))


def require_new(name: str, ids: set[str]) -> None:
    """Add an id to those seen.

    Raises:
        DataError: it was seen before.
    """
    if name in ids:
        raise DataError(f"expected an id of its own; got {name!r} a second time; renumber the records")
    ids.add(name)


def add_counts(subsets: dict[str, dict[str, int]], sample: InterleavedSample) -> None:
    """Add a sample to the counts of its subset."""
    counts = subsets.setdefault(sample.subset, {"samples": 0, "images": 0, "images_in_loss": 0})
    images = [segment for turn in sample.turns for segment in turn.segments if segment.image is not None]
    counts["samples"] += 1
    counts["images"] += len(images)
    counts["images_in_loss"] += sum(segment.in_loss for segment in images)


def summarise(subsets: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Totals of the counts by subset, and these."""
    totals: Counter[str] = Counter()
    for counts in subsets.values():
        totals.update(counts)
    return {name: totals[name] for name in ("samples", "images", "images_in_loss")} | {
        "subsets": dict(sorted(subsets.items()))
    }


def write_interleaved(path: Path, samples: Iterable[InterleavedSample], *, images: Path | None = None) -> int:
    """Write samples to a .parquet or .jsonl file, streaming, whole or not at all; returns their number.

    Args:
        path: file to write; replaced if it exists.
        samples: taken one by one.
        images: folder inside `path.parent` for image files named by content; None keeps the images in the rows.

    Raises:
        DataError: another kind of file, or it cannot be written, e.g. the disk is full.
    """
    return write_rows(path, map(to_row, samples), images=images)


def write_rows(path: Path, rows: Iterable[Row], *, images: Path | None = None) -> int:
    """As `write_interleaved`, for stored rows, whose images keep their bytes and format."""
    if images is not None:
        rows = (_with_files(row, path.parent, images) for row in rows)
    match path.suffix:
        case ".parquet":
            return write_table(path, rows, _SCHEMA)
        case ".jsonl":
            return write_json_lines(path, map(to_json, rows))
        case suffix:
            raise DataError(f"{path}: expected to write .parquet or .jsonl; got {suffix or 'none'!r}; rename the file")


def data_files(path: Path, *, contents: bool = False) -> list[Path]:
    """The files that hold the samples of a store or a file, in their order.

    Args:
        path: as for `stream_interleaved`.
        contents: True compares the files' checksums with the manifest, which reads all of them; sizes are always
            compared.

    Raises:
        DataError: nothing is there, an import is unfinished, or a file does not fit the manifest.
    """
    if not path.exists():
        raise DataError(f"{path}: expected conversations, a folder or a file; got nothing there; check the path")
    if not path.is_dir():
        files = [path]
    elif (path / MANIFEST).is_file():
        facts = read_manifest(path)["files"]
        for name in facts:
            check_file(path / name, facts[name], whole="store", contents=contents)
        files = [path / name for name in facts if name.endswith(".parquet")]
    elif (path / PROGRESS).is_file():
        raise DataError(
            f"{path}: expected a finished store; got one that an import left unfinished; add --resume to it"
        )
    else:
        files = [path / name for name in SINGLE if (path / name).is_file()]
        if len(files) != 1:
            raise DataError(
                f"{path}: expected a store with {MANIFEST}, or one of {', '.join(SINGLE)}; got {len(files)} of them; "
                "name a file, or make a store with `unirl data import`"
            )
    for file in files:
        _check_version(file)
    return files


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the manifest of a store says: schema_version, settings, counts, files.

    Raises:
        DataError: it cannot be read or is of another version.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        version = manifest["schema_version"]
        if any(Path(name).name != name or not facts["bytes"] >= 0 for name, facts in manifest["files"].items()):
            raise ValueError("a file that is not in the folder itself, or without a size")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: expected a manifest of a store; got: {error!r}; make the store again") from error
    if version != SCHEMA_VERSION:
        raise DataError(f"{path}: expected schema version {SCHEMA_VERSION}; got {version}; make the store again")
    return manifest


def _normal(row: Row | DataError, default_id: str) -> Row:
    if isinstance(row, DataError):
        raise row
    return normalise(row, default_id=default_id)


def _check_version(path: Path) -> None:
    """Refuse a parquet file that says it holds other records or another version; one that says nothing passes."""
    if path.suffix != ".parquet" or not path.is_file():
        return
    with open_table(path) as table:
        metadata = table.schema_arrow.metadata or {}
    version, record = metadata.get(b"unirl_schema_version"), metadata.get(b"unirl_record")
    expected = (str(SCHEMA_VERSION).encode(), _RECORD.encode())
    if record is not None and (version, record) != expected:
        raise DataError(
            f"{path}: expected {_RECORD} records of schema version {SCHEMA_VERSION}; got {record.decode()} of version "
            f"{(version or b'none').decode()}; convert it or name another"
        )


def _with_files(row: Row, folder: Path, images: Path) -> Row:
    """A row whose image bytes went into files named by content."""

    def moved(part: Row) -> Row:
        if part["image"] is None or part["image"]["bytes"] is None:
            return part
        data = part["image"]["bytes"]
        target = images / f"{hashlib.sha256(data).hexdigest()[:16]}{_suffix(data)}"
        if not target.exists():
            with atomic_file(target) as file:
                file.write(data)
        return part | {"image": {"bytes": None, "path": target.relative_to(folder).as_posix()}}

    return map_parts(row, moved)


def _suffix(data: bytes) -> str:
    return ".png" if data.startswith(b"\x89PNG") else ".jpg" if data.startswith(b"\xff\xd8") else ".webp"
