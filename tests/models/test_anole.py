"""Anole's layout by hand; what all families share is in test_interleaved.py."""

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.janus_checkpoints import edit_json
from tests.joint_checkpoints import write_anole
from tests.models.conversations import picture, say
from unirl.config import ModelConfig
from unirl.models.anole import load_interleaved, load_layout
from unirl.types import TokenKind

ANOLE = ModelConfig(family="anole")
# Ids of the tiny checkpoint: <s> <pad> </s> <unk>, codes 4 to 19, eoss, break, separator, <image>, words from 24.
BOS, EOS, FIRST, END, BEGIN, SEPARATOR, IMAGE, DRAW, A, RED = 0, 2, 4, 20, 21, 22, 23, 24, 25, 26


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_anole(tmp_path_factory.mktemp("anole") / "c")


def test_a_conversation_by_hand(folder):
    layout = load_layout(ANOLE, folder)
    turns = (say("user", "draw a"), say("assistant", "red", picture(), "a"))
    sequence = layout.encode(turns, [np.array([[3, 0], [15, 7]], np.int32)], id="s", subset="lab")
    image = [BEGIN, FIRST + 3, FIRST, FIRST + 15, FIRST + 7, END]
    assert sequence.ids.tolist() == [BOS, DRAW, A, SEPARATOR, RED, *image, A, EOS]
    assert sequence.kinds.tolist() == [0] * 5 + [TokenKind.BEGIN, *[TokenKind.CODE] * 4, TokenKind.END] + [0] * 2
    assert sequence.in_loss.tolist() == [False] * 4 + [True] * 9
    assert (sequence.id, sequence.subset, sequence.pixels) == ("s", "lab", ())


def test_a_shown_image_is_codes_too_and_is_not_learned(folder):
    layout = load_layout(ModelConfig(family="anole", system_prompt="red"), folder)
    turns = (say("user", picture(), "a"), say("assistant", "red"), say("user", "draw"))
    sequence = layout.encode(turns, [np.array([[1]], np.int32)])
    shown = [BEGIN, FIRST + 1, END, A, SEPARATOR]
    assert sequence.ids.tolist() == [BOS, RED, SEPARATOR, *shown, RED, EOS, DRAW, SEPARATOR]
    assert np.flatnonzero(sequence.in_loss).tolist() == [8, 9]


def test_text_may_be_words_break_and_end_only(folder):
    vocabulary = load_layout(ANOLE, folder).vocabulary
    assert (vocabulary.size, vocabulary.first_code, vocabulary.num_codes) == (64, FIRST, 16)
    assert np.flatnonzero(vocabulary.drawable_text).tolist() == [EOS, BEGIN, *range(DRAW, DRAW + 15)]
    assert vocabulary.text_ids.tolist() == [*range(4), *range(20, 64)]


def test_names_are_those_of_the_public_checkpoint(folder):
    layer = [f"self_attn.{name}_proj.weight" for name in "qkvo"]
    layer += [f"self_attn.{name}_norm.{kind}" for name in "qk" for kind in ("weight", "bias")]
    layer += [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    layer += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    wanted = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    wanted |= {f"model.layers.{index}.{name}" for index in range(2) for name in layer}
    assert load_interleaved(ANOLE, folder).shapes.keys() == wanted
    stored = load_file(folder / "model.safetensors").keys()
    assert {name for name in stored if not name.startswith("model.vqmodel.")} == wanted


def test_shifted_code_names_are_refused(folder, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text()
        for old, new in (("IMGIMGBZ", "IMGIMG?Z"), ("IMGIMGCZ", "IMGIMGBZ"), ("IMGIMG?Z", "IMGIMGCZ")):
            text = text.replace(old, new)
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"expected image codes named IMGIMGAZ and on, with consecutive ids; got 16"):
        load_layout(ANOLE, tmp_path)


def test_a_tokenizer_that_needs_code_of_its_own_is_refused(folder, tmp_path):
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    edit_json(
        tmp_path / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]},
    )
    with pytest.raises(ValueError, match=r"code of a checkpoint is never run: take the tokenizer files"):
        load_layout(ANOLE, tmp_path)
