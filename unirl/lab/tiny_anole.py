"""The lab's tiny Anole: Chameleon's network and image tokenizer, a word-level tokenizer, and their folder.

Text and image codes share one vocabulary in Anole's order: four special tokens, the codes, the marks, and then words.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    ChameleonImageProcessor,
    ChameleonProcessor,
    ChameleonVQVAE,
    ChameleonVQVAEConfig,
    PreTrainedTokenizerFast,
)

from unirl.lab.checkpoint_folder import write_folder
from unirl.lab.unified_visual import WORDS
from unirl.lab.world import CODE_DIM, IMAGE_PX, NUM_CODES, NUM_IMAGE_TOKENS
from unirl.models.anole import CODE_PREFIX, CODE_SUFFIX, TOKEN_STRINGS
from unirl.models.chameleon_vq import META_SCALE, Decoder
from unirl.models.checkpoint import write_weights

HIDDEN = 96
UNKNOWN, IMAGE_PLACEHOLDER = "<unk>", "<reserved08707>"
TOKENS = (
    *(TOKEN_STRINGS["bos"], TOKEN_STRINGS["pad"], TOKEN_STRINGS["eos"], UNKNOWN),
    *(
        f"{CODE_PREFIX}{str(code).translate(str.maketrans('0123456789', 'ABCDEFGHIJ'))}{CODE_SUFFIX}"
        for code in range(NUM_CODES)
    ),
    *(TOKEN_STRINGS["end"], TOKEN_STRINGS["begin"], TOKEN_STRINGS["separator"], IMAGE_PLACEHOLDER),
    *WORDS,
)
"""The whole vocabulary; a token's place is its id, and no id is spare."""
VQ_PREFIX = "model.vqmodel."


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer: splits at blanks and special strings, prepends bos."""
    bos = TOKEN_STRINGS["bos"]
    backend = Tokenizer(models.WordLevel({token: id for id, token in enumerate(TOKENS)}, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, TOKENS.index(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=TOKEN_STRINGS["eos"],
        pad_token=TOKEN_STRINGS["pad"],
        unk_token=UNKNOWN,
        sep_token=TOKEN_STRINGS["separator"],
        extra_special_tokens=list(TOKENS[: -len(WORDS)]),
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def make_config() -> ChameleonConfig:
    """0.5 M parameters and the image tokenizer: 4 layers of width 96, heads of 32, tied embeddings.

    The base channels of the image tokenizer are 32 because its GroupNorm has 32 groups.
    """
    ids = {token: id for id, token in enumerate(TOKENS)}
    return ChameleonConfig(
        vocab_size=len(TOKENS),
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=512,
        initializer_range=0.06,
        bos_token_id=ids[TOKEN_STRINGS["bos"]],
        pad_token_id=ids[TOKEN_STRINGS["pad"]],
        eos_token_id=ids[TOKEN_STRINGS["eos"]],
        tie_word_embeddings=True,
        vocabulary_map=ids | {"<image>": ids[IMAGE_PLACEHOLDER]},
        vq_config=ChameleonVQVAEConfig(
            embed_dim=CODE_DIM,
            num_embeddings=NUM_CODES,
            latent_channels=32,
            resolution=IMAGE_PX,
            base_channels=32,
            channel_multiplier=[1, 1, 1],
            num_res_blocks=1,
            attn_type="none",
        ),
    )


def make_vq(seed: int) -> Any:
    """The image tokenizer with random weights and its codebook on the unit sphere, for squares of 4 x 4 pixels."""
    config: Any = make_config().vq_config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vq: Any = ChameleonVQVAE(config)
        vq.decoder = Decoder(config)
    codebook = vq.quantize.embedding.weight
    codebook.data.copy_(normalize(codebook.data, dim=-1))
    return vq.float().eval()


def make_weights(seed: int) -> dict[str, Tensor]:
    """Random weights of the language model; the torch generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module: Any = ChameleonForConditionalGeneration(make_config())
    module.model.vqmodel = None
    return module.state_dict()


def write_checkpoint(
    weights: dict[str, Tensor], vq: nn.Module, path: Path, facts: dict[str, Any] | None = None
) -> None:
    """Write the public layout whole or not at all: float16 weights, config, tokenizer, processor, facts in lab.json.

    Raises:
        ValueError: `path` is there and is not a checkpoint folder.
    """
    write_folder(path, lambda folder: _write_files(weights, vq, folder), facts)


def _write_files(weights: dict[str, Tensor], vq: nn.Module, folder: Path) -> None:
    tokenizer = make_tokenizer()
    side = {"height": IMAGE_PX, "width": IMAGE_PX}
    images = ChameleonImageProcessor(size={"shortest_edge": IMAGE_PX}, crop_size=side, rescale_factor=META_SCALE.factor)
    ChameleonProcessor(images, tokenizer, NUM_IMAGE_TOKENS, IMAGE_PLACEHOLDER).save_pretrained(folder)
    images.save_pretrained(folder)
    config = make_config()
    config.architectures = [ChameleonForConditionalGeneration.__name__]
    config.dtype = torch.float16
    config.save_pretrained(folder)
    own = {name: value for name, value in weights.items() if name != "lm_head.weight"}
    state = own | {VQ_PREFIX + name: value for name, value in vq.state_dict().items()}
    write_weights(folder, {name: value.half() for name, value in state.items()})
