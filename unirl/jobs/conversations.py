"""The conversations of a fine-tuning run as token stores: made on first use, found again later."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from unirl.cluster.sft_worker import TokenSources
from unirl.config import SftConfig, SourceConfig
from unirl.data.interleaved import MANIFEST
from unirl.data.token_store import (
    VERSION,
    Unit,
    check_rejected,
    drop_damaged,
    encode_unit,
    finish_store,
    source_facts,
    units_of,
)
from unirl.jobs.assets import locked, resolve_conversations
from unirl.models.conversation_encoder import ConversationEncoder
from unirl.models.policy import load_encoder

log = logging.getLogger(__name__)

EncodeAll = Callable[[Sequence[Unit], Path], Iterator[Path]]
"""Makes the shards of units in a folder; yields their notes."""


def token_sources(config: SftConfig, checkpoint: Path, encode_all: EncodeAll | None = None) -> TokenSources:
    """The finished token stores of a run; what is not there yet or damaged is made.

    Args:
        config: the run's.
        checkpoint: folder of the policy, whose tokenizers are used.
        encode_all: makes shards with the run's workers; None makes them in this process.

    Raises:
        DataError: a source is missing or damaged, or too many samples are unfit.
        ConfigError: one image alone is longer than data.max_length.
    """
    # Where workers encode, this one only tells what its tokens would be, and leaves the GPUs to the learner.
    encoder = load_encoder(config, checkpoint, on_gpu=encode_all is None)

    def here(units: Sequence[Unit], folder: Path) -> Iterator[Path]:
        for unit in units:
            yield from encode_unit(unit, folder, encoder, config.data.samples_per_shard)

    def made(sources: dict[str, SourceConfig]) -> dict[str, tuple[Path, str]]:
        return {name: _store(source, config, encoder, encode_all or here) for name, source in sources.items()}

    return TokenSources(training=made(config.data.sources), heldout=made(config.evaluation.sources))


def changed_sources(
    before: Mapping[str, str], now: Mapping[str, str], sources: Mapping[str, SourceConfig]
) -> list[str]:
    """Which sources have other tokens than before, with their paths, and whether data or encoder made the difference.

    Args:
        before: fingerprint of each source's tokens, by its name, when the run began.
        now: the same now.
        sources: the run's.
    """
    lines: list[str] = []
    for name in sorted(now):
        was, became = (marks.get(name, "").partition("-") for marks in (before, now))
        path = sources[name].path
        if was[0] != became[0]:
            lines.append(f"{path} (source {name}) holds other data")
        elif was != became:
            lines.append(f"{path} (source {name}) is encoded otherwise, by other tokenizers or settings of data")
    return lines


def _digest(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


def _store(
    source: SourceConfig, config: SftConfig, encoder: ConversationEncoder, encode_all: EncodeAll
) -> tuple[Path, str]:
    """Folder and fingerprint of the token store of a source."""
    data = config.data
    conversations = resolve_conversations(source.path, data.cache_dir).absolute()
    facts = source_facts(conversations, Path(data.cache_dir) / "checksums")
    fingerprint = f"{_digest(facts)}-{_digest([VERSION, encoder.fingerprint, data.samples_per_shard])}"
    folder = Path(data.cache_dir).absolute() / "tokens" / f"{config.model.family}-{fingerprint}"
    with locked(folder):
        for damage in drop_damaged(folder, fingerprint):
            log.warning("makes a token shard again: %s", damage)
        if not (folder / MANIFEST).is_file():
            _make_store(folder, units_of(conversations, data.encoders.num_workers), source.path, encode_all)
            finish_store(folder, folder.glob("shard-*.json"), fingerprint)
    check_rejected(folder, fingerprint, max_rejected_fraction=data.max_rejected_fraction)
    return folder, fingerprint


def _make_store(folder: Path, units: Sequence[Unit], source: str, encode_all: EncodeAll) -> None:
    """Make what is missing of the shards of all units."""
    folder.mkdir(parents=True, exist_ok=True)
    log.info("encoding %s into tokens at %s", source, folder)
    for number, _ in enumerate(encode_all(units, folder), start=1):
        log.info("encoded %d shards of %s", number, source)
