"""The sampler of real runs: one vLLM engine inside this process, answers and images over one joint vocabulary."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from unirl.config import ModelConfig, RolloutConfig, SamplingConfig
from unirl.rollout.completions import Completion, encode_prompts, make_groups
from unirl.rollout.sampler import NamedArrays
from unirl.rollout.vllm_process import (
    EngineProcess,
    EngineSettings,
    family_file,
    ids_and_logprobs,
    sampling_params,
    set_environment,
    version_spans,
    with_memory,
)
from unirl.types import Modality, RolloutGroup, RolloutRequest, UnderstandingSample, WeightsManifest

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.inputs.engine import EngineInput

MODALITY: dict[str, Modality] = {"understanding": "text", "generation": "image"}


class VllmSampler:
    """Meets `Sampler`.

    The engine holds the trunk and the heads; a light copy of the family holds the image tokenizer. Where questions'
    images are seen by their pixels it also holds vision tower and embeddings, since answers are then sampled from
    prompt embeddings. Text runs in one stream even where images take two.
    """

    def __init__(
        self, model: ModelConfig, path: Path, rollout: RolloutConfig, role: str, *, rests: bool = False
    ) -> None:
        guidance_scale = rollout.sampling.image.guidance_scale
        self.policy_version = -1
        self.between_tokens: Callable[[], None] | None = None
        self.always_all_streams = not rollout.enforce_eager
        """Run every stream and head whatever is asked for; a compiled graph keeps the streams it was traced with."""
        self._rollout, self._role = rollout, role
        self._num_streams = 2 if role != "text" and guidance_scale != 1.0 else 1
        device = "cuda" if torch.cuda.is_available() else "cpu"
        set_environment()
        from unirl.rollout.modality_mask import ModalityMask

        family = family_file(model)
        self._front = family.load_front(model, path)
        self._sees_pixels = self._front.layout.sees_pixels
        if self._sees_pixels:
            nn.Module.to(self._front.module, device)
        self._dtype = getattr(torch, model.dtype)
        settings = EngineSettings(
            max_model_len=rollout.max_model_len,
            max_num_seqs=rollout.max_num_seqs,
            kv_cache_memory_gib=rollout.kv_cache_memory_gib,
            enforce_eager=rollout.enforce_eager,
            sleeps=rests,
        )
        settings = with_memory(self._front.config.get_text_config(), settings, self._dtype, self._num_streams)
        with tempfile.TemporaryDirectory(prefix="unirl-engine-") as folder:
            family.write_engine_folder(self._front, Path(folder), self._num_streams)
            self._engine = EngineProcess(
                self._front,
                Path(folder),
                model.dtype,
                settings,
                processor=ModalityMask,
                logprobs_mode="processed_logprobs",
                prompt_embeds=self._sees_pixels,
            )

    def sample(self, requests: Sequence[RolloutRequest], sampling: SamplingConfig) -> list[RolloutGroup]:
        """One group per request, in their order.

        Raises:
            ValueError: a task that this sampler's role leaves out, guidance that needs a second stream, or a prompt
                that is too long. Nothing has been sampled then.
        """
        self._engine.check_whole()
        self._check(requests, sampling)
        prompts = encode_prompts(self._front, requests, sampling, self._rollout.max_model_len)
        if self._rollout.deterministic:
            self._engine.forget_prefixes()
        self._set_streams({request.task for request in requests}, sampling.image.guidance_scale)
        outputs = self._engine.run(
            {
                f"{index}/{seed_index}": (prompt, self._params(request, seed, sampling))
                for index, (prompt, request) in enumerate(
                    zip(self._engine_prompts(requests, prompts), requests, strict=True)
                )
                for seed_index, seed in enumerate(request.seeds)
            },
            on_step=self.between_tokens,
        )
        completions = [
            [self._completion(outputs[f"{index}/{seed_index}"], request) for seed_index in range(len(request.seeds))]
            for index, request in enumerate(requests)
        ]
        return make_groups(self._front, requests, prompts, completions, self.policy_version)

    def rest(self) -> None:
        """Let the engine sleep: its weights wait in main memory, its key-value cache is given back."""
        self._engine.sleep()

    def weight_slices(self) -> dict[str, str] | None:
        """Checksums of a fixed slice of what engine and front hold as the checkpoint does: norms, tables, heads."""
        return self._engine.weight_slices()

    def load_weights(self, manifest: WeightsManifest, tensors: NamedArrays) -> None:
        """Replace the weights of engine and front in place and drop every cached prefix.

        Raises:
            ValueError: the manifest or the weights do not fit; nothing is changed.
        """
        self._engine.load_weights(manifest, tensors)
        self.policy_version = manifest.policy_version

    def _check(self, requests: Sequence[RolloutRequest], sampling: SamplingConfig) -> None:
        for request in requests:
            if self._role not in ("both", modality := MODALITY[request.task]):
                raise ValueError(
                    f"request {request.request_id}: expected {self._role} requests as this sampler's role says; got "
                    f"{modality}; send it to a worker of role {modality} or both"
                )
        scale = sampling.image.guidance_scale
        if self._num_streams == 1 and scale != 1.0 and any(request.task == "generation" for request in requests):
            raise ValueError(
                f"sampling.image.guidance_scale: expected 1, since this engine was built with one stream; got {scale}; "
                "set rollout.sampling.image.guidance_scale to other than 1 when the workers start"
            )

    def _set_streams(self, tasks: set[str], guidance_scale: float) -> None:
        """Tell the model what the coming steps need."""
        streams = self._engine.model.streams
        guided = "generation" in tasks and guidance_scale != 1.0
        streams.num_active = self._num_streams if guided or self.always_all_streams else 1
        streams.modalities = frozenset(MODALITY.values() if self.always_all_streams else (MODALITY[t] for t in tasks))
        streams.guidance_scale = guidance_scale

    def _engine_prompts(
        self, requests: Sequence[RolloutRequest], prompts: Sequence[NDArray[np.int32]]
    ) -> list["EngineInput"]:
        """Ids, but questions as embeddings with their image where the family sees it by its pixels.

        The salt keeps a prefix from being reused where other streams ran.
        """
        from vllm.inputs.engine import embeds_input, tokens_input

        salt = f"streams-{self._engine.model.streams.num_active}"
        made: list[EngineInput] = [tokens_input(prompt.tolist(), cache_salt=salt) for prompt in prompts]
        questions = {
            index: request.sample.image
            for index, request in enumerate(requests)
            if self._sees_pixels and isinstance(request.sample, UnderstandingSample)
        }
        if questions:
            with torch.inference_mode():
                ids, mask = self._front.pad_prompts([prompts[index] for index in questions])
                embedded = self._front.embed_prompts(ids, mask, list(questions.values())).to(self._dtype).cpu()
            for index, row in zip(questions, embedded, strict=True):
                # The second stream of a question is never read, but its place in the buffer is there.
                own = row[-len(prompts[index]) :].repeat(1, self._num_streams)
                made[index] = embeds_input(own, cache_salt=salt)
        return made

    def _params(self, request: RolloutRequest, seed: int, sampling: SamplingConfig) -> "SamplingParams":
        modality = MODALITY[request.task]
        is_text = modality == "text"
        return sampling_params(
            seed=seed,
            temperature=sampling.text.temperature if is_text else sampling.image.temperature,
            max_tokens=sampling.text.max_tokens if is_text else self._front.num_image_tokens,
            stop=[self._front.end_id] if is_text else [],
            modality=modality,
        )

    def _completion(self, output: "RequestOutput", request: RolloutRequest) -> Completion:
        ids, logprobs = ids_and_logprobs(output.outputs[0])
        codes = ids - np.int32(self._front.first_code)
        is_code, reason = (codes >= 0) & (codes < self._front.num_codes), "stop"
        if request.task == "generation":
            assert len(ids) == self._front.num_image_tokens, f"request {request.request_id}: {len(ids)} image codes"
            assert is_code.all(), f"request {request.request_id}: text ids in an image: {ids}"
            ids = codes
        else:
            assert not is_code.any(), f"request {request.request_id}: image codes in an answer: {ids}"
            reason = "stop" if ids[-1] == self._front.end_id else "length"
        return Completion(ids, logprobs, reason, versions=version_spans(output.outputs[0]))
