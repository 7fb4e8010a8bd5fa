"""Mixtures: by counts, by weights, by subsets, in an order of seed and epoch alone."""

from collections import Counter

import numpy as np
import pytest

from unirl.config import SourceConfig
from unirl.data.atomic import DataError
from unirl.data.mixture import Mixture


class Store:
    """As many sequences as asked for, named after the store; every third one of subset b."""

    def __init__(self, name, count):
        self.name, self.lengths = name, np.ones(count, np.int64)
        self.subsets = np.array(["b" if i % 3 == 0 else "a" for i in range(count)], object)

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        return f"{self.name}{index}"


def mixture(seed=0, size=8, **sources):
    stores = {"x": Store("x", 30), "y": Store("y", 12)}
    return Mixture({k: stores[k] for k in sources}, sources, seed=seed, samples_per_step=size)


def epoch(made, number=0):
    return [s for i in range(made.steps_per_epoch) for s in made.step(number * made.steps_per_epoch + i)]


def test_an_epoch_holds_every_sequence_once():
    made = mixture(x=SourceConfig(), y=SourceConfig())
    assert (made.epoch_size, made.steps_per_epoch) == (42, 6)
    assert sorted(epoch(made)) == sorted([f"x{i}" for i in range(30)] + [f"y{i}" for i in range(12)])
    assert len(made.step(5)) == 2, "the last step has the rest"
    assert epoch(made) != epoch(made, 1)
    assert sorted(epoch(made)) == sorted(epoch(made, 1))


def test_equal_seeds_give_equal_orders():
    one, same, other = (mixture(seed=seed, x=SourceConfig()) for seed in (3, 3, 4))
    assert epoch(one) == epoch(same) != epoch(other)


def test_a_step_can_be_taken_without_those_before():
    made = mixture(x=SourceConfig())
    straight = [made.step(i) for i in range(8)]
    assert mixture(x=SourceConfig()).step(7) == straight[7]


def test_a_count_is_the_same_part_in_every_epoch():
    made = mixture(x=SourceConfig(count=7), y=SourceConfig(count=30))
    first, second = epoch(made), epoch(made, 1)
    assert sorted(first) == sorted(second)
    counts = Counter(first)
    assert sum(count for name, count in counts.items() if name[0] == "x") == 7
    assert {counts[f"y{i}"] for i in range(12)} == {2, 3}, "30 of 12: all twice, six three times"
    larger = set(epoch(mixture(x=SourceConfig(count=9))))
    assert {name for name in first if name[0] == "x"} < larger, "more data means the same and more"


def test_a_count_of_0_takes_nothing():
    made = mixture(x=SourceConfig(), y=SourceConfig(count=0))
    assert made.counts() == {"x": 30, "y": 0}
    assert sorted(epoch(made)) == sorted(f"x{i}" for i in range(30))
    with pytest.raises(DataError, match="got none from anywhere"):
        mixture(x=SourceConfig(count=0))


def test_a_weight_shows_another_part_in_every_epoch():
    made = mixture(x=SourceConfig(weight=0.5), y=SourceConfig(weight=2.0))
    assert made.counts() == {"x": 15, "y": 24}
    parts = [{name for name in epoch(made, number) if name[0] == "x"} for number in range(4)]
    assert len(parts[0]) == 15
    assert parts[0] != parts[1]
    assert len(set.union(*parts)) > 20


def test_subsets_are_chosen_by_name():
    made = mixture(x=SourceConfig(subsets=("b",)))
    assert sorted(epoch(made)) == sorted(f"x{i}" for i in range(0, 30, 3))
    with pytest.raises(DataError, match=r"sources.x.subsets: expected subsets of .*, which has a, b; got c"):
        mixture(x=SourceConfig(subsets=("a", "c")))


def test_all_is_an_unshuffled_epoch():
    assert mixture(y=SourceConfig(), x=SourceConfig(count=3)).all()[-12:] == [f"y{i}" for i in range(12)]


@pytest.mark.parametrize(
    ("sources", "uses"),
    [
        ({"x": SourceConfig(), "y": SourceConfig(weight=0.5)}, 1),
        ({"x": SourceConfig(weight=1.5)}, 2),
        ({"x": SourceConfig(), "y": SourceConfig(count=30)}, 3),
    ],
)
def test_a_sequence_comes_so_often_at_most(sources, uses):
    made = mixture(**sources)
    assert made.most_uses == uses == max(Counter(epoch(made)).values())


def test_sources_of_one_store_may_overlap():
    store, sources = Store("x", 30), {"all": SourceConfig(), "again": SourceConfig(subsets=("b",))}
    made = Mixture(dict.fromkeys(sources, store), sources, seed=0, samples_per_step=8)
    assert made.most_uses == 2 == max(Counter(epoch(made)).values())
