import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unirl.data.atomic import DataError
from unirl.data.pair_choice import choose_pairs, unpair
from unirl.data.pair_source import PairSource, StepResult
from unirl.data.pair_store import PairSet, write_pair_set
from unirl.types import TASKS, GenerationSample, PairRecord, UnderstandingSample

IMAGE = np.zeros((2, 2, 3), np.uint8)


def make_pairs(count):
    return [
        PairRecord(
            pair_id=f"p{i}",
            kind="aligned",
            similarity=1.0,
            understanding=UnderstandingSample(id=f"u{i}", image=IMAGE, question="q", answer="1", answer_type="number"),
            generation=GenerationSample(id=f"g{i}", prompt="c", image=IMAGE),
        )
        for i in range(count)
    ]


def source(count=10, pairs_per_step=4, seed=0, shuffle=True):
    return PairSource(make_pairs(count), pairs_per_step=pairs_per_step, seed=seed, shuffle=shuffle)


def ids(batch):
    return [pair.pair_id for pair in batch]


def results(pairs, reward=0.5, zero_variance=False):
    return [
        StepResult(pair_id=pair.pair_id, task=task, mean_reward=reward, zero_variance=zero_variance)
        for pair in pairs
        for task in TASKS
    ]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_epochs_are_permutations_and_batches_hold_no_pair_twice(data):
    count = data.draw(st.integers(1, 12))
    size = data.draw(st.integers(1, count))
    pairs = source(count, size, seed=data.draw(st.integers(0, 5)), shuffle=data.draw(st.booleans()))
    num_epochs = 4
    steps = [ids(pairs.batch(step)) for step in range(num_epochs * count // size)]
    assert all(len(set(batch)) == size for batch in steps)
    stream = [pair for batch in steps for pair in batch]
    for epoch in range(len(stream) // count):
        assert Counter(stream[epoch * count : (epoch + 1) * count]) == Counter(f"p{i}" for i in range(count))


def test_a_batch_depends_on_seed_and_step_alone():
    first, second = source(), source()
    wanted = [ids(first.batch(step)) for step in range(9)]
    assert [ids(second.batch(step)) for step in (8, 0, 5)] == [wanted[step] for step in (8, 0, 5)]
    assert [ids(source(seed=1).batch(step)) for step in range(9)] != wanted


def test_the_order_of_a_seed_never_changes():
    assert ids(source(6, 6, seed=3).batch(0)) == ["p2", "p4", "p5", "p3", "p1", "p0"]


def test_without_shuffling_the_order_is_that_of_the_pair_set():
    assert [ids(source(5, 2, shuffle=False).batch(step)) for step in range(3)] == [
        ["p0", "p1"],
        ["p2", "p3"],
        ["p4", "p0"],
    ]


def test_a_batch_is_handed_out_once_until_released():
    pairs = source()
    batch = pairs.lease(3)
    with pytest.raises(RuntimeError, match=r"step 3.*handed out and not released"):
        pairs.lease(3)
    pairs.release(3)
    assert ids(pairs.lease(3)) == ids(batch)
    pairs.record(3, results(batch))
    with pytest.raises(RuntimeError, match="it is finished"):
        pairs.lease(3)
    with pytest.raises(RuntimeError, match="it is not out"):
        pairs.release(3)
    with pytest.raises(RuntimeError, match="it is not out"):
        pairs.record(3, results(batch))


def test_the_ledger_keeps_what_each_pair_earned():
    pairs = source(4, 4)
    for step, (reward, zero_variance) in enumerate([(0.25, False), (1.0, True), (None, False)]):
        pairs.record(step, results(pairs.lease(step), reward, zero_variance))
    earned = pairs.earnings("p2", "generation")
    assert (earned.num_steps, earned.sum_mean_rewards, earned.last_mean_reward) == (2, 1.25, 1.0)
    assert (earned.num_zero_variance, earned.num_unjudged) == (1, 1)
    assert pairs.earnings("p9", "generation").num_steps == 0


@pytest.mark.parametrize("harm", [lambda r: r[1:], lambda r: [r[0], *r], lambda r: [*r[1:], r[1]]])
def test_results_of_another_batch_are_refused(harm):
    pairs = source()
    batch = pairs.lease(0)
    with pytest.raises(ValueError, match="expected one result for each pair and task"):
        pairs.record(0, harm(results(batch)))
    pairs.record(0, results(batch))


def test_a_restored_source_goes_on_where_the_saved_one_was():
    pairs = source()
    pairs.record(0, results(pairs.lease(0)))
    pairs.lease(1)
    state = json.loads(json.dumps(pairs.state()))
    resumed = source()
    resumed.restore(state)
    assert ids(resumed.lease(1)) == ids(pairs.batch(1))
    with pytest.raises(RuntimeError, match="finished"):
        resumed.lease(0)
    pairs.release(1)
    assert resumed.state() == pairs.state()


def test_the_state_of_another_run_is_refused():
    state = source().state()
    renamed = [replace(p, generation=replace(p.generation, prompt="other")) for p in make_pairs(10)]
    same_ids = PairSource(renamed, pairs_per_step=4, seed=0)
    for other in (same_ids, source(seed=1), source(count=11), source(pairs_per_step=5), source(shuffle=False)):
        with pytest.raises(DataError, match="resume with the settings that the run began with"):
            other.restore(state)


def test_too_few_pairs_and_negative_steps_are_errors():
    with pytest.raises(DataError, match=r"rollout.pairs_per_step = 4 pairs.*got 3"):
        source(3, 4)
    with pytest.raises(ValueError, match="got -1"):
        source().batch(-1)
    with pytest.raises(DataError, match="an id twice"):
        PairSource(make_pairs(2) * 2, pairs_per_step=1, seed=0)


def test_a_folder_is_opened_with_its_first_pairs(tmp_path):
    pairs = tuple(make_pairs(5))
    write_pair_set(tmp_path / "set", PairSet(pairs=pairs, weights=(1.0,) * 5, settings={}))
    opened = PairSource.open(tmp_path / "set", pairs_per_step=2, seed=0, shuffle=False, max_pairs=3)
    assert [ids(opened.batch(step)) for step in range(2)] == [["p0", "p1"], ["p2", "p0"]]


def test_mixed_sides_are_the_same_samples_with_no_side_beside_its_partner():
    pairs = make_pairs(7)
    mixed = unpair(pairs, seed=3)
    partner = {pair.understanding.id: pair.generation.id for pair in pairs}
    assert {pair.understanding.id for pair in mixed} == set(partner)
    assert {pair.generation.id for pair in mixed} == set(partner.values())
    assert all(partner[pair.understanding.id] != pair.generation.id for pair in mixed)
    assert {(pair.kind, pair.similarity) for pair in mixed} == {("retrieved", 0.0)}
    assert ids(unpair(pairs, seed=3)) == ids(mixed) != ids(unpair(pairs, seed=4))


def test_pairs_are_taken_by_kind_and_by_the_side_that_was_given():
    a, b, c, d = make_pairs(4)
    pairs = (
        replace(a, kind="retrieved", similarity=0.7),
        replace(b, generation=replace(b.generation, id="u1/prompt")),
        replace(c, understanding=replace(c.understanding, id="g2/question")),
        replace(d, generation=replace(d.generation, id="u3/prompt")),
    )

    def taken(take, max_pairs=None):
        whole = PairSet(pairs=pairs, weights=(1.0,) * 4, settings={})
        return ids(choose_pairs(whole, take=take, partners="own", max_pairs=max_pairs, seed=0))

    assert taken("all") == ["p0", "p1", "p2", "p3"]
    assert taken("aligned") == ["p1", "p2", "p3"]
    assert taken("retrieved") == ["p0"]
    assert taken("from_understanding") == ["p1", "p3"]
    assert taken("from_understanding", 1) == ["p1"]
    assert taken("from_generation") == ["p2"]
    with pytest.raises(DataError, match="got none in the set"):
        choose_pairs(
            PairSet(pairs=pairs[1:], weights=(1.0,) * 3, settings={}),
            take="retrieved",
            partners="own",
            max_pairs=None,
            seed=0,
        )


def test_unlike_partners_are_the_least_like_that_are_left():
    pairs, angles = tuple(make_pairs(4)), np.array([0.0, 0.5, 1.0, 3.0])
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    # The prompts of the first two pairs were written by the teacher: their image is the question's.
    certificate = {"understanding_ids": ["u0", "u1", "u2", "u3"], "generation_ids": ["g2", "g3"]}
    pair_set = PairSet(
        pairs=pairs, weights=(1.0,) * 4, settings={}, certificate=certificate,
        features={"understanding": features, "generation": features[2:]},
    )  # fmt: skip
    made = choose_pairs(pair_set, take="all", partners="unlike", max_pairs=None, seed=0)
    assert sorted(pair.generation.id for pair in made) == ["g0", "g1", "g2", "g3"]
    free = [0, 1, 2, 3]
    for pair in made:
        asked = int(pair.understanding.id[1:])
        least = min(free, key=lambda row: np.cos(angles[asked] - angles[row]))
        assert pair.generation.id == f"g{least}"
        assert pair.similarity == pytest.approx(np.cos(angles[asked] - angles[least]), abs=1e-6)
        free.remove(least)


def test_a_mixed_source_serves_mixed_pairs(tmp_path):
    pairs = make_pairs(6)
    write_pair_set(tmp_path / "set", PairSet(pairs=tuple(pairs), weights=(1.0,) * 6, settings={}))
    batch = PairSource.open(tmp_path / "set", pairs_per_step=6, seed=0, partners="random").batch(0)
    partner = {pair.understanding.id: pair.generation.id for pair in pairs}
    assert all(partner[pair.understanding.id] != pair.generation.id for pair in batch)
