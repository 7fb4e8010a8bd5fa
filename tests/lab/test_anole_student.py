import random

import numpy as np
import pytest
import torch
from torch.nn import functional

from unirl.lab.anole_student import load_model, make_student
from unirl.lab.exam import make_exam
from unirl.lab.lab_model import SamplingPlan
from unirl.lab.noise import true_answer
from unirl.lab.plain_conversations import null_prompts
from unirl.lab.pretrain import _make_optimizers, make_scenes
from unirl.lab.show import show
from unirl.lab.student import Corpus
from unirl.lab.subsets.wording import as_request
from unirl.lab.tiny_anole import TOKENS
from unirl.lab.tokenizer import answer_text
from unirl.lab.unified_visual import SUBSETS, WORDS, make_lesson, make_sample
from unirl.lab.verifier import detect
from unirl.lab.vq_training import build_dictionary
from unirl.lab.world import NUM_CODES, caption, make_question, question_with_choices, render
from unirl.types import Segment, Turn


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


@pytest.fixture(scope="module")
def shipped(shipped_path):
    return load_model(shipped_path.parent / "anole")


def test_prompts_are_those_of_the_subsets_and_answers_have_their_form(student):
    drawing = make_sample("normal", 0, 3)
    _, lesson = make_lesson("normal", 0, 3)
    assert drawing.turns[0].segments[0].text == as_request(caption(lesson.key))
    asked, (scene, text) = make_sample("understanding", 0, 4), make_lesson("understanding", 0, 4)[1].prompt
    # Which of two objects is asked about is drawn at random.
    questions = [make_question(random.Random(seed), scene) for seed in range(400)]
    question = next(q for q in questions if question_with_choices(q.text, q.choices) == text)
    assert asked.turns[1].segments[0].text == answer_text(true_answer(scene, question))


def test_a_picture_loss_is_near_chance_at_first_and_has_a_gradient(student, corpus):
    captions = [caption(scene.spec) for scene in corpus.scenes[:6]]
    loss = student.drawing_loss(captions, [False] * 5 + [True], corpus.codes[:6], random.Random(0))
    assert 3.5 < loss.item() < 7.0
    loss.backward()
    assert all(parameter.grad is not None for parameter in student.module.parameters())
    student.module.zero_grad()
    again = student.drawing_loss(captions, [False] * 5 + [True], corpus.codes[:6], random.Random(0))
    assert again.item() == loss.item(), "equal random numbers choose equal prompts"


@torch.no_grad()
def test_codes_compete_with_codes_and_words_with_words(student, corpus):
    codes = corpus.codes[0].view(5, 5).numpy().astype(np.int32)
    turns = (
        Turn(role="user", segments=(Segment(text="a photo of a cross"),)),
        Turn(role="assistant", segments=(Segment(image=corpus.images[0], in_loss=True),)),
    )
    sequence = student.policy.layout.encode(turns, [codes])
    ids, targets = torch.from_numpy(sequence.ids).long()[None], torch.from_numpy(sequence.in_loss)[None]
    nats = student._nats(ids, targets)[0]
    logits = student.policy.module.lm_head(student.module.model(input_ids=ids).last_hidden_state)[0]
    assert [TOKENS[i] for i in ids[0, targets[0]]][::26] == ["<racm3:break>", "<eoss>"]
    for place in torch.nonzero(targets[0])[:, 0]:
        is_code = 4 <= ids[0, place] < 4 + NUM_CODES
        own = torch.tensor([(4 <= i < 4 + NUM_CODES) == is_code for i in range(len(TOKENS))])
        expected = functional.cross_entropy(logits[place - 1].masked_fill(~own, -torch.inf), ids[0, place])
        torch.testing.assert_close(nats[place], expected)
    assert not nats[~targets[0]].any()


def test_a_dropped_caption_leaves_padding_of_its_length(student):
    ids = torch.tensor([[*student.as_model().prompt("a photo of a cross"), TOKENS.index("<racm3:break>")]])
    null = null_prompts(student.policy, ids)[0]
    assert [TOKENS[i] for i in null] == ["<s>", *["<pad>"] * 6, "<racm3:break>"]


def test_the_first_letter_weighs_more_in_an_answer(student, corpus):
    rows = range(12)
    answers = [true_answer(corpus.scenes[row], corpus.questions[row]) for row in rows]
    losses = [student.answering_loss(corpus, rows, answers, weight, random.Random(0)) for weight in (1.0, 3.0)]
    (plain, letter), (weighted, same) = losses
    assert same == letter
    tokens = np.mean([len(answer_text(answer).split()) + 1 for answer in answers])
    assert weighted.item() - plain.item() == pytest.approx(2 * letter / tokens, rel=1e-4)


def test_matrices_of_the_layers_go_to_muon_and_norms_do_not(student):
    muon, rest = _make_optimizers(student)
    assert {p.shape for group in muon.param_groups for p in group["params"]} == {(96, 96), (288, 96), (96, 288)}
    norms = {p for name, p in student.module.named_parameters() if "norm" in name}
    assert norms <= {p for group in rest.param_groups for p in group["params"]}


def test_a_few_steps_teach_each_half_of_the_image_tokenizer(corpus):
    student = make_student(1)
    student.start_image_tokenizer(build_dictionary(corpus.images, NUM_CODES), 0)
    before = {name: value.clone() for name, value in student.vq.state_dict().items()}
    for side in (0, 1):
        first, later = (student.train_image_tokenizer(side, corpus, steps, 0) for steps in (1, 15))
        assert later < 0.9 * first
    moved = {name.split(".")[0] for name, v in student.vq.state_dict().items() if not torch.equal(v, before[name])}
    assert moved == {"encoder", "quant_conv", "post_quant_conv", "decoder"}


def test_what_is_examined_is_what_would_be_written(student, tmp_path):
    student.write(tmp_path / "now")
    written, examined = load_model(tmp_path / "now"), student.as_model()
    for model in (written, examined):
        for name, value in model.policy.module.state_dict().items():
            torch.testing.assert_close(value, student.module.state_dict()[name].half().float(), atol=0, rtol=0)


@torch.no_grad()
def test_cached_sampling_agrees_with_the_loss_and_padding_changes_nothing(shipped):
    exam, plan = make_exam(5), SamplingPlan(seed=0, greedy=True)
    answers = shipped.answer(exam.images, exam.questions, plan)
    prompts = [question_with_choices(q.text, q.choices) for q in exam.questions]
    assert len({len(prompt.split()) for prompt in prompts}) > 1, "the fixture should exercise padding"
    alone = [shipped.answer(exam.images[i : i + 1], exam.questions[i : i + 1], plan)[0] for i in range(5)]
    assert answers == alone
    layout, module = shipped.policy.layout, shipped.policy.module
    text_ids = torch.from_numpy(layout.vocabulary.text_ids)
    for image, own, prompt, answer in zip(
        exam.images, shipped.codec.encode(exam.images), prompts, answers, strict=True
    ):
        start = shipped.prompt(prompt, image, own)
        reply = [*layout.encode_text(answer.rsplit(" ", 1)[0]), layout.end]
        hidden = module.model(input_ids=torch.tensor([[*start, *reply]])).last_hidden_state[0]
        best = text_ids[shipped.policy.logits(hidden[len(start) - 1 : -1], "text").argmax(-1)]
        assert best.tolist() == reply


def test_equal_seeds_draw_equally_and_guidance_changes_the_drawing(shipped):
    captions = ["a photo of a red circle", "a photo of two squares"]
    one, two = (shipped.draw(captions, SamplingPlan(seed=3)) for _ in range(2))
    assert np.array_equal(one, two)
    assert one.shape == (2, 20, 20, 3)
    guided = [shipped.draw(captions, SamplingPlan(seed=3, guidance=scale)) for scale in (1.0, 8.0)]
    assert np.array_equal(guided[0], one)
    assert not np.array_equal(guided[0], guided[1])


def test_only_words_are_ever_written(student):
    exam, model = make_exam(4), student.as_model()
    texts = [text for seed in range(4) for text in model.answer(exam.images, exam.questions, SamplingPlan(seed=seed))]
    ends = {"<｜end▁of▁sentence｜>"}  # noqa: RUF001
    assert {word for text in texts for word in text.split()} <= {*WORDS} | ends


def test_a_contact_sheet_of_the_shipped_base_is_made(shipped_path, tmp_path):
    shown = show(shipped_path.parent / "anole", tmp_path / "sheet", n=5, seed=0, guidance=1.5)
    assert all(record.prompt.startswith("a photo of") for record in shown)
    assert sum(record.answer.startswith("<think>") for record in shown) >= 3
    assert (tmp_path / "sheet" / "lab.png").is_file()


def test_pictures_of_the_subsets_survive_the_shipped_image_tokenizer(shipped):
    pictures = np.stack(
        [
            image
            for subset in SUBSETS
            for index in range(12)
            for turn in make_sample(subset, 0, index, heldout=True).turns
            for image in turn.images
        ]
    )
    again = shipped.reconstruct(pictures)
    assert np.mean([seen(one) == seen(two) for one, two in zip(pictures, again, strict=True)]) >= 0.97


def seen(image):
    """Shape, colour and place of every object that the verifier finds."""
    return sorted((str(found.shape), found.color, found.centre) for found in detect(image).objects)
