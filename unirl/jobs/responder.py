"""A checkpoint that answers conversations with text and pictures: tokenizers and sampler put together."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from unirl.config import DrawingConfig, ModelConfig, RepliesConfig
from unirl.models.image_codec import ImageCodec
from unirl.models.policy import load_codec, load_interleaved, load_layout
from unirl.rollout.interleaved_law import Drawing, InterleavedSampling
from unirl.rollout.interleaved_replies import InterleavedRequest, OnDone, Reply
from unirl.types import Segment, Turn


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

    def __init__(self, model: ModelConfig, checkpoint: Path, config: RepliesConfig) -> None:
        """Load the tokenizers and start the sampler.

        Raises:
            FileNotFoundError: the checkpoint lacks a file.
            ValueError: it is of another family, or the settings do not fit it.
        """
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.layout, self.codec = load_layout(model, checkpoint), load_codec(model, checkpoint)
        codec_module: torch.nn.Module = self.codec.module  # pyright: ignore[reportAttributeAccessIssue]
        codec_module.to(device)
        self._sampling = _sampling(config, self.codec)
        self._sampler: Sampler = _sampler(model, checkpoint, config, device)

    def requests(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[InterleavedRequest]:
        """Each prompt as ids, its images in codes where the family reads codes.

        Raises:
            ValueError: a text holds a special token of the family.
        """
        return [
            InterleavedRequest(
                request_id=prompt.id,
                prompt=self.layout.encode(
                    prompt.turns, self.codec.encode(self.layout.images_to_code(prompt.turns)), id=prompt.id
                ),
                seeds=tuple(seeds),
            )
            for prompt in prompts
        ]

    def reply(self, requests: Sequence[InterleavedRequest], on_done: OnDone | None = None) -> list[Reply]:
        """A reply for each seed of each request, in their order.

        Raises:
            ValueError: a prompt is too long. Nothing has been sampled then.
        """
        return self._sampler.generate(requests, self._sampling, on_done)

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


def _sampler(model: ModelConfig, checkpoint: Path, config: RepliesConfig, device: str) -> Sampler:
    if config.backend == "torch":
        from unirl.rollout.interleaved_torch import InterleavedTorch

        policy = load_interleaved(model, checkpoint)
        policy.module.to(device)
        return InterleavedTorch(policy, config.max_model_len)
    from unirl.rollout.interleaved_engine import InterleavedEngine
    from unirl.rollout.vllm_process import EngineSettings

    settings = EngineSettings(
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        kv_cache_memory_gib=config.kv_cache_memory_gib,
        enforce_eager=config.enforce_eager,
        section="replies",
    )
    return InterleavedEngine(model, checkpoint, settings)
