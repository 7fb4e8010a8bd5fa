"""A pair set on disk: one folder with pairs, their samples, features, certificate and a manifest of checksums."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from unirl.data.atomic import DataError, atomic_file, atomic_folder
from unirl.data.checksums import check_file, file_facts
from unirl.data.records import Rejected, Sample, file_name, read_samples, write_rejected, write_samples
from unirl.types import GenerationSample, PairKind, PairRecord, UnderstandingSample

SCHEMA_VERSION = 1
PAIRS = "pairs.parquet"
MANIFEST = "manifest.json"
CERTIFICATE = "certificate.json"
REJECTED = "rejected.jsonl"
FEATURES = "features"
IMAGES = "images"
_PAIR_SCHEMA = pa.schema(
    {
        "pair_id": pa.string(),
        "kind": pa.string(),
        "similarity": pa.float64(),
        "weight": pa.float64(),
        "und_id": pa.string(),
        "gen_id": pa.string(),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSet:
    """Pairs and what is known about how they came to be."""

    pairs: tuple[PairRecord, ...]
    weights: tuple[float, ...]
    """w_p of each pair under the default rule, in [0, 1]; for reading, since training weighs pairs by its own rule."""
    settings: dict[str, Any]
    """How the set was made: sources, encoder, teacher, threshold, K, order, seed. JSON values."""
    certificate: dict[str, Any] = field(default_factory=dict)
    """What `unirl pair verify` needs beside the features. JSON values."""
    features: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """[N, D] unit rows of every sample that was offered for pairing, by task; rows named in the certificate."""
    rejected: tuple[Rejected, ...] = ()
    """Records that were left out, with reasons."""


def write_pair_set(folder: Path, pair_set: PairSet, *, image_files: bool = False) -> None:
    """Write a pair set, whole or not at all.

    Args:
        folder: must not exist.
        pair_set: at least one pair.
        image_files: write images as files under images/, shared by equal samples, instead of inside the tables.

    Raises:
        DataError: no pairs, two samples with one id, an existing folder, or a full disk.
    """
    if not pair_set.pairs:
        raise DataError(
            f"{folder}: expected at least one pair to write; got none; lower the threshold or give more samples"
        )
    understanding = _by_id(pair.understanding for pair in pair_set.pairs)
    generation = _by_id(pair.generation for pair in pair_set.pairs)
    rows = [
        {
            "pair_id": pair.pair_id,
            "kind": pair.kind,
            "similarity": pair.similarity,
            "weight": weight,
            "und_id": pair.understanding.id,
            "gen_id": pair.generation.id,
        }
        for pair, weight in zip(pair_set.pairs, pair_set.weights, strict=True)
    ]
    with atomic_folder(folder) as partial:
        images = partial / IMAGES if image_files else None
        write_samples(
            partial / file_name(UnderstandingSample), understanding.values(), UnderstandingSample, images=images
        )
        write_samples(partial / file_name(GenerationSample), generation.values(), GenerationSample, images=images)
        with atomic_file(partial / PAIRS) as file:
            pq.write_table(pa.Table.from_pylist(rows, _PAIR_SCHEMA), file, compression="zstd")
        for task, matrix in pair_set.features.items():
            with atomic_file(partial / FEATURES / f"{task}.npy") as file:
                np.save(file, matrix, allow_pickle=False)
        _write_json(partial / CERTIFICATE, pair_set.certificate)
        write_rejected(partial / REJECTED, pair_set.rejected)
        _write_json(partial / MANIFEST, _manifest(partial, pair_set))


def read_pair_set(folder: Path) -> PairSet:
    """All of a pair set, its checksums verified.

    Raises:
        DataError: the folder or a file is missing, truncated, altered, of another version, or holds no valid pairs.
    """
    manifest = check_files(folder)
    understanding = _by_id(_samples(folder, UnderstandingSample))
    generation = _by_id(_samples(folder, GenerationSample))
    rows = _pair_rows(folder)
    return PairSet(
        pairs=tuple(_pair(folder, row, understanding, generation) for row in rows),
        weights=tuple(row["weight"] for row in rows),
        settings=manifest["settings"],
        certificate=json.loads((folder / CERTIFICATE).read_text()),
        features={path.stem: np.load(path, allow_pickle=False) for path in sorted((folder / FEATURES).glob("*.npy"))},
        rejected=tuple(Rejected(**json.loads(line)) for line in (folder / REJECTED).read_text().splitlines()),
    )


def check_files(folder: Path) -> dict[str, Any]:
    """The manifest of a pair set, after comparing every file with its size and sha256.

    Raises:
        DataError: the manifest or a file is missing, truncated, altered or of another schema version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(f"{folder}: expected a pair set with {MANIFEST}; got none; make one with `unirl pair make`")
    try:
        manifest = json.loads(path.read_text())
        version, files = manifest["schema_version"], dict(manifest["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: expected a manifest of a pair set; got: {error!r}; make the pair set again"
        ) from error
    if version != SCHEMA_VERSION:
        raise DataError(f"{path}: expected schema version {SCHEMA_VERSION}; got {version}; make the pair set again")
    for name, facts in files.items():
        check_file(folder / name, facts, whole="pair set")
    return manifest


def _manifest(folder: Path, pair_set: PairSet) -> dict[str, Any]:
    kinds = [pair.kind for pair in pair_set.pairs]
    stages = Counter(record.stage for record in pair_set.rejected)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        "schema_version": SCHEMA_VERSION,
        "settings": pair_set.settings,
        "counts": {**{kind: kinds.count(kind) for kind in get_args(PairKind)}, "rejected": dict(stages)},
        "files": {path.relative_to(folder).as_posix(): file_facts(path) for path in files},
    }


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with atomic_file(path) as file:
        file.write(json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode())


def _samples(folder: Path, kind: type[Sample]) -> list[Sample]:
    return read_samples(folder, kind, max_rejected_fraction=0.0)[0]


def _by_id(samples: Iterable[Sample]) -> dict[str, Sample]:
    found: dict[str, Sample] = {}
    for sample in samples:
        if found.setdefault(sample.id, sample) is not sample:
            raise DataError(
                f"expected each sample in one pair; got sample {sample.id!r} twice; give samples unique ids"
            )
    return found


def _pair_rows(folder: Path) -> list[dict[str, Any]]:
    try:
        rows = pq.read_table(folder / PAIRS, schema=_PAIR_SCHEMA).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{folder / PAIRS}: expected columns {_PAIR_SCHEMA.names}; got: {error}; make the set again"
        ) from error
    if not rows:
        raise DataError(f"{folder}: expected at least one pair; got an empty pair set; make it again with more samples")
    return rows


def _pair(
    folder: Path,
    row: dict[str, Any],
    understanding: Mapping[str, UnderstandingSample],
    generation: Mapping[str, GenerationSample],
) -> PairRecord:
    name = f"{folder / PAIRS}, pair {row['pair_id']!r}"
    if row["und_id"] not in understanding or row["gen_id"] not in generation:
        raise DataError(
            f"{name}: expected samples of {file_name(UnderstandingSample)} and {file_name(GenerationSample)}; got "
            f"und_id {row['und_id']!r} and gen_id {row['gen_id']!r}, at least one unknown; make the pair set again"
        )
    if not row["pair_id"] or row["kind"] not in get_args(PairKind) or row["similarity"] is None:
        raise DataError(
            f"{name}: expected an id, a kind of {get_args(PairKind)} and a similarity; got {row}; make the set again"
        )
    return PairRecord(
        pair_id=row["pair_id"],
        kind=row["kind"],
        similarity=row["similarity"],
        understanding=understanding[row["und_id"]],
        generation=generation[row["gen_id"]],
    )
