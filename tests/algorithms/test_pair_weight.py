import pytest

from unirl.algorithms.pair_weight import pair_weight, weigh_pairs


@pytest.mark.parametrize(
    ("kind", "similarity", "rule", "expected"),
    [
        ("aligned", 0.3, "sqrt", 1.0),
        ("aligned", 0.3, "linear", 1.0),
        ("retrieved", 0.64, "sqrt", 0.8),
        ("retrieved", 0.64, "linear", 0.64),
        ("retrieved", 0.64, "none", 1.0),
        ("retrieved", -0.2, "sqrt", 0.0),
        ("retrieved", 1.0000001, "sqrt", 1.0),
    ],
)
def test_pair_weight_table(kind, similarity, rule, expected):
    assert pair_weight(kind, similarity, rule) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("kind", "similarity", "rule"),
    [("aligned", float("nan"), "sqrt"), ("retrieved", 1.1, "sqrt"), ("mixed", 0.5, "sqrt"), ("aligned", 0.5, "log")],
)
def test_pair_weight_refuses_what_it_cannot_weigh(kind, similarity, rule):
    with pytest.raises((ValueError, TypeError), match=r"cosine similarity|mixed|log"):
        pair_weight(kind, similarity, rule)


def test_pairs_are_weighed_one_by_one_in_float64():
    weights = weigh_pairs(["aligned", "retrieved"], [0.9, 0.64])
    assert weights.tolist() == [1.0, 0.8]
    assert weights.dtype.itemsize == 8
