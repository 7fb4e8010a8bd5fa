"""One vLLM engine inside this process: how it is started, stepped and given new weights, whatever it samples."""

import importlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from unirl.config import ModelConfig
from unirl.models.checkpoint import copy_into
from unirl.models.named_arrays import slice_checksums, to_tensor
from unirl.rollout.completions import verified_weights
from unirl.rollout.sampler import NamedArrays
from unirl.types import WeightsManifest

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.inputs.engine import EngineInput
    from vllm.outputs import CompletionOutput

BLOCK_TOKENS = 32
"""Tokens of one block of the key-value cache: the least that CPU kernels take; prompts share whole blocks."""
BATCH_TOKENS = 16384
"""Most prompt tokens read in one step, unless one prompt alone is longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Size and habits of an engine."""

    max_model_len: int
    """Longest prompt plus completion in tokens."""
    max_num_seqs: int
    """Most sequences decoded at once."""
    kv_cache_memory_gib: float | None
    """Memory for the key-value cache; None takes 1 GiB, or what one sequence of the longest takes if that is more."""
    enforce_eager: bool = True
    """Skip torch.compile and CUDA graphs; starts faster, samples slower."""
    sleeps: bool = False
    """Whether `sleep` is to give GPU memory back; without a GPU there is none to give."""
    section: str = "rollout"
    """Section of the configuration that holds these, for messages."""


class EngineProcess:
    """An engine for the model in a folder that a family's file wrote.

    The model's weights are the engine's; `front` is the part of the policy that stays outside it.
    """

    def __init__(
        self,
        front: Any,
        folder: Path,
        dtype: Literal["float32", "bfloat16"],
        settings: EngineSettings,
        *,
        processor: type,
        logprobs_mode: Literal["processed_logprobs", "processed_logits"],
        prompt_embeds: bool,
    ) -> None:
        from vllm import LLM

        assert settings.kv_cache_memory_gib is not None, "see with_memory"
        # It complains about a missing tokenizer, which the engine is not meant to have.
        logging.getLogger("vllm.renderers.base").addFilter(lambda record: record.levelno >= logging.ERROR)
        self._front, self._eager, self._is_broken = front, settings.enforce_eager, False
        self._asleep: set[str] = set()
        self.llm = LLM(
            str(folder),
            skip_tokenizer_init=True,
            use_tqdm_on_load=False,
            dtype=dtype,
            enforce_eager=settings.enforce_eager,
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            # A seeded request whose prompt is read in pieces fails on the CPU, so prompts are read whole.
            enable_chunked_prefill=False,
            max_num_batched_tokens=max(
                settings.max_model_len, min(BATCH_TOKENS, settings.max_num_seqs * settings.max_model_len)
            ),
            kv_cache_memory_bytes=int(settings.kv_cache_memory_gib * 2**30),
            block_size=BLOCK_TOKENS,
            enable_prefix_caching=True,
            enable_prompt_embeds=prompt_embeds,
            logits_processors=[processor],
            logprobs_mode=logprobs_mode,
            enable_sleep_mode=settings.sleeps and torch.cuda.is_available(),
            seed=0,
        )
        # In one process the worker's model is this very object.
        self.model: Any = self.llm.apply_model(lambda module: module)[0]

    def check_whole(self) -> None:
        """Refuse to sample from half-loaded weights.

        Raises:
            RuntimeError: an update failed in the middle.
        """
        if self._is_broken:
            raise RuntimeError(
                "sampler: expected whole weights; got an update that failed half-way; start a new worker"
            )

    def run(
        self,
        requests: Mapping[str, tuple["EngineInput", "SamplingParams"]],
        on_done: Callable[[Any], None] | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> dict[str, "RequestOutput"]:
        """Outputs of requests by their names; `on_done` sees each as soon as it is finished.

        `on_step` is called after each step of the engine and may load weights.
        """
        engine = self.llm.llm_engine
        self._wake("weights", "kv_cache")
        outputs: dict[str, Any] = {}
        pending: set[str] = set()
        # vLLM compiles a helper of its log-probabilities even in eager mode, which takes half a minute on a CPU.
        with torch.compiler.set_stance("force_eager" if self._eager else "default"):
            try:
                for name, (prompt, params) in requests.items():
                    pending.add(name)
                    engine.add_request(name, prompt, params)
                while engine.has_unfinished_requests():
                    for output in engine.step():
                        if output.finished:
                            outputs[output.request_id] = output
                            if on_done is not None:
                                on_done(output)
                    if on_step is not None and engine.has_unfinished_requests():
                        on_step()
            finally:
                # After an interrupt nothing may linger in the engine and mix with the next call.
                engine.abort_request(list(pending - outputs.keys()))
        return outputs

    def load_weights(self, manifest: WeightsManifest, tensors: NamedArrays) -> None:
        """Replace the weights of engine and front in place and drop every key and value.

        Sequences under way go on: the new weights read their prompts and tokens anew, except that a prompt given as
        embeddings stays as it was embedded.

        Raises:
            ValueError: the manifest or the weights do not fit; nothing is changed.
        """
        named = verified_weights(manifest, tensors, self._front.shapes)
        # The cache follows with the next request: until then the learner may need the room.
        self._wake("weights")
        self._is_broken = True
        weights = ((name, to_tensor(array)) for name, array in named)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        # On the meta device lies what the engine alone holds.
        targets = {name: value for name, value in self._front.module.state_dict().items() if not value.is_meta}
        for name, array in named:
            if name in targets:
                copy_into(targets, name, to_tensor(array))
        self.llm.reset_prefix_cache(reset_running_requests=True)
        self.llm.llm_engine.set_weight_version(str(manifest.policy_version))
        self._is_broken = False

    def weight_slices(self) -> dict[str, str] | None:
        """Checksums of a fixed slice of the weights that lie here under the checkpoint's names and in its shapes.

        None while it sleeps.

        The engine names and fuses weights in its own way: one of its tensors is taken for the checkpoint's where both
        alone have the last words of its name.
        """
        if "weights" in self._asleep:
            return None
        shapes, own = self._front.shapes, dict(self.model.named_parameters())
        theirs, ours = _by_last_words(shapes), _by_last_words(own)
        pairs = [(names[0], ours[words][0]) for words, names in theirs.items() if _is_one(names, ours.get(words))]
        # Tables are padded with rows at their end; what was packed for the CPU's kernels is empty.
        held = {name: own[other][: shapes[name][0]] for name, other in pairs if own[other].ndim and shapes[name]}
        front = {name: value for name, value in self._front.module.state_dict().items() if not value.is_meta}
        return slice_checksums(front, shapes) | slice_checksums(held, shapes)

    def sleep(self) -> None:
        """Move the weights to main memory and give back the key-value cache, until the next call that needs them."""
        if len(self._asleep) == 1:
            self._wake("kv_cache")
        if not self._asleep:
            self.llm.sleep(level=1)
            self._asleep = {"weights", "kv_cache"}

    def _wake(self, *parts: str) -> None:
        if asleep := [part for part in parts if part in self._asleep]:
            self.llm.wake_up(tags=asleep)
            self._asleep -= set(asleep)

    def forget_prefixes(self) -> None:
        """Read every coming prompt anew."""
        done = self.llm.reset_prefix_cache()
        assert done, "vLLM kept its prefix cache, which it does while requests run; none may run here"


def _by_last_words(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by what follows the words for the whole model: from the number of the layer on, or the last two words."""
    found: dict[str, list[str]] = {}
    for name in names:
        words = name.split(".")
        start = next((place for place, word in enumerate(words) if word.isdigit()), max(0, len(words) - 2))
        found.setdefault(".".join(words[start:]), []).append(name)
    return found


def _is_one(theirs: Sequence[str], ours: Sequence[str] | None) -> bool:
    return ours is not None and len(theirs) == len(ours) == 1


def sampling_params(*, seed: int, temperature: float, max_tokens: int, stop: Sequence[int], **extra: Any) -> Any:
    """Parameters of one sequence, whose tokens come back with their own log-probabilities.

    `extra` goes to the logits processor as it is, not copied.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=temperature,
        max_tokens=max_tokens,
        stop_token_ids=list(stop),
        seed=seed,
        ignore_eos=True,
        detokenize=False,
        logprobs=0,
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args=extra,
    )
    params.skip_clone = True
    return params


def ids_and_logprobs(completion: "CompletionOutput") -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Sampled ids [T] and the values that the engine kept of them [T]."""
    from vllm.logprobs import FlatLogprobs

    logprobs = completion.logprobs
    # With logprobs=0 each position holds the sampled token alone.
    assert isinstance(logprobs, FlatLogprobs)
    assert logprobs.token_ids == list(completion.token_ids), "tokens without logprobs"
    return np.asarray(completion.token_ids, dtype=np.int32), np.asarray(logprobs.logprobs, dtype=np.float32)


def version_spans(completion: "CompletionOutput") -> tuple[tuple[int, int], ...]:
    """(first token, version) of each stretch of tokens; -1 is the checkpoint that the engine was built from."""
    spans = completion.weight_versions or []
    return tuple((span.start, -1 if span.version == "default" else int(span.version)) for span in spans)


def with_memory(text: Any, settings: EngineSettings, dtype: torch.dtype, num_streams: int = 1) -> EngineSettings:
    """Settings whose key-value cache holds one sequence at least.

    Args:
        text: transformers configuration of the trunk.
        settings: with the memory, or None to choose it.
        dtype: of the cache.
        num_streams: caches that a sequence fills.

    Raises:
        ValueError: the memory given does not hold one sequence.
    """
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    values_per_token = 2 * num_streams * text.num_hidden_layers * text.num_key_value_heads * head_dim
    num_blocks = -(-settings.max_model_len // BLOCK_TOKENS)
    least = num_blocks * BLOCK_TOKENS * values_per_token * dtype.itemsize / 2**30
    memory = max(least, 1.0) if settings.kv_cache_memory_gib is None else settings.kv_cache_memory_gib
    if memory < least:
        section = settings.section
        raise ValueError(
            f"{section}.kv_cache_memory_gib: expected at least {least:.3g}, which one sequence of "
            f"{section}.max_model_len {settings.max_model_len} tokens takes in {num_streams} streams; got "
            f"{memory:.3g}; raise it to {least:.3g} times the sequences to decode at once"
        )
    return replace(settings, kv_cache_memory_gib=memory)


def set_environment() -> None:
    """What vLLM reads when it is imported: one process, since the engine's steps are driven from here."""
    for name, value in (
        ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),
        ("VLLM_USE_V2_MODEL_RUNNER", "0"),
        ("VLLM_LOGGING_LEVEL", "ERROR"),
        ("VLLM_NO_USAGE_STATS", "1"),
    ):
        os.environ.setdefault(name, value)
    # It looks at every name of torch.distributed, deprecated ones too.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.reduce_op`", category=FutureWarning)


def family_file(model: ModelConfig) -> Any:
    """The family's file for the engine: its `load_front` and `write_engine_folder`."""
    name = f"unirl.rollout.vllm_models.{model.family}"
    if importlib.util.find_spec(name) is None:
        raise ValueError(
            f"rollout.backend: expected a family that vLLM can sample; got model.family {model.family}; set "
            "rollout.backend=torch"
        )
    return importlib.import_module(name)
