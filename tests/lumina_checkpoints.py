"""Tiny random checkpoint folders in Lumina-DiMOO's public layout: LLaDA weights, a tokenizer, diffusers' VQModel."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.autoencoders.vq_model import VQModel
from huggingface_hub import save_torch_state_dict
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from unirl.models.lumina_prompts import PUBLIC_IDS, PUBLIC_STRINGS, TAGS

WORDS = (
    *("[UNK]", "A.", "B.", "C.", "D.", "draw", "ask", "what", "colour", "is", "the", "cat", "dog", "bird", "on", "a"),
    *("red", "blue", "green", "mat", "two", "three", "yes", "no", "?"),
)
STRINGS = {role: PUBLIC_STRINGS.get(role, f"<{role}>") for role in PUBLIC_IDS}
NUM_WORDLESS = 5
"""Ids before the image codes for which the small tokenizer has no token."""
TINY_SIZES = {"min_area": 12 * 12, "max_area": 24 * 24, "drawn": [8, 12]}
WIDTH, NUM_HEADS, NUM_LAYERS, INNER = 64, 2, 2, 96


@dataclass(frozen=True)
class Layout:
    """Which token has which id."""

    tokens: dict[str, int]
    first_code: int
    num_codes: int

    @property
    def size(self) -> int:
        return self.first_code + self.num_codes


def layout_of(size: str, num_codes: int = 24) -> Layout:
    """The published ids, or the same tokens packed into a small table."""
    words = {word: index for index, word in enumerate(WORDS)}
    if size == "public":
        tags = {tag: 126340 + index for index, tag in enumerate(TAGS)}
        return Layout(words | tags | {STRINGS[role]: index for role, index in PUBLIC_IDS.items()}, 126356, 8192)
    special = [*TAGS, *(text for role, text in STRINGS.items() if role != "first_code")]
    tokens = words | {text: len(WORDS) + index for index, text in enumerate(special)}
    first = len(tokens) + NUM_WORDLESS
    return Layout(tokens | {STRINGS["first_code"]: first}, first, num_codes)


def write_lumina(
    folder: Path,
    size: str = "small",
    *,
    factor: int = 4,
    shard: str = "1GB",
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """Write the checkpoint and return its folder.

    Args:
        folder: where.
        size: "public" takes the published ids and picture sizes, "small" a vocabulary and pictures that are tiny.
        factor: side of the square of pixels that becomes one code, a power of two.
        shard: largest file of weights.
        tied: one table for embedding and head.
        dtype: of the stored weights.
        seed: of the weights.
    """
    layout = layout_of(size)
    folder.mkdir(parents=True)
    save_torch_state_dict(random_weights(layout, seed, dtype, tied=tied), folder, max_shard_size=shard)
    config = published_config(layout, tied=tied)
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": str(dtype).removeprefix("torch.")}))
    _write_tokenizer(folder, layout, names_roles=size == "small")
    if size == "small":
        (folder / "preprocessor_config.json").write_text(json.dumps(TINY_SIZES))
    random_vq(layout.num_codes, factor, seed).save_pretrained(folder / "vqvae")
    return folder


def published_config(layout: Layout, *, tied: bool = False) -> dict[str, object]:
    """config.json with the fields that LLaDA's has."""
    nothing = ("alibi", "attention_layer_norm", "bias_for_layer_norm", "flash_attention", "include_bias")
    nothing += ("include_qkv_bias", "input_emb_norm", "scale_logits", "use_cache")
    return dict.fromkeys(nothing, False) | {
        "model_type": "llada", "architectures": ["LLaDAForMultiModalGeneration"], "transformers_version": "4.46.3",
        "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig"}, "activation_type": "silu",
        "d_model": WIDTH, "n_heads": NUM_HEADS, "n_kv_heads": NUM_HEADS, "n_layers": NUM_LAYERS,
        "mlp_hidden_size": INNER, "mlp_ratio": 4, "vocab_size": layout.size, "embedding_size": layout.size,
        "weight_tying": tied, "max_sequence_length": 4096, "rope": True, "rope_full_precision": True,
        "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "layer_norm_type": "rms", "layer_norm_with_affine": True,
        "block_type": "llama", "block_group_size": 1, "init_device": "meta", "init_fn": "mitchell", "init_std": 0.02,
        "attention_dropout": 0.0, "embedding_dropout": 0.0, "residual_dropout": 0.0, "multi_query_attention": None,
        "mask_token_id": layout.tokens[STRINGS["mask"]], "eos_token_id": layout.tokens[STRINGS["end_text"]],
        "pad_token_id": layout.tokens[STRINGS["end_text"]], "precision": "amp_bf16",
    }  # fmt: skip


def random_weights(
    layout: Layout, seed: int, dtype: torch.dtype = torch.float32, *, tied: bool = False
) -> dict[str, torch.Tensor]:
    """Weights under the official names; logits spread over about two nats."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * gain * columns**-0.5).to(dtype)

    def norm() -> torch.Tensor:
        return (1 + 0.1 * torch.randn(WIDTH, generator=generator)).to(dtype)

    state = {"wte.weight": matrix(layout.size, WIDTH, 2.0), "ln_f.weight": norm()}
    for block in range(NUM_LAYERS):
        own = {name: matrix(WIDTH, WIDTH, 1.2) for name in ("q_proj", "k_proj", "v_proj", "attn_out")}
        own |= {name: matrix(INNER, WIDTH, 1.2) for name in ("ff_proj", "up_proj")}
        own |= {"ff_out": matrix(WIDTH, INNER, 1.2), "attn_norm": norm(), "ff_norm": norm()}
        state |= {f"blocks.{block}.{name}.weight": value for name, value in own.items()}
    if not tied:
        state["ff_out.weight"] = matrix(layout.size, WIDTH, 2.0)
    return {f"model.transformer.{name}": value for name, value in state.items()}


def random_vq(num_codes: int, factor: int, seed: int) -> VQModel:
    """The image tokenizer, small, with codes that random pictures use."""
    depth = factor.bit_length()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VQModel(
            block_out_channels=(8,) * (depth - 1) + (16,), down_block_types=("DownEncoderBlock2D",) * depth,
            up_block_types=("UpDecoderBlock2D",) * depth, layers_per_block=1, latent_channels=4, norm_num_groups=4,
            num_vq_embeddings=num_codes, lookup_from_codebook=True, mid_block_add_attention=False,
        )  # fmt: skip
        latents = model.encode(torch.rand(4, 3, 4 * factor, 4 * factor)).latents.detach()
        centre, spread = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        model.quantize.embedding.weight.data = centre + spread * torch.randn(num_codes, 4)
        # A picture that leaves [0, 1] almost everywhere would be black and white.
        model.decoder.conv_out.bias.data += 0.5
    return model.eval()


def edit_json(file: Path, **changes: object) -> None:
    """Set keys of a JSON file; None removes the key."""
    content = json.loads(file.read_text())
    for key, value in changes.items():
        content.pop(key, None) if value is None else content.update({key: value})
    file.write_text(json.dumps(content))


def _write_tokenizer(folder: Path, layout: Layout, *, names_roles: bool) -> None:
    backend = Tokenizer(WordLevel(layout.tokens, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [text for text in layout.tokens if text not in WORDS]
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", additional_special_tokens=special
    ).save_pretrained(folder)
    if names_roles:
        edit_json(folder / "tokenizer_config.json", token_roles=STRINGS)
