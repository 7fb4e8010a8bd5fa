"""Measures whether answers pay for the second stream: run `python -m unirl.benchmarks.streams [checkpoint folder]`.

All variants take turns in one process, so that their ratios hold where single timings are noisy.
"""

import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import unirl.lab
from unirl.config import ImageSampling, ModelConfig, RolloutConfig, SamplingConfig
from unirl.lab.data import make_heldout
from unirl.rollout.seeds import sample_seed
from unirl.rollout.vllm_engine import VllmSampler
from unirl.types import GenerationSample, RolloutRequest, UnderstandingSample

log = logging.getLogger(__name__)

NUM_PROMPTS, NUM_SEEDS, ROUNDS = 16, 8, 5
GUIDED = SamplingConfig(image=ImageSampling(guidance_scale=1.5))
UNGUIDED = SamplingConfig(image=ImageSampling(guidance_scale=1.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way of sampling the same requests."""

    name: str
    sampler: VllmSampler
    requests: list[RolloutRequest]
    sampling: SamplingConfig
    always_all_streams: bool = False
    """Run every stream and head, as without the fast path."""


def tokens_per_cpu_second(variant: Variant) -> float:
    """Completion tokens per second of processor time in one call."""
    variant.sampler.always_all_streams = variant.always_all_streams
    started = time.process_time()
    groups = variant.sampler.sample(variant.requests, variant.sampling)
    spent = time.process_time() - started
    return sum(len(t.completion_ids) for group in groups for t in group.trajectories) / spent


def make_requests(samples: Sequence[UnderstandingSample | GenerationSample]) -> list[RolloutRequest]:
    """One request of `NUM_SEEDS` completions per sample."""
    requests = []
    for sample in samples:
        task = "understanding" if isinstance(sample, UnderstandingSample) else "generation"
        seeds = tuple(sample_seed(0, 0, sample.id, task, index) for index in range(NUM_SEEDS))
        requests.append(
            RolloutRequest(request_id=f"{sample.id}/{task}", pair_id=sample.id, task=task, sample=sample, seeds=seeds)
        )
    return requests


def main(folder: Path) -> None:
    """Log the median speed of each variant and its ratio to the first of its task."""
    answers, images = (make_requests(samples) for samples in make_heldout(NUM_PROMPTS, 0))
    one = VllmSampler(ModelConfig(), folder, RolloutConfig(sampling=UNGUIDED), "both")
    two = VllmSampler(ModelConfig(), folder, RolloutConfig(sampling=GUIDED), "both")
    shared = {"requests": answers, "sampling": GUIDED}
    drawn = {"requests": images, "sampler": two}
    variants = [
        Variant(name="answers, one-stream engine", sampler=one, **shared),
        Variant(name="answers, two-stream engine", sampler=two, **shared),
        Variant(name="answers, two-stream engine without fast path", sampler=two, always_all_streams=True, **shared),
        Variant(name="images, one-stream engine", sampler=one, requests=images, sampling=UNGUIDED),
        Variant(name="images, two-stream engine, guidance 1", sampling=UNGUIDED, **drawn),
        Variant(name="images, two-stream engine, guidance 1.5", sampling=GUIDED, **drawn),
    ]
    rounds = [[tokens_per_cpu_second(variant) for variant in variants] for _ in range(ROUNDS + 1)][1:]
    base = 0.0
    for variant, speeds in zip(variants, zip(*rounds, strict=True), strict=True):
        median = sorted(speeds)[ROUNDS // 2]
        base = median if variant.sampler is one else base
        log.info("%-46s %6.0f tokens per CPU second, ratio %.2f", variant.name, median, median / base)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    shipped = Path(unirl.lab.__file__).parent / "checkpoints" / "janus"
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else shipped)
