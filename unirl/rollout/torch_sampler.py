"""The plain sampler: one forward pass per token with a key-value cache; the oracle of the tests, quick to start."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from unirl.algorithms.guidance import guided_logits
from unirl.config import SamplingConfig
from unirl.models.named_arrays import slice_checksums
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
    between_tokens: Callable[[], None] | None = None

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
        self, requests: Sequence[RolloutRequest], prompts: Sequence[NDArray[np.int32]], sampling: SamplingConfig
    ) -> list[list[Completion]]:
        ids, mask = self.policy.pad_prompts(prompts)
        images = [r.sample.image for r in requests if isinstance(r.sample, UnderstandingSample)]
        allowed = self.policy.allowed_text_ids.to(ids.device)
        decoder = _Decoder(
            self, requests, mask, lambda: self.policy.embed_prompts(ids, mask, images), self.policy.embed_text
        )
        done = torch.zeros(decoder.num_sequences, dtype=torch.bool, device=ids.device)
        for _ in range(sampling.text.max_tokens):
            logits = self.policy.text_logits(decoder.last_hidden).masked_fill(~allowed, -torch.inf)
            tokens = decoder.draw(logits, sampling.text.temperature)
            done |= tokens == self.policy.end_id
            if done.all():
                break
            decoder.advance(tokens)
        return decoder.completions(self.policy.end_id)

    def _images(
        self, requests: Sequence[RolloutRequest], prompts: Sequence[NDArray[np.int32]], sampling: SamplingConfig
    ) -> list[list[Completion]]:
        assert all(isinstance(request.sample, GenerationSample) for request in requests)
        scale = sampling.image.guidance_scale
        ids, mask = self.policy.pad_prompts(prompts)
        if scale != 1.0:
            ids, mask = torch.cat([ids, self.policy.unconditional(ids)]), mask.repeat(2, 1)
        decoder = _Decoder(
            self,
            requests,
            mask,
            lambda: self.policy.embed_text(ids),
            lambda codes: self.policy.embed_codes(codes.repeat(len(ids) // len(prompts), 1)),
        )
        for index in range(self.policy.num_image_tokens):
            cond, *uncond = self.policy.code_logits(decoder.last_hidden).split(decoder.num_sequences)
            logits = guided_logits(cond, uncond[0], scale) if uncond else cond
            codes = decoder.draw(logits, sampling.image.temperature, self.policy.first_code)
            if index < self.policy.num_image_tokens - 1:
                decoder.advance(codes)
        return decoder.completions(None)


class _Decoder:
    """Cache, generators and tokens of the sequences in flight; a second stream follows the first."""

    def __init__(
        self,
        sampler: TorchSampler,
        requests: Sequence[RolloutRequest],
        mask: Tensor,
        embed_prompts: Callable[[], Tensor],
        embed_tokens: Callable[[Tensor], Tensor],
    ) -> None:
        """Read the prompts.

        Args:
            sampler: whose policy draws.
            requests: one per prompt.
            mask: [S R, P] 1 where a prompt has a token, in S streams.
            embed_prompts: embeddings [S R, P, H] of the prompts.
            embed_tokens: embeddings [S N, T, H] of drawn tokens [N, T].
        """
        self._sampler, self._prompt_mask = sampler, mask
        self._embed_prompts, self._embed_tokens = embed_prompts, embed_tokens
        self._sizes = [len(request.seeds) for request in requests]
        self._generators = [torch.Generator().manual_seed(seed) for request in requests for seed in request.seeds]
        self.num_sequences = len(self._generators)
        # Each prompt is read once; its state is repeated for its seeds.
        repeats = torch.tensor(self._sizes * (len(mask) // len(requests)), device=mask.device)
        self._rows = torch.arange(len(mask), device=mask.device).repeat_interleave(repeats)
        self._tokens: list[Tensor] = []
        self._logprobs: list[Tensor] = []
        self._versions: list[tuple[int, int]] = []
        self._read_prompts()

    def _read_prompts(self) -> None:
        self._versions.append((len(self._tokens), self._sampler.policy_version))
        self._cache = DynamicCache()
        hidden = self._sampler.policy.hidden_states(self._embed_prompts(), self._prompt_mask, self._cache)[:, -1]
        self._cache.batch_select_indices(self._rows)
        self._mask, self.last_hidden = self._prompt_mask[self._rows], hidden[self._rows]

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

    def advance(self, tokens: Tensor) -> None:
        """Read the tokens [N] drawn last; under other weights than before, all that came before them too."""
        if self._sampler.between_tokens is not None:
            self._sampler.between_tokens()
        if self._sampler.policy_version == self._versions[-1][1]:
            self._read(tokens[:, None])
        else:
            self._read_prompts()
            self._read(torch.stack(self._tokens, dim=1))

    def _read(self, tokens: Tensor) -> None:
        embeddings = self._embed_tokens(tokens)
        self._mask = torch.cat([self._mask, self._mask.new_ones(embeddings.shape[:2])], dim=1)
        self.last_hidden = self._sampler.policy.hidden_states(embeddings, self._mask, self._cache)[:, -1]

    def completions(self, end_id: int | None) -> list[list[Completion]]:
        """Completions by request, each cut after its first end token."""
        tokens = torch.stack(self._tokens, dim=1).int().cpu().numpy()
        logprobs = torch.stack(self._logprobs, dim=1).float().cpu().numpy()
        flat = []
        for ids, values in zip(tokens, logprobs, strict=True):
            ends = np.flatnonzero(ids == end_id) if end_id is not None else []
            length = ends[0] + 1 if len(ends) else len(ids)
            reason = "stop" if len(ends) or end_id is None else "length"
            versions = tuple(span for span in self._versions if span[0] < length)
            flat.append(Completion(ids[:length].copy(), values[:length].copy(), reason, versions=versions))
        rows = iter(flat)
        return [[next(rows) for _ in range(size)] for size in self._sizes]
