"""A random checkpoint of Janus-Pro's layout of any size, so that a measurement needs no download."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusImageProcessor,
    JanusProcessor,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.initialization import no_init_weights

from unirl.models.janus_prompts import ASSISTANT, TOKEN_STRINGS, USER

PIXELS_PER_CODE = 16
NUM_WORDS = 1000
"""Words that the tokenizer knows; the other rows of the text table are never drawn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JanusSize:
    """Of trunk, heads, vision tower and image tokenizer; the defaults are a model for a CPU."""

    hidden: int = 512
    layers: int = 8
    head_width: int = 64
    inner: int = 1408
    """Width inside a trunk's feed-forward layer."""
    vocabulary: int = 4096
    """Rows of the text table."""
    num_codes: int = 16384
    codes_per_side: int = 24
    vision_hidden: int = 256
    vision_layers: int = 2
    vq_channels: int = 32
    """Of the image tokenizer's widest picture; 128 in the published one."""

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            ValueError: a width of no whole number of heads, or a vocabulary without room for the words.
        """
        if self.hidden % self.head_width:
            raise ValueError(f"bench: expected a hidden width that {self.head_width} divides; got {self.hidden}")
        if self.vocabulary < NUM_WORDS + 8:
            raise ValueError(f"bench: expected a vocabulary of at least {NUM_WORDS + 8}; got {self.vocabulary}")

    @property
    def num_image_tokens(self) -> int:
        """Codes of a picture."""
        return self.codes_per_side**2

    @property
    def trunk_weights(self) -> int:
        """Of the matrices of all layers: what a token is multiplied with."""
        return self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.inner)


JANUS_1B = JanusSize(
    hidden=2048, layers=24, head_width=128, inner=5632, vocabulary=102400,
    vision_hidden=1024, vision_layers=24, vq_channels=128,
)  # fmt: skip
"""Janus-Pro-1B."""
JANUS_7B = JanusSize(
    hidden=4096, layers=30, head_width=128, inner=11008, vocabulary=102400,
    vision_hidden=1024, vision_layers=24, vq_channels=128,
)  # fmt: skip
"""Janus-Pro-7B."""


def word(index: int) -> str:
    """Name of the text token number `index` of the tokenizer."""
    return f"w{index % NUM_WORDS}"


def write_janus(folder: Path, size: JanusSize, dtype: str = "float32") -> Path:
    """Write the folder: tokenizer of whole words, configurations, random weights; returns it.

    Args:
        folder: to be made.
        size: of the model.
        dtype: "float32" or "bfloat16", of the weights in the file.
    """
    ids = _token_ids()
    model = _random_model(size, getattr(torch, dtype))
    special = {f"{name}_token_id": ids[TOKEN_STRINGS[name]] for name in ("pad", "bos", "eos")}
    drawing = {"boi_token_id": ids[TOKEN_STRINGS["boi"]]}
    model.generation_config = GenerationConfig(**special, generation_kwargs=drawing)
    model.save_pretrained(folder, max_shard_size="1GB")
    side = size.codes_per_side * PIXELS_PER_CODE
    images = JanusImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3, size={"height": side, "width": side})
    tokenizer = _tokenizer(ids)
    JanusProcessor(
        images, tokenizer, use_default_system_prompt=False, num_image_tokens=size.num_image_tokens
    ).save_pretrained(folder)
    images.save_pretrained(folder)
    return folder


def config_of_size(size: JanusSize) -> JanusConfig:
    """The configuration of a model of this size."""
    ids = _token_ids()
    special: dict[str, Any] = {f"{name}_token_id": ids[TOKEN_STRINGS[name]] for name in ("pad", "bos", "eos")}
    heads = size.hidden // size.head_width
    text = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=size.head_width,
        max_position_embeddings=16384,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        **special,
    )
    vision = JanusVisionConfig(
        hidden_size=size.vision_hidden,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=size.vision_hidden // 64,
        image_size=size.codes_per_side * PIXELS_PER_CODE,
        patch_size=PIXELS_PER_CODE,
        projection_dim=size.hidden,
        num_image_tokens=size.num_image_tokens,
    )
    vq = JanusVQVAEConfig(
        num_embeddings=size.num_codes,
        base_channels=size.vq_channels,
        projection_dim=size.hidden,
        image_token_embed_dim=size.hidden,
    )
    return JanusConfig(
        text_config=text,
        vision_config=vision,
        vq_config=vq,
        image_token_id=ids[TOKEN_STRINGS["placeholder"]],
        tie_word_embeddings=False,
    )


def _random_model(size: JanusSize, dtype: torch.dtype) -> Any:
    config = config_of_size(size)
    with no_init_weights():
        model: Any = JanusForConditionalGeneration._from_config(config, dtype=dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, value in model.named_parameters():
            if value.ndim < 2:
                nn.init.zeros_(value) if name.endswith("bias") else nn.init.ones_(value)
            else:
                nn.init.normal_(value, std=value[0].numel() ** -0.5)
    return model


def _token_ids() -> dict[str, int]:
    names = [*TOKEN_STRINGS.values(), USER, ASSISTANT, *map(word, range(NUM_WORDS))]
    return {name: index for index, name in enumerate(names)}


def _tokenizer(ids: dict[str, int]) -> PreTrainedTokenizerFast:
    backend: Any = Tokenizer(models.WordLevel(ids, unk_token=word(0)))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bos = TOKEN_STRINGS["bos"]
    backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, ids[bos])])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{f"{name}_token": TOKEN_STRINGS[name] for name in ("bos", "eos", "pad")},
        extra_special_tokens={
            "image_token": TOKEN_STRINGS["placeholder"],
            "boi_token": TOKEN_STRINGS["boi"],
            "eoi_token": TOKEN_STRINGS["eoi"],
            "user_token": USER,
            "assistant_token": ASSISTANT,
        },
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
