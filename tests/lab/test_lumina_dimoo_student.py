import random
from pathlib import Path

import numpy as np
import pytest
import torch

from unirl.config import ModelConfig
from unirl.lab.lab_model import SamplingPlan
from unirl.lab.lumina_dimoo_student import make_student
from unirl.lab.noise import true_answer
from unirl.lab.pretrain import make_scenes
from unirl.lab.show import show
from unirl.lab.student import Corpus
from unirl.lab.tiny_lumina import NUM_TEXT_IDS, ROLES, make_tokenizer, write_checkpoint
from unirl.lab.tokenizer import WORDS, answer_text
from unirl.lab.vq_training import build_dictionary
from unirl.lab.world import LETTERS, NUM_CODES, caption, render
from unirl.models.lumina_dimoo import LuminaDimoo

SHIPPED = Path(show.__code__.co_filename).parent / "checkpoints" / "lumina_dimoo"


@pytest.fixture(scope="module")
def corpus():
    scenes, questions = make_scenes(1500, seed=1)
    images = np.stack([render(scene) for scene in scenes])
    codes = build_dictionary(images, NUM_CODES).codes(images)
    return Corpus(scenes=scenes, questions=questions, images=images, codes=codes)


@pytest.fixture(scope="module")
def student(corpus):
    student = make_student(0)
    student.start_image_tokenizer(build_dictionary(corpus.images, NUM_CODES), 0)
    return student


def test_the_vocabulary_ends_in_the_image_codes_and_every_word_has_an_id():
    vocabulary = make_tokenizer().get_vocab()
    assert vocabulary[ROLES["first_code"]] == NUM_TEXT_IDS
    assert len(vocabulary) - 1 <= NUM_TEXT_IDS
    assert set(WORDS) <= set(vocabulary)
    assert make_tokenizer()("a red circle").input_ids == [vocabulary[word] for word in ("a", "red", "circle")]


def test_only_words_the_end_and_padding_may_be_drawn(student):
    allowed = student._policy.cell_law("understanding", 1.0).allowed
    tokenizer = make_tokenizer()
    drawn = set(tokenizer.convert_ids_to_tokens(torch.nonzero(allowed)[:, 0].tolist()))
    assert drawn == {*WORDS, ROLES["end_answer"], ROLES["end_text"], ROLES["answer_pad"]}


def test_a_picture_loss_is_near_chance_at_first_and_has_a_gradient(student, corpus):
    captions = [caption(scene.spec) for scene in corpus.scenes[:6]]
    loss = student.drawing_loss(captions, [False] * 5 + [True], corpus.codes[:6], random.Random(0))
    assert 3.5 < loss.item() < 7.0
    loss.backward()
    assert all(parameter.grad is not None for parameter in student.module.parameters())
    student.module.zero_grad()
    again = student.drawing_loss(captions, [False] * 5 + [True], corpus.codes[:6], random.Random(0))
    assert again.item() == loss.item(), "equal random numbers hide equal cells"


def test_letters_weigh_more_in_an_answer(student, corpus):
    rows = range(24)
    answers = [true_answer(corpus.scenes[row], corpus.questions[row]) for row in rows]
    losses = [student.answering_loss(corpus, rows, answers, weight, random.Random(0)) for weight in (1.0, 3.0)]
    (plain, letter), (weighted, same) = losses
    assert same == letter
    share = (weighted.item() - plain.item()) / (2 * letter)
    assert 0.02 < share < 0.3, "hidden letters among all hidden tokens"
    assert answer_text(answers[0]).split()[-2] in LETTERS


def test_a_few_steps_teach_each_half_of_the_image_tokenizer(corpus):
    student = make_student(1)
    student.start_image_tokenizer(build_dictionary(corpus.images, NUM_CODES), 0)
    before = {name: value.clone() for name, value in student.vq.state_dict().items()}
    for side in (0, 1):
        first, later = (student.train_image_tokenizer(side, corpus, steps, 0) for steps in (1, 25))
        assert later < 0.8 * first
    moved = {name for name, value in student.vq.state_dict().items() if not torch.equal(value, before[name])}
    assert any(name.startswith("encoder") for name in moved)
    assert any(name.startswith("decoder") for name in moved)
    assert "quantize.embedding.weight" not in moved


def test_what_is_examined_is_what_would_be_written(student, tmp_path):
    model = student.as_model()
    plan = SamplingPlan(seed=3, guidance=1.5)
    pictures = model.draw(["a photo of a red circle", "a photo of two squares"], plan)
    assert pictures.shape == (2, 20, 20, 3)
    write_checkpoint(student.module, student.vq, tmp_path / "now")
    loaded = LuminaDimoo.load(ModelConfig(family="lumina_dimoo"), tmp_path / "now")
    for name, value in loaded.module.state_dict().items():
        torch.testing.assert_close(value, student.module.state_dict()[name].half().float(), atol=0, rtol=0)


def test_a_contact_sheet_of_the_shipped_base_is_made(tmp_path):
    shown = show(SHIPPED, tmp_path / "sheet", n=5, seed=0, guidance=1.5)
    assert all(record.prompt.startswith("a photo of") for record in shown)
    assert sum(record.answer.startswith("<think>") for record in shown) >= 3
    assert (tmp_path / "sheet" / "lab.png").is_file()
