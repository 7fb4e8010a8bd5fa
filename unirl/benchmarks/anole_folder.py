"""A random checkpoint of Anole's layout of any size, image tokenizer included, so that a measurement needs none."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import ChameleonConfig, ChameleonForConditionalGeneration, PreTrainedTokenizerFast

from unirl.models.anole import CODE_PREFIX, CODE_SUFFIX, TOKEN_STRINGS
from unirl.models.chameleon_vq import Decoder

PIXELS_PER_CODE = 16
HEAD_WIDTH = 64
LEAST_WORDS = 64
"""Text tokens that every vocabulary has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnoleSize:
    """Of a language model and its image tokenizer."""

    hidden: int = 256
    """Width; a multiple of 64, since a head has 64."""
    layers: int = 4
    vocabulary: int = 4096
    num_codes: int = 1024
    codes_per_side: int = 8
    """Codes along a side of a picture."""

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            ValueError: a width of no whole number of heads, or a vocabulary that has no room for codes and words.
        """
        if self.hidden % HEAD_WIDTH:
            raise ValueError(f"bench sft: expected --hidden to be a multiple of {HEAD_WIDTH}; got {self.hidden}")
        least = self.num_codes + LEAST_WORDS + 8
        if self.vocabulary < least:
            raise ValueError(
                f"bench sft: expected --vocabulary of at least {least}, since {self.num_codes} ids are image codes and "
                f"8 are marks; got {self.vocabulary}"
            )


def word(index: int) -> str:
    """Name of the text token number `index` of the tokenizer."""
    return f"w{index}"


def write_anole(folder: Path, size: AnoleSize) -> Path:
    """Write the folder: tokenizer of whole words, configuration, random weights; returns it."""
    folder.mkdir(parents=True)
    codes = [
        CODE_PREFIX + "".join("ABCDEFGHIJ"[int(digit)] for digit in str(code)) + CODE_SUFFIX
        for code in range(size.num_codes)
    ]
    marks = [TOKEN_STRINGS[name] for name in ("end", "begin", "separator")]
    special = ["<s>", "<pad>", "</s>", "<unk>", *codes, *marks, "<image>"]
    names = [*special, *map(word, range(size.vocabulary - len(special)))]
    ids = {name: id for id, name in enumerate(names)}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special[4:]})  # pyright: ignore[reportArgumentType]
    tokenizer.save_pretrained(folder)
    side = size.codes_per_side * PIXELS_PER_CODE
    config = ChameleonConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=-(-size.hidden * 8 // 3 // 64) * 64,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // HEAD_WIDTH,
        num_key_value_heads=size.hidden // HEAD_WIDTH,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        tie_word_embeddings=False,
        vocabulary_map={name: ids[name] for name in special},
        vq_config={
            "embed_dim": 32,
            "latent_channels": 32,
            "num_embeddings": size.num_codes,
            "resolution": side,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 2, 2, 4],
            "num_res_blocks": 1,
        },
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = ChameleonForConditionalGeneration(config)
        model.model.vqmodel.decoder = Decoder(model.model.vqmodel.config)
    config.save_pretrained(folder)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
