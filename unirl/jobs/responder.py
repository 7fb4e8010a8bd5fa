"""A checkpoint that answers conversations with text and pictures: tokenizers and sampler put together."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from unirl.config import DrawingConfig, ModelConfig, RepliesConfig
from unirl.config_rules import ConfigError, Problem
from unirl.models.image_codec import ImageCodec
from unirl.models.policy import check_family, load_codec, load_interleaved, load_layout, max_positions
from unirl.rollout.interleaved_law import Drawing, InterleavedSampling
from unirl.rollout.interleaved_replies import InterleavedRequest, OnDone, Reply, make_jobs, make_rules
from unirl.types import Segment, Turn

MODEL_LEN = 4096
"""Longest prompt plus reply in tokens where neither settings nor checkpoint ask for less."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that ends with the user's turn."""

    id: str
    turns: tuple[Turn, ...]


class Sampler(Protocol):
    """The engine or the plain sampler."""

    def generate(
        self, requests: Sequence[InterleavedRequest], sampling: InterleavedSampling, on_done: OnDone | None = None
    ) -> list[Reply]:
        """One reply for each seed of each request, in their order."""
        ...


class Responder:
    """Holds what answering takes, on a GPU where there is one."""

    def __init__(
        self, model: ModelConfig, checkpoint: Path, config: RepliesConfig, *, section: str = "replies"
    ) -> None:
        """Load the tokenizers; the sampler starts with the first reply.

        Args:
            model: family and precision.
            checkpoint: its folder.
            config: how replies are sampled.
            section: of the configuration that holds it, for messages.

        Raises:
            ConfigError: the checkpoint is of another family, or replies would be longer than it allows.
            FileNotFoundError: the checkpoint lacks a file.
            ValueError: the settings do not fit it.
        """
        self._model, self._checkpoint, self._config, self._section = model, checkpoint, config, section
        check_family(model, checkpoint)
        self._max_model_len = _max_model_len(config, checkpoint, section)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self.layout, self.codec = load_layout(model, checkpoint), load_codec(model, checkpoint)
        codec_module: torch.nn.Module = self.codec.module  # pyright: ignore[reportAttributeAccessIssue]
        codec_module.to(self._device)
        self._sampling = _sampling(config, self.codec)
        self._sampler: Sampler | None = None

    def requests(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[InterleavedRequest]:
        """Each prompt as ids, its images in codes where the family reads codes.

        Raises:
            ValueError: a text holds a special token of the family or a word that it lacks, or a prompt leaves no room
                for its reply.
        """
        requests = [
            InterleavedRequest(
                request_id=prompt.id,
                prompt=self.layout.encode(
                    prompt.turns, self.codec.encode(self.layout.images_to_code(prompt.turns)), id=prompt.id
                ),
                seeds=tuple(seeds),
            )
            for prompt in prompts
        ]
        make_jobs(requests, make_rules(self.layout, self._sampling), self._max_model_len, self._section)
        return requests

    def reply(self, requests: Sequence[InterleavedRequest], on_done: OnDone | None = None) -> list[Reply]:
        """A reply for each seed of each request, in their order.

        Raises:
            ValueError: a prompt is too long. Nothing has been sampled then.
        """
        if self._sampler is None:
            self._sampler = self._start()
        return self._sampler.generate(requests, self._sampling, on_done)

    def _start(self) -> Sampler:
        if self._config.backend == "torch":
            from unirl.rollout.interleaved_torch import InterleavedTorch

            policy = load_interleaved(self._model, self._checkpoint)
            policy.module.to(self._device)
            return InterleavedTorch(policy, self._max_model_len)
        from unirl.rollout.interleaved_engine import InterleavedEngine
        from unirl.rollout.vllm_process import EngineSettings

        settings = EngineSettings(
            max_model_len=self._max_model_len,
            max_num_seqs=self._config.max_num_seqs,
            kv_cache_memory_gib=self._config.kv_cache_memory_gib,
            enforce_eager=self._config.enforce_eager,
            section=self._section,
        )
        return InterleavedEngine(self._model, self._checkpoint, settings)

    def segments(self, reply: Reply) -> tuple[Segment, ...]:
        """The reply as text and pictures; empty texts are left out."""
        return tuple(self._segments(reply))

    def _segments(self, reply: Reply) -> Iterator[Segment]:
        for segment in reply.segments:
            if segment.codes is not None:
                (picture,) = self.codec.decode([segment.codes])
                yield Segment(image=picture, in_loss=True)
            elif segment.text_ids is not None:
                text = self.layout.decode_text(segment.text_ids.tolist()).strip()
                if text:
                    yield Segment(text=text, in_loss=True)


def _sampling(config: RepliesConfig, codec: ImageCodec) -> InterleavedSampling:
    """The settings as the samplers take them; a picture's grid follows from its size."""
    height, width = config.image_size or (1, 1)
    grid = codec.grid(np.zeros((height, width, 3), np.uint8))
    side = codec.pixels_per_code
    if config.image_size is not None and grid != (height // side, width // side):
        raise ValueError(
            f"image_size: expected a size that the checkpoint's image tokenizer keeps; got {height} x {width}, which "
            f"it reads as {grid[0] * side} x {grid[1] * side}; leave the key out, or take that"
        )
    return InterleavedSampling(
        text=_drawing(config.text),
        image=_drawing(config.image),
        max_tokens=config.max_tokens,
        max_images=config.max_images,
        grid=grid,
    )


def _drawing(config: DrawingConfig) -> Drawing:
    return Drawing(**asdict(config))


def _max_model_len(config: RepliesConfig, checkpoint: Path, section: str) -> int:
    """Longest prompt plus reply in tokens.

    Raises:
        ConfigError: the settings ask for more than the checkpoint has positions.
    """
    positions, asked = max_positions(checkpoint), config.max_model_len
    if positions is None:
        return asked or MODEL_LEN
    if asked and asked > positions:
        rule = f"must be at most {positions}, the positions of the checkpoint {checkpoint}"
        fix = f"try {section}.max_model_len={positions}, or leave it out"
        raise ConfigError([Problem(f"{section}.max_model_len", asked, rule, fix)])
    if asked is None and positions < MODEL_LEN:
        log.info("%s: prompt and reply take at most %d tokens, all that the checkpoint has", section, positions)
    return asked or min(MODEL_LEN, positions)
