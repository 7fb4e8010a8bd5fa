"""Weights from the learner's module through Ray's object store into an engine, part by part, against one memory copy.

Needs a Ray that runs already. Run it by `unirl bench sync`.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from unirl.benchmarks.janus_folder import JanusSize, write_janus
from unirl.benchmarks.report import Goal, Report, Row, Table, seconds_of
from unirl.cluster.weight_sync import Publication, put_buckets
from unirl.config import ImageSampling, ModelConfig, RolloutConfig, SamplingConfig
from unirl.learner.weights import WeightExport
from unirl.models.janus_pro import JanusPro
from unirl.models.named_arrays import checksum
from unirl.rollout.completions import verified_weights
from unirl.rollout.vllm_engine import VllmSampler

WANTED = 0.5
LEAST_MB = 100
WHOLE = "publish and load, in all"


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncBench:
    """What `unirl bench sync` measures."""

    megabytes: int = 400
    """Of a random model's weights, about; 10^6 bytes each."""
    dtype: str = "float32"
    rounds: int = 5

    def __post_init__(self) -> None:
        """Refuse what a Janus cannot be.

        Raises:
            ValueError: fewer megabytes than its parts beside the trunk have.
        """
        if self.megabytes < LEAST_MB:
            raise ValueError(f"bench sync: expected --megabytes of at least {LEAST_MB}; got {self.megabytes}")


def measure_sync(bench: SyncBench) -> Report:
    """Seconds and MB/s of each part, medians over the rounds; the first round warms up."""
    config = ModelConfig(dtype=bench.dtype)  # pyright: ignore[reportArgumentType]
    with tempfile.TemporaryDirectory(prefix="unirl-bench-") as folder:
        path = write_janus(Path(folder) / "janus", _size(bench), bench.dtype)
        policy = JanusPro.load(config, path)
        sampling = SamplingConfig(image=ImageSampling())
        engine = VllmSampler(config, path, RolloutConfig(sampling=sampling, max_model_len=64, max_num_seqs=1), "text")
    tensors = list(policy.module.state_dict().values())
    copies = [torch.empty_like(tensor) for tensor in tensors]
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    rounds = [_round(policy, engine, list(zip(copies, tensors, strict=True)), version) for version in range(
        bench.rounds + 1)]  # fmt: skip
    seconds = {part: float(np.median([own[part] for own in rounds[1:]])) for part in rounds[0]}
    rows: list[Row] = [
        {"part": part, "seconds": spent, "MB/s": num_bytes / 1e6 / spent, "share of the whole": spent / seconds[WHOLE]}
        for part, spent in seconds.items()
    ]
    ratio = float(np.median([own["one memory copy"] / own[WHOLE] for own in rounds[1:]]))
    least = 2 * seconds["one memory copy"] + seconds["checksum"] + seconds["checksum, verified"]
    limits = [
        "No path through a store can pass 0.5 of a memory copy on one core, since the bytes are copied into the store "
        "and out of it; with a checksum on both sides, which reads them twice more, not "
        f"{seconds['one memory copy'] / least:.2f} at the speeds above.",
        "The two sides run in one process here, one after the other, as in a synchronous step. Across machines the "
        "network stands between the two copies.",
    ]
    goal = Goal(text="weight sync to one memory copy", wanted=WANTED, got=ratio)
    title = f"{num_bytes / 1e6:.0f} MB in {len(tensors)} tensors, {bench.dtype}"
    tables = [Table(title=title, rows=rows)]
    return Report(name="sync", command="unirl bench sync", tables=tables, goals=[goal], limits=limits)


def _size(bench: SyncBench) -> JanusSize:
    """About the bytes asked for: as many layers as they take."""
    one = JanusSize(hidden=1024, inner=2816, layers=1)
    layer = replace(one, layers=2).trunk_weights - one.trunk_weights
    rest = 2 * one.vocabulary * one.hidden + one.num_codes * one.hidden + 12_000_000
    width = getattr(torch, bench.dtype).itemsize
    return replace(one, layers=max(1, round((bench.megabytes * 1e6 / width - rest) / layer)))


def _round(
    policy: JanusPro, engine: VllmSampler, pairs: list[tuple[torch.Tensor, torch.Tensor]], version: int
) -> dict[str, float]:
    """Seconds of every part of one publication."""
    seconds: dict[str, float] = {}

    def timed(part: str, run: Callable[[], object]) -> None:
        seconds[part] = seconds_of(run)

    def copy() -> None:
        for target, source in pairs:
            target.copy_(source)

    published: list[Publication] = []

    def publish() -> None:
        export = WeightExport(policy.module, policy_version=version, holds_arrays=True)
        references = put_buckets(export.buckets(copy=False))
        published.append(Publication(export.manifest(), references))

    timed("one memory copy", copy)
    timed("publish: gather, checksum, put", publish)
    publication = published[0]
    timed("load: get, verify, copy into the engine", lambda: engine.load_weights(
        publication.manifest, publication.tensors()))  # fmt: skip
    arrays = list(publication.tensors())
    timed("checksum", lambda: checksum(arrays))
    timed("get", lambda: list(publication.tensors()))
    timed("verify: names, checksum, finite", lambda: verified_weights(publication.manifest, arrays, policy.shapes))
    timed("checksum, verified", lambda: checksum(arrays))
    whole = seconds["publish: gather, checksum, put"] + seconds["load: get, verify, copy into the engine"]
    return seconds | {
        "gather and put alone": seconds["publish: gather, checksum, put"] - seconds["checksum"],
        "copy into the engine alone": seconds["load: get, verify, copy into the engine"]
        - seconds["get"]
        - seconds["verify: names, checksum, finite"],
        WHOLE: whole,
    }
