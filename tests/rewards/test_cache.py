from dataclasses import replace

import numpy as np
import pytest

from tests.rewards.groups import answers, pictures, question
from unirl.rewards.cache import CachedScore, ScoreCache, content_keys
from unirl.types import RewardScores

RED = np.full((2, 2, 3), 200, np.uint8)


def length_of(seen):
    """Scores a text by its length and cannot judge an empty one; notes what it was given."""

    def score(group):
        texts = [trajectory.text for trajectory in group.trajectories]
        seen.append(texts)
        lengths = np.array([len(text) for text in texts], np.float32)
        judged = lengths > 0
        return RewardScores(
            values=lengths,
            judged=judged,
            details={"half": lengths / 2},
            problem="" if judged.all() else "empty",
            texts={"first": tuple(text[:1] or None for text in texts)},
        )

    return score


def scored(cache, group, seen):
    return cache.score(content_keys("r", {}, group), group, length_of(seen))


def test_a_hit_equals_the_first_scores_and_costs_nothing():
    cache, seen = ScoreCache(10), []
    group = answers(question(), ["aa", "b", "aa"])
    first, second = scored(cache, group, seen), scored(cache, group, seen)
    assert seen == [["aa", "b"]]
    for scores in (first, second):
        assert scores.values.tolist() == [2, 1, 2]
        assert scores.details["half"].tolist() == [1, 0.5, 1]
        assert scores.texts == {"first": ("a", "b", "a")}
        assert scores.judged.all()


def test_only_what_is_new_is_scored_and_lands_in_its_place():
    cache, seen = ScoreCache(10), []
    scored(cache, answers(question(), ["bb"]), seen)
    scores = scored(cache, answers(question(), ["a", "bb", "ccc"]), seen)
    assert seen == [["bb"], ["a", "ccc"]]
    assert scores.values.tolist() == [1, 2, 3]


def test_what_was_not_judged_is_asked_again():
    cache, seen = ScoreCache(10), []
    group = answers(question(), ["", "a", ""])
    for _ in range(2):
        scores = scored(cache, group, seen)
        assert scores.judged.tolist() == [False, True, False]
        assert scores.problem == "empty"
    assert seen == [["", "a"], [""]]


def test_the_least_recently_used_entry_goes_first():
    cache = ScoreCache(2)
    score = CachedScore(value=1.0, details={}, texts={})
    cache.put(b"a", score)
    cache.put(b"b", score)
    cache.get(b"a")
    cache.put(b"c", score)
    assert len(cache) == 2
    assert cache.get(b"b") is None
    assert cache.get(b"a") == cache.get(b"c") == score


def test_a_cache_of_no_entries_remembers_nothing_yet_scores():
    cache, seen = ScoreCache(0), []
    for _ in range(2):
        assert scored(cache, answers(question(), ["a", "a"]), seen).values.tolist() == [1, 1]
    assert len(cache) == 0
    assert seen == [["a"], ["a"]]


@pytest.mark.parametrize(
    "other",
    [
        ("other", {}, question(), "a", "stop"),
        ("r", {"x": 2}, question(), "a", "stop"),
        ("r", {}, question("A"), "a", "stop"),
        ("r", {}, question(choices=("red", "gre", "enblue")), "a", "stop"),
        ("r", {}, replace(question(), question="what shape?"), "a", "stop"),
        ("r", {}, replace(question(), image=RED), "a", "stop"),
        ("r", {}, question(), "a ", "stop"),
        ("r", {}, question(), "a", "length"),
    ],
)
def test_anything_a_reward_may_look_at_changes_the_key(other):
    name, options, sample, text, finish = other
    base = content_keys("r", {}, answers(question(), ["a"]))
    assert content_keys(name, options, answers(sample, [text], [finish])) != base


def test_the_name_of_a_sample_and_the_seed_do_not_change_the_key():
    base = content_keys("r", {}, answers(question(), ["a", "a"]))
    assert base[0] == base[1]
    assert content_keys("r", {}, answers(replace(question(), id="q2", source="x"), ["a"]))[0] == base[0]


def test_pictures_differ_by_pixels_and_by_shape():
    keys = content_keys("r", {}, pictures("p", [RED, RED.copy(), RED.reshape(1, 4, 3), RED + 1]))
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3
