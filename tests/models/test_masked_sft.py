import math
from pathlib import Path

import numpy as np
import pytest
import torch

from unirl.config import ModelConfig
from unirl.lab.tiny_lumina import ROLES, make_model, make_vq, write_checkpoint
from unirl.models.canvases import CellLaw
from unirl.models.lumina_dimoo import LuminaDimoo
from unirl.models.masked_sft import Lesson, answer_lesson, hide_cells, masked_cross_entropy, without_prompt
from unirl.types import GenerationSample, UnderstandingSample

CAPTION = GenerationSample(id="g", prompt="a photo of two circles")
QUESTION = UnderstandingSample(
    id="u", image=np.zeros((20, 20, 3), np.uint8), question="how many circles ?", choices=("one", "two"), answer="B"
)


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> LuminaDimoo:
    folder = Path(tmp_path_factory.mktemp("lumina")) / "tiny"
    write_checkpoint(make_model(0), make_vq(0), folder)
    return LuminaDimoo.load(ModelConfig(family="lumina_dimoo"), folder)


@pytest.fixture
def drawing(policy):
    values = np.random.default_rng(0).integers(0, policy.prompts.num_codes, 25).astype(np.int32)
    return Lesson(canvas=policy.prompts.drawing(CAPTION, (5, 5)), values=values)


@pytest.fixture
def answer(policy):
    canvas = policy.prompts.answering(QUESTION, np.zeros((5, 5), np.int32), 14)
    return answer_lesson(policy.prompts, canvas, "<think> two circles : two B </think> <answer> B </answer>")


def test_an_answer_ends_in_its_token_and_padding_fills_the_rest(policy, answer):
    words = policy.prompts.tokenizer.convert_ids_to_tokens(answer.values.tolist())
    assert words[-5:] == ["</answer>", ROLES["end_answer"], *[ROLES["answer_pad"]] * 3]
    assert answer.num_padding == 3
    assert policy.prompts.end_of(answer.values) == 10
    with pytest.raises(ValueError, match="expected at most 13 tokens and the end in 14 cells; got 15"):
        answer_lesson(policy.prompts, answer.canvas, "a " * 15)


def test_hidden_shares_follow_the_cosine_and_parts_are_drawn_apart(drawing, answer):
    rng = np.random.default_rng(1)
    counts = np.array([hide_cells(drawing, rng).sum() for _ in range(4000)])
    # The mean of floor(25 cos(pi r / 2)), at least 1, by a fine sum over r.
    grid = (np.arange(200_000) + 0.5) / 200_000
    wanted = np.maximum(1, np.floor(25 * np.cos(np.pi / 2 * grid))).mean()
    assert counts.mean() == pytest.approx(wanted, abs=4 * counts.std() / math.sqrt(len(counts)))
    assert counts.min() == 1
    assert counts.max() == 24
    both = np.array([(h[:-3].sum(), h[-3:].sum()) for h in (hide_cells(answer, rng) for _ in range(4000))])
    assert (both >= 1).all()
    assert abs(np.corrcoef(both.T)[0, 1]) < 0.06
    places = np.mean([hide_cells(drawing, rng) for _ in range(4000)], axis=0)
    assert np.abs(places - wanted / 25).max() < 0.05


def test_a_short_answer_is_hidden_whole_and_its_padding_is_not(policy):
    canvas = policy.prompts.answering(QUESTION, np.zeros((5, 5), np.int32), 14)
    lesson = answer_lesson(policy.prompts, canvas, "two B")
    hidden = [hide_cells(lesson, np.random.default_rng(seed)) for seed in range(40)]
    assert all(cells[:3].all() for cells in hidden)
    assert not all(cells[3:].all() for cells in hidden)


@pytest.mark.parametrize("whole_vocabulary", [False, True])
def test_the_loss_is_the_cross_entropy_of_hidden_cells_on_the_canvas_without_them(policy, drawing, whole_vocabulary):
    prompts, model = policy.prompts, policy.module
    law, lessons = policy.cell_law("generation", 1.0), [drawing, without_prompt(prompts, drawing)]
    if whole_vocabulary:
        law = CellLaw(mask_id=prompts.ids.mask, start=0, stop=model.config.vocab_size)
        lessons = [Lesson(canvas=own.canvas, values=own.values + prompts.ids.first_code) for own in lessons]
    hidden = [hide_cells(own, np.random.default_rng(seed)) for seed, own in enumerate(lessons)]
    nats = masked_cross_entropy(model, lessons, hidden, law)
    plain = []
    for own, cells in zip(lessons, hidden, strict=True):
        ids, places = torch.from_numpy(own.canvas).long(), np.flatnonzero(own.canvas == prompts.ids.mask)
        for place, value, is_hidden in zip(places, own.values, cells, strict=True):
            if not is_hidden:
                ids[place] = int(value) + law.start
        logits = model(ids[None])[0, :, law.start : law.stop]
        plain += [
            -logits[place].log_softmax(0)[int(value)]
            for place, value, is_hidden in zip(places, own.values, cells, strict=True)
            if is_hidden
        ]
    torch.testing.assert_close(nats, torch.stack(plain), atol=2e-6, rtol=0)


def test_a_dropped_prompt_leaves_the_cells_as_they_are(policy, drawing):
    empty = without_prompt(policy.prompts, drawing)
    assert len(empty.canvas) < len(drawing.canvas)
    assert np.array_equal(empty.canvas[-34:], drawing.canvas[-34:])
    assert np.array_equal(empty.values, drawing.values)
