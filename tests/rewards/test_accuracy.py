import numpy as np
import pytest

from tests.rewards.groups import EOS, answers, pictures, question
from unirl.rewards.accuracy import (
    AccuracyReward,
    extract_answer,
    normalise_text,
    read_choice,
    read_quantity,
    split_list,
    strip_math,
)


@pytest.fixture(scope="module")
def reward():
    reward = AccuracyReward(math_timeout_s=10.0)
    yield reward
    reward.close()


@pytest.fixture
def free():
    return AccuracyReward(answer_format="free")


def tagged(answer: str) -> str:
    return f"<think> because </think> <answer> {answer} </answer> {EOS}"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (f"<think> it is C </think> <answer> B </answer> {EOS}", "B"),
        ("<think>x</think>\n<answer>B</answer>", "B"),
        ("<answer>B</answer></s>", "B"),
        ("<think> <answer> A </answer> </think> <answer> B </answer>", "B"),
        ("<answer> A </answer> <answer> B </answer>", "B"),
        ("<answer> B </answer> and so on", None),
        ("<answer> B </answer> <answer>", None),
        ("<answer> B </answer> B", None),
        (f"<answer> B </answer> {EOS} {EOS}", None),
        ("<answer> <answer> B </answer> </answer>", None),
        ("<answer> A <answer> B </answer>", None),
        ("</answer> B <answer>", None),
        ("<think> <answer> A </think> <answer> B </answer>", None),
        ("<answer> B", None),
        ("B </answer>", None),
        ("<ANSWER> B </ANSWER>", None),
        ("<think> B </think>", None),
        ("<answer></answer>", None),
        ("B", None),
        ("", None),
    ],
)
def test_a_tagged_answer_is_the_last_closed_pair_at_the_very_end(text, answer):
    assert extract_answer(text, "tagged") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think> A </think> The answer is B.", "B."),
        ("**Answer:** B", "B"),
        (r"so \boxed{\frac{1}{2}} or \boxed{3}, I think", "3"),
        (r"so \boxed{\frac{1}{2}} or \boxed{3", r"\frac{1}{2}"),
        ("<answer>7</answer> is what I say", "7"),
        ("just blue", "just blue"),
        ("<think> A", None),
        ("<think> <answer> A </answer>", None),
        ("<answer> A", None),
        ("", None),
    ],
)
def test_a_free_answer_is_sought_in_tags_then_box_then_phrase_then_all_of_it(text, answer):
    assert extract_answer(text, "free") == answer


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("B: green", "B"),
        ("B. Green", "B"),
        ("B red", None),
        ("B or C", None),
        ("A B", None),
        ("AB", None),
        ("D", None),
        ("b", None),
        ("green", None),
        ("\uff22", None),
        ("\u0412", None),
        ("", None),
    ],
)
def test_a_tagged_choice_is_one_upper_case_letter(answer, letter):
    assert read_choice(answer, ("red", "green", "blue")) == letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("b", "B"),
        ("(b)", "B"),
        ("\uff22", "B"),
        ("green", "B"),
        ("It is green, I think.", "B"),
        ("dark red", "D"),
        ("It may be dark red", None),
        ("red", "A"),
        ("red or blue", None),
        ("evergreen", None),
        ("a dog", None),
        ("\u0412", None),
    ],
)
def test_a_free_choice_may_be_the_text_of_one_option(answer, letter):
    assert read_choice(answer, ("red", "green", "blue", "dark red"), "free") == letter


def test_choices_score_one_or_zero_and_say_how_they_were_written(reward):
    texts = [tagged("B"), tagged("A"), "<think> B </think>", tagged("b"), ""]
    scores = reward.score(answers(question(), texts))
    assert scores.values.tolist() == [1, 0, 0, 0, 0]
    assert scores.judged.all()
    assert scores.details["correct"].tolist() == [1, 0, 0, 0, 0]
    assert scores.details["formatted"].tolist() == [1, 1, 0, 0, 0]
    assert scores.problem == ""


def test_a_truncated_answer_is_wrong_and_counted(reward):
    scores = reward.score(answers(question(), [tagged("B"), tagged("B")], ["length", "stop"]))
    assert scores.values.tolist() == [0, 1]
    assert scores.judged.all()
    assert scores.details["truncated"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("text", "quantity"),
    [
        ("12", (12, "")),
        ("-0.50", (-0.5, "")),
        ("\u22123", (-3, "")),
        ("\uff11\uff12", (12, "")),
        ("1,200", (1200, "")),
        ("3/4", (0.75, "")),
        ("50%", (0.5, "")),
        ("$12", (12, "")),
        ("12 cm.", (12, "cm")),
        ("1e3", (1000, "")),
        ("12 or 13", None),
        ("1,20", None),
        ("1/0", None),
        ("1e999", None),
        ("nan", None),
        ("inf", None),
        ("twelve", None),
        ("", None),
    ],
)
def test_a_quantity_is_one_number_and_nothing_else(text, quantity):
    assert read_quantity(text) == quantity


def test_numbers_are_compared_within_tolerance_and_unit():
    texts = [tagged(t) for t in ("12", "12.0", "12 cm", "12 mm", "12.1", "12 or 12", "many")]
    exact = AccuracyReward().score(answers(question("12 cm", "number"), texts))
    assert exact.values.tolist() == [1, 1, 1, 0, 0, 0, 0]
    loose = AccuracyReward(number_tolerance=0.05).score(answers(question("12 cm", "number"), texts))
    assert loose.values.tolist() == [1, 1, 1, 0, 1, 0, 0]


def test_a_free_number_must_be_the_only_one(free):
    texts = ["I count 5 dogs", "5 or 6", "the answer is 5", "5 and again 5", "x5", "about 500%"]
    assert free.score(answers(question("5", "number"), texts)).values.tolist() == [1, 0, 1, 1, 0, 1]


def test_texts_are_compared_after_normalisation(reward, free):
    texts = ["stop  SIGN.", "\uff33top sign", "sign stop", "stop sign here", "..."]
    group = answers(question("Stop sign", "text"), [tagged(text) for text in texts])
    scores = reward.score(group)
    assert scores.values.tolist() == [1, 1, 0, 0, 0]
    assert scores.details["formatted"].tolist() == [1, 1, 1, 1, 0]
    assert free.score(answers(question("Paris", "text"), ["The answer is: Paris.", "no"])).values.tolist() == [1, 0]
    assert normalise_text(" \u00dcber  \u201ca\u201d ") == "\u00fcber \u201ca\u201d"


def test_a_gold_answer_that_cannot_be_read_judges_nobody(reward):
    for gold, answer_type in (("many", "number"), ("...", "text"), (r"\frac{", "math")):
        scores = reward.score(answers(question(gold, answer_type), [tagged("3"), tagged("4")]))
        assert not scores.judged.any()
        assert "gold answer of sample q1" in scores.problem
        assert "correct the record" in scores.problem


def test_expressions_are_equal_by_value(reward):
    right = ["0.5", r"\frac{2}{4}", r"\boxed{1/2}", "$1/2$", r"\(50\%\)"]
    wrong = ["2", "1/2, 1/2", r"\boxed{1/2}\boxed{1/2}", "1/2}{3", "}", r"\frac{", "the answer is 1/2 or 3", "1" * 1001]
    scores = reward.score(answers(question(r"\frac{1}{2}", "math"), [tagged(t) for t in right + wrong]))
    assert scores.values.tolist() == [1] * len(right) + [0] * len(wrong)
    assert scores.judged.all()


def test_lists_keep_their_order_and_words_are_no_products(reward):
    assert reward.score(answers(question("2, 5", "math"), [tagged("2,5"), tagged("5,2")])).values.tolist() == [1, 0]
    words = reward.score(answers(question("listen", "math"), [tagged("Listen"), tagged("silent")]))
    assert words.values.tolist() == [1, 0]
    assert split_list("(1, 2), 1,000, {a}") == ["(1, 2)", "1000", "{a}"]
    assert strip_math(r"$\boxed{x^{2}}$.") == "x^{2}"
    assert strip_math(r"\boxed{1} + \boxed{2}") == r"\boxed{1} + \boxed{2}"


def test_an_expression_that_hangs_is_not_judged_and_spares_its_neighbours():
    reward = AccuracyReward(math_timeout_s=2.0)
    scores = reward.score(answers(question("2", "math"), [tagged("2"), tagged("9^{9^{9^{9}}}"), tagged("2.0")]))
    reward.close()
    assert scores.judged.tolist() == [True, False, True]
    assert scores.values[[0, 2]].tolist() == [1, 1]
    assert "nothing after 2 s" in scores.problem


def test_pictures_are_refused_with_the_place_to_look(reward):
    with pytest.raises(ValueError, match=r"rewards\.understanding"):
        reward.score(pictures("a photo", [np.zeros((2, 2, 3), np.uint8)]))


@pytest.mark.parametrize(
    "options",
    [
        {"answer_format": "loose"},
        {"number_tolerance": -1},
        {"number_tolerance": 1},
        {"math_timeout_s": 0},
        {"math_timeout_s": float("inf")},
        {"end_tokens": "</s>"},
        {"end_tokens": [""]},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="accuracy: expected"):
        AccuracyReward(**options)


def test_the_end_token_of_another_family_can_be_named():
    reward = AccuracyReward(end_tokens=["<stop>"])
    assert reward.score(answers(question(), ["<answer> B </answer><stop>"])).values.tolist() == [1]


def test_the_answer_that_was_read_is_told_and_none_where_there_was_none(reward):
    texts = [tagged("B"), "B", tagged("(A)")]
    scores = reward.score(answers(question(), texts, finish_reasons=["stop", "stop", "length"]))
    assert scores.texts == {"extracted": ("B", None, None)}
