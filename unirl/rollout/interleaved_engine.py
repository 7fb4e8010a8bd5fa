"""Replies of alternating text and images by one vLLM engine inside this process."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from unirl.config import ModelConfig
from unirl.rollout.interleaved_law import InterleavedSampling
from unirl.rollout.interleaved_replies import (
    InterleavedRequest,
    Job,
    OnDone,
    Reply,
    Rules,
    make_jobs,
    make_rules,
)
from unirl.rollout.sampler import NamedArrays
from unirl.rollout.vllm_process import (
    EngineProcess,
    EngineSettings,
    family_file,
    ids_and_logprobs,
    sampling_params,
    set_environment,
    with_memory,
)
from unirl.types import WeightsManifest

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.inputs.engine import EngineInput


class InterleavedEngine:
    """One engine with the weights of a checkpoint folder.

    Where a family sees the user's images by their pixels, vision tower and embeddings stay outside the engine and
    prompts enter as embeddings.
    """

    def __init__(self, model: ModelConfig, path: Path, settings: EngineSettings) -> None:
        set_environment()
        from unirl.rollout.interleaved_processor import InterleavedProcessor

        self.policy_version = -1
        self._settings, family = settings, family_file(model)
        self._front = family.load_front(model, path)
        self._dtype = getattr(torch, model.dtype)
        sees_pixels = self._front.layout.sees_pixels
        if sees_pixels:
            nn.Module.to(self._front.module, "cuda" if torch.cuda.is_available() else "cpu")
        settings = with_memory(self._front.config.get_text_config(), settings, self._dtype)
        with tempfile.TemporaryDirectory(prefix="unirl-engine-") as folder:
            family.write_engine_folder(self._front, Path(folder))
            self._engine = EngineProcess(
                self._front,
                Path(folder),
                model.dtype,
                settings,
                processor=InterleavedProcessor,
                logprobs_mode="processed_logits",
                prompt_embeds=sees_pixels,
            )

    def generate(
        self, requests: Sequence[InterleavedRequest], sampling: InterleavedSampling, on_done: OnDone | None = None
    ) -> list[Reply]:
        """One reply for each seed of each request, in their order; `on_done` sees each as soon as it is finished.

        Raises:
            ValueError: a request or the sampling cannot be served. Nothing has been sampled then.
        """
        self._engine.check_whole()
        rules = make_rules(self._front.layout, sampling)
        jobs = make_jobs(requests, rules, self._settings.max_model_len, self._settings.section)
        # Tokens depend on nothing that was read in an earlier call.
        self._engine.forget_prefixes()
        prompts = [self._prompt(job) for job in jobs]
        owners = {f"{i}/{k}": (i, seed) for i, job in enumerate(jobs) for k, seed in enumerate(job.request.seeds)}
        replies: dict[str, Reply] = {}

        def take(output: Any) -> None:
            index, seed = owners[output.request_id]
            reply = replies[output.request_id] = jobs[index].reply(rules, seed, *ids_and_logprobs(output.outputs[0]))
            if on_done is not None:
                on_done(reply)

        work = {name: (prompts[i], self._params(jobs[i], rules, seed)) for name, (i, seed) in owners.items()}
        self._engine.run(work, take)
        return [replies[name] for name in owners]

    def load_weights(self, manifest: WeightsManifest, tensors: NamedArrays) -> None:
        """Replace the weights of engine and front in place and drop every cached prefix.

        Raises:
            ValueError: the manifest or the weights do not fit; nothing is changed.
        """
        self._engine.load_weights(manifest, tensors)
        self.policy_version = manifest.policy_version

    def _prompt(self, job: Job) -> "EngineInput":
        from vllm.inputs.engine import embeds_input, tokens_input

        if not job.request.prompt.pixels:
            return tokens_input(job.prompt_ids.tolist())
        with torch.inference_mode():
            embedded = self._front.embed_row(job.row([], self._front.device))
        return embeds_input(embedded.to(self._dtype).cpu())

    def _params(self, job: Job, rules: Rules, seed: int) -> "SamplingParams":
        return sampling_params(
            seed=seed,
            temperature=1.0,
            max_tokens=job.max_tokens,
            stop=[rules.grammar.end],
            rules=rules,
            opened=job.opened,
        )
