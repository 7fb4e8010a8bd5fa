"""A few pairs of a step as a person wants to see them: prompts, answers, images, and what each earned."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from unirl.monitoring.durable_files import write_atomic
from unirl.monitoring.images import encode_webp
from unirl.monitoring.step_data import StepData
from unirl.types import UnderstandingSample, WeightedGroup

ImageNames = dict[tuple[str, int], str]
"""File name by (request_id, index of the completion)."""


def write_pairs(folder: Path, data: StepData, num_pairs: int) -> tuple[list[dict[str, object]], ImageNames]:
    """Write the images of the step's first pairs, and return the lines of pairs.jsonl that name them.

    The images come first, so that a line never names a file that is missing.

    Args:
        folder: the run's images/.
        data: the step.
        num_pairs: pairs to show; the step's order is random already.

    Raises:
        OSError: the disk is full or refuses.
    """
    lines, names = [], ImageNames()
    for number, groups in enumerate(_by_pair(data)[:num_pairs]):
        prefix = f"{data.step:06d}_p{number:05d}"
        pair = groups[0].pair
        line: dict[str, object] = {
            "v": 1,
            "step": data.step,
            "pair_id": pair.pair_id,
            "kind": pair.kind,
            "similarity": pair.similarity,
            "weight": groups[0].pair_weight,
        }
        for group in groups:
            line[group.scored.group.request.task] = _show_group(folder, prefix, group, names)
        lines.append(line)
    return lines, names


def used_pairs(data: StepData) -> dict[str, object]:
    """The step's line of used_pairs.jsonl: every pair with its weight and the mean reward of either side."""
    pairs = []
    for groups in _by_pair(data):
        pair = groups[0].pair
        line: dict[str, object] = {"pair_id": pair.pair_id, "kind": pair.kind}
        line |= {"similarity": pair.similarity, "weight": groups[0].pair_weight}
        for group in groups:
            judged = group.scored.rewards[group.scored.judged]
            line[group.scored.group.request.task] = float(judged.mean()) if len(judged) else None
        pairs.append(line)
    return {"v": 1, "step": data.step, "pairs": pairs}


def _by_pair(data: StepData) -> list[list[WeightedGroup]]:
    by_pair: dict[str, list[WeightedGroup]] = {}
    for group in data.groups:
        by_pair.setdefault(group.pair.pair_id, []).append(group)
    return list(by_pair.values())


def _show_group(folder: Path, prefix: str, group: WeightedGroup, names: ImageNames) -> dict[str, object]:
    request = group.scored.group.request
    for index, trajectory in enumerate(group.scored.group.trajectories):
        if trajectory.image is not None:
            name = f"{prefix}_g{index}.webp"
            write_atomic(folder / name, encode_webp(trajectory.image), sync=False)
            names[request.request_id, index] = name
    samples = list(_show_samples(group, names))
    sample = request.sample
    image = f"{prefix}_u.webp" if isinstance(sample, UnderstandingSample) else f"{prefix}_r.webp"
    if sample.image is not None:
        write_atomic(folder / image, encode_webp(sample.image), sync=False)
    if not isinstance(sample, UnderstandingSample):
        reference = image if sample.image is not None else None
        return {"id": sample.id, "prompt": sample.prompt, "image": reference, "samples": samples}
    return {
        "id": sample.id,
        "image": image,
        "question": sample.question,
        "choices": sample.choices,
        "gold": sample.answer,
        "samples": samples,
    }


def _show_samples(group: WeightedGroup, names: ImageNames) -> Iterator[dict[str, object]]:
    scored = group.scored
    read = [scores.texts["extracted"] for scores in scored.components.values() if "extracted" in scores.texts]
    for index, trajectory in enumerate(scored.group.trajectories):
        extracted: dict[str, object] = {"extracted": read[0][index]} if read else {}
        yield extracted | {
            "text": trajectory.text,
            "image": names.get((scored.group.request.request_id, index)),
            "reward": float(scored.rewards[index]) if scored.judged[index] else None,
            "advantage": float(group.advantages[index]),
            "parts": reward_parts(group, index),
            "policy_version": trajectory.policy_version,
            "finish_reason": trajectory.finish_reason,
        }


def reward_parts(group: WeightedGroup, index: int) -> Mapping[str, float | None]:
    """One completion's value of each reward and of each named part of it; None where it was not judged."""
    parts: dict[str, float | None] = {}
    for name, scores in group.scored.components.items():
        for part, values in ((name, scores.values), *((f"{name}/{d}", v) for d, v in scores.details.items())):
            parts[part] = float(values[index]) if scores.judged[index] else None
    return parts
