from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unirl.pairing import matching as room
from unirl.pairing.check import matching_faults
from unirl.pairing.matching import match

ORDERS = ["similarity", "input"]


def unit(rows):
    rows = np.asarray(rows, dtype=np.float64)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def random_features(seed, num_gen, num_und, dimensions, distinct):
    """Rows drawn from a few directions, so that duplicates and exact ties abound."""
    generator = np.random.default_rng(seed)
    pool = unit(generator.normal(size=(distinct, dimensions)) + 0.7)
    return pool[generator.integers(distinct, size=num_gen)], pool[generator.integers(distinct, size=num_und)]


def exact_similarity(a, b):
    return float(sum(Fraction(float(x)) * Fraction(float(y)) for x, y in zip(a, b, strict=True)))


def oracle(gen, und, threshold, order):
    """Every cross pair in exact rational arithmetic, then the greedy choice spelled out."""
    table = {(g, u): exact_similarity(gen[g], und[u]) for g in range(len(gen)) for u in range(len(und))}
    key = (lambda p: (-table[p], p)) if order == "similarity" else (lambda p: (p[0], -table[p], p[1]))
    pairs, used_gen, used_und = [], set(), set()
    for g, u in sorted(table, key=key):
        if table[g, u] >= threshold and g not in used_gen and u not in used_und:
            pairs.append((g, u, table[g, u]))
            used_gen.add(g)
            used_und.add(u)
    return pairs


def as_list(matching):
    return list(
        zip(matching.gen_index.tolist(), matching.und_index.tolist(), matching.similarity.tolist(), strict=True)
    )


def test_hand_worked_example():
    # Angles in degrees; cosines: g0 (0) with u0 (10) 0.985 and u1 (40) 0.766; g1 (15) with u0 0.996 and u1 0.906.
    def at(*angles):
        return unit([[np.cos(np.radians(a)), np.sin(np.radians(a))] for a in angles])

    gen, und = at(0, 15), at(10, 40)
    # The best pair of all is (g1, u0); g0 is left with u1.
    by_similarity = match(gen, und, threshold=0.6)
    assert [p[:2] for p in as_list(by_similarity)] == [(1, 0), (0, 1)]
    assert by_similarity.similarity.tolist() == pytest.approx([np.cos(np.radians(5)), np.cos(np.radians(40))])
    # In row order g0 takes u0 first.
    assert [p[:2] for p in as_list(match(gen, und, threshold=0.6, order="input"))] == [(0, 0), (1, 1)]
    # Above 0.8 nothing is left for g0, or for g1 in row order beyond 0.906.
    assert [p[:2] for p in as_list(match(gen, und, threshold=0.8))] == [(1, 0)]


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_gen=st.integers(1, 12),
    num_und=st.integers(1, 12),
    distinct=st.integers(1, 14),
    threshold=st.sampled_from([-1.0, 0.0, 0.5, 0.8, 1.0]),
    top_n=st.sampled_from([1, 2, 3, 50]),
    order=st.sampled_from(ORDERS),
)
def test_equals_the_brute_force_oracle_whatever_top_n(seed, num_gen, num_und, distinct, threshold, top_n, order):
    gen, und = random_features(seed, num_gen, num_und, 5, distinct)
    got = match(gen, und, threshold=threshold, top_n=top_n, order=order)
    assert as_list(got) == oracle(gen, und, threshold, order)
    assert matching_faults(gen, und, got) == []


@pytest.mark.parametrize("order", ORDERS)
def test_equals_the_oracle_where_float32_products_cannot_tell_candidates_apart(order):
    # Similarities differ by less than the rounding of a float32 matrix product.
    generator = np.random.default_rng(0)
    base = generator.normal(size=64)
    gen = unit(base + 1e-4 * generator.normal(size=(15, 64)))
    und = unit(base + 1e-4 * generator.normal(size=(15, 64)))
    for top_n in (1, 4, 99):
        assert as_list(match(gen, und, top_n=top_n, order=order)) == oracle(gen, und, 0.6, order)


@pytest.mark.parametrize("order", ORDERS)
def test_block_size_and_number_of_candidates_change_nothing(order, monkeypatch):
    gen, und = random_features(1, 120, 90, 16, 60)
    whole = as_list(match(gen, und, top_n=10**6, order=order))
    for elements, top_n in ((1, 1), (90 * 7, 3), (10**6, 17)):
        monkeypatch.setattr(room, "BLOCK_ELEMENTS", elements)
        assert as_list(match(gen, und, top_n=top_n, order=order)) == whole


def test_permuting_images_permutes_pairs_when_no_similarity_ties():
    generator = np.random.default_rng(2)
    gen, und = unit(generator.normal(size=(30, 8)) + 0.5), unit(generator.normal(size=(25, 8)) + 0.5)
    gen_order, und_order = generator.permutation(30), generator.permutation(25)
    permuted = match(gen[gen_order], und[und_order])
    renamed = [(int(gen_order[g]), int(und_order[u]), s) for g, u, s in as_list(permuted)]
    assert renamed == as_list(match(gen, und))


def test_ties_go_to_the_lowest_rows():
    same = unit(np.ones((3, 4)))
    for order in ORDERS:
        assert [p[:2] for p in as_list(match(same, same, order=order))] == [(0, 0), (1, 1), (2, 2)]


def test_the_threshold_is_inclusive():
    gen, und = np.array([[1.0, 0.0]], np.float32), np.array([[0.6, 0.8]], np.float32)
    similarity = float(np.float32(0.6))
    assert len(match(gen, und, threshold=similarity).gen_index) == 1
    assert len(match(gen, und, threshold=np.nextafter(similarity, 1)).gen_index) == 0


@pytest.mark.parametrize(("num_gen", "num_und"), [(0, 3), (3, 0), (0, 0)])
def test_an_empty_side_gives_no_pairs(num_gen, num_und):
    got = match(np.zeros((num_gen, 4), np.float32) + 0.5, np.zeros((num_und, 4), np.float32) + 0.5)
    assert as_list(got) == []
    assert got.similarity.dtype == np.float64


@pytest.mark.parametrize(
    ("choice", "message"),
    [({"threshold": 1.5}, "threshold in"), ({"threshold": float("nan")}, "threshold in"), ({"top_n": 0}, "top_n >= 1")],
)
def test_settings_out_of_range_are_errors(choice, message):
    rows = unit(np.eye(3))
    with pytest.raises(ValueError, match=message):
        match(rows, rows, **choice)


def test_an_unknown_order_is_an_error():
    rows = unit(np.eye(3))
    with pytest.raises((ValueError, TypeError), match="random"):
        match(rows, rows, order="random")


def test_features_of_different_encoders_are_an_error():
    with pytest.raises((ValueError, TypeError), match=r"dimensions|axis"):
        match(unit(np.eye(3)), unit(np.eye(4)))
