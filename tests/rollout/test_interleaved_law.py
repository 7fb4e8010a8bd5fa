import pytest
import torch

from unirl.models.interleaved import ImageMarkup
from unirl.rollout.interleaved_grammar import BatchGrammar, Grammar
from unirl.rollout.interleaved_law import Drawing, drawing_logprobs

SOFT = Drawing()
TEXT, CODES = list(range(1, 10)), list(range(16, 24))


@pytest.fixture
def grammar(chat_layout):
    layout = chat_layout(ImageMarkup(begin=10, end=13), size=24, codes=range(16, 24), words=TEXT, end=1)
    return BatchGrammar(Grammar.of(layout, 2, 3), torch.device("cpu"))


def drawn(logits, grammar, text=SOFT, image=SOFT):
    """Log-probabilities of a row in text without room for an image, one in codes and one whose id is given."""
    places, room = torch.tensor([0, 1, 7]), torch.zeros(3, dtype=torch.bool)
    return drawing_logprobs(logits.expand(3, -1).clone(), places, room, grammar, (text, image))


def by_hand(logits, ids, drawing):
    """{id: log-probability} by sorting and adding up."""
    values = {id: float(logits[id]) / (drawing.temperature or 1.0) for id in ids}
    order = sorted(ids, key=lambda id: -values[id])[: drawing.top_k or None]
    total = sum(torch.tensor(values[id]).exp().item() for id in order)
    kept, mass = [], 0.0
    for id in order:
        if mass < drawing.top_p:
            kept.append(id)
        mass += torch.tensor(values[id]).exp().item() / total
    total = sum(torch.tensor(values[id]).exp().item() for id in kept)
    return {id: values[id] - torch.tensor(total).log().item() for id in kept[: 1 if drawing.temperature == 0 else None]}


@pytest.mark.parametrize(
    "drawing",
    [
        Drawing(), Drawing(temperature=0.6), Drawing(top_k=3), Drawing(top_p=0.7), Drawing(temperature=0),
        Drawing(temperature=1.7, top_k=5, top_p=0.8), Drawing(top_k=100, top_p=1e-9), Drawing(temperature=0, top_k=2),
    ],
)  # fmt: skip
def test_each_modality_has_a_law_of_its_own(grammar, drawing):
    torch.manual_seed(0)
    for _ in range(20):
        logits = torch.randn(24) * 2
        for text, image in ((drawing, Drawing(temperature=3.0)), (Drawing(temperature=3.0), drawing)):
            found = drawn(logits, grammar, text, image)
            for row, wanted in enumerate((by_hand(logits, TEXT, text), by_hand(logits, CODES, image), {13: 0.0})):
                assert set(torch.isfinite(found[row]).nonzero()[:, 0].tolist()) == set(wanted)
                assert found[row][list(wanted)].tolist() == pytest.approx(list(wanted.values()), abs=1e-5)


def test_logits_of_other_ids_matter_nothing(grammar):
    logits = torch.randn(24)
    others = torch.full((24,), 1e6)
    others[TEXT + CODES] = logits[TEXT + CODES]
    torch.testing.assert_close(drawn(others, grammar), drawn(logits, grammar))
