"""Anole-7b, and any checkpoint of that layout: Chameleon's language model, whose ids 4 to 8195 are image codes.

transformers' own forward sets all image logits to the least number before its loss; here the trunk and the head are
called one after the other.
"""

import functools
from pathlib import Path
from typing import Any

from transformers import ChameleonConfig, ChameleonForConditionalGeneration

from unirl.config import ModelConfig
from unirl.models import joint_generate
from unirl.models.chameleon_vq import ChameleonVq, read_grid
from unirl.models.checkpoint import config_of
from unirl.models.image_codec import refuse_area
from unirl.models.interleaved import ChatLayout, ImageMarkup, JointVocabulary, Markup
from unirl.models.joint_family import JointDrawing, JointFamily
from unirl.models.joint_policy import JointPolicy
from unirl.models.joint_prompts import JointPrompts
from unirl.models.tokenizer import OpenTokenizer, code_range, open_tokenizer

TOKEN_STRINGS = {
    "bos": "<s>",
    "pad": "<pad>",
    "eos": "</s>",
    "end": "<eoss>",
    "begin": "<racm3:break>",
    "separator": "<reserved08706>",
}
CODE_PREFIX, CODE_SUFFIX = "IMGIMG", "Z"
"""Around the decimal digits of an image code, which are spelled A to J."""
TEMPLATE_VERSION = 1


def load_layout(config: ModelConfig, path: Path) -> ChatLayout:
    """Chameleon's conversation: `<s>` user `<reserved08706>` assistant `</s>`, images between break and eoss.

    Raises:
        FileNotFoundError: the folder lacks config.json or the tokenizer.
        ValueError: another family, or a tokenizer without Chameleon's tokens.
    """
    size = int(_own_config(path).get("vocab_size", ChameleonConfig().vocab_size))
    tokenizer = open_tokenizer(path, TOKEN_STRINGS)
    first, count = code_range(_codes(tokenizer), path, f"{CODE_PREFIX}A{CODE_SUFFIX}")
    ids, plain = tokenizer.special, tokenizer.plain(size)
    plain[first : first + count] = False
    # Ids that Chameleon never used, and the place of an image in its processor's texts.
    plain[[id for name, id in tokenizer.vocabulary.items() if name.startswith(("<reserved", "<image>"))]] = False
    return ChatLayout(
        vocabulary=JointVocabulary.around(plain, first_code=first, num_codes=count, drawn=(ids["begin"], ids["eos"])),
        image=ImageMarkup(begin=ids["begin"], end=ids["end"]),
        start=(ids["bos"],),
        turns={
            "system": Markup(after=(ids["separator"],)),
            "user": Markup(after=(ids["separator"],)),
            "assistant": Markup(after=(ids["eos"],)),
        },
        end=ids["eos"],
        encode_text=tokenizer.encode,
        decode_text=tokenizer.decode_plain,
        plain=plain,
        system=config.system_prompt or "",
        fingerprint=tokenizer.fingerprint("anole", TEMPLATE_VERSION, config.system_prompt),
    )


def _codes(tokenizer: OpenTokenizer) -> dict[int, int]:
    """Id of each image code that the tokenizer names."""
    digits = str.maketrans("ABCDEFGHIJ", "0123456789")
    return {
        int(name[len(CODE_PREFIX) : -len(CODE_SUFFIX)].translate(digits)): id
        for name, id in tokenizer.vocabulary.items()
        if name.startswith(CODE_PREFIX) and name.endswith(CODE_SUFFIX)
    }


def _own_config(path: Path) -> dict[str, Any]:
    return config_of(path, "anole", "chameleon")


def load_codec(config: ModelConfig, path: Path) -> ChameleonVq:
    """The checkpoint's own image tokenizer, or that of `config.image_tokenizer`; its pictures have one size."""
    refuse_area(config.image_pixels, "anole")
    return ChameleonVq.load(_tokenizer_folder(config, path))


def _tokenizer_folder(config: ModelConfig, path: Path) -> Path:
    return Path(config.image_tokenizer) if config.image_tokenizer else path


FAMILY = JointFamily(
    module=ChameleonForConditionalGeneration,
    read_config=lambda path: ChameleonConfig.from_dict(_own_config(path)),
    load_layout=load_layout,
    drop=("vqmodel",),
    drawing=JointDrawing(
        name="Anole",
        load_codec=load_codec,
        read_grid=lambda config, path: read_grid(_tokenizer_folder(config, path)),
        null=("<pad>",),
    ),
)
load = load_interleaved = functools.partial(JointPolicy.load, FAMILY)
load_prompts = functools.partial(JointPrompts.load, FAMILY)
load_independent = functools.partial(joint_generate.load_independent, FAMILY)
