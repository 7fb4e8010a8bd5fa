import json

import numpy as np
import pytest
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from unirl.models.lumina_prompts import PUBLIC_IDS, PUBLIC_STRINGS, LuminaPrompts
from unirl.types import GenerationSample, UnderstandingSample

TAGS = ("<system>", "</system>", "<user>", "</user>")
ROLES = {role: PUBLIC_STRINGS.get(role, f"<{role}>") for role in PUBLIC_IDS}
WORDS = ("[UNK]", "draw", "ask", "a", "red", "square", "A.", "B.", "yes", "no", "?")
IMAGE = np.zeros((8, 8, 3), np.uint8)
QUESTION = UnderstandingSample(
    id="q", image=IMAGE, question="red ?", choices=("yes", "no"), answer="A", answer_type="choice"
)
PROMPT = GenerationSample(id="p", prompt="a red square")


def write_folder(folder, roles=ROLES, *, num_codes=6, extra_rows=0, drop=()):
    """A checkpoint folder without weights: words, tags, special tokens by role, the first code last."""
    special = [text for role, text in ROLES.items() if role not in {"first_code", *drop}]
    tokens = [*WORDS, *TAGS, *special, ROLES["first_code"]]
    inner = Tokenizer(WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", additional_special_tokens=[*TAGS, *special, ROLES["first_code"]]
    )
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | ({"token_roles": roles} if roles else {})))
    size = len(tokens) - 1 + num_codes + extra_rows
    (folder / "config.json").write_text(json.dumps({"vocab_size": size}))
    (folder / "vqvae").mkdir()
    (folder / "vqvae" / "config.json").write_text(
        json.dumps({"num_vq_embeddings": num_codes, "block_out_channels": [8, 8]})
    )
    return folder


@pytest.fixture
def prompts(tmp_path):
    return LuminaPrompts.load(write_folder(tmp_path), "draw")


def words(prompts, ids):
    return " ".join(prompts.tokenizer.convert_ids_to_tokens(ids.tolist()))


def test_a_picture_to_draw_is_masks_whose_rows_end_in_newlines(prompts):
    canvas = prompts.drawing(PROMPT, (2, 3))
    row = f"{ROLES['mask']} " * 3 + ROLES["newline"]
    assert words(prompts, canvas) == (
        f"<system> draw </system> <user> a red square </user> <answer> {ROLES['begin_image']} {row} {row} "
        f"{ROLES['end_image']} </answer>"
    )
    assert canvas.dtype == np.int32


def test_the_null_canvas_keeps_the_answer_part_as_it_is(prompts):
    canvas = prompts.drawing(PROMPT, (2, 3))
    canvas[canvas == prompts.ids.mask] = [prompts.ids.first_code, *[prompts.ids.mask] * 5]
    null = prompts.unconditional(canvas)
    assert words(prompts, null).startswith("<system> draw </system> <user> <uncondition> </user> <answer>")
    assert null[-10:].tolist() == canvas[-10:].tolist()


def test_the_image_of_a_question_stands_before_the_end_of_the_instruction(prompts):
    """Each row ends in one newline and the image in its mark, as in the official training code; the official script for
    questions inserts the line breaks twice and then cuts the tail off, mark included."""
    canvas = prompts.answering(QUESTION, np.array([[0, 1], [2, 3]], np.int32), 2)
    first, newline = prompts.ids.first_code, prompts.ids.newline
    picture = [first, first + 1, newline, first + 2, first + 3, newline]
    start = canvas.tolist().index(first)
    assert canvas[start : start + 6].tolist() == picture
    assert (canvas == newline).sum() == 2
    assert words(prompts, canvas[: start - 1]) == "<system> draw </system> <user> red ? A. yes B. no"
    mask = ROLES["mask"]
    assert words(prompts, canvas[start + 6 :]) == f"{ROLES['end_image']} </user> <answer> {mask} {mask} </answer>"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"extra_rows": 2}, r"expected a vocabulary of \d+ ids, which ends in 6 image codes .* got \d+"),
        ({"drop": ("newline",)}, r"special tokens in the tokenizer; got none for <newline>"),
        ({"roles": None}, r"expected the published ids; got .*'mask'"),
        ({"roles": {"mask": ROLES["mask"]}}, r"a string for every role under token_roles; got none for answer_pad"),
    ],
)
def test_a_vocabulary_that_would_shift_or_lose_ids_is_refused(tmp_path, damage, message):
    with pytest.raises(ValueError, match=message):
        LuminaPrompts.load(write_folder(tmp_path, **damage), None)


def test_text_with_a_special_token_is_refused(prompts):
    with pytest.raises(ValueError, match=r"generation sample p: expected plain text; got the special token <answer>"):
        prompts.drawing(GenerationSample(id="p", prompt="a <answer> square"), (1, 1))
    odd = UnderstandingSample(id="q", image=IMAGE, question=f"a {ROLES['mask']}", answer="a", answer_type="text")
    with pytest.raises(ValueError, match="understanding sample q: expected plain text"):
        prompts.answering(odd, np.zeros((1, 1), np.int32), 1)
