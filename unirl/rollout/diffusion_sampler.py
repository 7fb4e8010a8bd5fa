"""The sampler of masked-diffusion families: canvases of a unit of work revealed together, step by step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from unirl.config import SamplingConfig
from unirl.models.named_arrays import slice_checksums
from unirl.models.policy import MaskedDiffusionPolicy
from unirl.rollout.approximate_cache import ApproximateCache
from unirl.rollout.completions import Completion, encode_prompts, load_policy_weights, make_groups
from unirl.rollout.sampler import NamedArrays
from unirl.rollout.units import units_of_work
from unirl.rollout.unmasking import Drawn, draw_answers, draw_images
from unirl.types import FinishReason, RolloutGroup, RolloutRequest, WeightsManifest


@dataclass(slots=True)
class DiffusionSampler:
    """Meets `Sampler` with the policy itself."""

    policy: MaskedDiffusionPolicy
    max_model_len: int
    """Longest canvas in tokens."""
    max_num_seqs: int
    """Canvases revealed together."""
    policy_version: int = -1
    between_tokens: Callable[[], None] | None = None
    """Called between canvases revealed together, which one version draws from end to end."""

    @torch.inference_mode()
    def sample(self, requests: Sequence[RolloutRequest], sampling: SamplingConfig) -> list[RolloutGroup]:
        """One group per request, in their order."""
        groups = {}
        for unit in units_of_work(requests, self.max_num_seqs):
            if self.between_tokens is not None:
                self.between_tokens()
            canvases = encode_prompts(self.policy, unit, sampling, self.max_model_len)
            draw = self._answers if unit[0].task == "understanding" else self._images
            repeated = [canvas for canvas, request in zip(canvases, unit, strict=True) for _ in request.seeds]
            drawn = iter(draw(repeated, [seed for request in unit for seed in request.seeds], sampling))
            completions = [[next(drawn) for _ in request.seeds] for request in unit]
            made = make_groups(self.policy, unit, canvases, completions, self.policy_version)
            groups |= {id(group.request): group for group in made}
        return [groups[id(request)] for request in requests]

    def rest(self) -> None:
        """Nothing: between calls it holds its weights alone."""

    def weight_slices(self) -> dict[str, str]:
        """Checksums of a fixed slice of every weight."""
        return slice_checksums(self.policy.module.state_dict(), self.policy.shapes)

    def load_weights(self, manifest: WeightsManifest, tensors: NamedArrays) -> None:
        """Replace the weights in place.

        Raises:
            ValueError: the manifest or the weights do not fit; nothing is changed.
        """
        load_policy_weights(self.policy, manifest, tensors)
        self.policy_version = manifest.policy_version

    def _answers(
        self, canvases: Sequence[NDArray[np.int32]], seeds: Sequence[int], sampling: SamplingConfig
    ) -> list[Completion]:
        text = sampling.text
        law = self.policy.cell_law("understanding", text.temperature)
        block = text.block_length or text.max_tokens
        drawn = draw_answers(self.policy.module, canvases, seeds, law, text.diffusion_steps, block)
        completions = []
        for one in drawn:
            end = self.policy.end_of(one[0].values)
            counted = None if end is None or text.loss_padding is None else end + 1 + text.loss_padding
            completions.append(_completion(one, "length" if end is None else "stop", counted))
        return completions

    def _images(
        self, canvases: Sequence[NDArray[np.int32]], seeds: Sequence[int], sampling: SamplingConfig
    ) -> list[Completion]:
        image = sampling.image
        law = self.policy.cell_law("generation", image.temperature, image.guidance_scale)
        nulls = [self.policy.null_canvas(canvas) for canvas in canvases] if image.guidance_scale != 1.0 else None
        cache = ApproximateCache() if image.approximate_cache else None
        drawn = draw_images(self.policy.module, canvases, nulls, seeds, law, image.diffusion_steps, cache=cache)
        return [_completion(one) for one in drawn]


def _completion(drawn: Drawn, finish_reason: FinishReason = "stop", num_counted: int | None = None) -> Completion:
    row, logprobs = drawn
    return Completion(row.values, logprobs, finish_reason, num_counted, row.steps)
