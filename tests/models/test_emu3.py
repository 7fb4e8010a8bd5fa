"""Emu3's two layouts by hand; what all families share is in test_interleaved.py."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests.janus_checkpoints import edit_json
from tests.joint_checkpoints import visual_token, write_emu3
from tests.models.conversations import dialogues, pack, picture, say
from unirl.config import ModelConfig
from unirl.models.emu3 import FAMILY, load_interleaved, load_layout
from unirl.types import TokenKind

EMU3 = ModelConfig(family="emu3")


@pytest.fixture(scope="module", params=[False, True], ids=["own code", "native"])
def folder(request, tmp_path_factory):
    return write_emu3(tmp_path_factory.mktemp("emu3") / "c", native=request.param)


@pytest.fixture(scope="module")
def ids(folder):
    """Id of a token, or ids of a text, by the tokenizer itself."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    vocabulary = tokenizer.get_vocab()

    def look_up(text):
        return [vocabulary[text]] if text in vocabulary else tokenizer(text, add_special_tokens=False).input_ids

    return look_up


def test_a_conversation_by_hand(folder, ids):
    layout = load_layout(EMU3, folder)
    codes = np.array([[0, 5, 15], [2, 2, 1]], np.int32)
    turns = (say("user", "draw"), say("assistant", "here", picture(), "it is"))
    sequence = layout.encode(turns, [codes])
    prompt = ids("<|extra_203|>") + ids("You are a helpful assistant. USER: draw. ASSISTANT:")
    rows = [[ids(visual_token(code))[0] for code in row] + ids("<|extra_200|>") for row in codes]
    image = ids("<|image start|>") + ids("2") + ids("*") + ids("3") + ids("<|image token|>")
    image += rows[0] + rows[1] + ids("<|extra_201|>") + ids("<|image end|>")
    answer = ids(" here") + image + ids("it is") + ids("<|extra_204|>")
    assert sequence.ids.tolist() == prompt + answer
    row = [TokenKind.CODE] * 3 + [TokenKind.ROW_END]
    kinds = [TokenKind.BEGIN, *[TokenKind.GEOMETRY] * 4, *row, *row, TokenKind.ROW_END, TokenKind.END]
    text = [TokenKind.TEXT]
    assert sequence.kinds.tolist() == text * (len(prompt) + 5) + kinds + text * 6
    assert sequence.in_loss.tolist() == [False] * len(prompt) + [True] * len(answer)
    assert layout.image.length(2, 3) == len(image)
    assert layout.end == ids("<|extra_204|>")[0]


def test_a_shown_image_stands_before_the_question(folder, ids):
    layout = load_layout(ModelConfig(family="emu3", system_prompt=""), folder)
    code = np.zeros((1, 1), np.int32)
    turns = (say("user", picture(), "what ?"), say("assistant", "red"), say("user", "why"))
    sequence = layout.encode(turns, [code])
    shown = ids(
        " USER: <|image start|>1*1<|image token|><|visual token 000000|><|extra_200|><|extra_201|><|image end|>"
    )
    asked = ids("what ?. ASSISTANT:")
    wanted = [*ids("<|extra_203|>"), *shown, *asked, *ids(" red<|extra_204|>"), *ids(" USER: why. ASSISTANT:")]
    assert sequence.ids.tolist() == wanted
    assert sequence.in_loss.sum() == 5


def test_text_may_be_no_mark(folder, ids):
    layout = load_layout(EMU3, folder)
    drawable = np.flatnonzero(layout.vocabulary.drawable_text).tolist()
    assert drawable == [*range(256), *ids("<|extra_204|>"), *ids("<|image start|>")]
    assert (layout.vocabulary.first_code, layout.vocabulary.num_codes) == (265, 16)


def test_names_are_those_of_both_public_layouts(folder):
    layer = [f"self_attn.{name}_proj.weight" for name in "qkvo"]
    layer += [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    layer += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    wanted = {"model.embed_tokens.weight", "model.norm.weight"}
    wanted |= {f"model.layers.{index}.{name}" for index in range(2) for name in layer}
    assert load_interleaved(EMU3, folder).shapes.keys() == wanted | {"lm_head.weight"}
    if json.loads((folder / "config.json").read_text())["model_type"] == "emu3":
        wanted = {name.replace("model.", "model.text_model.", 1) for name in wanted}
    stored = load_file(folder / "model.safetensors").keys()
    assert {name for name in stored if not name.startswith("model.vqmodel.")} == wanted | {"lm_head.weight"}


def test_both_layouts_hold_the_same_model(tmp_path):
    plain, native = (
        load_interleaved(EMU3, write_emu3(tmp_path / name, native=name == "native")) for name in ("own", "native")
    )
    plain.module.load_state_dict(native.module.state_dict())
    row = pack(dialogues(plain.layout))
    assert torch.equal(plain.hidden_states_of(row), native.hidden_states_of(row))


def test_training_mode_drops_nothing(folder):
    policy = load_interleaved(EMU3, folder)
    row = pack(dialogues(policy.layout))
    states = policy.hidden_states_of(row)
    policy.module.train()
    assert torch.equal(policy.hidden_states_of(row), states)


def test_config_keys_that_stage1_leaves_out_are_the_published_ones(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "Emu3"}))
    config = FAMILY.read_config(tmp_path)
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (184622, 4096, 14336)
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (32, 32, 8)
    assert (config.rms_norm_eps, config.rope_parameters["rope_theta"]) == (1e-5, 1e6)
    assert (config.attention_dropout, config.tie_word_embeddings) == (0, False)
    edit_json(tmp_path / "config.json", rope_theta=5e5, num_hidden_layers=3)
    config = FAMILY.read_config(tmp_path)
    assert (config.num_hidden_layers, config.rope_parameters["rope_theta"]) == (3, 5e5)


def test_saving_states_precision_and_tie(folder, tmp_path):
    policy = load_interleaved(EMU3, folder)
    state = {name: value.bfloat16() for name, value in policy.module.state_dict().items()}
    policy.save(tmp_path / "out", state)
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "out"))
    assert after.get("dtype", after.get("torch_dtype")) == "bfloat16"
    assert after["tie_word_embeddings"] is False
    assert {key for key in after if after[key] != before.get(key)} <= {"dtype", "torch_dtype", "tie_word_embeddings"}


def test_shifted_code_names_are_refused(folder, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text()
        for old, new in ((1, 99), (2, 1), (99, 2)):
            text = text.replace(visual_token(old), visual_token(new))
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"codes named <\|visual token 000000\|> and on, with consecutive ids; got 16"):
        load_layout(EMU3, tmp_path)
