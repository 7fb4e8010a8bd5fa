"""The sampler of real runs: one vLLM engine inside this process, answers and images over one joint vocabulary."""

import importlib.util
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from unirl.config import ModelConfig, RolloutConfig, SamplingConfig
from unirl.models.checkpoint import copy_into
from unirl.models.named_arrays import to_tensor
from unirl.rollout.completions import Completion, encode_prompts, make_groups, verified_weights
from unirl.rollout.sampler import NamedArrays
from unirl.types import Modality, RolloutGroup, RolloutRequest, UnderstandingSample, WeightsManifest

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams
    from vllm.inputs.engine import EngineInput

BLOCK_TOKENS = 32
"""Tokens of one block of the key-value cache: the least that CPU kernels take; prompts share whole blocks."""
BATCH_TOKENS = 16384
"""Most prompt tokens read in one step, unless one prompt alone is longer."""
MODALITY: dict[str, Modality] = {"understanding": "text", "generation": "image"}


class VllmSampler:
    """Meets `Sampler`.

    The engine holds the trunk and the heads; a light copy of the family holds vision tower, embeddings and image
    tokenizer, since answers are sampled from prompt embeddings. Text runs in one stream even where images take two.
    """

    def __init__(self, model: ModelConfig, path: Path, rollout: RolloutConfig, role: str) -> None:
        guidance_scale = rollout.sampling.image.guidance_scale
        self.policy_version = -1
        self.always_all_streams = not rollout.enforce_eager
        """Run every stream and head whatever is asked for; a compiled graph keeps the streams it was traced with."""
        self._rollout, self._role = rollout, role
        self._num_streams = 2 if role != "text" and guidance_scale != 1.0 else 1
        device = "cuda" if torch.cuda.is_available() else "cpu"
        _set_environment()
        family = _family(model)
        self._front = family.load_front(model, path)
        nn.Module.to(self._front.module, device)
        self._dtype = getattr(torch, model.dtype)
        self._check_memory()
        with tempfile.TemporaryDirectory(prefix="unirl-engine-") as folder:
            family.write_engine_folder(self._front, Path(folder), self._num_streams)
            self._llm = self._start(folder, model.dtype)
        # In one process the worker's model is this very object.
        self._model: Any = self._llm.apply_model(lambda module: module)[0]
        self._is_broken = False

    def sample(self, requests: Sequence[RolloutRequest], sampling: SamplingConfig) -> list[RolloutGroup]:
        """One group per request, in their order.

        Raises:
            ValueError: a task that this sampler's role leaves out, guidance that needs a second stream, or a prompt
                that is too long. Nothing has been sampled then.
        """
        if self._is_broken:
            raise RuntimeError(
                "sampler: expected whole weights; got an update that failed half-way; start a new worker"
            )
        self._check(requests, sampling)
        prompts = encode_prompts(self._front, requests, sampling, self._rollout.max_model_len)
        if self._rollout.deterministic:
            self._forget_prefixes()
        self._set_streams({request.task for request in requests}, sampling.image.guidance_scale)
        outputs = self._run(self._engine_prompts(requests, prompts), requests, sampling)
        completions = [
            [self._completion(outputs[f"{index}/{seed_index}"], request) for seed_index in range(len(request.seeds))]
            for index, request in enumerate(requests)
        ]
        return make_groups(self._front, requests, prompts, completions, self.policy_version)

    def load_weights(self, manifest: WeightsManifest, tensors: NamedArrays) -> None:
        """Replace the weights of engine and front in place and drop every cached prefix.

        Raises:
            ValueError: the manifest or the weights do not fit; nothing is changed.
        """
        named = verified_weights(manifest, tensors, self._front.shapes)
        self._is_broken = True
        weights = ((name, to_tensor(array)) for name, array in named)
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        targets = self._front.module.state_dict()
        for name, array in named:
            if name in targets:
                copy_into(targets, name, to_tensor(array))
        self._forget_prefixes()
        self.policy_version = manifest.policy_version
        self._is_broken = False

    def _start(self, folder: str, dtype: Literal["float32", "bfloat16"]) -> "LLM":
        from vllm import LLM

        from unirl.rollout.modality_mask import ModalityMask

        # It complains about a missing tokenizer, which the engine is not meant to have.
        logging.getLogger("vllm.renderers.base").addFilter(lambda record: record.levelno >= logging.ERROR)
        rollout = self._rollout
        return LLM(
            folder,
            skip_tokenizer_init=True,
            use_tqdm_on_load=False,
            dtype=dtype,
            enforce_eager=rollout.enforce_eager,
            max_model_len=rollout.max_model_len,
            max_num_seqs=rollout.max_num_seqs,
            # A seeded request whose prompt is read in pieces fails on the CPU, so prompts are read whole.
            enable_chunked_prefill=False,
            max_num_batched_tokens=max(
                rollout.max_model_len, min(BATCH_TOKENS, rollout.max_num_seqs * rollout.max_model_len)
            ),
            kv_cache_memory_bytes=int(rollout.kv_cache_memory_gib * 2**30),
            block_size=BLOCK_TOKENS,
            enable_prefix_caching=True,
            enable_prompt_embeds=True,
            logits_processors=[ModalityMask],
            logprobs_mode="processed_logprobs",
            seed=0,
        )

    def _check_memory(self) -> None:
        text, rollout = self._front.config.text_config, self._rollout
        values_per_token = 2 * self._num_streams * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
        num_blocks = -(-rollout.max_model_len // BLOCK_TOKENS)
        least = num_blocks * BLOCK_TOKENS * values_per_token * self._dtype.itemsize / 2**30
        if rollout.kv_cache_memory_gib < least:
            raise ValueError(
                f"rollout.kv_cache_memory_gib: expected at least {least:.3g}, which one sequence of "
                f"rollout.max_model_len {rollout.max_model_len} tokens takes in {self._num_streams} streams; got "
                f"{rollout.kv_cache_memory_gib:.3g}; raise it to {least:.3g} times the sequences to decode at once"
            )

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
        streams = self._model.streams
        guided = "generation" in tasks and guidance_scale != 1.0
        streams.num_active = self._num_streams if guided or self.always_all_streams else 1
        streams.modalities = frozenset(MODALITY.values() if self.always_all_streams else (MODALITY[t] for t in tasks))
        streams.guidance_scale = guidance_scale

    def _engine_prompts(
        self, requests: Sequence[RolloutRequest], prompts: Sequence[NDArray[np.int32]]
    ) -> list["EngineInput"]:
        """Questions as embeddings with their image, pictures as ids.

        The salt keeps a prefix from being reused where other streams ran.
        """
        from vllm.inputs.engine import embeds_input, tokens_input

        salt = f"streams-{self._model.streams.num_active}"
        made: list[EngineInput] = [tokens_input(prompt.tolist(), cache_salt=salt) for prompt in prompts]
        questions = {
            index: request.sample.image
            for index, request in enumerate(requests)
            if isinstance(request.sample, UnderstandingSample)
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

    def _run(
        self, prompts: Sequence["EngineInput"], requests: Sequence[RolloutRequest], sampling: SamplingConfig
    ) -> dict[str, "RequestOutput"]:
        engine = self._llm.llm_engine
        outputs: dict[str, Any] = {}
        pending: set[str] = set()
        # vLLM compiles a helper of its log-probabilities even in eager mode, which takes half a minute on a CPU.
        with torch.compiler.set_stance("force_eager" if self._rollout.enforce_eager else "default"):
            try:
                for index, (prompt, request) in enumerate(zip(prompts, requests, strict=True)):
                    for seed_index, seed in enumerate(request.seeds):
                        pending.add(name := f"{index}/{seed_index}")
                        engine.add_request(name, prompt, self._params(request, seed, sampling))
                while engine.has_unfinished_requests():
                    outputs |= {output.request_id: output for output in engine.step() if output.finished}
            finally:
                # After an interrupt nothing may linger in the engine and mix with the next call.
                engine.abort_request(list(pending - outputs.keys()))
        return outputs

    def _params(self, request: RolloutRequest, seed: int, sampling: SamplingConfig) -> "SamplingParams":
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        modality = MODALITY[request.task]
        is_text = modality == "text"
        return SamplingParams(
            temperature=sampling.text.temperature if is_text else sampling.image.temperature,
            max_tokens=sampling.text.max_tokens if is_text else self._front.num_image_tokens,
            stop_token_ids=[self._front.end_id] if is_text else None,
            seed=seed,
            ignore_eos=True,
            detokenize=False,
            logprobs=0,
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={"modality": modality},
        )

    def _completion(self, output: "RequestOutput", request: RolloutRequest) -> Completion:
        from vllm.logprobs import FlatLogprobs

        completion = output.outputs[0]
        ids = np.asarray(completion.token_ids, dtype=np.int32)
        logprobs = completion.logprobs
        # With logprobs=0 each position holds the sampled token alone.
        assert isinstance(logprobs, FlatLogprobs)
        assert logprobs.token_ids == list(completion.token_ids), (
            f"request {request.request_id}: tokens without logprobs"
        )
        text_vocab_size = len(self._front.allowed_text_ids)
        reason = "stop"
        if request.task == "generation":
            assert len(ids) == self._front.num_image_tokens, f"request {request.request_id}: {len(ids)} image codes"
            assert (ids >= text_vocab_size).all(), f"request {request.request_id}: text ids in an image: {ids}"
            ids = ids - np.int32(text_vocab_size)
        else:
            assert (ids < text_vocab_size).all(), f"request {request.request_id}: image codes in an answer: {ids}"
            reason = "stop" if ids[-1] == self._front.end_id else "length"
        return Completion(ids, np.asarray(logprobs.logprobs, dtype=np.float32), reason)

    def _forget_prefixes(self) -> None:
        done = self._llm.reset_prefix_cache()
        assert done, "vLLM kept its prefix cache, which it does while requests run; none may run here"


def _set_environment() -> None:
    """What vLLM reads when it is imported: one process, since the engine's steps are driven from here."""
    for name, value in (
        ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),
        ("VLLM_USE_V2_MODEL_RUNNER", "0"),
        ("VLLM_LOGGING_LEVEL", "ERROR"),
        ("VLLM_NO_USAGE_STATS", "1"),
    ):
        os.environ.setdefault(name, value)


def _family(model: ModelConfig) -> Any:
    """The family's file for the engine: its `load_front` and `write_engine_folder`."""
    name = f"unirl.rollout.vllm_models.{model.family}"
    if importlib.util.find_spec(name) is None:
        raise ValueError(
            f"rollout.backend: expected a family that vLLM can sample; got model.family {model.family}; set "
            "rollout.backend=torch"
        )
    return importlib.import_module(name)
