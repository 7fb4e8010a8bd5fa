"""The lab's word-level tokenizer, a real fast tokenizer with Janus-Pro's special strings, and the texts it reads.

Prompts are Janus-Pro's templates without a system prompt. There is no unknown token: other words are an error.
"""

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from unirl.lab.noise import Answer
from unirl.lab.words import WORDS
from unirl.lab.world import LETTERS, NUM_IMAGE_TOKENS, question_with_choices

# Janus-Pro writes these three with full-width bars and lower one-eighth blocks.
PAD = "<｜▁pad▁｜>"  # noqa: RUF001
BOS = "<｜begin▁of▁sentence｜>"  # noqa: RUF001
EOS = "<｜end▁of▁sentence｜>"  # noqa: RUF001
BEGIN_OF_IMAGE = "<begin_of_image>"
END_OF_IMAGE = "<end_of_image>"
IMAGE_PLACEHOLDER = "<image_placeholder>"
USER = "<|User|>"
ASSISTANT = "<|Assistant|>"
SPECIAL_TOKENS = (PAD, BOS, EOS, BEGIN_OF_IMAGE, END_OF_IMAGE, IMAGE_PLACEHOLDER, USER, ASSISTANT)

EMBEDDING_ROWS = 64
"""Rows of the model's text table, more than there are words; the spare ids must never be sampled."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer: splits at blanks and special strings, prepends BOS, decodes words joined by one blank."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *WORDS))}
    backend = Tokenizer(models.WordLevel(vocabulary))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens={
            "image_token": IMAGE_PLACEHOLDER,
            "boi_token": BEGIN_OF_IMAGE,
            "eoi_token": END_OF_IMAGE,
            "user_token": USER,
            "assistant_token": ASSISTANT,
        },
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )


def understanding_prompt(question: str, choices: tuple[str, ...]) -> str:
    """Janus-Pro's understanding prompt, the placeholder expanded to the lab's 25 image tokens."""
    image = BEGIN_OF_IMAGE + IMAGE_PLACEHOLDER * NUM_IMAGE_TOKENS + END_OF_IMAGE
    return f"{USER}: {image}\n{question_with_choices(question, choices)}\n\n{ASSISTANT}:"


def generation_prompt(prompt: str) -> str:
    """Janus-Pro's text-to-image prompt."""
    return f"{USER}: {prompt}\n\n{ASSISTANT}:{BEGIN_OF_IMAGE}"


def answer_text(answer: Answer) -> str:
    """What a model should write: reasoning, word, letter, answer; the end token is the family's.

    The letter right after the word turns the look-up of the letter into induction, which a tiny model learns;
    without it the answers stayed at chance.
    """
    reasoning = f"<think> {answer.description} : {answer.word} {answer.letter} </think>"
    return f"{reasoning} <answer> {answer.letter} </answer>"


def completion(answer: Answer) -> str:
    """What the lab's Janus should write."""
    return f"{answer_text(answer)} {EOS}"


def answered_letter(text: str) -> str | None:
    """The letter of a decoded completion, special tokens kept; None unless it ends in a whole answer and EOS."""
    words = text.split()
    if len(words) < 4 or words.count("<answer>") != 1:
        return None
    opening, letter, closing, end = words[-4:]
    whole = opening == "<answer>" and closing == "</answer>" and end == EOS and letter in LETTERS
    return letter if whole else None
