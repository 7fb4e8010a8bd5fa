"""Token shards: made once, resumed, checked, refused when they are not what is asked for."""

import json
import os
import shutil

import numpy as np
import pytest

from tests.sequences import PICTURE, random_turns
from unirl.data.atomic import DataError
from unirl.data.interleaved import write_interleaved
from unirl.data.token_store import (
    TokenStore,
    check_rejected,
    drop_damaged,
    encode_unit,
    finish_store,
    source_facts,
    units_of,
)
from unirl.types import InterleavedSample, TokenSequence

FINGERPRINT = "abc"


def samples(count):
    rng = np.random.default_rng(0)
    subset = ("drawing", "editing")
    return [InterleavedSample(id=f"s{i}", turns=random_turns(rng), subset=subset[i % 2]) for i in range(count)]


class Encoder:
    """One sequence a sample, two of s3, none of s5; counts what it was given."""

    def __init__(self):
        self.seen = []

    def __call__(self, sample):
        self.seen.append(sample.id)
        number = int(sample.id[1:])
        if number == 5:
            raise ValueError("expected fewer tokens; got more; shorten it")
        return [self._sequence(sample, number, part) for part in range(2 if number == 3 else 1)]

    def _sequence(self, sample, number, part):
        length = 3 + number
        return TokenSequence(
            id=f"{sample.id}/{part}", subset=sample.subset, ids=np.arange(length, dtype=np.int32) + 100 * number,
            kinds=np.full(length, number % 3, np.uint8), in_loss=np.arange(length) % 2 == 0,
            pixels=(PICTURE + number,) if number == 2 else (),
        )  # fmt: skip


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "mine.jsonl"
    write_interleaved(path, samples(10))
    return path


def encode(source, folder, encoder=None, *, num_parts=1, size=4, limit=0.2):
    encoder = encoder or Encoder()
    notes = [n for unit in units_of(source, num_parts) for n in encode_unit(unit, folder, encoder, size)]
    finish_store(folder, notes, FINGERPRINT)
    check_rejected(folder, FINGERPRINT, max_rejected_fraction=limit)
    return TokenStore(folder, FINGERPRINT)


@pytest.mark.parametrize("num_parts", [1, 3])
def test_every_fit_sample_comes_back_as_it_was(source, tmp_path, num_parts):
    store = encode(source, tmp_path, num_parts=num_parts)
    assert len(store) == 10
    assert store.num_rejected == 1
    assert [store[i].id for i in range(3, 6)] == ["s3/0", "s3/1", "s4/0"]
    assert store.lengths.tolist() == [len(store[i].ids) for i in range(10)]
    assert store.subsets[:2].tolist() == ["drawing", "editing"]
    found = store[2]
    assert found.ids.dtype == np.int32
    assert found.ids.tolist() == [200, 201, 202, 203, 204]
    assert found.kinds.tolist() == [2] * 5
    assert found.in_loss.tolist() == [True, False, True, False, True]
    assert (found.pixels[0] == PICTURE + 2).all()


def test_the_left_out_are_named(source, tmp_path):
    encode(source, tmp_path)
    (record,) = map(json.loads, (tmp_path / "rejected.jsonl").read_text().splitlines())
    assert (record["id"], record["row"], record["stage"]) == ("s5", 5, "tokens")
    assert "fewer tokens" in record["reason"]


def test_too_many_left_out_stop_the_encoding(source, tmp_path):
    with pytest.raises(DataError, match=r"at most 5.00% of 10 samples to be unfit.*got 1 unfit: s5"):
        encode(source, tmp_path, limit=0.05)
    assert (tmp_path / "rejected.jsonl").exists()


def test_a_finished_store_is_asked_again(source, tmp_path):
    encode(source, tmp_path, limit=0.2)
    check_rejected(tmp_path, FINGERPRINT, max_rejected_fraction=0.1)
    with pytest.raises(DataError, match=r"at most 5.00% of 10 samples to be unfit.*got 1 unfit: s5: expected fewer"):
        check_rejected(tmp_path, FINGERPRINT, max_rejected_fraction=0.05)


def test_a_store_without_sequences_is_refused(tmp_path):
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(DataError, match=r"of 0 samples.*and one that is fit; got 0 unfit"):
        encode(tmp_path / "none.jsonl", tmp_path)


def test_a_broken_row_is_left_out(source, tmp_path):
    with source.open("a") as file:
        file.write('{"id": "half"')
    store = encode(source, tmp_path)
    assert store.num_rejected == 2
    assert "half" in (tmp_path / "rejected.jsonl").read_text()


def test_an_interrupted_encoding_goes_on(source, tmp_path):
    (unit,) = units_of(source, 1)
    work = encode_unit(unit, tmp_path, Encoder(), 4)
    next(work)
    work.close()
    encoder = Encoder()
    assert len(encode(source, tmp_path, encoder)) == 10
    assert encoder.seen == [f"s{i}" for i in range(4, 10)], "the first shard is there already"


def test_parts_share_the_shards(source, tmp_path):
    seen = []
    for unit in units_of(source, 2):
        encoder = Encoder()
        list(encode_unit(unit, tmp_path, encoder, 4))
        seen.append(encoder.seen)
    assert seen == [["s0", "s1", "s2", "s3", "s8", "s9"], ["s4", "s5", "s6", "s7"]]


@pytest.mark.parametrize("harm", ["cut", "flip", "gone"])
def test_a_damaged_shard_is_refused_by_name_and_made_again_alone(source, tmp_path, harm):
    encode(source, tmp_path)
    shard = tmp_path / "shard-00000-000001.arrow"
    data = bytearray(shard.read_bytes())
    if harm == "cut":
        shard.write_bytes(data[:-20])
    elif harm == "flip":
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    else:
        shard.unlink()
    with pytest.raises(DataError, match=r"shard-00000-000001.*delete shard-00000-000001.json"):
        TokenStore(tmp_path, FINGERPRINT)
    (said,) = drop_damaged(tmp_path, FINGERPRINT)
    assert "shard-00000-000001.arrow: expected" in said
    encoder = Encoder()
    assert len(encode(source, tmp_path, encoder)) == 10, "the others stay"
    assert encoder.seen == ["s4", "s5", "s6", "s7"]


def test_tokens_of_another_family_are_refused(source, tmp_path):
    encode(source, tmp_path)
    with pytest.raises(DataError, match=r"fingerprint other.*got version 1, fingerprint abc.*another family"):
        TokenStore(tmp_path, "other")


def test_an_unfinished_store_is_refused(tmp_path):
    with pytest.raises(DataError, match="expected a finished token store"):
        TokenStore(tmp_path, FINGERPRINT)


def test_a_changed_or_moved_source_has_other_facts_and_a_touched_or_restored_one_the_same(source, tmp_path):
    before = source_facts(source, tmp_path / "memory")
    os.utime(source, (1, 1))
    assert source_facts(source, tmp_path / "memory") == before
    write_interleaved(source, samples(9))
    assert source_facts(source, tmp_path / "memory") != before
    write_interleaved(source, samples(10))
    assert source_facts(source, tmp_path / "memory") == before
    moved = shutil.copytree(tmp_path, tmp_path.with_name("moved")) / source.name
    assert source_facts(moved, tmp_path / "memory") != before, "pictures beside it may be others"
