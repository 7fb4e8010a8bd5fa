"""From the records of a public dataset to a store: choosing, proving, sharding, and going on after a kill.

A store under way holds whole shards and progress.json; only a finished one has manifest.json, without which no reader
opens it. Of an import that found too much of the source bad, rejected.jsonl alone stays: what is repaired is read anew.
"""

import hashlib
import heapq
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from unirl.data.atomic import DataError, atomic_file
from unirl.data.checksums import check_file, file_facts
from unirl.data.interleaved import (
    FEWEST_ROWS,
    IMAGES,
    MANIFEST,
    PROGRESS,
    SCHEMA_VERSION,
    add_counts,
    read_manifest,
    require_new,
    summarise,
    write_rows,
)
from unirl.data.messages import normalise, to_sample
from unirl.data.records import Rejected, TooManyBadError, stop_if_too_many, write_rejected
from unirl.data.tables import SUFFIXES, Row, stream_rows

REJECTED = "rejected.jsonl"
RECORDS_PER_SHARD = 2048
_PROGRESS_EVERY_S = 10.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Draft:
    """A record that an importer found: its name, and how to make a row of it, which loads its images."""

    id: str
    build: Callable[[], Row]
    """Gives a row in any chat form, images as bytes; raises ValueError when the record cannot be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What decides the content of a store; an import goes on only under an equal one."""

    importer: str
    source: str
    options: dict[str, Any] = field(default_factory=dict)
    """Of the importer. JSON values."""
    max_samples: int | None = None
    """Records to choose; None takes all. One that is rejected is not replaced."""
    seed: int = 0
    """Which records are chosen."""
    image_files: bool = False
    """Images as files under images/ instead of in the tables."""
    records_per_shard: int = RECORDS_PER_SHARD


@dataclass(slots=True)
class _Progress:
    """What the shards that are written hold."""

    threshold: int | None
    """Largest key of a chosen record; None when all are."""
    source: dict[str, list[int]] = field(default_factory=dict)
    """Size and time of writing of the source's files of rows, by path."""
    num_read: int = 0
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    subsets: dict[str, dict[str, int]] = field(default_factory=dict)
    num_rejected: int = 0


def import_samples(
    out: Path,
    drafts: Callable[[], Iterable[Draft]],
    plan: Plan,
    *,
    max_rejected_fraction: float = 0.01,
    resume: bool = False,
) -> dict[str, Any]:
    """Make a store of what an importer finds; returns its manifest.

    Every image is decoded once, so that the store holds only samples that load. Memory holds a row group, the ids, and
    the keys of the chosen records.

    Args:
        out: folder of the store; must not exist unless `resume`.
        drafts: gives the records, the same ones in the same order at each call.
        plan: what to make.
        max_rejected_fraction: more bad records than this share stop the import; then rejected.jsonl alone stays.
        resume: go on with a store that was left unfinished; start one if there is none.

    Raises:
        DataError: `out` exists or was started with another plan, the source cannot be read or changed since, or too
            much of it is bad.
    """
    if (out / MANIFEST).is_file() and resume:
        manifest = read_manifest(out)
        _require_same(out, manifest["settings"], plan)
        (out / PROGRESS).unlink(missing_ok=True)
        return manifest
    return _Import(out, drafts, plan, max_rejected_fraction, resume).run()


def source_files(source: Path, *patterns: str) -> list[Path]:
    """The file named, or the files inside the folder named that fit the first pattern that any fits, sorted.

    Raises:
        DataError: there is none.
    """
    if source.is_file():
        return [source]
    for pattern in patterns:
        if files := sorted(path for path in source.glob(pattern) if path.is_file()):
            return files
    raise DataError(
        f"{source}: expected a file, or a folder with {' or '.join(patterns)}; got none; check the download"
    )


def row_drafts(path: Path, build: Callable[[Row], Row], *, columns: Sequence[str] | None = None) -> Iterator[Draft]:
    """A draft for each row of a .parquet, .jsonl or .json file, named after the file and the row's place.

    Args:
        path: file to read.
        build: makes a chat row of one of its rows.
        columns: those to read of a parquet file; None for all.
    """
    for place, row in enumerate(stream_rows(path, columns)):
        yield Draft(f"{path.stem}/{place}", _building(row, build))


def _building(row: Row | DataError, build: Callable[[Row], Row]) -> Callable[[], Row]:
    def made() -> Row:
        if isinstance(row, DataError):
            raise row
        return build(row)

    return made


def field_text(row: Row, key: str) -> str:
    """The text under a key.

    Raises:
        DataError: there is none, or only blanks.
    """
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"expected text under {key!r}; got {str(value)[:40]!r}; repair or drop the record")
    return value.strip()


def key_of(name: str, seed: int) -> int:
    """A number in [0, 2**64) that a record's name draws under a seed: the lowest ones are a fair sample."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest())


class _Import:
    """One import under way: the shard that grows, and what the whole ones hold."""

    def __init__(
        self, out: Path, drafts: Callable[[], Iterable[Draft]], plan: Plan, max_rejected_fraction: float, resume: bool
    ) -> None:
        self._out, self._drafts, self._plan, self._max_rejected = out, drafts, plan, max_rejected_fraction
        self._rejected: list[Rejected] = []
        self._ids: set[str] = set()
        self._spoken = time.monotonic()
        left = self._go_on(resume) if out.exists() else None
        self._progress = left or _Progress(threshold=_threshold(drafts, plan), source=_source_stamps(plan))

    def run(self) -> dict[str, Any]:
        self._say("starts" if not self._progress.files else f"goes on after {len(self._progress.files)} shards")
        drafts = islice(self._chosen(), self._progress.num_read, None)
        first = next(drafts, None)  # a source that cannot be read leaves no folder
        if first is None and not self._progress.num_read:
            raise DataError(f"{self._plan.source}: expected records to import; got none: it is empty; check the source")
        self._save()
        try:
            while first is not None:
                self._write_shard(chain([first], islice(drafts, self._plan.records_per_shard - 1)))
                first = next(drafts, None)
            self._stop_if_too_many(self._progress.num_read)
            self._require_some()
        except TooManyBadError as error:
            self._clear()
            raise TooManyBadError(f"{error}; all of them stand in {self._out / REJECTED}") from error
        finally:
            write_rejected(self._out / REJECTED, self._rejected)
        return self._finish()

    def _stop_if_too_many(self, seen: int) -> None:
        stop_if_too_many(
            Path(self._plan.source), self._rejected, self._max_rejected, seen, limit="--max-rejected-fraction"
        )

    def _require_some(self) -> None:
        if not self._progress.subsets:
            raise TooManyBadError(
                f"{self._plan.source}: expected records to import; got {self._progress.num_read}, none of them good: "
                f"{self._rejected[0].reason}"
            )

    def _clear(self) -> None:
        """Remove what was written, so that the same command starts anew."""
        (self._out / PROGRESS).unlink()
        for name in self._progress.files:
            (self._out / name).unlink()
        shutil.rmtree(self._out / IMAGES, ignore_errors=True)

    def _go_on(self, resume: bool) -> _Progress | None:
        """What an earlier attempt left, checked and cleared of partial files; None when it left nothing."""
        path = self._out / PROGRESS
        if resume:
            for partial in self._out.rglob(".*.partial"):
                partial.unlink()
        if self._out.is_dir() and {path.name for path in self._out.iterdir()} <= {REJECTED}:
            return None
        if not resume or not path.is_file():
            hint = "add --resume to go on with it" if path.is_file() else "remove it or name another"
            raise DataError(f"{self._out}: expected a folder that is not there yet; got an existing one; {hint}")
        try:
            saved = json.loads(path.read_text())
            settings, progress = dict(saved.pop("settings")), _Progress(**saved)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: expected the progress of an import; got: {error!r}; import anew") from error
        _require_same(self._out, settings, self._plan)
        if progress.source != _source_stamps(self._plan):
            raise DataError(
                f"{self._out}: expected to go on with the source as it was; got {self._plan.source} written again "
                "since; remove the folder and import anew"
            )
        for name, facts in progress.files.items():
            check_file(self._out / name, facts, whole="store")
            self._ids.update(row["id"] for row in stream_rows(self._out / name, ["id"]) if isinstance(row, dict))
        if (self._out / REJECTED).is_file():
            lines = (self._out / REJECTED).read_text().splitlines()[: progress.num_rejected]
            self._rejected = [Rejected(**json.loads(line)) for line in lines]
        return progress

    def _chosen(self) -> Iterator[Draft]:
        threshold = self._progress.threshold
        return (d for d in self._drafts() if threshold is None or key_of(d.id, self._plan.seed) <= threshold)

    def _write_shard(self, drafts: Iterator[Draft]) -> None:
        progress = self._progress
        name = f"interleaved-{len(progress.files):05d}.parquet"
        images = self._out / IMAGES if self._plan.image_files else None
        try:
            write_rows(self._out / name, self._good(drafts), images=images)
        except pa.ArrowException as error:
            raise DataError(
                f"{self._out / name}: expected rows that parquet can hold; got: {error}; take smaller shards"
            ) from error
        write_rejected(self._out / REJECTED, self._rejected)
        progress.files[name] = file_facts(self._out / name)
        progress.num_rejected = len(self._rejected)
        self._save()

    def _good(self, drafts: Iterator[Draft]) -> Iterator[Row]:
        progress = self._progress
        for draft in drafts:
            place = progress.num_read
            progress.num_read += 1
            try:
                row = normalise(draft.build(), default_id=f"{self._plan.importer}/{draft.id}")
                sample = to_sample(row, self._out)
                require_new(sample.id, self._ids)
            except (ValueError, OSError) as error:
                self._rejected.append(Rejected(source=self._plan.importer, row=place, id=draft.id, reason=str(error)))
                seen = max(progress.num_read, FEWEST_ROWS)
                self._stop_if_too_many(seen)
            else:
                add_counts(progress.subsets, sample)
                yield row
            if time.monotonic() - self._spoken > _PROGRESS_EVERY_S:
                self._say("goes on")

    def _save(self) -> None:
        _write_json(self._out / PROGRESS, {"settings": asdict(self._plan), **asdict(self._progress)})

    def _finish(self) -> dict[str, Any]:
        progress = self._progress
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "settings": asdict(self._plan),
            "counts": summarise(progress.subsets) | {"rejected": len(self._rejected)},
            "files": progress.files | {REJECTED: file_facts(self._out / REJECTED)},
        }
        _write_json(self._out / MANIFEST, manifest)
        (self._out / PROGRESS).unlink()
        self._say("done")
        return manifest

    def _say(self, what: str) -> None:
        self._spoken = time.monotonic()
        num_read, bad = self._progress.num_read, len(self._rejected)
        _log.info("%s: %s: %d read, %d kept, %d left out", self._out, what, num_read, num_read - bad, bad)


def _threshold(drafts: Callable[[], Iterable[Draft]], plan: Plan) -> int | None:
    """The largest key among those of the records to choose; None when all are taken."""
    if plan.max_samples is None:
        return None
    _log.info("%s: chooses %d records", plan.source, plan.max_samples)
    lowest: list[int] = []
    for draft in drafts():
        key = key_of(draft.id, plan.seed)
        if len(lowest) < plan.max_samples:
            heapq.heappush(lowest, -key)
        elif -key > lowest[0]:
            heapq.heapreplace(lowest, -key)
    return -lowest[0] if lowest else None


def _source_stamps(plan: Plan) -> dict[str, list[int]]:
    """Size and time of writing of the source's files of rows, at most a folder down: unpacked images lie deeper."""
    source = Path(plan.source)
    files = [path for path in (source, *source.glob("*"), *source.glob("*/*")) if path.suffix.lower() in SUFFIXES]
    stats = {str(path): path.stat() for path in sorted(files) if path.is_file()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def _require_same(out: Path, saved: dict[str, Any], plan: Plan) -> None:
    asked = json.loads(json.dumps(asdict(plan), default=str))
    if differing := [f"{key} {saved.get(key)!r}, now {asked[key]!r}" for key in asked if saved.get(key) != asked[key]]:
        raise DataError(
            f"{out}: expected to go on with what was started; got {'; '.join(differing)}; repeat the first command's "
            "options or name another folder"
        )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with atomic_file(path) as file:
        file.write(json.dumps(value, indent=1, default=str).encode())
