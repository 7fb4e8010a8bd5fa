from dataclasses import dataclass, field

import numpy as np
import pytest

from unirl.data.teacher import complete
from unirl.lab.data import make_generation, make_understanding
from unirl.lab.teacher import Teacher as LabTeacher
from unirl.lab.verifier import parse_caption, verify
from unirl.lab.world import is_heldout
from unirl.types import GenerationSample, UnderstandingSample


@dataclass
class Says:
    """A teacher with fixed words."""

    prompt: str = "a prompt"
    question: tuple = ("what ?", ("x", "y"), "B")
    ok: bool = True
    reason: str = ""
    heard: list = field(default_factory=list)

    def complete_generation(self, image, question, answer):
        self.heard.append(answer)
        return self.prompt

    def complete_understanding(self, image, prompt):
        return self.question

    def verify(self, image, question, choices, answer, prompt):
        self.heard.append((question, choices, answer, prompt))
        return self


IMAGE = np.zeros((3, 3, 3), np.uint8)
ASKED = UnderstandingSample(id="u", image=IMAGE, question="q ?", choices=("red", "blue"), answer="B", category="colors")
DRAWN = GenerationSample(id="g", prompt="draw", image=IMAGE, class_name="one")


def test_both_sides_are_completed_and_verified():
    teacher = Says()
    quadruples, refused = complete([ASKED, DRAWN], teacher)
    assert refused == []
    first, second = quadruples
    assert (first.origin, first.origin_id, first.understanding) == ("understanding", "u", ASKED)
    assert (first.generation.id, first.generation.prompt, first.generation.class_name) == (
        "u/prompt",
        "a prompt",
        "colors",
    )
    assert (second.origin, second.origin_id, second.generation) == ("generation", "g", DRAWN)
    assert (second.understanding.question, second.understanding.answer, second.understanding.category) == (
        "what ?",
        "B",
        "one",
    )
    assert all(q.understanding.image is q.generation.image for q in quadruples)
    assert teacher.heard == ["blue", ("q ?", ("red", "blue"), "B", "a prompt"), ("what ?", ("x", "y"), "B", "draw")]


@pytest.mark.parametrize(
    ("teacher", "reason"),
    [
        (Says(ok=False, reason="two cats, not three"), "inconsistent completion: two cats, not three"),
        (Says(prompt="  "), "expected a prompt"),
    ],
)
def test_refused_and_inconsistent_completions_are_named(teacher, reason):
    quadruples, (refused,) = complete([ASKED], teacher)
    assert quadruples == []
    assert (refused.id, refused.stage) == ("u", "teacher")
    assert reason in refused.reason


def test_a_letter_without_a_choice_is_refused():
    quadruples, (refused,) = complete([DRAWN], Says(question=("what ?", ("x", "y"), "D")))
    assert quadruples == []
    assert "got 2 choices and answer 'D'" in refused.reason


def test_an_outage_of_the_teacher_is_no_refusal():
    teacher = Says()
    teacher.complete_generation = lambda *_: (_ for _ in ()).throw(ConnectionError("teacher is down"))
    with pytest.raises(ConnectionError):
        complete([ASKED], teacher)


def test_a_prompt_without_an_image_is_refused():
    _, (refused,) = complete([GenerationSample(id="g", prompt="draw")], Says())
    assert "expected an image to ask about" in refused.reason


def test_the_labs_teacher_binds_all_four_parts():
    samples = [*make_understanding(60, seed=5), *make_generation(60, seed=5)]
    quadruples, refused = complete(samples, LabTeacher(seed=0))
    assert len(quadruples) + len(refused) == 120
    assert len(quadruples) > 100
    for quadruple in quadruples:
        spec = parse_caption(quadruple.generation.prompt)
        assert verify(spec, quadruple.understanding.image).exact
        assert not is_heldout(spec)
