"""Token stores of a run's sources, made by an encoder that only counts letters."""

import os

import numpy as np
import pytest

from unirl.config import ModelConfig, SftConfig, SftDataConfig, SourceConfig
from unirl.data.interleaved import write_interleaved
from unirl.data.token_store import TokenStore
from unirl.jobs import conversations
from unirl.types import InterleavedSample, Segment, TokenSequence, Turn


class Letters:
    """One sequence a sample; its ids are the answer's letters. Keeps what it was given."""

    fingerprint = "letters"

    def __init__(self):
        self.seen = []

    def __call__(self, sample):
        self.seen.append(sample.id)
        ids = np.frombuffer(sample.turns[1].segments[0].text.encode(), np.uint8).astype(np.int32)
        return [
            TokenSequence(
                id=sample.id,
                subset="",
                ids=ids,
                kinds=np.zeros(len(ids), np.uint8),
                in_loss=np.ones(len(ids), np.bool_),
            )
        ]


def talk(index, answer="yes"):
    turns = (
        Turn(role="user", segments=(Segment(text="?"),)),
        Turn(role="assistant", segments=(Segment(text=answer),)),
    )
    return InterleavedSample(id=f"c{index}", turns=turns)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "talks.jsonl"
    write_interleaved(path, map(talk, range(6)))
    return path


@pytest.fixture
def config(tmp_path, source):
    data = SftDataConfig(
        sources={"mine": SourceConfig(path=str(source))}, cache_dir=str(tmp_path / "cache"), samples_per_shard=2
    )
    return SftConfig(model=ModelConfig(family="anole", path="none"), data=data)


@pytest.fixture
def encoder(monkeypatch):
    encoder = Letters()
    monkeypatch.setattr(conversations, "load_encoder", lambda config, checkpoint, on_gpu: encoder)
    return encoder


def tokens(config, encoder, tmp_path):
    """Fingerprint of the source's tokens, and the ids of the samples that had to be encoded for it."""
    encoder.seen.clear()
    made = conversations.token_sources(config, tmp_path).training
    assert len(TokenStore(*made["mine"])) == 6
    return made["mine"][1], list(encoder.seen)


@pytest.mark.parametrize("harm", ["cut", "flip", "gone"])
def test_a_damaged_shard_is_named_and_made_again(config, encoder, tmp_path, caplog, harm):
    mark, seen = tokens(config, encoder, tmp_path)
    assert seen == [f"c{i}" for i in range(6)]
    (shard,) = (tmp_path / "cache" / "tokens").glob("*/shard-00000-000001.arrow")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.unlink()
    if harm != "gone":
        shard.write_bytes(data if harm == "flip" else data[:-9])
    assert tokens(config, encoder, tmp_path) == (mark, ["c2", "c3"])
    assert "makes a token shard again" in caplog.text
    assert "shard-00000-000001.arrow: expected" in caplog.text
    assert tokens(config, encoder, tmp_path) == (mark, [])


def test_a_touched_or_restored_file_is_the_same_source_and_a_changed_one_is_named(config, encoder, source, tmp_path):
    mark, _ = tokens(config, encoder, tmp_path)
    os.utime(source, (1, 1))
    assert tokens(config, encoder, tmp_path) == (mark, [])
    write_interleaved(source, (talk(index, "no") for index in range(6)))
    changed, seen = tokens(config, encoder, tmp_path)
    assert len(seen) == 6
    sources = config.data.sources
    (said,) = conversations.changed_sources({"mine": mark}, {"mine": changed}, sources)
    assert said == f"{source} (source mine) holds other data"
    write_interleaved(source, map(talk, range(6)))
    assert tokens(config, encoder, tmp_path) == (mark, [])
    assert conversations.changed_sources({"mine": mark}, {"mine": mark}, sources) == []
    encoder.fingerprint = "other letters"
    other, _ = tokens(config, encoder, tmp_path)
    (said,) = conversations.changed_sources({"mine": mark}, {"mine": other}, sources)
    assert said == f"{source} (source mine) is encoded otherwise, by other tokenizers or settings of data"
