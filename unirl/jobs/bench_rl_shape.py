"""One RL step of a Janus-Pro of any size with random weights: seconds and memory of each phase.

Sampler, rewards, learner and publication are those of a run, in this process. Run it by `unirl bench rl-shape`.
"""

import resource
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from unirl.benchmarks.hf_loop import draw_pictures
from unirl.benchmarks.janus_folder import JANUS_1B, JANUS_7B, JanusSize, word, write_janus
from unirl.benchmarks.report import GIB, Report, Row, Table, product_speed, seconds_of
from unirl.benchmarks.reward import write_random_clip
from unirl.benchmarks.sft_shape import DENSE_TFLOPS
from unirl.config import (
    ImageSampling,
    LearnerConfig,
    ModelConfig,
    RewardConfig,
    RewardsConfig,
    RlConfig,
    RolloutConfig,
    SamplingConfig,
    TextSampling,
)
from unirl.config_rules import OptionError
from unirl.data.pair_source import StepResult
from unirl.jobs.local import LocalPublication, LocalRewards, LocalRollouts
from unirl.jobs.parts import Parts
from unirl.jobs.step import rl_step
from unirl.learner.engine import RankPlace
from unirl.learner.learner import Learner, LearnerSettings, scoring_of
from unirl.models.janus_pro import JanusPro
from unirl.monitoring.step_clock import StepClock
from unirl.monitoring.step_data import StepData
from unirl.types import GenerationSample, LearnerBatch, PairRecord, UnderstandingSample

SIZES: dict[str, JanusSize] = {
    "tiny": JanusSize(hidden=128, layers=2, inner=256, codes_per_side=4, vision_hidden=64, num_codes=256),
    "1b": JANUS_1B,
    "7b": JANUS_7B,
}
CLIP = "ViT-B-32"
WORDS = 24
STEP = ("pairs", "rollout", "batch", "update", "publish")


@dataclass(frozen=True, slots=True, kw_only=True)
class RlShape:
    """What `unirl bench rl-shape` runs."""

    size: str = "1b"
    """A name of `SIZES`."""
    checkpoint: Path | None = None
    """Folder of such a checkpoint, written there where it is missing; None makes one and removes it."""
    num_pairs: int = 1
    num_completions: int = 2
    """Answers and pictures of a prompt, K."""
    guidance_scale: float = 5.0
    trained_layers: int | None = None
    """Layers of the trunk that learn, spread evenly from the first; null trains all that a run trains. The gradient
    passes through every layer in any case: what is left out is its product with the frozen layers' inputs, and the
    optimizer's 14 bytes a weight."""
    answer_tokens: int = 24
    baseline: bool = False
    """Also draw the pictures by the Hugging Face loop."""
    clip: str = CLIP
    """Architecture of the random HPSv2."""

    def __post_init__(self) -> None:
        """Refuse an unknown size.

        Raises:
            OptionError: names the known ones.
        """
        if self.size not in SIZES:
            raise OptionError(f"bench rl-shape: expected --shape {', '.join(SIZES)}; got {self.size}; correct it")


def measure_rl_shape(shape: RlShape) -> Report:
    """Make the checkpoint, load it twice as a run does, publish, and take one step.

    Raises:
        RuntimeError: the machine has too little memory.
    """
    meter = _Meter()
    with tempfile.TemporaryDirectory(prefix="unirl-bench-") as temporary, ExitStack() as stack:
        checkpoint = shape.checkpoint or Path(temporary) / "janus"
        with meter.clock.phase("write the random checkpoint"):
            if not (checkpoint / "config.json").is_file():
                write_janus(checkpoint, SIZES[shape.size], "bfloat16")
        config = _config(shape, write_random_clip(Path(temporary) / "clip.safetensors", shape.clip))
        with meter.clock.phase("load the learner"):
            learner = _ShapeLearner(config, checkpoint, shape.trained_layers)
        with meter.clock.phase("load the sampler"):
            rollouts = LocalRollouts(config, checkpoint)
        rewards = LocalRewards(config.rewards)
        stack.callback(rewards.close)
        parts = Parts(_MadePairs(shape.num_pairs), rollouts, rewards, learner)
        with meter.clock.phase("publish, the first time"):
            parts.rollouts.load_weights(parts.learner.publish_weights())
        data = rl_step(1, parts, config, meter.clock)
    loop = _loop_seconds(learner.policy, shape) if shape.baseline else None
    return _report(shape, meter.rows(), learner, data, loop)


class _Meter:
    """A step's clock that notes the memory held whenever a phase begins or ends."""

    def __init__(self) -> None:
        self._marks: list[tuple[str, float, dict[str, float]]] = []
        self.clock = StepClock(self._mark)

    def _mark(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self._marks.append((self.clock.current, now, _memory()))
        return now

    def rows(self) -> list[Row]:
        """Seconds of each phase, and the memory at its end."""
        begins, ends = self._marks[::2], self._marks[1::2]
        return [
            {"phase": name, "seconds": now - begin, **memory}
            for (_, begin, _), (name, now, memory) in zip(begins, ends, strict=True)
        ]


def _memory() -> dict[str, float]:
    """GiB of main memory now and at the most, and the GPU's at the most."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    held = {
        "GiB held": pages * resource.getpagesize() / GIB,
        "GiB at most so far": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
    }
    return held | ({"GPU GiB at most": torch.cuda.max_memory_allocated() / GIB} if torch.cuda.is_available() else {})


@dataclass(frozen=True, slots=True)
class _MadePairs:
    """Meets `Pairs` with made-up aligned pairs."""

    count: int

    def num_pairs(self) -> int:
        """As many as a step takes."""
        return self.count

    def batch(self, step: int) -> tuple[PairRecord, ...]:
        """The same pairs for every step."""
        return tuple(_pair(index) for index in range(self.count))

    lease = batch

    def record(self, step: int, results: Sequence[StepResult]) -> None:
        """Nothing is kept."""

    def state(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing."""


def _pair(index: int) -> PairRecord:
    image = np.random.default_rng(index).integers(0, 256, (384, 384, 3), dtype=np.uint8)
    text = " ".join(word(place) for place in range(index, index + WORDS))
    return PairRecord(
        pair_id=str(index),
        kind="aligned",
        similarity=1.0,
        understanding=UnderstandingSample(
            id=f"u{index}", image=image, question=text, answer=word(1), answer_type="text"
        ),
        generation=GenerationSample(id=f"g{index}", prompt=text),
    )


class _ShapeLearner:
    """Meets `Learners` with a learner of which only some layers learn."""

    def __init__(self, config: RlConfig, checkpoint: Path, trained_layers: int | None) -> None:
        self.policy = JanusPro.load(config.model, checkpoint)
        if trained_layers is not None:
            layers: Any = self.policy.module.model.language_model.layers
            self.policy.module.requires_grad_(False)
            for place in sorted({index * len(layers) // trained_layers for index in range(trained_layers)}):
                layers[place].requires_grad_(True)
        self.num_trained = sum(p.numel() for p in self.policy.module.parameters() if p.requires_grad)
        settings = LearnerSettings(
            learner=config.learner,
            algorithm=config.algorithm,
            sampling=config.rollout.sampling,
            num_steps=config.train.num_steps,
        )
        self._learner = Learner(self.policy, settings, RankPlace())
        self.save, self.restore, self.export = self._learner.save, self._learner.restore, self._learner.export
        self._scoring = scoring_of(config.rollout.sampling, config.algorithm)
        self.num_tokens = 0
        """Through the trunk in the last update, both streams counted."""

    def update(self, batch: LearnerBatch, step: int) -> dict[str, float]:
        """One optimizer update."""
        self.num_tokens = sum(self.policy.tokens_per_row(row, self._scoring) for row in batch.rows)
        return self._learner.update(batch, step)

    def publish_weights(self) -> LocalPublication:
        """The weights themselves, to be read at once: a copy of them might not fit."""
        tensors = [named for bucket in self._learner.weight_buckets(copy=False) for named in bucket]
        return LocalPublication(self._learner.manifest(), tensors)


def _config(shape: RlShape, clip: Path) -> RlConfig:
    size = SIZES[shape.size]
    sampling = SamplingConfig(
        text=TextSampling(max_tokens=shape.answer_tokens), image=ImageSampling(guidance_scale=shape.guidance_scale)
    )
    length = size.num_image_tokens + 2 * WORDS + shape.answer_tokens
    sequences = shape.num_pairs * shape.num_completions
    blocks = (-(-length // 32) + 1) * (sequences + 1)
    cache = 2 * 2 * 2 * size.layers * size.hidden * 32 * blocks / GIB
    gpus = 1.0 if torch.cuda.is_available() else 0.0
    default = RlConfig()
    return replace(
        default,
        model=ModelConfig(dtype="bfloat16"),
        rollout=RolloutConfig(
            pairs_per_step=shape.num_pairs,
            num_understanding=shape.num_completions,
            num_generation=shape.num_completions,
            sampling=sampling,
            max_model_len=length,
            max_num_seqs=sequences,
            kv_cache_memory_gib=cache,
        ),
        rewards=RewardsConfig(
            understanding={"accuracy": RewardConfig()},
            generation={
                "hpsv2": RewardConfig(timeout_s=600, options={"checkpoint": str(clip), "model_name": shape.clip})
            },
        ),
        # Random answers are all wrong, which states no preference; the penalty keeps their rows in the update.
        algorithm=replace(default.algorithm, kl_beta=0.01),
        learner=LearnerConfig(
            num_gpus=gpus, activation_checkpointing=True, zero_stage=2, max_tokens_per_micro_batch=2 * length
        ),
    )


@torch.inference_mode()
def _loop_seconds(policy: JanusPro, shape: RlShape) -> float:
    nn.Module.to(policy.module, "cuda" if torch.cuda.is_available() else "cpu")
    policy.module.gradient_checkpointing_disable()  # which turns the cache off
    policy.module.eval()
    prompts = [policy.prompts.encode_generation(_pair(index).generation) for index in range(shape.num_pairs)]
    ids = torch.from_numpy(np.stack(prompts)).long().repeat_interleave(shape.num_completions, 0).to(policy.device)
    scale, num_codes = shape.guidance_scale, policy.num_image_tokens
    return seconds_of(lambda: draw_pictures(policy, ids, guidance_scale=scale, num_codes=num_codes))


def _report(shape: RlShape, rows: list[Row], learner: _ShapeLearner, data: StepData, loop_s: float | None) -> Report:
    seconds = {str(row["phase"]): float(row["seconds"] or 0) for row in rows}
    drawn = [t for group in data.groups for t in group.scored.group.trajectories]
    num_images = sum(t.modality == "image" for t in drawn)
    num_tokens = sum(len(t.completion_ids) for t in drawn)
    trunk = sum(p.numel() for p in learner.policy.module.model.language_model.layers.parameters())
    flops = learner.num_tokens * (4.0 * trunk + 2.0 * min(trunk, learner.num_trained))
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    sheet = next((1e12 * peak for part, peak in DENSE_TFLOPS.items() if part in name), None)
    peak = sheet or product_speed(torch.bfloat16)
    figures: list[Row] = [
        {"figure": "weights, millions", "value": sum(p.numel() for p in learner.policy.module.parameters()) / 1e6},
        {"figure": "of them trained, millions", "value": learner.num_trained / 1e6},
        {"figure": "pictures/s of the rollout", "value": num_images / seconds["rollout"]},
        {"figure": "tokens/s of the rollout", "value": num_tokens / seconds["rollout"]},
        {"figure": "tokens/s of the update, both streams", "value": learner.num_tokens / seconds["update"]},
        {"figure": "model TFLOP of the update, recomputation not counted", "value": flops / 1e12},
        {"figure": f"model-FLOP utilisation, of {peak / 1e12:.3g} TFLOP/s", "value": flops / seconds["update"] / peak},
        {"figure": "seconds of the step", "value": sum(seconds[phase] for phase in STEP)},
        {"figure": "gradient norm", "value": data.learner["learner/grad_norm"]},
        {"figure": "largest gap of log-probabilities, nats", "value": data.learner["policy/logprob_gap_max"]},
    ]
    if loop_s is not None:
        figures.append({"figure": "pictures/s of the Hugging Face loop", "value": num_images / loop_s})
    part = "all that a run trains" if shape.trained_layers is None else f"{shape.trained_layers} of the trunk's layers"
    limits = [
        f"Random weights of the published shape in bfloat16, {shape.num_pairs} pair(s), K = {shape.num_completions}, "
        f"{learner.policy.num_image_tokens} codes, guidance {shape.guidance_scale:g}; trained: {part}. The reward of "
        f"pictures is HPSv2 with a random {shape.clip}; answers are judged and all wrong, so a KL penalty of 0.01 "
        "keeps their rows in the update.",
        "The speed that utilisation is of: a known GPU's data sheet, else one large product in bfloat16 measured here.",
    ]
    title = f"{shape.size}, one step"
    tables = [Table(title=title, rows=rows), Table(title="figures", rows=figures)]
    layers = "" if shape.trained_layers is None else f" --trained-layers {shape.trained_layers}"
    command = f"unirl bench rl-shape --shape {shape.size}{layers}"
    return Report(name=f"rl-shape-{shape.size}", command=command, tables=tables, limits=limits)
