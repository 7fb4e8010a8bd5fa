import random

import pytest

from unirl.lab.noise import true_answer
from unirl.lab.tokenizer import (
    EMBEDDING_ROWS,
    EOS,
    SPECIAL_TOKENS,
    WORDS,
    answered_letter,
    completion,
    generation_prompt,
    make_tokenizer,
    understanding_prompt,
)
from unirl.lab.world import NUM_IMAGE_TOKENS, caption, make_question, sample_scene


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def words(tokenizer, text, **options):
    return tokenizer.convert_ids_to_tokens(tokenizer(text, **options)["input_ids"])


def test_special_strings_are_januss_own(tokenizer):
    bar, block = "\uff5c", "\u2581"
    assert tokenizer.bos_token == f"<{bar}begin{block}of{block}sentence{bar}>"
    assert tokenizer.eos_token == f"<{bar}end{block}of{block}sentence{bar}>"
    assert tokenizer.pad_token == f"<{bar}{block}pad{block}{bar}>"
    assert (tokenizer.boi_token, tokenizer.eoi_token) == ("<begin_of_image>", "<end_of_image>")
    assert tokenizer.image_token == "<image_placeholder>"


def test_all_words_fit_the_embedding_table_and_are_distinct(tokenizer):
    assert len(tokenizer) == len({*SPECIAL_TOKENS, *WORDS}) == len(SPECIAL_TOKENS) + len(WORDS) == 53
    assert len(tokenizer) < EMBEDDING_ROWS


def test_the_understanding_template_tokenizes_as_documented(tokenizer):
    choices = ("red", "blue", "green", "yellow")
    tokens = words(tokenizer, understanding_prompt("what color is the square ?", choices))
    head = ["<|User|>", ":", "<begin_of_image>", *["<image_placeholder>"] * NUM_IMAGE_TOKENS, "<end_of_image>"]
    assert tokens[: 1 + len(head)] == [tokenizer.bos_token, *head]
    question = "what color is the square ? A red B blue C green D yellow <|Assistant|> :"
    assert " ".join(tokens[1 + len(head) :]) == question


def test_the_generation_template_tokenizes_as_documented(tokenizer):
    tokens = words(tokenizer, "<|User|>: a photo of two red circles\n\n<|Assistant|>:<begin_of_image>")
    assert " ".join(tokens[1:]) == "<|User|> : a photo of two red circles <|Assistant|> : <begin_of_image>"
    assert tokens[0] == tokenizer.bos_token
    assert words(tokenizer, generation_prompt("a photo of two red circles")) == tokens


def test_every_text_of_the_world_round_trips(tokenizer):
    rng = random.Random(0)
    for _ in range(300):
        scene = sample_scene(rng)
        question = make_question(rng, scene)
        for text in (
            understanding_prompt(question.text, question.choices),
            generation_prompt(caption(scene.spec)),
            completion(true_answer(scene, question)),
        ):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer(tokenizer.decode(ids), add_special_tokens=False)["input_ids"] == ids


def test_a_completion_is_reasoning_word_letter_answer_end(tokenizer):
    rng = random.Random(1)
    scene = sample_scene(rng, "colors")
    question = make_question(rng, scene)
    color, shape = scene.objects[0].color, scene.objects[0].shape
    reasoning = f"<think> a {color} {shape} : {color} {question.letter} </think>"
    text = completion(true_answer(scene, question))
    assert text == f"{reasoning} <answer> {question.letter} </answer> {EOS}"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.removesuffix(f" {EOS}")


def test_spare_ids_decode_to_nothing(tokenizer):
    assert tokenizer.decode(list(range(len(tokenizer), EMBEDDING_ROWS))) == ""


def test_a_word_outside_the_world_is_an_error(tokenizer):
    with pytest.raises(Exception, match="Missing"):
        tokenizer("a photo of a dog")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (f"<think> a red circle : red B </think> <answer> B </answer> {EOS}", "B"),
        (f"<answer> D </answer> {EOS}", "D"),
        ("<think> a red circle : red B </think> <answer> B </answer>", None),
        (f"<answer> B C </answer> {EOS}", None),
        (f"<answer> red </answer> {EOS}", None),
        (f"<answer> A </answer> <answer> B </answer> {EOS}", None),
        (EOS, None),
        ("", None),
    ],
)
def test_only_a_whole_answer_counts(text, letter):
    assert answered_letter(text) == letter
