import numpy as np
import pytest
import torch

from unirl.models.canvases import CanvasRow, CellLaw, cells_of, score_canvases
from unirl.models.llada import LladaConfig, LladaForDiffusion

MASK, FIRST, NUM = 30, 40, 8
LAW = CellLaw(mask_id=MASK, start=FIRST, stop=FIRST + NUM, temperature=0.8)
GUIDED = CellLaw(mask_id=MASK, start=FIRST, stop=FIRST + NUM, temperature=0.8, guidance_scale=5.0)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LladaConfig(d_model=32, n_heads=2, n_layers=2, mlp_hidden_size=48, vocab_size=48, init_std=0.3)
    return LladaForDiffusion(config).eval()


def make_row(rng, num_prompt, steps):
    """A prompt, then cells between marks; the null prompt is shorter."""
    tail = [31, *[MASK] * len(steps), 32]
    canvas = np.array([*rng.integers(0, 30, num_prompt), *tail], np.int32)
    null = np.array([7, 8, *tail], np.int32)
    values = rng.integers(0, NUM, len(steps)).astype(np.int32)
    return CanvasRow(canvas=canvas, null=null, values=values, steps=np.array(steps, np.int16))


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    return [make_row(rng, 5, [0, 1, 0, 2]), make_row(rng, 3, [3, 0, 0]), make_row(rng, 9, [0, 0, 0, 0, 0])]


def one_by_one(model, row, law):
    """Each cell on its own canvas, written out anew."""
    scores = []
    for cell in range(len(row.values)):
        streams = []
        for canvas in [row.canvas] + ([row.null] if law.guidance_scale != 1 else []):
            seen = canvas.copy()
            for other, place in enumerate(cells_of(canvas, MASK)):
                if row.steps[other] < row.steps[cell]:
                    seen[place] = FIRST + row.values[other]
            ids = torch.from_numpy(seen).long()[None]
            streams.append(model(ids)[0, cells_of(canvas, MASK)[cell], FIRST : FIRST + NUM])
        mixed = streams[0] if len(streams) == 1 else streams[1] + law.guidance_scale * (streams[0] - streams[1])
        scores.append((mixed / law.temperature).log_softmax(0)[row.values[cell]])
    return torch.stack(scores)


@pytest.mark.parametrize("law", [LAW, GUIDED])
def test_scores_equal_a_plain_loop_over_cells(model, rows, law):
    total = torch.zeros(3, 5)
    seen = torch.zeros(3, 5)
    for scores in score_canvases(model, rows, law):
        total += scores.logprobs * scores.scored
        seen += scores.scored
        assert (scores.logprobs[~scores.scored] == 0).all()
    assert seen.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1] * 5], "each cell once"
    for index, row in enumerate(rows):
        assert torch.allclose(total[index, : len(row.values)], one_by_one(model, row, law), atol=1e-5 * 9)


def test_passes_are_the_steps_that_revealed_something(model, rows):
    assert [len(row.scored_steps) for row in rows] == [3, 2, 1]
    assert len(list(score_canvases(model, rows, LAW))) == 3


def test_one_cell_a_step_is_the_exact_chain_rule(model):
    """With N steps of one cell the scores add up to the log of a probability: over all completions it sums to 1."""
    rng = np.random.default_rng(1)
    row = make_row(rng, 4, [1, 0])
    total = 0.0
    for first in range(NUM):
        for second in range(NUM):
            whole = CanvasRow(
                canvas=row.canvas, null=None, values=np.array([first, second], np.int32), steps=row.steps
            )  # fmt: skip
            logprob = sum(float((s.logprobs * s.scored).sum().detach()) for s in score_canvases(model, [whole], LAW))
            total += np.exp(logprob)
    assert total == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("law", [LAW, GUIDED])
def test_gradients_of_the_passes_add_up_to_that_of_the_whole(model, rows, law):
    model.zero_grad()
    for scores in score_canvases(model, rows, law):
        (scores.logprobs * scores.scored).sum().backward()
    passed = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    sum(one_by_one(model, row, law).sum() for row in rows).backward()
    for ours, plain in zip(passed, model.parameters(), strict=True):
        assert torch.allclose(ours, plain.grad, rtol=1e-3, atol=1e-4)
    assert sum(grad.abs().sum() for grad in passed) > 0


def test_guidance_says_how_far_it_is_from_the_conditional_stream(model, rows):
    gaps = [float(scores.metrics["guidance_gap"]) for scores in score_canvases(model, rows, GUIDED)]
    assert min(gaps) > 0
    assert all(not scores.metrics for scores in score_canvases(model, rows, LAW))


def test_ids_that_may_not_be_drawn_have_no_share(model, rows):
    allowed = torch.ones(NUM, dtype=torch.bool)
    allowed[next(value for value in range(NUM) if value not in rows[1].values)] = False
    law = CellLaw(mask_id=MASK, start=FIRST, stop=FIRST + NUM, temperature=0.8, allowed=allowed)
    free = sum(float(s.logprobs.sum().detach()) for s in score_canvases(model, rows[1:2], LAW))
    fewer = sum(float(s.logprobs.sum().detach()) for s in score_canvases(model, rows[1:2], law))
    assert fewer > free


def test_guidance_without_a_null_canvas_is_an_error(model, rows):
    bare = CanvasRow(canvas=rows[0].canvas, values=rows[0].values, steps=rows[0].steps)
    with pytest.raises(ValueError, match="expected a null canvas for every row"):
        next(score_canvases(model, [bare], GUIDED))
