"""What every sampler does around its engine: check prompt lengths, make groups of completions, verify new weights."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray

from unirl.config import SamplingConfig
from unirl.models.checkpoint import all_finite, copy_into
from unirl.models.named_arrays import checksum, to_tensor
from unirl.models.policy import Policy
from unirl.types import (
    FinishReason,
    GenerationSample,
    RolloutGroup,
    RolloutRequest,
    Trajectory,
    UnderstandingSample,
    WeightsManifest,
)


class DecodeClock:
    """How long this process has turned tokens into texts and pictures, and whether it is at it."""

    def __init__(self) -> None:
        self.seconds, self.is_running = 0.0, False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time the block."""
        self.is_running, started = True, time.perf_counter()
        try:
            yield
        finally:
            self.is_running = False
            self.seconds += time.perf_counter() - started


DECODING = DecodeClock()


@dataclass(frozen=True, slots=True)
class Completion:
    """Sampled ids int32 [T], image codes counted from 0, and their log-probabilities float32 [T]."""

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    finish_reason: FinishReason = "stop"
    num_counted: int | None = None
    """Tokens from the front that count in the loss; None counts all."""
    unmask_step: NDArray[np.int16] | None = None
    """[T] step that revealed each token; masked-diffusion families only."""
    versions: tuple[tuple[int, int], ...] = ()
    """(first token, version) of each stretch; empty when the sampler's version drew all."""


def encode_prompts(
    policy: Policy, requests: Sequence[RolloutRequest], sampling: SamplingConfig, max_model_len: int
) -> list[NDArray[np.int32]]:
    """Prompt ids [P] of each request.

    Raises:
        ValueError: prompt and longest completion together exceed `max_model_len` tokens, or the first question's
            picture is lost on the way.
    """
    prompts = []
    for request in requests:
        prompt = policy.encode(request.sample, sampling)
        if prompt.longest > max_model_len:
            raise ValueError(
                f"request {request.request_id}: expected prompt and completion within rollout.max_model_len "
                f"{max_model_len} tokens; got up to {prompt.longest}; set rollout.max_model_len to {prompt.longest} or "
                "more, or drop the sample"
            )
        prompts.append(prompt.ids)
    asked = next(((r, ids) for r, ids in zip(requests, prompts, strict=True) if not _draws(r)), None)
    if asked is not None and not reads_image(policy, *asked, sampling):
        raise ValueError(
            f"request {asked[0].request_id}: expected a prompt that its picture decides; got the same one for a "
            "picture of noise: placeholder tokens without pixels; mend the family's encode or embed_prompts"
        )
    return prompts


@torch.inference_mode()
def reads_image(policy: Any, request: RolloutRequest, ids: NDArray[np.int32], sampling: SamplingConfig) -> bool:
    """Whether another picture would give another prompt: other ids where images are codes, other embeddings else.

    Args:
        policy: encodes, and embeds where it sees images by their pixels.
        request: a question.
        ids: [P] of its prompt.
        sampling: as for the prompt.
    """
    sample = request.sample
    assert isinstance(sample, UnderstandingSample), "only questions have pictures"
    # Of the picture's own seed: no picture is its own noise.
    noise = np.random.default_rng(crc32(sample.image.tobytes())).integers(0, 256, sample.image.shape, dtype=np.uint8)
    if not np.array_equal(ids, policy.encode(replace(sample, image=noise), sampling).ids):
        return True
    if not hasattr(policy, "embed_prompts"):
        return False
    own, other = (policy.embed_prompts(*policy.pad_prompts([ids]), [image]) for image in (sample.image, noise))
    return not torch.equal(own, other)


@DECODING.running()
def make_groups(
    policy: Policy,
    requests: Sequence[RolloutRequest],
    prompts: Sequence[NDArray[np.int32]],
    completions: Sequence[Sequence[Completion]],
    policy_version: int,
) -> list[RolloutGroup]:
    """One group per request, from one completion per seed; `policy_version` counts where a completion names none."""
    rows = list(zip(requests, prompts, completions, strict=True))
    drawn = [(c.ids, prompt) for request, prompt, row in rows if _draws(request) for c in row]
    pictures = iter(policy.decode_images([codes for codes, _ in drawn], [prompt for _, prompt in drawn]))
    groups = []
    for request, prompt, row in rows:
        is_image = _draws(request)
        spans = [completion.versions if len(completion.versions) > 1 else () for completion in row]
        oldest = [min((v for _, v in completion.versions), default=policy_version) for completion in row]
        trajectories = [
            Trajectory(
                prompt_ids=prompt,
                completion_ids=completion.ids,
                loss_mask=np.arange(len(completion.ids)) < _counted(completion),
                logprobs=completion.logprobs,
                modality="image" if is_image else "text",
                text=None if is_image else policy.decode_text(completion.ids[: _counted(completion)]),
                image=next(pictures) if is_image else None,
                finish_reason=completion.finish_reason,
                policy_version=version,
                seed=seed,
                unmask_step=completion.unmask_step,
                version_spans=own,
            )
            for seed, completion, version, own in zip(request.seeds, row, oldest, spans, strict=True)
        ]
        groups.append(RolloutGroup(request=request, trajectories=tuple(trajectories)))
    return groups


def num_sampled(groups: Iterable[RolloutGroup]) -> tuple[int, int]:
    """Tokens and images in the groups."""
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    return sum(len(t.completion_ids) for t in trajectories), sum(t.modality == "image" for t in trajectories)


def verified_weights(
    manifest: WeightsManifest, tensors: Iterable[tuple[str, NDArray[np.generic]]], shapes: Mapping[str, tuple[int, ...]]
) -> list[tuple[str, NDArray[np.generic]]]:
    """The published weights, after their names, shapes and checksum were found right.

    Raises:
        ValueError: the manifest is not of this model, or the weights are not those of the manifest.
    """
    listed = {spec.name: tuple(spec.shape) for spec in manifest.tensors}
    if wrong := sorted(listed.items() ^ shapes.items()):
        raise ValueError(
            f"weights of version {manifest.policy_version}: expected the {len(shapes)} weights of this sampler's "
            f"model; got a manifest that differs in {wrong[:3]}; publish from a learner of the same checkpoint"
        )
    named = list(tensors)
    if [(name, tuple(array.shape)) for name, array in named] != [(s.name, tuple(s.shape)) for s in manifest.tensors]:
        raise ValueError(
            f"weights of version {manifest.policy_version}: expected the manifest's {len(manifest.tensors)} weights in "
            f"its order; got {len(named)} that differ from it; publish again"
        )
    if (found := checksum(named)) != manifest.checksum:
        raise ValueError(
            f"weights of version {manifest.policy_version}: expected checksum {manifest.checksum}; got {found}; they "
            "were damaged on the way: publish again"
        )
    for name, array in named:
        if not all_finite(to_tensor(array)):
            raise ValueError(
                f"weights of version {manifest.policy_version}: expected finite values; got NaN or infinity in {name}; "
                "the learner diverged: lower learner.lr and resume from an older checkpoint"
            )
    return named


def load_policy_weights(
    policy: Policy, manifest: WeightsManifest, tensors: Iterable[tuple[str, NDArray[np.generic]]]
) -> None:
    """Replace the weights of a policy in this process.

    Raises:
        ValueError: the manifest or the weights do not fit; nothing is changed.
    """
    targets = policy.module.state_dict()
    for name, array in verified_weights(manifest, tensors, policy.shapes):
        copy_into(targets, name, to_tensor(array))


def _counted(completion: Completion) -> int:
    return len(completion.ids) if completion.num_counted is None else completion.num_counted


def _draws(request: RolloutRequest) -> bool:
    return isinstance(request.sample, GenerationSample)
