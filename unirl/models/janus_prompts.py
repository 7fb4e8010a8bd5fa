"""Janus-Pro's special tokens and its two prompt templates: samples -> prompt ids, ids -> text. No model here."""

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.janus.processing_janus import DEFAULT_SYSTEM_PROMPT

from unirl.config import RlConfig, SamplingConfig
from unirl.config_rules import Problem
from unirl.models.autoregressive import CHOICE_TEMPLATE, problems_of_settings, question_text
from unirl.models.checkpoint import read_json
from unirl.models.interleaved import ChatLayout, ImageMarkup, JointVocabulary, Markup
from unirl.models.policy import EncodedPrompt
from unirl.models.tokenizer import OpenTokenizer
from unirl.types import GenerationSample, UnderstandingSample

TOKEN_STRINGS = {
    "pad": "<｜▁pad▁｜>",  # noqa: RUF001 - the model's own spelling, with full-width bars
    "bos": "<｜begin▁of▁sentence｜>",  # noqa: RUF001
    "eos": "<｜end▁of▁sentence｜>",  # noqa: RUF001
    "boi": "<begin_of_image>",
    "eoi": "<end_of_image>",
    "placeholder": "<image_placeholder>",
}
USER, ASSISTANT = "<|User|>", "<|Assistant|>"
CHAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenIds:
    """Ids of the special tokens, which differ between the 1B and the 7B checkpoint."""

    pad: int
    bos: int
    eos: int
    boi: int
    """Begin of image."""
    eoi: int
    """End of image."""
    placeholder: int
    """Stands where a feature of the vision tower goes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JanusPrompts:
    """Templates of Janus-Pro with the tokenizer of one checkpoint."""

    tokenizer: PreTrainedTokenizerBase
    ids: TokenIds
    system_prompt: str
    """Text before understanding prompts, blank lines included; empty for none. Generation prompts have none."""
    num_image_tokens: int

    @classmethod
    def load(cls, folder: Path, system_prompt: str | None) -> "JanusPrompts":
        """Templates of the checkpoint folder.

        Args:
            folder: holds the tokenizer's files and processor_config.json.
            system_prompt: None takes what the checkpoint's processor says, "" means none.

        Raises:
            FileNotFoundError: the folder lacks the tokenizer or processor_config.json.
            ValueError: the tokenizer lacks a special token or does not prepend the begin token.
        """
        processor = read_json(folder / "processor_config.json")
        read_json(folder / "tokenizer_config.json")
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        vocabulary = tokenizer.get_vocab()
        missing = [text for text in (*TOKEN_STRINGS.values(), USER, ASSISTANT) if text not in vocabulary]
        if missing:
            raise ValueError(
                f"{folder}: expected Janus-Pro's special tokens in the tokenizer; got none for {', '.join(missing)}; "
                "take the tokenizer files of the converted Janus-Pro checkpoint"
            )
        ids = TokenIds(**{name: vocabulary[text] for name, text in TOKEN_STRINGS.items()})
        if (first := tokenizer("").input_ids) != [ids.bos]:
            raise ValueError(
                f"{folder}: expected the tokenizer to prepend {TOKEN_STRINGS['bos']} (id {ids.bos}); got {first} for "
                "an empty text; take the tokenizer files of the converted Janus-Pro checkpoint"
            )
        if system_prompt is None:
            system = DEFAULT_SYSTEM_PROMPT if processor.get("use_default_system_prompt", False) else ""
        else:
            system = f"{system_prompt}\n\n" if system_prompt else ""
        return cls(
            tokenizer=tokenizer,
            ids=ids,
            system_prompt=system,
            num_image_tokens=int(processor.get("num_image_tokens", 576)),
        )

    def find_problems(self, config: RlConfig) -> list[Problem]:
        """Settings that Janus-Pro would ignore."""
        return problems_of_settings(config, "Janus-Pro")

    def encode(self, sample: UnderstandingSample | GenerationSample, sampling: SamplingConfig) -> EncodedPrompt:
        """The prompt of a question or of a picture to draw.

        Raises:
            ValueError: a text contains a special token.
        """
        if isinstance(sample, UnderstandingSample):
            ids = self.encode_understanding(sample)
            return EncodedPrompt(ids, len(ids) + sampling.text.max_tokens)
        ids = self.encode_generation(sample)
        return EncodedPrompt(ids, len(ids) + self.num_image_tokens)

    def encode_understanding(self, sample: UnderstandingSample) -> NDArray[np.int32]:
        """Ids [P] of a question about an image, with `num_image_tokens` placeholders.

        Raises:
            ValueError: question or choices contain a special token.
        """
        image = TOKEN_STRINGS["boi"] + TOKEN_STRINGS["placeholder"] * self.num_image_tokens + TOKEN_STRINGS["eoi"]
        question = question_text(sample, self.tokenizer.init_kwargs.get("choice_template", CHOICE_TEMPLATE))
        self._check_plain(question, f"understanding sample {sample.id}")
        return self._encode(f"{self.system_prompt}{USER}: {image}\n{question}\n\n{ASSISTANT}:")

    def encode_generation(self, sample: GenerationSample) -> NDArray[np.int32]:
        """Ids [P] of a picture to draw; the last is the begin of the image.

        Raises:
            ValueError: the prompt contains a special token.
        """
        self._check_plain(sample.prompt, f"generation sample {sample.id}")
        return self._encode(f"{USER}: {sample.prompt}\n\n{ASSISTANT}:{TOKEN_STRINGS['boi']}")

    def unconditional(self, prompt_ids: Tensor) -> Tensor:
        """Null condition of generation prompts [..., P]: all but begin of text and begin of image becomes padding."""
        kept = (prompt_ids == self.ids.bos) | (prompt_ids == self.ids.boi)
        return torch.where(kept, prompt_ids, self.ids.pad)

    def decode(self, ids: NDArray[np.int32]) -> str:
        """Text of ids, special tokens kept; an id without a word gives nothing."""
        return str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=False))

    def allowed_text_ids(self, vocab_size: int) -> Tensor:
        """Which ids an answer may hold, bool [V]: words and the end token, but no padding and no image marks."""
        allowed = torch.zeros(vocab_size, dtype=torch.bool)
        allowed[sorted(self.tokenizer.get_vocab().values())] = True
        forbidden = {field.name for field in fields(self.ids)} - {"eos"}
        allowed[[getattr(self.ids, name) for name in sorted(forbidden)]] = False
        return allowed

    def layout(self, *, num_text_ids: int, num_codes: int) -> ChatLayout:
        """Janus-Pro's conversation, whose turns read as the two prompts do; code c is id `num_text_ids + c`.

        What the user shows is seen by its pixels; what the assistant draws, by its codes. As in the prompts, the system
        speaks only where the user shows an image. An answer follows `<|Assistant|>:` after a blank, an image at once.
        """
        vocabulary, ids = self.tokenizer.get_vocab(), self.ids
        special = {field.name: getattr(ids, field.name) for field in fields(ids)}
        tokenizer = OpenTokenizer(
            self.tokenizer, vocabulary, special | {"user": vocabulary[USER], "assistant": vocabulary[ASSISTANT]}
        )
        plain = np.concatenate([tokenizer.plain(num_text_ids), np.zeros(num_codes, np.bool_)])
        colon, gap = tokenizer.encode(":"), tuple(tokenizer.encode("\n\n"))
        return ChatLayout(
            vocabulary=JointVocabulary.around(
                plain, first_code=num_text_ids, num_codes=num_codes, drawn=(ids.boi, ids.eos)
            ),
            image=ImageMarkup(begin=ids.boi, end=ids.eoi),
            start=(ids.bos,),
            turns={
                "system": Markup(after=gap),
                "user": Markup(before=(vocabulary[USER], *colon), after=gap, lead=" ", image_lead=" ", image_tail="\n"),
                "assistant": Markup(before=(vocabulary[ASSISTANT], *colon), after=(ids.eos,), lead=" "),
            },
            end=ids.eos,
            encode_text=tokenizer.encode,
            decode_text=tokenizer.decode_plain,
            plain=plain,
            placeholders=(ids.boi, *[ids.placeholder] * self.num_image_tokens, ids.eoi),
            placeholder=ids.placeholder,
            system=self.system_prompt.removesuffix("\n\n"),
            system_for_images=True,
            fingerprint=tokenizer.fingerprint("janus_pro", CHAT_VERSION, self.system_prompt, self.num_image_tokens),
        )

    def _encode(self, text: str) -> NDArray[np.int32]:
        return np.asarray(self.tokenizer(text).input_ids, dtype=np.int32)

    def _check_plain(self, text: str, owner: str) -> None:
        found = [token for token in (*TOKEN_STRINGS.values(), USER, ASSISTANT) if token in text]
        if found:
            raise ValueError(
                f"{owner}: expected plain text; got the special token {found[0]} in {text[:80]!r}; remove it from the "
                "data"
            )
