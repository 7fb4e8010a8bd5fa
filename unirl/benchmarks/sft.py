"""Fine-tuning: the whole step against plain loops and Hugging Face's Trainer, the image tokenizer, the wait for data.

Arms take turns in one process on the same sequences, so that ratios hold where single timings are noisy. Run it by
`unirl bench sft`; the memory of the loss is measured in `sft_memory.py`.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from unirl.benchmarks.sft_baselines import PlainLoop, run_trainer, seconds_now, trainer_is_installed
from unirl.benchmarks.sft_data import Workload
from unirl.cluster.sft_worker import SftWorker, num_steps, open_mixture
from unirl.learner.engine import RankPlace
from unirl.learner.sft_learner import SftLearner, SftSettings
from unirl.models.image_codec import exact_float32
from unirl.models.joint_policy import JointPolicy
from unirl.models.policy import load_codec, load_interleaved

OURS = "unirl"
PACKED_LOOP, PADDED_LOOP, TRAINER = "plain loop, packed", "plain loop, padded", "Hugging Face Trainer, padded"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSpeed:
    """Of one arm, over the timed steps."""

    arm: str
    tokens_per_s: float
    """Tokens of the sequences, padding not counted."""
    ratio: float
    """Of our speed to this one: median over the rounds."""
    loss: float
    """Of the first step: equal for all arms with the restricted loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodingSpeed:
    """Pictures per second through an image tokenizer."""

    way: str
    images_per_s: float
    ratio: float
    """Of our speed to this one: median over the rounds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataWait:
    """Means over the steps of a run, the first left out."""

    steps: int
    step_s: float
    wait_s: float
    share: float
    """Of the steps' time that was spent waiting for data."""


def measure_steps(workload: Workload, *, rounds: int) -> list[StepSpeed]:
    """Tokens per second of an optimizer step on all sequences; the first step of each arm warms up.

    The Trainer takes part where `accelerate` is installed.

    Raises:
        ValueError: a family that is no causal language model over one vocabulary, or too long a sequence for a row.
    """
    config, sequences = workload.config, workload.sequences()
    clock = _Clock()
    losses: dict[str, float] = {}

    def plain(*, packed: bool) -> Callable[[], float]:
        return PlainLoop(_policy(workload), config, sequences, packed=packed).step

    loops = {PACKED_LOOP: plain(packed=True), PADDED_LOOP: plain(packed=False)}

    with _learner(workload, rounds + 1) as learner:
        loops = {OURS: lambda: learner.update(learner.prepare(sequences), 0)["learner/loss"], **loops}

        def turn() -> None:
            for name, step in loops.items():
                with clock.time(name):
                    loss = step()
                losses.setdefault(name, loss)

        if trainer_is_installed():
            trained = run_trainer(_policy(workload), config, sequences, rounds + 1, turn)
            clock.seconds[TRAINER], losses[TRAINER] = trained.seconds, trained.losses[0]
        else:
            for _ in range(rounds + 1):
                turn()
    tokens = sum(len(sequence.ids) for sequence in sequences)
    return [
        StepSpeed(arm=name, tokens_per_s=tokens / median, ratio=ratio, loss=losses[name])
        for name, median, ratio in clock.against(OURS)
    ]


def measure_encoding(workload: Workload, *, rounds: int) -> list[EncodingSpeed]:
    """Pictures per second of the tokenizer that fills the token cache, and of its bare network on ready tensors.

    Ours reads, resizes and checks every picture, and takes one a pass; the loops are given what the network is given.
    """
    config, images = workload.config, workload.images
    codec: Any = load_codec(config.model, workload.checkpoint)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network: Any = codec.module.to(device)
    with _recorded(network) as inputs:
        codec.encode(images)

    def loop(batch_size: int) -> None:
        with exact_float32(device):
            for start in range(0, len(inputs), batch_size):
                batch = inputs[start : start + batch_size]
                pixels = torch.cat([own[0][0] for own in batch])
                named = {name: torch.cat([own[1][name] for own in batch]) for name in batch[0][1]}
                network.encode(pixels, **named).image_tokens.cpu()

    ways: dict[str, Callable[[], object]] = {
        OURS: lambda: codec.encode(images),
        "bare network, one by one": lambda: loop(1),
        "bare network, 8 together": lambda: loop(8),
    }
    clock = _Clock()
    for _ in range(rounds + 1):
        for name, encode in ways.items():
            with clock.time(name):
                encode()
    return [
        EncodingSpeed(way=name, images_per_s=len(images) / median, ratio=ratio)
        for name, median, ratio in clock.against(OURS)
    ]


def measure_waiting(workload: Workload, *, steps: int) -> DataWait:
    """How long the steps of a run in this process wait for their sequences, which a thread makes ahead."""
    config = workload.config
    samples = max(1, len(open_mixture(workload.tokens.training, config.data.sources, config).all()) // 4)
    train = replace(config.train, samples_per_step=samples, num_epochs=steps, max_steps=steps + 1)
    config = replace(config, train=train, learner=replace(config.learner, num_ranks=1))
    assert num_steps(config, open_mixture(workload.tokens.training, config.data.sources, config)) == steps + 1
    worker = SftWorker(config, workload.checkpoint, workload.tokens, 0, ("127.0.0.1", 0))
    try:
        worker.update(1)
        started = time.perf_counter()
        waited = sum(worker.update(step)["sft/data_wait_s"] for step in range(2, steps + 2))
        spent = time.perf_counter() - started
    finally:
        worker.close()
    return DataWait(steps=steps, step_s=spent / steps, wait_s=waited / steps, share=waited / spent)


class _Clock:
    """Time of arms that take turns."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        started = seconds_now()
        yield
        self.seconds.setdefault(name, []).append(seconds_now() - started)

    def against(self, reference: str) -> list[tuple[str, float, float]]:
        """Of each arm its name, its median seconds, and the median ratio to the reference's; the first round aside."""
        base = np.array(self.seconds[reference][1:])
        return [
            (name, float(np.median(own[1:])), float(np.median(np.array(own[1:]) / base)))
            for name, own in self.seconds.items()
        ]


def _policy(workload: Workload) -> JointPolicy:
    policy = load_interleaved(workload.config.model, workload.checkpoint)
    if not isinstance(policy, JointPolicy):
        raise ValueError(
            f"bench sft: expected a family with one head over text and codes; got {workload.config.model.family}; set "
            "model.family to anole, emu3 or liquid"
        )
    return policy


@contextmanager
def _learner(workload: Workload, steps: int) -> Iterator[SftLearner]:
    learner = replace(workload.config.learner, num_ranks=1, schedule="constant")
    settings = SftSettings.of(replace(workload.config, learner=learner), steps)
    made = SftLearner(_policy(workload), settings, RankPlace())
    try:
        yield made
    finally:
        made.close()


@contextmanager
def _recorded(network: Any) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """The arguments of every call of the network's `encode` while this is open."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    encode = network.encode

    def recording(*arguments: Any, **named: Any) -> Any:
        calls.append((arguments, named))
        return encode(*arguments, **named)

    network.encode = recording
    try:
        yield calls
    finally:
        del network.encode
