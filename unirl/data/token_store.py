"""Conversations as tokens on disk: shards that are made once, each whole or not at all, and then read in place.

A shard holds the sequences of up to `samples_per_shard` consecutive rows of one source file, with a note beside it
(what it holds, its checksum, what was left out). A store is finished when its manifest says so. Arrow files hold plain
values and are mapped into memory, so that ranks on one machine share them.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from unirl.data.atomic import DataError, atomic_file
from unirl.data.checksums import check_file, file_facts, remembered_sha256
from unirl.data.interleaved import MANIFEST, data_files, sample_of
from unirl.data.messages import COLUMNS
from unirl.data.records import Rejected, decode_image, encode_png, write_rejected
from unirl.data.tables import stream_rows
from unirl.types import InterleavedSample, TokenSequence

VERSION = 1
REJECTED = "rejected.jsonl"
_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "subset": pa.string(),
        "ids": pa.list_(pa.int32()),
        "kinds": pa.list_(pa.uint8()),
        "in_loss": pa.list_(pa.uint8()),
        "pixels": pa.list_(pa.large_binary()),
    }
)
_log = logging.getLogger(__name__)

Encode = Callable[[InterleavedSample], list[TokenSequence]]
"""The sequences of a sample; raises ValueError where there are none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A share of a source file: those of its shards whose number leaves `part` when divided by `num_parts`."""

    file: Path
    index: int
    """Of the file among those of the source."""
    part: int = 0
    num_parts: int = 1


def units_of(source: Path, num_parts: int) -> list[Unit]:
    """The work of encoding a source: its files, or where it has fewer than `num_parts`, shares of them.

    Raises:
        DataError: as `data_files`.
    """
    files = data_files(source)
    shares = -(-num_parts // len(files))
    return [
        Unit(file=file, index=index, part=part, num_parts=shares)
        for index, file in enumerate(files)
        for part in range(shares)
    ]


def source_facts(source: Path, memory: Path) -> list[dict[str, Any]]:
    """What tells a source from another or a changed one: its manifest's checksum, or place and checksum of its files.

    Args:
        source: store, file or folder of conversations.
        memory: folder of remembered checksums.

    Raises:
        DataError: as `data_files`.
    """
    manifest = source / MANIFEST
    if manifest.is_file():
        return [{"manifest": file_facts(manifest)["sha256"]}]
    # The place counts, since rows may name pictures beside them.
    return [{"path": str(file), "sha256": remembered_sha256(file, memory)} for file in data_files(source)]


def encode_unit(unit: Unit, folder: Path, encode: Encode, samples_per_shard: int) -> Iterator[Path]:
    """Make the shards of a unit that are not there yet; yields the note of each of its shards.

    Args:
        unit: which rows of which file.
        folder: of the token store.
        encode: makes sequences of samples.
        samples_per_shard: rows of a shard.

    Raises:
        DataError: the source file is damaged, or the disk is full.
    """
    number, num_samples, rows, rejected = -1, 0, list[dict[str, Any]](), list[Rejected]()

    def finish() -> Iterator[Path]:
        if number >= 0 and number % unit.num_parts == unit.part:
            note = _note(folder, unit.index, number)
            if not note.is_file():
                _write_shard(note, rows, rejected, num_samples)
            yield note

    for place, row in enumerate(stream_rows(unit.file, COLUMNS)):
        if place // samples_per_shard != number:
            yield from finish()
            number, num_samples, rows, rejected = place // samples_per_shard, 0, [], []
        if number % unit.num_parts != unit.part or _note(folder, unit.index, number).is_file():
            continue
        num_samples += 1
        name = "" if isinstance(row, DataError) else str(row.get("id") or "")
        stage: Literal["reading", "tokens"] = "reading"
        try:
            sample = sample_of(row, unit.file, place)
            name, stage = sample.id, "tokens"
            rows += map(_to_row, encode(sample))
        except ValueError as error:
            rejected.append(Rejected(source=unit.file.name, row=place, id=name, stage=stage, reason=str(error)))
    yield from finish()


def _note(folder: Path, file: int, number: int) -> Path:
    return folder / f"shard-{file:05d}-{number:06d}.json"


def _write_shard(note: Path, rows: list[dict[str, Any]], rejected: list[Rejected], num_samples: int) -> None:
    shard = note.with_suffix(".arrow")
    with atomic_file(shard) as file, pa.ipc.new_file(file, _SCHEMA) as writer:
        writer.write_table(pa.Table.from_pylist(rows, _SCHEMA).combine_chunks())
    facts = {
        "shard": shard.name,
        **file_facts(shard),
        "num_samples": num_samples,
        "num_sequences": len(rows),
        "num_tokens": sum(len(row["ids"]) for row in rows),
        "rejected": [asdict(record) for record in rejected],
    }
    with atomic_file(note) as file:
        file.write(json.dumps(facts).encode())


def _to_row(sequence: TokenSequence) -> dict[str, Any]:
    return {
        "id": sequence.id,
        "subset": sequence.subset,
        "ids": sequence.ids,
        "kinds": sequence.kinds,
        "in_loss": sequence.in_loss.astype(np.uint8),
        "pixels": [encode_png(image) for image in sequence.pixels],
    }


def finish_store(folder: Path, notes: Iterable[Path], fingerprint: str) -> None:
    """Write the manifest of a store whose shards are all there, and rejected.jsonl where something was left out."""
    facts = [json.loads(note.read_text()) for note in sorted(notes)]
    rejected = [Rejected(**record) for shard in facts for record in shard.pop("rejected")]
    if rejected:
        write_rejected(folder / REJECTED, rejected)
    manifest = {"version": VERSION, "fingerprint": fingerprint, "num_rejected": len(rejected), "shards": facts}
    with atomic_file(folder / MANIFEST) as file:
        file.write(json.dumps(manifest, indent=1).encode())


def drop_damaged(folder: Path, fingerprint: str) -> list[str]:
    """Remove the damaged shards of a store and its manifest, so that encoding makes them again; says what was found.

    A reader that has opened a shard keeps the bytes it opened. An unfinished store is left as it is.

    Raises:
        DataError: the manifest cannot be read or is of another family.
    """
    if not (folder / MANIFEST).is_file():
        return []
    found: list[str] = []
    for facts in _read_manifest(folder, fingerprint)["shards"]:
        shard = folder / facts["shard"]
        try:
            check_file(shard, facts, whole="token shard")
        except DataError as error:
            found.append(str(error))
            (folder / MANIFEST).unlink(missing_ok=True)
            shard.with_suffix(".json").unlink(missing_ok=True)
            shard.unlink(missing_ok=True)
    return found


def check_rejected(folder: Path, fingerprint: str, *, max_rejected_fraction: float) -> None:
    """Refuse a finished store of which too much was left out, and say so of one of which less was.

    Raises:
        DataError: too many samples were left out, or nothing is left; or as `TokenStore`.
    """
    manifest = _read_manifest(folder, fingerprint)
    number = manifest["num_rejected"]
    num_samples, num_sequences = (sum(s[key] for s in manifest["shards"]) for key in ("num_samples", "num_sequences"))
    if number:
        _log.warning("%s: left out %d of %d samples; see %s", folder, number, num_samples, REJECTED)
    if number > max_rejected_fraction * num_samples or not num_sequences:
        lines = (folder / REJECTED).read_text().splitlines() if number else []
        shown = "; ".join("{id}: {reason}".format(**json.loads(line)) for line in lines[:3])
        raise DataError(
            f"{folder}: expected at most {max_rejected_fraction:.2%} of {num_samples} samples to be unfit, and one "
            f"that is fit; got {number} unfit: {shown}; see {folder / REJECTED}, repair the data, or raise "
            "data.max_rejected_fraction"
        )


class TokenStore:
    """The sequences of a finished store, read in place."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        """Open a store and check every byte of it.

        Args:
            folder: of the store.
            fingerprint: of the family, tokenizer, image tokenizer and settings that its tokens must be of.

        Raises:
            DataError: it is unfinished, damaged, or of another family or tokenizer.
        """
        self.folder = folder
        manifest = _read_manifest(folder, fingerprint)
        self._tables = [_open_shard(folder, facts) for facts in manifest["shards"] if facts["num_sequences"]]
        self.num_rejected: int = manifest["num_rejected"]
        self.num_samples: int = sum(facts["num_samples"] for facts in manifest["shards"])
        """Those that were left out among them."""
        self._starts = np.cumsum([0, *(len(table) for table in self._tables)])
        self.lengths = np.concatenate([_lengths(table) for table in self._tables])
        """[N] tokens of each sequence."""
        self.subsets = np.concatenate([np.array(table["subset"].to_pylist(), object) for table in self._tables])
        """[N] subset of each sequence."""

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> TokenSequence:
        """One sequence; its images are decoded when they are taken."""
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        table, place = self._tables[shard], index - int(self._starts[shard])
        cells = {name: table[name][place] for name in _SCHEMA.names}
        return TokenSequence(
            id=cells["id"].as_py(),
            subset=cells["subset"].as_py(),
            ids=_array(cells["ids"]),
            kinds=_array(cells["kinds"]),
            in_loss=_array(cells["in_loss"]).astype(np.bool_),
            pixels=_StoredImages(cells["pixels"].as_py()),
        )


class _StoredImages(Sequence[NDArray[np.uint8]]):
    """Images that are decoded each time they are taken."""

    def __init__(self, files: list[bytes]) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: Any) -> Any:
        return decode_image(self._files[index])


def _array(cell: Any) -> NDArray[Any]:
    return cast("NDArray[Any]", cell.values.to_numpy(zero_copy_only=False))


def _lengths(table: pa.Table) -> NDArray[np.int64]:
    import pyarrow.compute as pc

    return np.asarray(cast(Any, pc).list_value_length(table["ids"]), np.int64)


def _read_manifest(folder: Path, fingerprint: str) -> dict[str, Any]:
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_text())
        version, found = manifest["version"], manifest["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder}: expected a finished token store with {MANIFEST}; got {error!r}; delete that file and "
            "encode again, which goes on where it stopped"
        ) from error
    if version != VERSION or found != fingerprint:
        raise DataError(
            f"{folder}: expected tokens of version {VERSION} and fingerprint {fingerprint}, as model.family, its "
            f"tokenizers and the settings of data give; got version {version}, fingerprint {found}: these shards are "
            "of another family or checkpoint; name another data.cache_dir"
        )
    return manifest


def _open_shard(folder: Path, facts: dict[str, Any]) -> pa.Table:
    shard = folder / facts["shard"]
    try:
        check_file(shard, facts, whole="token shard")
        table = pa.ipc.open_file(pa.memory_map(str(shard))).read_all()
    except (DataError, OSError, pa.ArrowException) as error:
        raise DataError(
            f"{error}. To make this shard anew, delete {shard.with_suffix('.json').name}, {shard.name} and {MANIFEST} "
            f"in {folder} and run the command again"
        ) from error
    return table
