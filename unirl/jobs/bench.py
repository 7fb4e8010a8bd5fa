"""Benchmarks from the command line: each prints ratios against a named baseline in the same run."""

import json
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path

from unirl.benchmarks.anole_folder import AnoleSize
from unirl.benchmarks.diffusion import Arm, measure_sampling, measure_updates
from unirl.benchmarks.diffusion_shape import Shape, measure_shape
from unirl.benchmarks.sft import DataWait, EncodingSpeed, StepSpeed, measure_encoding, measure_steps, measure_waiting
from unirl.benchmarks.sft_data import make_workload
from unirl.benchmarks.sft_memory import HeadShape, LossMemory, measure_memory
from unirl.benchmarks.sft_shape import SftShape, measure_sft_shape, memory_plan
from unirl.config import ModelConfig, RlConfig, SftConfig
from unirl.evaluation.evaluate import EvaluationResult
from unirl.jobs.assets import resolve_checkpoint, resolve_heldout, resolve_pairs
from unirl.jobs.evaluate import evaluate_policy
from unirl.jobs.parts import open_parts
from unirl.jobs.prompt_check import check_prompts
from unirl.jobs.step import rl_step
from unirl.monitoring.step_clock import StepClock
from unirl.types import TASKS, Task

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """What an arm reached in a wall time."""

    arm: str
    steps: int
    seconds: float
    understanding: float
    """Held-out mean reward, sampled as in training."""
    generation: float


def diffusion(config: RlConfig, *, budget_s: float, as_json: bool) -> int:
    """Cost of an update by arm, reward at equal wall time, and the sampler's speed.

    Args:
        config: of a masked-diffusion family; pictures may be larger for the costs than the checkpoint learned to draw.
        budget_s: wall time of each learning arm; 0 leaves them out.
        as_json: machine-readable result on stdout.
    """
    checkpoint = resolve_checkpoint(config.model.path)
    heldout = resolve_heldout(config.evaluation.data, config.evaluation.num_prompts)
    check_prompts([*heldout[0], *heldout[1]], config, checkpoint)
    steps = config.rollout.sampling.image.diffusion_steps
    fewer = sorted({max(1, steps // 2), max(1, steps // 4)}, reverse=True)
    arms = [
        Arm(name=f"all {steps} steps"),
        *(Arm(name=f"{num} of {steps} steps", num_steps=num) for num in fewer),
        Arm(name="shrink 4 (biased)", shrink=4),
    ]
    log.info("cost of an update")
    updates = measure_updates(config, checkpoint, arms)
    log.info("speed of the sampler")
    speeds = measure_sampling(config, checkpoint)
    learned = learn_arms(config, checkpoint, arms, budget_s) if budget_s else []
    if as_json:
        results = {"updates": updates, "sampling": speeds, "learning": learned}
        sys.stdout.write(json.dumps({key: [asdict(row) for row in rows] for key, rows in results.items()}, indent=2))
        sys.stdout.write("\n")
        return 0
    lines = [f"{'update, one picture':<44}{'forward-equivalents':>20}{'seconds':>10}{'ratio':>8}"]
    lines += [f"{u.arm:<44}{u.forward_equivalents:>20.1f}{u.seconds:>10.4f}{u.ratio:>8.2f}" for u in updates]
    lines += ["", f"{'sampling':<44}{'pictures/s':>20}{'':>10}{'ratio':>8}"]
    lines += [f"{s.name:<44}{s.images_per_s:>20.2f}{'':>10}{s.ratio:>8.2f}" for s in speeds]
    if learned:
        lines += ["", f"{'held-out reward at equal wall time':<44}{'steps':>10}{'seconds':>10}{'und':>10}{'gen':>8}"]
        lines += [
            f"{row.arm:<44}{row.steps:>10}{row.seconds:>10.0f}{row.understanding:>10.3f}{row.generation:>8.3f}"
            for row in learned
        ]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def shape(settings: Shape, *, as_json: bool) -> int:
    """Time and memory of a network of random weights: one picture sampled, one update."""
    rows = measure_shape(settings)
    if as_json:
        sys.stdout.write(
            json.dumps({"shape": asdict(settings), "spent": [asdict(row) for row in rows]}, indent=2) + "\n"
        )
        return 0
    lines = [f"{'':<40}{'seconds':>10}{'peak GiB on the GPU':>22}"]
    lines += [f"{row.part:<40}{row.seconds:>10.2f}{row.peak_gib:>22.1f}" for row in rows]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SftSize:
    """How much `sft` measures."""

    model: AnoleSize = field(default_factory=AnoleSize)
    """Of the random checkpoint that stands in where the settings name none."""
    samples: int = 32
    """Conversations of a step."""
    rounds: int = 10
    """Timed steps of each arm."""
    positions: int = 512
    """Targets at which the memory of the loss is taken, at Emu3's vocabulary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SftFigures:
    """What `sft` prints."""

    steps: list[StepSpeed]
    memory: list[LossMemory]
    encoding: list[EncodingSpeed]
    waiting: DataWait


def sft(config: SftConfig, size: SftSize, *, as_json: bool) -> int:
    """Speed of a fine-tuning step by arm, memory of the loss, speed of the image tokenizer, the wait for data."""
    named = config.model.path != ModelConfig().path
    checkpoint = resolve_checkpoint(config.model.path) if named else None
    with tempfile.TemporaryDirectory(prefix="unirl-bench-") as folder:
        log.info("making conversations%s", "" if named else " and a random Anole")
        made = make_workload(Path(folder), config, checkpoint, size=size.model, num_samples=size.samples)
        log.info("speed of a step")
        steps = measure_steps(made, rounds=size.rounds)
        log.info("speed of the image tokenizer")
        encoding = measure_encoding(made, rounds=max(1, size.rounds // 2))
        log.info("wait for data")
        waiting = measure_waiting(made, steps=2 * size.rounds)
    log.info("memory of the loss")
    memory = measure_memory(HeadShape(positions=size.positions))
    found = SftFigures(steps=steps, memory=memory, encoding=encoding, waiting=waiting)
    sys.stdout.write((json.dumps(asdict(found), indent=2) if as_json else _sft_table(found)) + "\n")
    return 0


def _sft_table(found: SftFigures) -> str:
    wait = found.waiting
    lines = [f"{'a step':<40}{'tokens/s':>12}{'ours to it':>12}{'first loss':>12}"]
    lines += [f"{s.arm:<40}{s.tokens_per_s:>12.0f}{s.ratio:>12.3f}{s.loss:>12.5f}" for s in found.steps]
    lines += ["", f"{'memory of the loss':<40}{'peak MiB':>12}{'of full':>12}{'KiB/target':>12}"]
    lines += [
        f"{m.form:<40}{m.peak_mib:>12.0f}{m.peak_mib / found.memory[0].peak_mib:>12.2f}"
        f"{m.bytes_per_position / 1024:>12.0f}"
        for m in found.memory
    ]
    lines += ["", f"{'image tokenizer':<40}{'pictures/s':>12}{'ours to it':>12}"]
    lines += [f"{e.way:<40}{e.images_per_s:>12.1f}{e.ratio:>12.3f}" for e in found.encoding]
    lines += ["", f"waiting for data: {wait.share:.3%} of {wait.steps} steps of {wait.step_s:.3f} s"]
    return "\n".join(lines)


def sft_shape(settings: SftShape, *, as_json: bool) -> int:
    """Time, FLOP utilisation and memory of a fine-tuning step of a network of random weights."""
    speed, plan = measure_sft_shape(settings), memory_plan(settings)
    if as_json:
        result = {"shape": asdict(settings), "speed": asdict(speed), "plan_gib": plan}
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
        return 0

    def shown(value: float | None, form: str) -> str:
        return "unknown" if value is None else format(value, form)

    rows = {
        "device": speed.device,
        "weights": f"{speed.weights:,}",
        "tokens/s": f"{speed.tokens_per_s:.1f}",
        "seconds of a step": f"{speed.seconds:.3f}, of which the optimizer {speed.optimizer_s:.3f}",
        "seconds of a layer": f"{speed.layer_s:.4f}",
        "model FLOPs of a step": f"{speed.model_flops:.3e}",
        "model-FLOP utilisation": f"{shown(speed.mfu, '.1%')} of {shown(speed.peak_tflops, '.0f')} TFLOPS",
        "peak GiB on the GPU": shown(speed.peak_gib, ".1f"),
    }
    if speed.extrapolated_s is not None:
        rows["all 32 layers, EXTRAPOLATED"] = f"{speed.extrapolated_s:.3f} seconds a step; not measured"
    lines = [f"{name:<32}{value}" for name, value in rows.items()]
    lines += ["", "GiB of weights, gradients and AdamW's moments, activations aside:"]
    lines += [f"{gib:>10.1f}  {recipe}" for recipe, gib in plan.items()]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def learn_arms(config: RlConfig, checkpoint: Path, arms: Sequence[Arm], budget_s: float) -> list[Learned]:
    """Train each arm from the same weights for the same wall time, in this process, and measure it held out."""
    heldout = resolve_heldout(config.evaluation.data, config.evaluation.num_prompts)
    pairs = resolve_pairs(config.data.pairs, config.data.cache_dir)
    rows: list[Learned] = []
    for arm in [Arm(name="before"), *arms]:
        learner = replace(config.learner, num_ranks=1)
        own = replace(config, algorithm=arm.settings(config.algorithm), learner=learner)
        limit = 0.0 if arm.name == "before" else budget_s
        with open_parts(own, checkpoint, pairs, local=True) as parts:
            clock, done, started = StepClock(), 0, time.perf_counter()
            parts.rollouts.load_weights(parts.learner.publish_weights())
            for step in count(1):
                if time.perf_counter() - started >= limit:
                    break
                rl_step(step, parts, own, clock)
                done = step
            seconds = time.perf_counter() - started
            result = evaluate_policy(heldout, parts.rollouts, parts.rewards, own, lambda _: "")
        rewards = [_mean_reward(result, task) for task in TASKS]
        rows.append(Learned(arm=arm.name, steps=done, seconds=seconds, understanding=rewards[0], generation=rewards[1]))
        log.info("%s: %d steps in %.0f s, understanding %.3f, generation %.3f", *asdict(rows[-1]).values())
    return rows


def _mean_reward(result: EvaluationResult, task: Task) -> float:
    rewards = [item.reward for item in result.items if item.task == task and item.mode == "sampled"]
    judged = [reward for reward in rewards if reward is not None]
    return sum(judged) / len(judged)
