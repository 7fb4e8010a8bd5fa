import pytest
import torch

from unirl.lab.data import make_heldout
from unirl.lab.plain_sampling import (
    SamplingPlan,
    encode,
    image_logits,
    null_prompts,
    sample_answers,
    sample_codes,
    text_logits,
)
from unirl.lab.tiny_janus import to_pixels
from unirl.lab.tokenizer import EOS, generation_prompt, understanding_prompt


@pytest.fixture(scope="module")
def asked():
    """Five prompts of different length and their pictures."""
    understanding, generation = make_heldout(5)
    drawings = encode([generation_prompt(sample.prompt) for sample in generation], prompts=True)
    questions = encode([understanding_prompt(s.question, s.choices) for s in understanding], prompts=True)
    pixels = torch.cat([to_pixels(sample.image[None]) for sample in understanding])
    assert drawings.mask.min() == questions.mask.min() == 0, "the fixture should exercise padding"
    return drawings, questions, pixels


def one_row(text, row):
    keep = text.mask[row].bool()
    return type(text)(ids=text.ids[row : row + 1, keep], mask=text.mask[row : row + 1, keep])


def test_prompts_pad_left_with_bos_and_completions_right_without():
    prompts = encode(
        [generation_prompt("a photo of a cross"), generation_prompt("a photo of two red circles")], prompts=True
    )
    answers = encode([f"<answer> A </answer> {EOS}", EOS], prompts=False)
    assert prompts.mask.tolist()[0] == [0, 0] + [1] * 10 or prompts.mask[0, 0] == 0
    assert prompts.ids[1, 0] == 1
    assert answers.mask.tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert answers.ids[1].tolist() == [2, 0, 0, 0]


def test_null_prompts_keep_only_bos_and_begin_of_image(asked):
    drawings = asked[0]
    null = null_prompts(drawings)
    kept = {int(i) for i in null.ids.unique()}
    assert kept == {0, 1, 3}
    assert torch.equal(null.mask, drawings.mask)
    assert (null.ids[:, -1] == 3).all()


@torch.no_grad()
def test_padding_changes_no_logit(random_model, asked):
    drawings, questions, pixels = asked
    codes = torch.randint(96, (5, 25), generator=torch.Generator().manual_seed(0))
    answers = encode([f"<answer> {letter} </answer> {EOS}" for letter in "ABCDA"], prompts=False)
    batched = image_logits(random_model, drawings, codes), text_logits(random_model, questions, pixels, answers)
    for row in range(5):
        drawn = image_logits(random_model, one_row(drawings, row), codes[row : row + 1])
        answer = one_row(answers, row)
        written = text_logits(random_model, one_row(questions, row), pixels[row : row + 1], answer)
        assert torch.allclose(batched[0][row], drawn[0], atol=1e-5)
        assert torch.allclose(batched[1][row], written[0], atol=1e-5)


@torch.no_grad()
def test_cached_sampling_agrees_with_teacher_forcing(base, asked):
    drawings, questions, pixels = asked
    codes = sample_codes(base, drawings, SamplingPlan(seed=0, greedy=True))
    assert torch.equal(image_logits(base, drawings, codes).argmax(-1), codes)
    answers = encode(sample_answers(base, questions, pixels, SamplingPlan(seed=0, greedy=True)), prompts=False)
    best = text_logits(base, questions, pixels, answers).argmax(-1)
    assert torch.equal(best * answers.mask, answers.ids * answers.mask)


def test_guidance_one_needs_no_null_stream_and_more_guidance_changes_the_drawing(random_model, asked):
    plain = sample_codes(random_model, asked[0], SamplingPlan(seed=0))
    guided = sample_codes(random_model, asked[0], SamplingPlan(seed=0, guidance=5.0))
    assert plain.shape == guided.shape == (5, 25)
    assert not torch.equal(plain, guided)


def test_equal_seeds_draw_equally_and_leave_the_global_generator_alone(random_model, asked):
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    first = sample_codes(random_model, asked[0], SamplingPlan(seed=7))
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(first, sample_codes(random_model, asked[0], SamplingPlan(seed=7)))
    assert not torch.equal(first, sample_codes(random_model, asked[0], SamplingPlan(seed=8)))


def test_only_words_and_the_end_token_are_ever_drawn(random_model, asked):
    _, questions, pixels = asked
    texts = [t for seed in range(8) for t in sample_answers(random_model, questions, pixels, SamplingPlan(seed=seed))]
    assert not any(token in text for text in texts for token in ("<image", "<begin", "<end_of_image", "<|"))
    assert all(len(text.split()) <= 20 for text in texts)
