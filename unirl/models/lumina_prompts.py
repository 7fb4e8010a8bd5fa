"""Lumina-DiMOO's special tokens and its canvases: samples -> ids with masks where the model is to write. No model here.

A canvas is everything that the model sees: instruction, then `<answer>`, then the cells to fill, then `</answer>`.
An image's rows each end in a newline token, which is how the model knows its height and width.
"""

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from unirl.config import RlConfig, SamplingConfig
from unirl.config_rules import Problem
from unirl.models.checkpoint import read_json
from unirl.models.lumina_vq import FOLDER, ImageSizes
from unirl.models.policy import EncodedPrompt
from unirl.types import GenerationSample, UnderstandingSample

DRAW_SYSTEM = "Generate an image according to the text prompt."
ANSWER_SYSTEM = (
    "You are a multimodal model that can process both text and images. Answer the following question based on the "
    "provided images. Analyze each image and combine relevant details to answer."
)
TAGS = ("<system>", "</system>", "<user>", "</user>")
PUBLIC_IDS = {
    "mask": 126336,
    "newline": 126084,
    "begin_image": 126349,
    "end_image": 126350,
    "uncondition": 126351,
    "begin_answer": 126354,
    "end_answer": 126355,
    "answer_pad": 126339,
    "end_text": 126081,
    "first_code": 126356,
}
"""Ids of the published checkpoint, by role."""
PUBLIC_STRINGS = {
    "mask": "<|mdm_mask|>",
    "uncondition": "<uncondition>",
    "begin_answer": "<answer>",
    "end_answer": "</answer>",
    "end_text": "<|endoftext|>",
}
"""Strings by which the published tokenizer is recognised. A checkpoint with ids of its own names a string for every
role under `token_roles` in its tokenizer_config.json."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenIds:
    """Ids of the special tokens by role."""

    mask: int
    newline: int
    """Ends a row of an image."""
    begin_image: int
    end_image: int
    uncondition: int
    """Stands for the text of a prompt that is left out."""
    begin_answer: int
    end_answer: int
    answer_pad: int
    """Fills what is left of an answer after its end."""
    end_text: int
    first_code: int
    """Id of image code 0; the codes are the last of the vocabulary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LuminaPrompts:
    """Canvases of Lumina-DiMOO with the tokenizer of one checkpoint."""

    tokenizer: PreTrainedTokenizerBase
    ids: TokenIds
    num_codes: int
    sizes: ImageSizes
    draw_system: str
    answer_system: str

    @classmethod
    def load(cls, folder: Path, system_prompt: str | None) -> "LuminaPrompts":
        """Canvases of the checkpoint folder.

        Args:
            folder: holds the tokenizer's files and config.json.
            system_prompt: None takes the checkpoint's own (`system_prompt` in its tokenizer_config.json) or the two
                published ones; any other text stands before both kinds of prompt.

        Raises:
            FileNotFoundError: the folder lacks the tokenizer or config.json.
            ValueError: the tokenizer lacks a special token, the vocabulary does not end in the image codes, or the
                system prompt contains a special token.
        """
        config = read_json(folder / "config.json")
        read_json(folder / "tokenizer.json")
        own_prompt = read_json(folder / "tokenizer_config.json").get("system_prompt")
        system_prompt = own_prompt if system_prompt is None else system_prompt
        # Not AutoTokenizer: the published config.json names code of its own, which that one asks for leave to run.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        ids = _resolve(tokenizer, folder)
        size = int(config.get("embedding_size") or config["vocab_size"])
        num_codes = int(read_json(folder / FOLDER / "config.json")["num_vq_embeddings"])
        if size - num_codes != ids.first_code:
            raise ValueError(
                f"{folder}: expected a vocabulary of {ids.first_code + num_codes} ids, which ends in {num_codes} image "
                f"codes from id {ids.first_code} on; got {size} in config.json; a padded or resized head shifts every "
                "code: take the published checkpoint, or cut the head back"
            )
        loaded = cls(
            tokenizer=tokenizer,
            ids=ids,
            num_codes=num_codes,
            sizes=ImageSizes.load(folder),
            draw_system=DRAW_SYSTEM if system_prompt is None else system_prompt,
            answer_system=ANSWER_SYSTEM if system_prompt is None else system_prompt,
        )
        loaded._check_plain(loaded.answer_system, "model.system_prompt")
        if len(found := tokenizer(TAGS[-1]).input_ids) != 1:
            raise ValueError(
                f"{folder}: expected {TAGS[-1]} to be one token, before which the image of a question stands; got "
                f"{found}; take the tokenizer files of the published checkpoint"
            )
        return loaded

    def find_problems(self, config: RlConfig) -> list[Problem]:
        """Sizes, lengths and steps that cannot be."""
        problems: list[Problem] = []
        sampling = config.rollout.sampling
        key, factor, (height, width) = "rollout.sampling.image", self.sizes.factor, self._drawn(sampling)
        if height % factor or width % factor:
            rule = f"must be two multiples of {factor}, the side of a code's square"
            fix = f"try [{max(1, height // factor) * factor}, {max(1, width // factor) * factor}]"
            problems.append(Problem(f"{key}.size", sampling.image.size, rule, fix))
        elif sampling.image.diffusion_steps > (cells := height // factor * (width // factor)):
            rule = f"must be at most {cells}, the codes of a picture of {height} x {width} pixels: a step reveals one"
            problems.append(Problem(f"{key}.diffusion_steps", sampling.image.diffusion_steps, rule, f"try {cells}"))
        key, text = "rollout.sampling.text", sampling.text
        block = text.block_length or text.max_tokens
        blocks = text.max_tokens // block
        if text.max_tokens % block:
            rule = f"must divide {key}.max_tokens ({text.max_tokens}), or be null"
            problems.append(Problem(f"{key}.block_length", text.block_length, rule, f"try {text.max_tokens}"))
        elif text.diffusion_steps > text.max_tokens:
            rule = f"must be at most {key}.max_tokens ({text.max_tokens}): a step reveals one token or more"
            problems.append(Problem(f"{key}.diffusion_steps", text.diffusion_steps, rule, f"try {text.max_tokens}"))
        elif text.diffusion_steps % blocks:
            rule = f"must be a multiple of the {blocks} blocks of {key}.block_length"
            fix = f"try {-(-text.diffusion_steps // blocks) * blocks}"
            problems.append(Problem(f"{key}.diffusion_steps", text.diffusion_steps, rule, fix))
        return problems

    def encode(self, sample: UnderstandingSample | GenerationSample, sampling: SamplingConfig) -> EncodedPrompt:
        """The canvas of a question, its image as large as any and all of code 0, or of a picture to draw.

        Raises:
            ValueError: a text contains a special token.
        """
        if isinstance(sample, UnderstandingSample):
            canvas = self.answering(sample, np.zeros(self.sizes.largest_grid, np.int32), sampling.text.max_tokens)
        else:
            canvas = self.drawing(sample, self.sizes.grid(self._drawn(sampling)))
        return EncodedPrompt(canvas, len(canvas))

    def answering(self, sample: UnderstandingSample, codes: NDArray[np.int32], num_cells: int) -> NDArray[np.int32]:
        """Canvas int32 [T] of a question about an image, with `num_cells` masks for the answer.

        Args:
            sample: question and choices.
            codes: image codes [rows, columns].
            num_cells: longest answer in tokens.

        Raises:
            ValueError: question or choices contain a special token.
        """
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
        template = self.tokenizer.init_kwargs.get("choice_template", "{letter}. {choice}")
        options = [template.format(letter=a, choice=b) for a, b in zip(letters, sample.choices, strict=False)]
        question = "\n".join((sample.question, *options))
        self._check_plain(question, f"understanding sample {sample.id}")
        instruction = self._instruction(self.answer_system, question)
        # The image stands before the end of the instruction, which is one token.
        with_image = [*instruction[:-1], *self._picture(codes + self.ids.first_code), instruction[-1]]
        cells = [self.ids.mask] * num_cells
        return np.asarray([*with_image, self.ids.begin_answer, *cells, self.ids.end_answer], np.int32)

    def drawing(self, sample: GenerationSample, grid: tuple[int, int]) -> NDArray[np.int32]:
        """Canvas int32 [T] of a picture to draw, of `grid` rows and columns of codes.

        Raises:
            ValueError: the prompt contains a special token.
        """
        self._check_plain(sample.prompt, f"generation sample {sample.id}")
        return self._drawing(sample.prompt, grid)

    def unconditional(self, canvas: NDArray[np.int32]) -> NDArray[np.int32]:
        """The same answer part after the instruction of an empty prompt: the null canvas of guidance."""
        start = int(np.flatnonzero(canvas == self.ids.begin_answer)[0])
        text = str(self.tokenizer.convert_ids_to_tokens(self.ids.uncondition))
        return np.concatenate([np.asarray(self._instruction(self.draw_system, text), np.int32), canvas[start:]])

    def decode(self, ids: NDArray[np.int32]) -> str:
        """Text of ids, special tokens kept but for the padding and the end of the answer's part of a canvas."""
        shown = [token for token in ids.tolist() if token not in (self.ids.answer_pad, self.ids.end_answer)]
        return str(self.tokenizer.decode(shown, skip_special_tokens=False))

    def end_of(self, ids: NDArray[np.int32]) -> int | None:
        """Place of the first token after which an answer is over; None where there is none."""
        ends = np.flatnonzero(np.isin(ids, (self.ids.end_answer, self.ids.end_text, self.ids.answer_pad)))
        return int(ends[0]) if len(ends) else None

    def grid_of(self, canvas: NDArray[np.int32]) -> tuple[int, int]:
        """Rows and columns of the picture that is drawn on a canvas, from where its newlines stand."""
        answer = canvas[int(np.flatnonzero(canvas == self.ids.begin_answer)[0]) :]
        rows = int((answer == self.ids.newline).sum())
        return rows, int((answer == self.ids.mask).sum()) // rows

    def allowed_text_ids(self) -> NDArray[np.bool_]:
        """Which of the ids before the image codes an answer may hold: those with a word, the end and the padding."""
        allowed = np.zeros(self.ids.first_code, bool)
        vocabulary = self.tokenizer.get_vocab()
        # What is special here, and what the tokenizer calls special, whose roles nobody may know.
        special = {getattr(self.ids, item.name) for item in fields(TokenIds)} | set(self.tokenizer.all_special_ids)
        special |= {vocabulary[tag] for tag in TAGS if tag in vocabulary}
        special -= {self.ids.end_answer, self.ids.end_text, self.ids.answer_pad}
        allowed[[word for word in vocabulary.values() if word < self.ids.first_code and word not in special]] = True
        return allowed

    def _drawn(self, sampling: SamplingConfig) -> tuple[int, int]:
        return sampling.image.size or self.sizes.drawn

    def _drawing(self, text: str, grid: tuple[int, int]) -> NDArray[np.int32]:
        cells = np.full(grid, self.ids.mask, np.int32)
        answer = [self.ids.begin_answer, *self._picture(cells), self.ids.end_answer]
        return np.asarray([*self._instruction(self.draw_system, text), *answer], np.int32)

    def _picture(self, cells: NDArray[np.int32]) -> list[int]:
        """Ids of a picture's cells [rows, columns]: each row ends in a newline, the whole stands in image marks."""
        rows = np.pad(cells, ((0, 0), (0, 1)), constant_values=self.ids.newline)
        return [self.ids.begin_image, *rows.flatten().tolist(), self.ids.end_image]

    def _instruction(self, system: str, text: str) -> list[int]:
        return self.tokenizer(f"<system>{system}</system><user>{text}</user>").input_ids

    def _check_plain(self, text: str, owner: str) -> None:
        special = [str(self.tokenizer.convert_ids_to_tokens(getattr(self.ids, item.name))) for item in fields(TokenIds)]
        found = [token for token in (*special, *TAGS) if token in text]
        if found:
            raise ValueError(
                f"{owner}: expected plain text; got the special token {found[0]} in {text[:80]!r}; remove it"
            )


def _resolve(tokenizer: PreTrainedTokenizerBase, folder: Path) -> TokenIds:
    vocabulary = tokenizer.get_vocab()
    own: dict[str, str] = tokenizer.init_kwargs.get("token_roles", {})
    strings = own or PUBLIC_STRINGS
    if missing := [text for text in strings.values() if text not in vocabulary]:
        raise ValueError(
            f"{folder}: expected Lumina-DiMOO's special tokens in the tokenizer; got none for {', '.join(missing)}; "
            "take the tokenizer files of the published checkpoint"
        )
    found = {role: vocabulary[text] for role, text in strings.items()}
    if own and (unnamed := PUBLIC_IDS.keys() - own.keys()):
        raise ValueError(
            f"{folder}: expected a string for every role under token_roles; got none for {', '.join(sorted(unnamed))}"
        )
    if not own and (wrong := {role: found[role] for role in found if found[role] != PUBLIC_IDS[role]}):
        raise ValueError(
            f"{folder}: expected the published ids; got {wrong}; take the published tokenizer, or name its tokens by "
            "role under token_roles in tokenizer_config.json"
        )
    resolved = PUBLIC_IDS | found
    # The published code names these by number alone, so that nothing but their presence can be checked.
    if absent := [f"{role} ({resolved[role]})" for role in resolved if resolved[role] not in vocabulary.values()]:
        raise ValueError(
            f"{folder}: expected a token for every role; got a tokenizer of {len(vocabulary)} tokens without ids for "
            f"{', '.join(absent)}; take the tokenizer files of the published checkpoint"
        )
    # A string that tokenizer.json lacks was added behind the codes, so that its id would be one of them.
    first = resolved["first_code"]
    misplaced = [f"{role} ({one})" for role, one in resolved.items() if role != "first_code" and one >= first]
    if misplaced or len(set(resolved.values())) != len(resolved):
        raise ValueError(
            f"{folder}: expected ids of their own, below the first image code {first}, for all special tokens; got "
            f"{', '.join(misplaced) or resolved}; tokenizer.json and tokenizer_config.json do not belong together: "
            "take the tokenizer files of one checkpoint"
        )
    return TokenIds(**resolved)
