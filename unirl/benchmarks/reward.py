"""Pictures per second of HPSv2 in groups, with one text pass a prompt, against one picture at a time.

Random weights of any open_clip architecture stand in where no checkpoint is given. Run it by `unirl bench reward`.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file

from unirl.benchmarks.report import Goal, Report, Row, Table, median_ratio, take_turns
from unirl.config_rules import OptionError
from unirl.rewards.hpsv2 import Hpsv2Reward, Precision
from unirl.types import GenerationSample, RolloutGroup, RolloutRequest, Trajectory

WANTED = 2.0
PROMPT = "a photo of a red circle and a blue square on a wooden table, soft light, very detailed"


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardBench:
    """What `unirl bench reward` measures."""

    checkpoint: Path | None = None
    """HPSv2 weights; None makes random ones of each architecture."""
    models: tuple[str, ...] = ("ViT-B-32", "ViT-H-14")
    """Names in open_clip; HPSv2 is ViT-H-14."""
    rounds: int = 1
    group_size: int = 8
    """Pictures of one prompt, K."""
    side: int = 384
    """Of a picture in pixels."""
    precision: Precision = "float32"


def measure_reward(bench: RewardBench) -> Report:
    """Both ways for every architecture.

    Raises:
        ValueError: an architecture that open_clip does not know, or a checkpoint of another.
    """
    rows = [_measure(name, bench) for name in bench.models]
    goals = []
    for row in rows:
        ours, passes = float(row["ours to it"] or 0), float(row["text passes, one by one"] or 0)
        goals += [
            Goal(text=f"pictures/s against one at a time, {row['model']}", wanted=WANTED, got=ours),
            Goal(text=f"fewer text passes, times, {row['model']}", wanted=bench.group_size, got=passes),
        ]
    limits = [
        "`by arithmetic` is the ratio of the operations: K pictures and K texts against K pictures and one text. What "
        "a group gains beyond it comes of larger products: the weights are read once a batch, not once a picture. "
        "At ViT-H-14 a picture is seven times a text, so one text pass saves an eighth; the rest is the device's.",
        f"A group has {bench.group_size} pictures of {bench.side} x {bench.side} pixels; resizing is in both times.",
    ]
    table = Table(title=f"HPSv2, groups of {bench.group_size}", rows=rows)
    return Report(name="reward", command="unirl bench reward", tables=[table], goals=goals, limits=limits)


def write_random_clip(file: Path, model_name: str) -> Path:
    """Random float16 weights of an open_clip architecture, of the published layout."""
    with torch.device("meta"):
        wanted = open_clip.CLIP(**(open_clip.get_model_config(model_name) or {})).state_dict()
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, spec in wanted.items():
        made = torch.empty(spec.shape, dtype=torch.float16).normal_(generator=generator)
        state[name] = made * max(1, spec[0].numel()) ** -0.5 if spec.ndim > 1 else torch.ones_like(made)
    save_file(state, file)
    return file


def _measure(name: str, bench: RewardBench) -> Row:
    if open_clip.get_model_config(name) is None:
        raise OptionError(
            f"bench reward: expected open_clip architectures in --models; got {name!r}; HPSv2 is ViT-H-14"
        )
    with tempfile.TemporaryDirectory(prefix="unirl-bench-") as folder:
        checkpoint = bench.checkpoint or write_random_clip(Path(folder) / "clip.safetensors", name)
        reward = Hpsv2Reward(checkpoint=checkpoint, model_name=name, precision=bench.precision)
    images = [np.random.RandomState(i).randint(0, 256, (bench.side,) * 2 + (3,), np.uint8) for i in range(
        bench.group_size)]  # fmt: skip
    group, singles = _group(images), [_group([image]) for image in images]

    def one_by_one() -> None:
        for single in singles:
            reward.score(single)

    reward.score(singles[0])  # warms up
    seconds = take_turns({"one": one_by_one, "group": lambda: reward.score(group)}, bench.rounds, warm=False)
    with _text_passes() as grouped:
        reward.score(group)
    image, text = _operations(name)
    size = bench.group_size
    return {
        "model": name,
        "one at a time pictures/s": size / float(np.median(seconds["one"])),
        "our pictures/s": size / float(np.median(seconds["group"])),
        "ours to it": median_ratio(seconds["one"], seconds["group"]),
        "by arithmetic": size * (image + text) / (size * image + text),
        "text passes, one by one": size,
        "text passes, ours": grouped[0],
        "GFLOP a picture": image / 1e9,
        "GFLOP a text": text / 1e9,
        "our GFLOP/s": (size * image + text) / 1e9 / float(np.median(seconds["group"])),
    }


def _group(images: list) -> RolloutGroup:
    request = RolloutRequest(
        request_id="r", pair_id="p", task="generation", sample=GenerationSample(id="g", prompt=PROMPT),
        seeds=tuple(range(len(images))),
    )  # fmt: skip
    one = np.zeros(1, np.int32)
    made = [
        Trajectory(
            prompt_ids=one,
            completion_ids=one,
            loss_mask=np.ones(1, bool),
            logprobs=np.zeros(1, np.float32),
            modality="image",
            image=image,
            finish_reason="stop",
            policy_version=0,
            seed=seed,
        )
        for seed, image in enumerate(images)
    ]
    return RolloutGroup(request=request, trajectories=tuple(made))


@contextmanager
def _text_passes() -> Iterator[list[int]]:
    """Counts the calls of any text tower while this is open."""
    counts, encode = [0], open_clip.CLIP.encode_text

    def counting(*arguments: object, **named: object) -> object:
        counts[0] += 1
        return encode(*arguments, **named)  # pyright: ignore[reportArgumentType]

    open_clip.CLIP.encode_text = counting  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield counts
    finally:
        open_clip.CLIP.encode_text = encode


def _operations(name: str) -> tuple[float, float]:
    """FLOPs of a picture and of a text: two for each weight of a layer and token; attention's products come on top."""
    config = open_clip.get_model_config(name) or {}
    vision, text = config["vision_cfg"], config["text_cfg"]
    tokens = vision.get("image_size", 224) ** 2 // vision["patch_size"] ** 2 + 1

    def tower(width: int, layers: int, length: int) -> float:
        return layers * length * (2 * 12 * width**2 + 4 * length * width)

    return tower(vision["width"], vision["layers"], tokens), tower(
        text["width"], text["layers"], text.get("context_length", 77)
    )
