"""The plain sampler: one forward pass per token with a key-value cache; the oracle of the tests, quick to start."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from unirl.algorithms.guidance import guided_logits
from unirl.config import SamplingConfig
from unirl.models.policy import AutoregressivePolicy
from unirl.rollout.completions import Completion, encode_prompts, load_policy_weights, make_groups
from unirl.rollout.gumbel import gumbel_argmax, step_seeds
from unirl.rollout.sampler import NamedArrays
from unirl.rollout.units import units_of_work
from unirl.types import GenerationSample, RolloutGroup, RolloutRequest, UnderstandingSample, WeightsManifest


@dataclass(slots=True)
class TorchSampler:
    """Meets `Sampler` with the policy itself."""

    policy: AutoregressivePolicy
    max_model_len: int
    """Longest prompt plus completion in tokens."""
    max_num_seqs: int
    """Sequences decoded at a time."""
    policy_version: int = -1

    @torch.inference_mode()
    def sample(self, requests: Sequence[RolloutRequest], sampling: SamplingConfig) -> list[RolloutGroup]:
        """One group per request, in their order."""
        groups = {}
        for unit in units_of_work(requests, self.max_num_seqs):
            prompts = encode_prompts(self.policy, unit, sampling, self.max_model_len)
            decode = self._answers if unit[0].task == "understanding" else self._images
            made = make_groups(self.policy, unit, prompts, decode(unit, prompts, sampling), self.policy_version)
            groups |= {id(group.request): group for group in made}
        return [groups[id(request)] for request in requests]

    def load_weights(self, manifest: WeightsManifest, tensors: NamedArrays) -> None:
        """Replace the weights in place.

        Raises:
            ValueError: the manifest or the weights do not fit; nothing is changed.
        """
        load_policy_weights(self.policy, manifest, tensors)
        self.policy_version = manifest.policy_version

    def _answers(
        self, requests: Sequence[RolloutRequest], prompts: Sequence[NDArray[np.int32]], sampling: SamplingConfig
    ) -> list[list[Completion]]:
        ids, mask = self.policy.pad_prompts(prompts)
        images = [r.sample.image for r in requests if isinstance(r.sample, UnderstandingSample)]
        allowed = self.policy.allowed_text_ids.to(ids.device)
        decoder = _Decoder(self.policy, requests, self.policy.embed_prompts(ids, mask, images), mask)
        done = torch.zeros(decoder.num_sequences, dtype=torch.bool, device=ids.device)
        for _ in range(sampling.text.max_tokens):
            logits = self.policy.text_logits(decoder.last_hidden).masked_fill(~allowed, -torch.inf)
            tokens = decoder.draw(logits, sampling.text.temperature)
            done |= tokens == self.policy.end_id
            if done.all():
                break
            decoder.advance(self.policy.embed_text(tokens))
        return decoder.completions(self.policy.end_id)

    def _images(
        self, requests: Sequence[RolloutRequest], prompts: Sequence[NDArray[np.int32]], sampling: SamplingConfig
    ) -> list[list[Completion]]:
        assert all(isinstance(request.sample, GenerationSample) for request in requests)
        scale = sampling.image.guidance_scale
        ids, mask = self.policy.pad_prompts(prompts)
        if scale != 1.0:
            ids, mask = torch.cat([ids, self.policy.unconditional(ids)]), mask.repeat(2, 1)
        decoder = _Decoder(self.policy, requests, self.policy.embed_text(ids), mask)
        for index in range(self.policy.num_image_tokens):
            cond, *uncond = self.policy.code_logits(decoder.last_hidden).split(decoder.num_sequences)
            logits = guided_logits(cond, uncond[0], scale) if uncond else cond
            codes = decoder.draw(logits, sampling.image.temperature, self.policy.first_code)
            if index < self.policy.num_image_tokens - 1:
                decoder.advance(self.policy.embed_codes(codes.repeat(1 + len(uncond))))
        return decoder.completions(None)


class _Decoder:
    """Cache, generators and tokens of the sequences in flight; a second stream follows the first."""

    def __init__(
        self, policy: AutoregressivePolicy, requests: Sequence[RolloutRequest], embeddings: Tensor, mask: Tensor
    ) -> None:
        self._policy = policy
        self._sizes = [len(request.seeds) for request in requests]
        device = mask.device
        self._generators = [torch.Generator().manual_seed(seed) for request in requests for seed in request.seeds]
        self.num_sequences = len(self._generators)
        self._cache = DynamicCache()
        hidden = policy.hidden_states(embeddings, mask, self._cache)[:, -1]
        # Each prompt is read once; its state is repeated for its seeds.
        repeats = torch.tensor(self._sizes * (len(mask) // len(requests)), device=device)
        rows = torch.arange(len(mask), device=device).repeat_interleave(repeats)
        self._cache.batch_select_indices(rows)
        self._mask, self.last_hidden = mask[rows], hidden[rows]
        self._tokens: list[Tensor] = []
        self._logprobs: list[Tensor] = []

    def draw(self, logits: Tensor, temperature: float, offset: int = 0) -> Tensor:
        """Draw and record one token per sequence; greedy tokens are recorded under temperature 1."""
        logits = logits / (temperature or 1.0)
        if temperature:
            tokens = gumbel_argmax(logits, step_seeds(self._generators).to(logits.device), offset)
        else:
            tokens = logits.argmax(dim=1)
        self._tokens.append(tokens)
        self._logprobs.append(logits.log_softmax(dim=1).gather(1, tokens[:, None])[:, 0])
        return tokens

    def advance(self, embeddings: Tensor) -> None:
        """Read one more token [S B, H] of each stream."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], dim=1)
        self.last_hidden = self._policy.hidden_states(embeddings[:, None], self._mask, self._cache)[:, -1]

    def completions(self, end_id: int | None) -> list[list[Completion]]:
        """Completions by request, each cut after its first end token."""
        tokens = torch.stack(self._tokens, dim=1).int().cpu().numpy()
        logprobs = torch.stack(self._logprobs, dim=1).float().cpu().numpy()
        flat = []
        for ids, values in zip(tokens, logprobs, strict=True):
            ends = np.flatnonzero(ids == end_id) if end_id is not None else []
            length = ends[0] + 1 if len(ends) else len(ids)
            reason = "stop" if len(ends) or end_id is None else "length"
            flat.append(Completion(ids[:length].copy(), values[:length].copy(), reason))
        rows = iter(flat)
        return [[next(rows) for _ in range(size)] for size in self._sizes]
