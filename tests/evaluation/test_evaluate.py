import dataclasses
import json
import random

import numpy as np
import pytest

from tests.monitoring.made_run import make_samples, sample_group, score
from unirl.evaluation.evaluate import (
    find_gains,
    find_measures,
    from_document,
    make_requests,
    summarise,
)
from unirl.evaluation.intervals import bounded_interval, t_interval, wilson_interval

NUM = 24


@pytest.fixture(scope="module")
def samples():
    rng = random.Random(5)
    sides = [make_samples(f"s{index}", rng, heldout=True) for index in range(NUM)]
    return [u for u, _ in sides], [g for _, g in sides]


@pytest.fixture(scope="module")
def requests(samples):
    return make_requests(*samples, lambda task, name: int(name[1:-2]) + 100 * (task == "generation"))


def name_image(image):
    return f"{hash(image.tobytes())}.webp"


def evaluate(requests, skill, *, greedy=(), unjudged=()):
    groups = [
        score(sample_group(request, skill, 3), unjudged=(0,) if request.sample.id in unjudged else ())
        for request in requests
    ]
    return summarise(groups, list(greedy), name_image), groups


def test_each_sample_is_asked_once_with_a_seed_of_its_own(samples, requests):
    assert len(requests) == 2 * NUM
    assert requests[3].seeds == (3,)
    assert requests[NUM + 3].seeds == (103,)
    assert requests[3].request_id == "s3-u/understanding"
    with pytest.raises(ValueError, match="distinct ids"):
        make_requests(samples[0][:2] + samples[0][:1], [], lambda task, name: 0)
    with pytest.raises(ValueError, match="got 0 samples"):
        make_requests([], [], lambda task, name: 0)


def test_means_and_intervals_are_those_of_the_judged_items(requests):
    result, groups = evaluate(requests, 0.6)
    right = sum(float(group.rewards[0]) for group in groups[:NUM])
    estimate = result.estimates["understanding/sampled/accuracy/correct"]
    assert (estimate.mean, estimate.num) == (right / NUM, NUM)
    assert (estimate.low, estimate.high) == wilson_interval(round(right), NUM)
    partial = np.array([group.components["lab_verifier"].details["partial"][0] for group in groups[NUM:]], float)
    estimate = result.estimates["generation/sampled/lab_verifier/partial"]
    assert estimate.mean == pytest.approx(partial.mean())
    assert (estimate.low, estimate.high) == pytest.approx(bounded_interval(partial))
    assert result.policy_version == 3


def test_only_repeated_prompts_get_a_clustered_interval(requests):
    result, _ = evaluate(requests, 0.6)
    prompts = {request.sample.prompt for request in requests[NUM:]}
    assert len(prompts) < NUM, "the sample must hold a repeated prompt"
    estimate = result.estimates["generation/sampled/lab_verifier/exact"]
    assert estimate.num_clusters == len(prompts)
    assert estimate.clustered_low is not None
    assert result.estimates["understanding/sampled/accuracy"].clustered_low is None


def test_categories_split_the_items(requests):
    result, _ = evaluate(requests, 0.6)
    counts = [values["generation/sampled/reward"].num for values in result.categories.values()]
    assert sum(counts) == NUM
    assert set(result.categories) == {request.sample.class_name for request in requests[NUM:]}


def test_what_could_not_be_judged_is_left_out_and_counted(requests):
    result, groups = evaluate(requests, 0.6, unjudged=("s0-u", "s1-u"))
    estimate = result.estimates["understanding/sampled/reward"]
    assert estimate.num == NUM - 2
    assert estimate.mean == pytest.approx(np.mean([float(group.rewards[0]) for group in groups[2:NUM]]))
    assert result.num_unjudged == 2
    assert result.items[0].reward is None
    assert result.items[0].parts["accuracy/correct"] is None


def test_an_evaluation_without_anything_judged_says_why(requests):
    with pytest.raises(ValueError, match=r"none judged \(the judge did not answer in 60 s"):
        evaluate(requests[:3], 0.6, unjudged=("s0-u", "s1-u", "s2-u"))


def test_a_result_survives_json(requests):
    result, groups = evaluate(requests, 0.6)
    assert from_document(json.loads(json.dumps(dataclasses.asdict(result)))) == result
    result, _ = evaluate(requests, 0.6, greedy=groups)
    assert from_document(json.loads(json.dumps(dataclasses.asdict(result)))) == result
    with pytest.raises(ValueError, match="evaluate again with this release"):
        from_document({"items": []})


def test_gains_pair_the_same_items(requests):
    before, early = evaluate(requests, 0.3)
    after, late = evaluate(requests, 0.9)
    gain = {gain.name: gain for gain in find_gains(before, after)}["understanding/sampled/reward"]
    differences = np.array([float(b.rewards[0] - a.rewards[0]) for a, b in zip(early[:NUM], late[:NUM], strict=True)])
    assert gain.difference.mean == pytest.approx(differences.mean())
    assert (gain.difference.low, gain.difference.high) == pytest.approx(bounded_interval(differences, -1, 1))
    assert gain.before.mean == before.estimates["understanding/sampled/reward"].mean


def with_rewards(result, rewards):
    """The result with these sampled rewards in place of its own."""
    items = tuple(
        dataclasses.replace(item, reward=reward, parts={}) for item, reward in zip(result.items, rewards, strict=True)
    )
    return dataclasses.replace(result, items=items, estimates={"understanding/sampled/reward": None})


def test_no_interval_leaves_the_range_of_its_measure(requests):
    result, _ = evaluate(requests[:NUM], 0.6)
    nearly = np.ones(NUM)
    nearly[0] = 0.4
    assert t_interval(nearly)[1] > 1
    (gain,) = find_gains(with_rewards(result, np.zeros(NUM)), with_rewards(result, nearly))
    assert gain.after.high < 1
    assert gain.difference.mean < gain.difference.high < 1


def test_measures_without_bounds_keep_the_interval_of_student(requests):
    result, _ = evaluate(requests[:NUM], 0.6)
    before, after = np.linspace(0.2, 0.9, NUM), np.linspace(0.1, 3.0, NUM) ** 2
    (gain,) = find_gains(with_rewards(result, before), with_rewards(result, after))
    assert (gain.after.low, gain.after.high) == t_interval(after)
    assert (gain.difference.low, gain.difference.high) == t_interval(after - before)


def test_values_that_do_not_vary_have_no_interval(requests):
    result, _ = evaluate(requests[:NUM], 0.6)
    (gain,) = find_gains(with_rewards(result, [0.5] * NUM), with_rewards(result, [1.0] * NUM))
    assert gain.before.low is gain.difference.low is None
    assert (gain.after.low, gain.after.high) == wilson_interval(NUM, NUM)
    result, _ = evaluate(requests, 1.0)
    assert result.estimates["generation/sampled/lab_verifier/exact"].clustered_low is None


def test_gains_leave_out_items_that_one_side_lacks(requests):
    before, _ = evaluate(requests[5:], 0.3)
    after, _ = evaluate(requests, 0.9, unjudged=("s7-u",))
    gain = {gain.name: gain for gain in find_gains(before, after)}["understanding/sampled/reward"]
    assert gain.difference.num == NUM - 6
    assert gain.before.num == gain.after.num == NUM - 6


def test_parts_with_equal_numbers_share_a_row(requests):
    before, groups = evaluate(requests, 0.3)
    after, _ = evaluate(requests, 0.9, greedy=groups)
    measures = find_measures(before, after)
    assert measures[0].parts == ("reward", "accuracy", "accuracy/correct")
    assert measures[0].label == "correct"
    assert [m.label for m in measures if m.task == "generation"] == ["lab_verifier", "exact", "partial"]


def test_an_evaluation_alone_is_measured_against_itself(requests):
    after, _ = evaluate(requests, 0.9)
    measures = find_measures(None, after)
    assert all(measure.any.difference.mean == 0 for measure in measures)
    assert all(measure.greedy is None for measure in measures)
