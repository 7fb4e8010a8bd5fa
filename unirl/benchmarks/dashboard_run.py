"""A long run that nobody trained: every file that the dashboard reads, of any size, written as a run writes them."""

import os
import random
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unirl.config import RlConfig, RolloutConfig, TrainConfig
from unirl.config_loading import to_yaml
from unirl.monitoring.durable_files import encode_line
from unirl.monitoring.images import encode_webp
from unirl.types import TASKS

STEP_S = 4.0
HEARTBEAT_S = 5.0
NUM_ANSWERS = 8
NUM_DISTINCT = 256
"""Pictures; files of the same one are links to one place on the disk."""
ACTORS = {
    "driver": "driver",
    "learner-0": "learner",
    "rollout-text-0": "rollout.text",
    "rollout-image-0": "rollout.image",
    "reward-accuracy-0": "reward.accuracy",
    "reward-lab_verifier-0": "reward.lab_verifier",
}
METRICS = (
    *(f"reward/{t}{end}" for t in TASKS for end in ("", "/aligned", "/retrieved", "/group_std")),
    *(f"reward/{t}/zero_variance_fraction" for t in TASKS),
    *(f"learner/{name}" for name in ("loss", "grad_norm", "lr", "grad_cosine")),
    *(f"policy/{name}" for name in ("kl", "clip_fraction", "ratio_mean", "ratio_max", "ratio_min")),
    *(f"policy/{name}" for name in ("entropy/text", "entropy/image", "guidance_gap")),
    *(f"pairs/{name}" for name in ("similarity_mean", "weight_mean")),
    *(f"rollout/{name}" for name in ("policy_version", "tokens_per_s", "images_per_s")),
    *(f"time/{name}_s" for name in ("step", "rollout", "update")),
)  # fmt: skip
"""Thirty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LongRun:
    """How long, and how much of it is shown."""

    num_steps: int = 20_000
    num_pairs: int = 10_000
    """Shown ones, over all steps."""
    pairs_per_step: int = 16
    seed: int = 0


def write_long_run(folder: Path, size: LongRun, ended: float) -> Path:
    """Write the run directory.

    Args:
        folder: a new one.
        size: of the run.
        ended: Unix time of its last step.
    """
    for name in ("images", "evaluations", "actors"):
        (folder / name).mkdir(parents=True)
    config = RlConfig(
        train=TrainConfig(num_steps=2 * size.num_steps, name="long"),
        rollout=RolloutConfig(pairs_per_step=size.pairs_per_step),
    )
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    run = {"v": 1, "id": folder.name, "attempt": 0, "status": "running", "host": f"not-{socket.gethostname()}"}
    (folder / "run.json").write_bytes(encode_line(run))
    began = ended - STEP_S * size.num_steps
    _write(folder / "metrics.jsonl", (metrics_line(step, began + STEP_S * step) for step in _steps(size)))
    _write(folder / "used_pairs.jsonl", (_used(step, size) for step in _steps(size)))
    _write(folder / "events.jsonl", _events(size, began))
    for actor, role in ACTORS.items():
        _write(folder / f"actors/{actor}.jsonl", _beats(actor, role, began, ended))
    for step in range(0, size.num_steps + 1, max(1, size.num_steps // 4)):
        (folder / f"evaluations/step_{step:06d}.json").write_bytes(encode_line(_evaluation(step)))
    _write(folder / "pairs.jsonl", _shown(folder / "images", size))
    return folder


def metrics_line(step: int, time: float) -> dict[str, Any]:
    """One step's line of metrics.jsonl."""
    rng = random.Random(step)
    values = {name: rng.gauss(0.5, 0.1) for name in METRICS}
    values |= {"time/step_s": STEP_S, "rollout/policy_version": step - 1}
    return {"v": 1, "step": step, "time": time, "attempt": 0, **values}


def _steps(size: LongRun) -> range:
    return range(1, size.num_steps + 1)


def _write(path: Path, lines: Iterator[dict[str, Any]]) -> None:
    with path.open("wb") as file:
        for line in lines:
            file.write(encode_line(line))


def _pair(number: int) -> dict[str, Any]:
    rng = random.Random(number)
    kind = "aligned" if rng.random() < 0.5 else "retrieved"
    similarity = 1.0 if kind == "aligned" else rng.uniform(0.6, 0.98)
    return {"pair_id": f"pair-{number:06d}", "kind": kind, "similarity": similarity, "weight": similarity**0.5}


def _pairs_of(step: int, size: LongRun) -> Iterator[dict[str, Any]]:
    """The step's pairs: the set in order, epoch after epoch."""
    first = (step - 1) * size.pairs_per_step
    return (_pair((first + place) % size.num_pairs) for place in range(size.pairs_per_step))


def _used(step: int, size: LongRun) -> dict[str, Any]:
    rng = random.Random(step)
    means = ({"understanding": rng.randint(0, 8) / 8, "generation": rng.random()} for _ in range(size.pairs_per_step))
    return {"v": 1, "step": step, "pairs": [p | m for p, m in zip(_pairs_of(step, size), means, strict=True)]}


def _shown(images: Path, size: LongRun) -> Iterator[dict[str, Any]]:
    """Lines of pairs.jsonl; the pictures of each are written before it."""
    rng = np.random.default_rng(size.seed)
    distinct = [encode_webp(rng.integers(0, 256, (32, 32, 3), np.uint8)) for _ in range(NUM_DISTINCT)]
    for number, data in enumerate(distinct):
        (images / f"distinct_{number}.webp").write_bytes(data)
    a_step = max(1, min(size.pairs_per_step, 5))
    every = max(1, size.num_steps * a_step // size.num_pairs)
    for number in range(size.num_pairs):
        step = min(size.num_steps, 1 + number // a_step * every)
        pair = list(_pairs_of(step, size))[number % a_step]
        prefix = f"{step:06d}_p{number % a_step:05d}"
        names = [f"{prefix}_u.webp", *(f"{prefix}_g{index}.webp" for index in range(NUM_ANSWERS))]
        for index, name in enumerate(names):
            os.link(images / f"distinct_{(number + index) % NUM_DISTINCT}.webp", images / name)
        yield {"v": 1, "step": step, **pair, **_sides(number, names)}


def _sides(number: int, names: list[str]) -> dict[str, Any]:
    rng = random.Random(number)
    answers = [_answer(rng.choice("ABCD"), rng) for _ in range(NUM_ANSWERS)]
    drawings = [_drawing(name, rng) for name in names[1:]]
    question = {"question": f"what shape is number {number} ?", "choices": ["square", "cross", "circle", "triangle"]}
    return {
        "understanding": {"id": f"u-{number}", "image": names[0], **question, "gold": "A", "samples": answers},
        "generation": {"id": f"g-{number}", "prompt": f"a photo of {number} red circles", "samples": drawings},
    }


def _answer(letter: str, rng: random.Random) -> dict[str, Any]:
    reward = float(letter == "A")
    text = f"<think> a square : square {letter} </think> <answer> {letter} </answer> <eos>"
    parts = {"accuracy": reward, "accuracy/correct": reward, "accuracy/formatted": 1.0, "accuracy/truncated": 0.0}
    return {"text": text, "image": None, "reward": reward, "advantage": rng.gauss(0, 1), "parts": parts}


def _drawing(name: str, rng: random.Random) -> dict[str, Any]:
    reward = rng.random()
    parts = {"lab_verifier": reward, "lab_verifier/exact": 0.0, "lab_verifier/partial": reward}
    return {"text": None, "image": name, "reward": reward, "advantage": rng.gauss(0, 1), "parts": parts}


def _events(size: LongRun, began: float) -> Iterator[dict[str, Any]]:
    yield {"v": 1, "time": began, "attempt": 0, "kind": "start", "message": "the run starts"}
    for step in range(20, size.num_steps + 1, 20):
        fields = {"time": began + STEP_S * step, "attempt": 0, "step": step}
        yield {"v": 1, **fields, "kind": "checkpoint", "message": f"saved after step {step}"}
        if step % 1000 == 0:
            fields |= {"sentinel": "zero_variance", "severity": "warn", "remedy": "look at the pairs"}
            yield {"v": 1, **fields, "kind": "alert", "message": "no group of this step carries a signal"}


def _beats(actor: str, role: str, began: float, ended: float) -> Iterator[dict[str, Any]]:
    states = ("idle", "sampling", "sampling", "decoding")
    for number in range(int((ended - began) / HEARTBEAT_S) + 1):
        time = began + HEARTBEAT_S * number
        yield {
            "v": 1,
            "time": time,
            "actor": actor,
            "role": role,
            "state": states[number % 4],
            "queue": number % 3,
            "policy_version": int((time - began) / STEP_S),
            "num_done": 16 * number,
            "num_tokens": 900 * number if role.startswith("rollout") else 0,
            "num_images": 40 * number if role == "rollout.image" else 0,
            "memory_mb": 812.5,
            "pid": 4321,
            "node": "node-0",
        }


def _evaluation(step: int) -> dict[str, Any]:
    item = {"task": "understanding", "mode": "sampled", "category": "shape", "prompt": "what shape is shown ?"}
    item |= {"choices": ["square", "cross"], "gold": "A", "text": "<answer> A </answer>", "finish_reason": "stop"}
    names = [f"{task}/{mode}/reward" for task in TASKS for mode in ("sampled", "greedy")]
    estimate = {"mean": 0.5, "low": 0.45, "high": 0.55, "num": 480, "num_clusters": 480}
    items = [item | {"id": f"heldout-{number}", "reward": 1.0} for number in range(1920)]
    return {"v": 1, "step": step, "items": items, "estimates": dict.fromkeys(names, estimate), "categories": {}}
