"""The lab's tiny model, a true `JanusForConditionalGeneration`, and its checkpoint folder."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize
from transformers import (
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusImageProcessor,
    JanusProcessor,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
)

from unirl.lab.checkpoint_folder import write_folder
from unirl.lab.tokenizer import BEGIN_OF_IMAGE, BOS, EMBEDDING_ROWS, EOS, IMAGE_PLACEHOLDER, PAD, make_tokenizer
from unirl.lab.world import CELL_PX, CODE_DIM, IMAGE_PX, NUM_CODES, NUM_IMAGE_TOKENS

HIDDEN = 96
DEFAULT_GUIDANCE = 1.5


def make_config() -> JanusConfig:
    """1.0 M parameters: 4 layers of width 96, heads of 32, 25 image tokens of 4 x 4 px, 96 codes.

    The base channels are 32 because the VQ's GroupNorm has 32 groups.
    """
    ids = make_tokenizer().get_vocab()
    text = LlamaConfig(
        vocab_size=EMBEDDING_ROWS,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=128,
        rms_norm_eps=1e-6,
        initializer_range=0.06,
        pad_token_id=ids[PAD],
        bos_token_id=ids[BOS],
        eos_token_id=ids[EOS],
        tie_word_embeddings=True,
    )
    vision = JanusVisionConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=IMAGE_PX,
        patch_size=CELL_PX,
        mlp_ratio=2.0,
        initializer_range=0.06,
        projection_dim=HIDDEN,
        depth=2,
        num_image_tokens=NUM_IMAGE_TOKENS,
    )
    vq = JanusVQVAEConfig(
        embed_dim=CODE_DIM,
        num_embeddings=NUM_CODES,
        latent_channels=32,
        base_channels=32,
        channel_multiplier=[1, 1, 1],
        num_res_blocks=1,
        projection_dim=HIDDEN,
        num_hidden_layers=2,
        image_token_embed_dim=HIDDEN,
    )
    return JanusConfig(
        text_config=text,
        vision_config=vision,
        vq_config=vq,
        image_token_id=ids[IMAGE_PLACEHOLDER],
        tie_word_embeddings=True,
    )


def make_model(seed: int) -> JanusForConditionalGeneration:
    """A float32 model with random weights; the global torch generator is left as it was.

    The codebook lies on the unit sphere: `decode` normalises code vectors and `encode` does not.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = JanusForConditionalGeneration(make_config()).float()
    codebook = model.model.vqmodel.quantize.embedding.weight
    codebook.data.copy_(normalize(codebook.data, dim=-1))
    return model.eval()


def load_model(path: Path) -> JanusForConditionalGeneration:
    """The model of a checkpoint folder, float32, in evaluation mode.

    Raises:
        ValueError: the weights lack tensors that the model has, or hold others.
    """
    loaded: Any = JanusForConditionalGeneration.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    model, report = loaded
    wrong = {kind: sorted(map(str, keys)) for kind, keys in report.items() if keys and kind != "error_msgs"}
    if wrong:
        raise ValueError(
            f"expected the lab's tensors in {path}; got {wrong}; make the checkpoint again with `unirl lab pretrain`"
        )
    return model.eval()


def write_checkpoint(model: JanusForConditionalGeneration, path: Path, facts: dict[str, Any] | None = None) -> None:
    """Write a Hugging Face folder whole or not at all: float16 weights, configs, tokenizer.

    Facts go to lab.json with the sha256 of every file. An older folder at `path` is replaced.

    Raises:
        ValueError: `path` is there and is not a checkpoint folder.
    """
    write_folder(path, lambda folder: _write_files(model, folder), facts)


def make_random_checkpoint(path: Path, seed: int) -> None:
    """Write a checkpoint folder of the lab's layout with random weights."""
    write_checkpoint(make_model(seed), path)


def to_pixels(images: NDArray[np.uint8]) -> Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] in [-1, 1], as both vision tower and VQ take it."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def decode_codes(model: JanusForConditionalGeneration, codes: Tensor) -> NDArray[np.uint8]:
    """Image codes int64 [N, 25] -> RGB uint8 [N, 20, 20, 3]."""
    vq: Any = model.model.vqmodel  # its annotations ask for LongTensor
    pixels = torch.cat([vq.decode(chunk) for chunk in codes.split(128)])
    return ((pixels.permute(0, 2, 3, 1) + 1) * 127.5).round().clamp(0, 255).byte().numpy()


@torch.no_grad()
def encode_images(model: JanusForConditionalGeneration, images: NDArray[np.uint8]) -> Tensor:
    """RGB uint8 [N, 20, 20, 3] -> image codes int64 [N, 25]."""
    vq: Any = model.model.vqmodel
    return vq.encode(to_pixels(images)).image_tokens.view(len(images), -1)


def _write_files(model: JanusForConditionalGeneration, path: Path) -> None:
    tokenizer = make_tokenizer()
    images = JanusImageProcessor(
        image_mean=[0.5] * 3, image_std=[0.5] * 3, size={"height": IMAGE_PX, "width": IMAGE_PX}, min_size=IMAGE_PX
    )
    small = make_model(0).half()
    small.load_state_dict(model.state_dict())
    small.config.dtype = torch.float16
    small.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=24,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        guidance_scale=DEFAULT_GUIDANCE,
        generation_kwargs={"boi_token_id": tokenizer.convert_tokens_to_ids(BEGIN_OF_IMAGE)},
    )
    small.save_pretrained(path)
    JanusProcessor(
        images, tokenizer, use_default_system_prompt=False, num_image_tokens=NUM_IMAGE_TOKENS
    ).save_pretrained(path)
    images.save_pretrained(path)
