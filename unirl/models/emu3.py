"""Emu3 (Stage1, Chat, Gen), and any checkpoint of that layout: a Llama whose last ids are image codes, row by row.

Both public layouts load: the one with code of its own (model_type "Emu3"), of which no code is run, and transformers'
conversion (model_type "emu3"), whose image tokenizer stays in the file. Emu3's `attention_dropout` of 0.1 acts on both
residual branches too when a module is in training mode; here it is 0, or equal inputs would have unequal losses.
"""

import functools
from pathlib import Path
from typing import Any

from transformers import Emu3ForCausalLM, Emu3TextConfig

from unirl.config import ModelConfig
from unirl.models.checkpoint import config_of
from unirl.models.emu3_vq import Emu3Vq
from unirl.models.interleaved import ChatLayout, ImageMarkup, JointVocabulary, Markup
from unirl.models.joint_family import JointFamily
from unirl.models.joint_policy import JointPolicy
from unirl.models.tokenizer import OpenTokenizer, code_range, open_tokenizer

TOKEN_STRINGS = {
    "bos": "<|extra_203|>",
    "eos": "<|extra_204|>",
    "pad": "<|endoftext|>",
    "row_end": "<|extra_200|>",
    "frame_end": "<|extra_201|>",
    "codes": "<|image token|>",
    "begin": "<|image start|>",
    "end": "<|image end|>",
}
CODE_PREFIX, CODE_SUFFIX = "<|visual token ", "|>"
"""Around the six decimal digits of an image code."""
SYSTEM_PROMPT = "You are a helpful assistant."
TEMPLATE_VERSION = 1
PUBLISHED = {
    "vocab_size": 184622,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 9216,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 151643,
    "bos_token_id": 151849,
    "eos_token_id": 151850,
}
"""What a config.json means that leaves a number out, as Stage1's does; the base of its rotary angles is 1e6."""


def load_layout(config: ModelConfig, path: Path) -> ChatLayout:
    """Emu3-Chat's conversation: `You are a helpful assistant. USER: {image}{text}. ASSISTANT: {answer}<|extra_204|>`.

    An image is `<|image start|>`, rows*columns in digits, `<|image token|>`, each row of codes with the end of a row,
    the end of the frame, `<|image end|>`.

    Raises:
        FileNotFoundError: the folder lacks config.json or the tokenizer.
        ValueError: another family, or a tokenizer without Emu3's tokens.
    """
    size = int(_text_settings(path)["vocab_size"])
    tokenizer = open_tokenizer(path, TOKEN_STRINGS)
    first, count = code_range(_codes(tokenizer), path, f"{CODE_PREFIX}000000{CODE_SUFFIX}")
    ids, plain = tokenizer.special, tokenizer.plain(size)
    plain[[id for name, id in tokenizer.vocabulary.items() if name.startswith("<|") and name.endswith("|>")]] = False
    system = SYSTEM_PROMPT if config.system_prompt is None else config.system_prompt
    return ChatLayout(
        vocabulary=JointVocabulary.around(plain, first_code=first, num_codes=count, drawn=(ids["begin"], ids["eos"])),
        image=ImageMarkup(
            begin=ids["begin"],
            end=ids["end"],
            geometry=lambda rows, columns: (*tokenizer.encode(f"{rows}*{columns}"), ids["codes"]),
            row_end=ids["row_end"],
            before_end=(ids["frame_end"],),
        ),
        start=(ids["bos"],),
        turns={
            "system": Markup(),
            "user": Markup(
                before=tuple(tokenizer.encode(" USER:")), after=tuple(tokenizer.encode(".")), lead=" ", image_lead=" "
            ),
            "assistant": Markup(before=tuple(tokenizer.encode(" ASSISTANT:")), after=(ids["eos"],), lead=" "),
        },
        end=ids["eos"],
        encode_text=tokenizer.encode,
        decode_text=tokenizer.decode_plain,
        plain=plain,
        system=system,
        fingerprint=tokenizer.fingerprint("emu3", TEMPLATE_VERSION, system),
    )


def _codes(tokenizer: OpenTokenizer) -> dict[int, int]:
    """Id of each image code that the tokenizer names."""
    return {
        int(name[len(CODE_PREFIX) : -len(CODE_SUFFIX)]): id
        for name, id in tokenizer.vocabulary.items()
        if name.startswith(CODE_PREFIX)
    }


def _text_settings(path: Path) -> dict[str, Any]:
    """The language model's part of config.json, with the published numbers where it has none."""
    raw = config_of(path, "emu3", "Emu3", "emu3")
    return PUBLISHED | (raw.get("text_config", {}) if raw["model_type"] == "emu3" else raw)


def _read_config(path: Path) -> Emu3TextConfig:
    own = {"model_type": Emu3TextConfig.model_type, "attention_dropout": 0.0}
    return Emu3TextConfig.from_dict(_text_settings(path) | own)


FAMILY = JointFamily(
    module=Emu3ForCausalLM,
    read_config=_read_config,
    load_layout=load_layout,
    namings=(
        {},
        {"model.": "model.text_model."},
        {"model.": "text_model.model.", "lm_head.": "text_model.lm_head."},  # earlier conversions
    ),
)
load_interleaved = functools.partial(JointPolicy.load, FAMILY)


def load_codec(config: ModelConfig, path: Path) -> Emu3Vq:
    """The image tokenizer of the folder `config.image_tokenizer` or of the checkpoint, for pictures of this area."""
    low, high = config.image_pixels or (None, None)
    return Emu3Vq.load(
        Path(config.image_tokenizer) if config.image_tokenizer else path, min_pixels=low, max_pixels=high
    )
