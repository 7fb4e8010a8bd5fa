import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unirl.data.atomic import DataError
from unirl.data.pair_store import PairSet, check_files, read_pair_set, write_pair_set
from unirl.data.records import Rejected
from unirl.types import GenerationSample, PairRecord, UnderstandingSample


def image(seed):
    return np.random.default_rng(seed).integers(0, 256, (6, 5, 3), np.uint8)


def pair(number, kind="retrieved", similarity=0.7):
    und_image = image(number)
    return PairRecord(
        pair_id=f"p{number}",
        kind=kind,
        similarity=similarity,
        understanding=UnderstandingSample(
            id=f"u{number}", image=und_image, question="q ?", choices=("a", "b"), answer="A", category="c"
        ),
        generation=GenerationSample(
            id=f"g{number}", prompt="draw", image=und_image if kind == "aligned" else image(-number + 9999)
        ),
    )


@pytest.fixture
def pair_set():
    return PairSet(
        pairs=(pair(0), pair(1, "aligned", 1.0), pair(2, similarity=0.1 + 0.2)),
        weights=(0.8, 1.0, 0.5),
        settings={"threshold": 0.3, "encoder": "lab"},
        certificate={"medoids": [1, 2]},
        features={"understanding": np.eye(3, dtype=np.float32), "generation": np.eye(3, dtype=np.float32)[::-1]},
        rejected=(Rejected(source="s", row=3, id="x", stage="teacher", reason="no"),),
    )


@pytest.fixture
def folder(tmp_path, pair_set):
    write_pair_set(tmp_path / "set", pair_set)
    return tmp_path / "set"


def refresh_manifest(folder):
    """Make the manifest agree with the files, as a forger would."""
    import hashlib

    manifest = json.loads((folder / "manifest.json").read_text())
    for name, facts in manifest["files"].items():
        data = (folder / name).read_bytes()
        facts.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("image_files", [False, True])
def test_a_pair_set_comes_back_whole(tmp_path, pair_set, image_files):
    write_pair_set(tmp_path / "set", pair_set, image_files=image_files)
    read = read_pair_set(tmp_path / "set")
    for got, wanted in zip(read.pairs, pair_set.pairs, strict=True):
        assert (got.pair_id, got.kind, got.similarity) == (wanted.pair_id, wanted.kind, wanted.similarity)
        np.testing.assert_array_equal(got.understanding.image, wanted.understanding.image)
        np.testing.assert_array_equal(got.generation.image, wanted.generation.image)
        assert replace(got.generation, image=None) == replace(wanted.generation, image=None)
    assert (read.weights, read.settings, read.certificate) == (
        pair_set.weights,
        pair_set.settings,
        pair_set.certificate,
    )
    np.testing.assert_array_equal(read.features["generation"], pair_set.features["generation"])
    assert read.rejected == pair_set.rejected
    manifest = check_files(tmp_path / "set")
    assert manifest["counts"] == {"aligned": 1, "retrieved": 2, "rejected": {"teacher": 1}}


def test_equal_images_share_one_file(tmp_path, pair_set):
    write_pair_set(tmp_path / "set", pair_set, image_files=True)
    assert len(list((tmp_path / "set" / "images").iterdir())) == 5


def test_the_same_pairs_give_the_same_bytes(tmp_path, pair_set):
    for name in ("a", "b"):
        write_pair_set(tmp_path / name, pair_set)
    assert (tmp_path / "a" / "manifest.json").read_bytes() == (tmp_path / "b" / "manifest.json").read_bytes()


FILES = ["pairs.parquet", "understanding.parquet", "generation.parquet", "certificate.json", "features/generation.npy"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda path: path.unlink(), "got none"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "it was cut off or altered"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"~"), "expected sha256"),
    ],
)
def test_a_harmed_file_is_named(folder, name, harm, words):
    harm(folder / name)
    with pytest.raises(DataError, match=words) as caught:
        read_pair_set(folder)
    assert str(folder / name) in str(caught.value)


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        (None, "make one with `unirl pair make`"),
        ("{", "expected a manifest"),
        ("[]", "expected a manifest"),
        ('{"schema_version": 99, "files": {}}', "expected schema version 1; got 99"),
    ],
)
def test_a_wrong_manifest_is_refused(folder, manifest, words):
    (folder / "manifest.json").unlink()
    if manifest is not None:
        (folder / "manifest.json").write_text(manifest)
    with pytest.raises(DataError, match=words):
        read_pair_set(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"und_id": "nobody"}, "'nobody' and gen_id 'g0', at least one unknown"),
        ({"kind": "random"}, "expected an id, a kind of"),
        ({"similarity": None}, "expected an id, a kind of"),
        ({"similarity": 1.5}, "expected a cosine similarity"),
    ],
)
def test_pairs_that_make_no_sense_are_refused(folder, change, words):
    table = pq.read_table(folder / "pairs.parquet")
    rows = table.to_pylist()
    rows[0] |= change
    pq.write_table(pa.Table.from_pylist(rows, table.schema), folder / "pairs.parquet")
    refresh_manifest(folder)
    with pytest.raises(ValueError, match=words):
        read_pair_set(folder)


def test_an_empty_pair_set_is_refused(tmp_path, folder, pair_set):
    with pytest.raises(DataError, match="expected at least one pair to write"):
        write_pair_set(tmp_path / "none", replace(pair_set, pairs=(), weights=()))
    assert not (tmp_path / "none").exists()
    pq.write_table(pq.read_table(folder / "pairs.parquet")[:0], folder / "pairs.parquet")
    refresh_manifest(folder)
    with pytest.raises(DataError, match="got an empty pair set"):
        read_pair_set(folder)


def test_a_sample_in_two_pairs_is_refused(tmp_path, pair_set):
    twice = replace(pair(5), generation=replace(pair(5).generation, id="g0"))
    with pytest.raises(DataError, match="got sample 'g0' twice"):
        write_pair_set(tmp_path / "twice", replace(pair_set, pairs=(*pair_set.pairs, twice), weights=(1,) * 4))
    assert not list(tmp_path.glob("*twice*"))


def test_features_are_never_unpickled(tmp_path, folder):
    with (folder / "features" / "generation.npy").open("wb") as file:
        np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    refresh_manifest(folder)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        read_pair_set(folder)
