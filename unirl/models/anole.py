"""Anole-7b, and any checkpoint of that layout: Chameleon's language model, whose ids 4 to 8195 are image codes.

transformers' own forward sets all image logits to the least number before its loss; here the trunk and the head are
called one after the other.
"""

import functools
from pathlib import Path
from typing import Any

from transformers import ChameleonConfig, ChameleonForConditionalGeneration

from unirl.config import ModelConfig
from unirl.models.checkpoint import read_json
from unirl.models.interleaved import ChatLayout, ImageMarkup, JointVocabulary, Markup
from unirl.models.joint_policy import JointFamily, JointPolicy
from unirl.models.tokenizer import OpenTokenizer, open_tokenizer

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
    first, count = _codes(tokenizer, path)
    ids = tokenizer.special
    plain = tokenizer.plain(size)
    plain[first : first + count] = False
    drawable = plain.copy()
    drawable[[ids["begin"], ids["eos"]]] = True
    system = tokenizer.encode(config.system_prompt) if config.system_prompt else []
    return ChatLayout(
        vocabulary=JointVocabulary(size=size, first_code=first, num_codes=count, drawable_text=drawable),
        image=ImageMarkup(begin=ids["begin"], end=ids["end"]),
        start=(ids["bos"], *system),
        turns={
            "system": Markup(after=(ids["separator"],)),
            "user": Markup(after=(ids["separator"],)),
            "assistant": Markup(after=(ids["eos"],)),
        },
        end=ids["eos"],
        encode_text=tokenizer.encode,
        plain=plain,
        fingerprint=tokenizer.fingerprint("anole", TEMPLATE_VERSION, config.system_prompt),
    )


def _codes(tokenizer: OpenTokenizer, path: Path) -> tuple[int, int]:
    """First id and number of the image codes, from their names.

    Raises:
        ValueError: there are none, or code c is not id `first + c`.
    """
    digits = str.maketrans("ABCDEFGHIJ", "0123456789")
    found: dict[int, int] = {}
    for name, id in tokenizer.vocabulary.items():
        if name.startswith(CODE_PREFIX) and name.endswith(CODE_SUFFIX):
            found[int(name[len(CODE_PREFIX) : -len(CODE_SUFFIX)].translate(digits))] = id
    first = found.get(0, -1)
    if sorted(found) != list(range(len(found))) or any(id != first + code for code, id in found.items()) or not found:
        raise ValueError(
            f"{path}: expected image codes named {CODE_PREFIX}A{CODE_SUFFIX} and on, with consecutive ids; got "
            f"{len(found)} names from id {first}; take the tokenizer files of the converted checkpoint"
        )
    return first, len(found)


def _own_config(path: Path) -> dict[str, Any]:
    raw = read_json(path / "config.json")
    if raw.get("model_type") != "chameleon":
        raise ValueError(
            f"{path}: expected a checkpoint of model_type 'chameleon' for model.family anole; got "
            f"{raw.get('model_type')!r}; set model.family to its family, or point model.path elsewhere"
        )
    return raw


FAMILY = JointFamily(
    module=ChameleonForConditionalGeneration,
    read_config=lambda path: ChameleonConfig.from_dict(_own_config(path)),
    load_layout=load_layout,
    drop=("vqmodel",),
)
load = functools.partial(JointPolicy.load, FAMILY)
