from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import JanusProcessor

import unirl.lab
from tests.janus_checkpoints import edit_json
from unirl.lab.data import make_heldout
from unirl.lab.tokenizer import generation_prompt, make_tokenizer, understanding_prompt
from unirl.models.janus_prompts import JanusPrompts


@pytest.fixture
def prompts(janus_folder):
    return JanusPrompts.load(janus_folder, None)


def test_understanding_ids_equal_the_processors_own(prompts, janus_folder, question, picture):
    processor = JanusProcessor.from_pretrained(janus_folder, local_files_only=True)
    text = "<|User|>: <image_placeholder>\nwhat colour is the cat ?\nA red\nB blue\n\n<|Assistant|>:"
    wanted = processor(text=[text], images=[picture], input_data_format="channels_last")["input_ids"][0]
    assert prompts.encode_understanding(question).tolist() == wanted.tolist()


def test_generation_ids_equal_the_processors_own(prompts, janus_folder, drawing):
    processor = JanusProcessor.from_pretrained(janus_folder, local_files_only=True)
    text = "<|User|>: a red cat on a blue mat\n\n<|Assistant|>:"
    wanted = processor(text=[text], generation_mode="image")["input_ids"][0]
    assert prompts.encode_generation(drawing).tolist() == wanted.tolist()


@pytest.mark.parametrize(
    ("said", "asked", "wanted"),
    [
        (True, None, "You are a helpful language and vision assistant."),
        (True, "", ""),
        (False, None, ""),
        (False, "the cat", "the cat\n\n"),
    ],
)
def test_system_prompt_follows_the_key_and_then_the_processor(janus_folder, tmp_path, said, asked, wanted):
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        (tmp_path / name).write_bytes((janus_folder / name).read_bytes())
    edit_json(tmp_path / "processor_config.json", use_default_system_prompt=said)
    system = JanusPrompts.load(tmp_path, asked).system_prompt
    assert system.startswith(wanted)
    assert bool(system) == bool(wanted)
    assert not system or system.endswith("\n\n")


def test_checkpoint_may_set_how_choices_read(janus_folder, tmp_path, question):
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        (tmp_path / name).write_bytes((janus_folder / name).read_bytes())
    edit_json(tmp_path / "tokenizer_config.json", choice_template="{letter} : {choice}")
    prompts = JanusPrompts.load(tmp_path, None)
    assert "A : red B : blue" in prompts.decode(prompts.encode_understanding(question))


def test_special_tokens_in_data_are_refused(prompts, question, drawing):
    with pytest.raises(ValueError, match=r"understanding sample q: .*special token <image_placeholder>"):
        prompts.encode_understanding(replace(question, question="what is <image_placeholder> ?"))
    with pytest.raises(ValueError, match=r"generation sample g: .*special token <begin_of_image>.*remove it"):
        prompts.encode_generation(replace(drawing, prompt="cat <begin_of_image>"))


def test_answers_may_hold_words_and_the_end_but_no_marks(prompts):
    allowed = prompts.allowed_text_ids(64)
    ids = prompts.ids
    assert allowed[ids.eos]
    assert not allowed[[ids.pad, ids.bos, ids.boi, ids.eoi, ids.placeholder]].any()
    vocabulary = torch.zeros(64, dtype=torch.bool)
    vocabulary[list(prompts.tokenizer.get_vocab().values())] = True
    assert not allowed[~vocabulary].any()
    assert int(allowed.sum()) == int(vocabulary.sum()) - 5


def test_decoding_keeps_special_tokens_and_survives_ids_without_words(prompts):
    what = prompts.tokenizer.get_vocab()["what"]
    text = prompts.decode(np.array([what, 63, prompts.ids.eos], np.int32))
    assert text.startswith("what")
    assert text.endswith("▁sentence｜>")  # noqa: RUF001


def test_lab_prompts_are_those_its_model_was_trained_on():
    folder = Path(unirl.lab.__file__).parent / "checkpoints" / "janus"
    prompts, tokenizer = JanusPrompts.load(folder, None), make_tokenizer()
    for question, drawing in zip(*make_heldout(20, 0), strict=True):
        wanted = tokenizer(understanding_prompt(question.question, question.choices)).input_ids
        assert prompts.encode_understanding(question).tolist() == wanted
        assert prompts.encode_generation(drawing).tolist() == tokenizer(generation_prompt(drawing.prompt)).input_ids
