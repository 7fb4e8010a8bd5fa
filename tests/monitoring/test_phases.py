import random

import pytest

from unirl.monitoring.phases import PHASES, Activity, Block, fleet_metrics, partition


def work(begin, end, role="rollout.both", **seconds):
    return Activity(role=role, begin=begin, end=end, seconds=seconds)


def shares(blocks, activities=(), **learner):
    found = partition(blocks, activities, {f"learner/{name}_s": value for name, value in learner.items()})
    assert tuple(found) == PHASES
    return {phase: pytest.approx(seconds) for phase, seconds in found.items() if seconds}


def test_a_moment_is_shared_by_those_who_are_busy_and_idle_when_none_is():
    # 0-2 text alone, 2-4 text and image, 4-6 image alone, of which a third is decoding, 6-7 a reward, 7-8 nobody.
    activities = [
        work(0, 4, text_rollout=4),
        work(2, 6.5, image_rollout=3, decode=1),
        work(6, 7, role="reward.accuracy", reward=1),
    ]
    assert shares([Block("rollout", 0, 8)], activities) == {
        "text_rollout": 3.0,
        "image_rollout": 2.25,
        "decode": 0.75,
        "reward": 1.0,
        "idle": 1.0,
    }


def test_work_counts_inside_its_block_and_until_its_result_was_there():
    activities = [work(-1, 1, text_rollout=2), work(3, 4, image_rollout=9), work(5, 8, reward=3)]
    assert shares([Block("rollout", 0, 6)], activities) == {
        "text_rollout": 1.0,
        "idle": 3.0,
        "image_rollout": 1.0,
        "reward": 1.0,
    }


def test_an_update_is_divided_by_what_the_learner_says_and_never_beyond_its_length():
    assert shares([Block("update", 1, 11)], score=3.0, backward=5.0) == {"score": 3, "backward": 5, "other": 2}
    assert shares([Block("update", 0, 4)], score=3.0, backward=5.0) == {"score": 1.5, "backward": 2.5}
    assert shares([Block("update", 0, 4)]) == {"other": 4}


def test_waiting_is_idle_publishing_is_sync_and_the_rest_other():
    blocks = [Block("wait", 0, 1), Block("publish", 1, 3), Block("pairs", 3, 4), Block("evaluate", 4, 9)]
    assert shares(blocks, [work(0, 1, text_rollout=1)]) == {"idle": 1, "sync": 2, "other": 6}


def test_phases_sum_to_the_blocks_whatever_overlaps():
    draw = random.Random(0)
    for _ in range(50):
        spans = sorted(draw.uniform(0, 10) for _ in range(6))
        blocks = [Block(name, *spans[i : i + 2]) for i, name in ((0, "rollout"), (2, "update"), (4, "rollout"))]
        activities = []
        for _ in range(20):
            begin = draw.uniform(-1, 10)
            took = {phase: draw.uniform(0, 1) for phase in draw.sample(PHASES[:4], 2)}
            activities.append(work(begin, begin + draw.uniform(0, 3), **took))
        found = partition(blocks, activities, {"learner/score_s": draw.uniform(0, 5)})
        assert min(found.values()) >= 0
        assert sum(found.values()) == pytest.approx(sum(block.end - block.begin for block in blocks), abs=1e-9)


def test_work_without_a_measured_second_takes_nothing():
    assert shares([Block("rollout", 0, 2)], [work(0, 1, text_rollout=0.0)]) == {"idle": 2}


def test_fleet_rates_are_by_role_over_the_rollout():
    common = {"begin": 0.0, "end": 1.0, "seconds": {}}
    activities = [
        Activity(role="rollout.text", num_tokens=30, waited_s=1.0, num_requests=4, **common),
        Activity(role="rollout.text", num_tokens=10, **common),
        Activity(role="reward.accuracy", waited_s=4.0, **common),
    ]
    assert fleet_metrics(activities, 2.0) == {
        "fleet/rollout.text/tokens_per_s": 20.0,
        "fleet/rollout.text/queue_length": 2.0,
        "fleet/reward.accuracy/queue_length": 2.0,
    }
