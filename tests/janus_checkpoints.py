"""Tiny random checkpoint folders in Janus-Pro's public layout: untied heads, its own special ids, a real VQ."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
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

from unirl.data.records import file_name, write_samples
from unirl.models.janus_prompts import TOKEN_STRINGS
from unirl.types import GenerationSample, UnderstandingSample

WORDS = (
    *"ABCD?:",
    *("what", "colour", "is", "the", "cat", "dog", "bird", "on", "a", "red", "blue", "green", "mat", "yes", "no"),
)
SIDE, PATCH = 8, 2


@dataclass(frozen=True)
class Layout:
    """Where the special tokens lie, and sizes in the proportions of the published checkpoint."""

    vocab_size: int
    ids: dict[str, int]
    heads: int = 2
    """Of the trunk, each of 32."""
    mlp: int = 96
    layers: int = 2


def layout_of(size: str) -> Layout:
    """Ids as in the public 1B and 7B checkpoints, or packed into a small table."""
    if size == "small":
        ids = {name: index for index, name in enumerate(TOKEN_STRINGS)}
        return Layout(64, ids | {"user": 6, "assistant": 7})
    placeholder = {"1B": 100581, "7B": 100594}[size]
    ids = {"bos": 100000, "eos": 100001, "pad": 100002, "boi": 100016, "eoi": 100593, "placeholder": placeholder}
    heads, mlp, layers = {"1B": (2, 176, 2), "7B": (4, 344, 3)}[size]
    return Layout(102400, ids | {"user": 100003, "assistant": 100004}, heads, mlp, layers)


def write_janus(
    folder: Path,
    size: str = "small",
    seed: int = 0,
    shard: str = "1GB",
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write the checkpoint and return its folder."""
    layout = layout_of(size)
    model = random_model(layout, seed, tied=tied)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    tokenizer = _tokenizer(layout)
    images = JanusImageProcessor(
        image_mean=[0.5] * 3, image_std=[0.5] * 3, size={"height": SIDE, "width": SIDE}, min_size=1
    )
    processor = JanusProcessor(
        images, tokenizer, use_default_system_prompt=False, num_image_tokens=(SIDE // PATCH) ** 2
    )
    processor.save_pretrained(folder)
    images.save_pretrained(folder)
    return folder


def random_model(layout: Layout, seed: int, *, tied: bool = False) -> JanusForConditionalGeneration:
    hidden, ids = 32 * layout.heads, layout.ids
    special = {f"{name}_token_id": ids[name] for name in ("pad", "bos", "eos")}
    text = LlamaConfig(
        vocab_size=layout.vocab_size, hidden_size=hidden, intermediate_size=layout.mlp, head_dim=32,
        num_hidden_layers=layout.layers, num_attention_heads=layout.heads, num_key_value_heads=layout.heads,
        max_position_embeddings=256, rms_norm_eps=1e-6, initializer_range=0.2, tie_word_embeddings=tied, **special,
    )  # fmt: skip
    vision = JanusVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=PATCH, mlp_ratio=2.0,
        projection_dim=hidden, depth=2, num_image_tokens=(SIDE // PATCH) ** 2, initializer_range=0.2,
    )  # fmt: skip
    vq = JanusVQVAEConfig(
        embed_dim=8, num_embeddings=48, latent_channels=32, base_channels=32, channel_multiplier=[1, 2],
        num_res_blocks=2, projection_dim=hidden, num_hidden_layers=2, image_token_embed_dim=hidden,
        initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = JanusForConditionalGeneration(
            JanusConfig(
                text_config=text,
                vision_config=vision,
                vq_config=vq,
                image_token_id=ids["placeholder"],
                tie_word_embeddings=tied,
            )
        )
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=1.2 * parameter[0].numel() ** -0.5)
    model.generation_config = GenerationConfig(**special, generation_kwargs={"boi_token_id": ids["boi"]})
    return model.eval()


def write_prompts(folder: Path) -> Path:
    """Write held-out questions and prompts in the checkpoints' words, three of each, and return their folder."""
    picture = np.random.default_rng(0).integers(0, 255, (9, 7, 3)).astype(np.uint8)
    questions = [
        UnderstandingSample(
            id=f"q{i}", image=picture, question=f"what colour is the {w} ?", choices=("red", "blue"), answer="A"
        )
        for i, w in enumerate(("cat", "dog", "mat"))
    ]
    drawings = [GenerationSample(id=f"g{i}", prompt=f"a {w} cat") for i, w in enumerate(("red", "blue", "green"))]
    folder.mkdir()
    for kind, samples in ((UnderstandingSample, questions), (GenerationSample, drawings)):
        write_samples(folder / file_name(kind), samples, kind)
    return folder


def edit_json(file: Path, **changes: object) -> None:
    """Set keys of a JSON file; None removes the key."""
    content = json.loads(file.read_text())
    for key, value in changes.items():
        content.pop(key, None) if value is None else content.update({key: value})
    file.write_text(json.dumps(content))


def _tokenizer(layout: Layout) -> PreTrainedTokenizerFast:
    strings = TOKEN_STRINGS | {"user": "<|User|>", "assistant": "<|Assistant|>"}
    vocabulary = {strings[name]: index for name, index in layout.ids.items()}
    vocabulary |= {word: 8 + index for index, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bos = strings["bos"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, layout.ids["bos"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{f"{name}_token": strings[name] for name in ("bos", "eos", "pad")},
        extra_special_tokens={
            "image_token": strings["placeholder"],
            "boi_token": strings["boi"],
            "eoi_token": strings["eoi"],
            "user_token": strings["user"],
            "assistant_token": strings["assistant"],
        },
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
