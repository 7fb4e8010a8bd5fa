"""Liquid's layout by hand; what all families share is in test_interleaved.py."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.janus_checkpoints import edit_json
from tests.joint_checkpoints import read_config, write_liquid
from tests.models.conversations import dialogues, pack, picture, say
from unirl.config import ModelConfig
from unirl.models.liquid import load_interleaved, load_layout
from unirl.types import TokenKind

LIQUID = ModelConfig(family="liquid")
PAD, EOS, BOS, UNK, BOI, EOI, UNCONDITIONAL, TURN, TURN_END = range(9)
FIRST = 9 + 256
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request, tmp_path_factory):
    return write_liquid(tmp_path_factory.mktemp("liquid") / "c", tied=request.param)


def test_a_conversation_by_hand(folder):
    layout = load_layout(LIQUID, folder)
    turns = (say("user", picture(), "why"), say("assistant", picture(), "so"), say("user", "ok"))
    codes = [np.array([[0, 15]], np.int32), np.array([[7], [8]], np.int32)]
    sequence = layout.encode(turns, codes)

    def text(words):
        return layout.encode_text(words)

    user, model = [TURN, *text("user\n")], [TURN, *text("model\n")]
    close = [TURN_END, *text("\n")]
    shown, drawn = [BOI, FIRST, FIRST + 15, EOI], [BOI, FIRST + 7, FIRST + 8, EOI]
    prompt = [BOS, *user, *shown, *text("\nwhy"), *close, *model]
    answer = [*drawn, *text("\nso"), EOS]
    asked = [*user, *text("ok"), *close, *model]
    assert sequence.ids.tolist() == prompt + answer + asked
    assert sequence.in_loss.tolist() == [False] * len(prompt) + [True] * len(answer) + [False] * len(asked)
    block = [TokenKind.BEGIN, TokenKind.CODE, TokenKind.CODE, TokenKind.END]
    kinds = sequence.kinds.tolist()
    assert kinds[7:11] == block
    assert kinds[len(prompt) : len(prompt) + 4] == block
    assert sum(kinds) == 2 * sum(block)


def test_text_may_be_no_mark_and_no_row_without_a_token(folder):
    vocabulary = load_layout(LIQUID, folder).vocabulary
    assert np.flatnonzero(vocabulary.drawable_text).tolist() == [EOS, BOI, *range(9, FIRST)]
    assert (vocabulary.size, vocabulary.first_code, vocabulary.num_codes) == (FIRST + 16, FIRST, 16)


def test_names_are_those_of_the_public_checkpoint(folder):
    layer = [f"self_attn.{name}_proj.weight" for name in "qkvo"]
    layer += [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    layer += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    wanted = {TABLE, "model.norm.weight"} | {f"model.layers.{i}.{name}" for i in range(2) for name in layer}
    wanted |= set() if read_config(folder)["tie_word_embeddings"] else {HEAD}
    assert load_interleaved(LIQUID, folder).shapes.keys() == load_file(folder / "model.safetensors").keys() == wanted


@pytest.mark.parametrize("says", [True, None], ids=["config says tied", "config says nothing"])
@pytest.mark.parametrize("same", [True, False], ids=["equal head", "head of its own"])
def test_a_stored_head_decides_what_the_config_calls_tied(tmp_path, says, same):
    folder = write_liquid(tmp_path / "c", tied=same)
    state = load_file(folder / "model.safetensors")
    if same:
        save_file(state | {HEAD: state[TABLE].clone()}, folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "config.json", tie_word_embeddings=says)
    policy = load_interleaved(LIQUID, folder)
    assert policy.config.tie_word_embeddings == (HEAD not in policy.shapes) == same
    assert (policy.module.lm_head.weight is policy.module.model.embed_tokens.weight) == same
    with torch.no_grad():
        policy.module.model.embed_tokens.weight.add_(1)
    policy.save(tmp_path / "out", policy.module.state_dict())
    assert (HEAD in load_file(tmp_path / "out" / "model.safetensors")) != same
    assert read_config(tmp_path / "out")["tie_word_embeddings"] == same
    again, row = load_interleaved(LIQUID, tmp_path / "out"), pack(dialogues(policy.layout))
    ours, theirs = (each.logits(each.hidden_states_of(row), "both") for each in (policy, again))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("size", [FIRST + 15, FIRST, FIRST + 17])
def test_a_token_more_or_less_is_refused(folder, tmp_path, size):
    copy = shutil.copytree(folder, tmp_path / "copy")
    edit_json(copy / "config.json", vocab_size=size)
    with pytest.raises(ValueError, match=rf"tokenizer's {FIRST} ids and a codebook .*got {size}, which leaves"):
        load_layout(LIQUID, copy)
