"""Liquid, and any checkpoint of that layout: Gemma, whose table is continued by image codes that no tokenizer names.

Image code c is id `len(tokenizer) + c`, so one token more in the tokenizer would shift every code.
"""

import functools
from pathlib import Path

from transformers import GemmaConfig, GemmaForCausalLM

from unirl.config import ModelConfig
from unirl.models import joint_generate
from unirl.models.chameleon_vq import ChameleonVq, read_grid
from unirl.models.checkpoint import config_of
from unirl.models.image_codec import refuse_area
from unirl.models.interleaved import ChatLayout, ImageMarkup, JointVocabulary, Markup
from unirl.models.joint_family import JointDrawing, JointFamily
from unirl.models.joint_policy import JointPolicy
from unirl.models.joint_prompts import JointPrompts
from unirl.models.tokenizer import OpenTokenizer, open_tokenizer

TOKEN_STRINGS = {
    "bos": "<bos>",
    "eos": "<eos>",
    "pad": "<pad>",
    "begin": "<boi>",
    "end": "<eoi>",
    "turn": "<start_of_turn>",
    "turn_end": "<end_of_turn>",
}
TEMPLATE_VERSION = 1


def load_layout(config: ModelConfig, path: Path) -> ChatLayout:
    """Liquid's conversation: `<start_of_turn>user`, then the turn, `<end_of_turn>`, `<start_of_turn>model`, the answer.

    An answer ends in `<eos>`. An image stands between `<boi>` and `<eoi>`; a text behind it begins a line of its own.
    Gemma knows no system: a system prompt stands before the first turn.

    Raises:
        FileNotFoundError: the folder lacks config.json or the tokenizer.
        ValueError: another family, a tokenizer without Liquid's tokens, or one of another size.
    """
    settings = _read_config(path)
    tokenizer = open_tokenizer(path, TOKEN_STRINGS)
    first = _first_code(tokenizer, settings.vocab_size, path)
    ids, plain = tokenizer.special, tokenizer.plain(settings.vocab_size)

    def turn(role: str) -> tuple[int, ...]:
        return (ids["turn"], *tokenizer.encode(f"{role}\n"))

    return ChatLayout(
        vocabulary=JointVocabulary.around(
            plain,
            first_code=first,
            num_codes=settings.vocab_size - first,
            drawn=(ids["begin"], ids["eos"]),
        ),
        image=ImageMarkup(begin=ids["begin"], end=ids["end"]),
        start=(ids["bos"],),
        turns={
            "system": Markup(after=tuple(tokenizer.encode("\n\n"))),
            "user": Markup(before=turn("user"), after=(ids["turn_end"], *tokenizer.encode("\n")), image_tail="\n"),
            "assistant": Markup(before=turn("model"), after=(ids["eos"],), image_tail="\n"),
        },
        end=ids["eos"],
        encode_text=tokenizer.encode,
        decode_text=tokenizer.decode_plain,
        plain=plain,
        system=config.system_prompt or "",
        fingerprint=tokenizer.fingerprint("liquid", TEMPLATE_VERSION, config.system_prompt),
    )


def _first_code(tokenizer: OpenTokenizer, size: int, path: Path) -> int:
    """The id behind the tokenizer's last, if what is left of the table can be a codebook.

    Raises:
        ValueError: it cannot: there is none, or its size is no power of two.
    """
    length = max(tokenizer.vocabulary.values()) + 1
    num_codes = size - length
    if num_codes < 2 or num_codes & (num_codes - 1):
        raise ValueError(
            f"{path}: expected vocab_size in config.json to be the tokenizer's {length} ids and a codebook of 2, 4, 8, "
            f"... image codes (8192 in the published checkpoint, 264192 in all); got {size}, which leaves {num_codes}; "
            "take tokenizer and config.json of one Liquid checkpoint"
        )
    return length


def _read_config(path: Path) -> GemmaConfig:
    return GemmaConfig.from_dict(config_of(path, "liquid", "gemma"))


def load_codec(config: ModelConfig, path: Path) -> ChameleonVq:
    """Chameleon's image tokenizer from the folder `config.image_tokenizer`; Liquid's checkpoint has none."""
    refuse_area(config.image_pixels, "liquid")
    return ChameleonVq.load(_tokenizer_folder(config, path))


def _tokenizer_folder(config: ModelConfig, path: Path) -> Path:
    if not config.image_tokenizer:
        raise FileNotFoundError(
            f"model.image_tokenizer: expected the folder of Chameleon's VQGAN (vqgan.yaml, vqgan.ckpt), which {path} "
            "does not hold; got null; download it and name its folder"
        )
    return Path(config.image_tokenizer)


FAMILY = JointFamily(
    module=GemmaForCausalLM,
    read_config=_read_config,
    load_layout=load_layout,
    drawing=JointDrawing(
        name="Liquid",
        load_codec=load_codec,
        read_grid=lambda config, path: read_grid(_tokenizer_folder(config, path)),
        null=("<unconditional>", "<pad>"),
    ),
)
load = load_interleaved = functools.partial(JointPolicy.load, FAMILY)
load_prompts = functools.partial(JointPrompts.load, FAMILY)
load_independent = functools.partial(joint_generate.load_independent, FAMILY)
