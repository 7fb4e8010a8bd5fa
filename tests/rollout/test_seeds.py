from itertools import product

from unirl.rollout.seeds import sample_seed


def test_seeds_are_fixed_for_all_time():
    assert sample_seed(0, 1, "pair-7", "understanding", 2) == 1862614715


def test_every_part_of_the_key_counts():
    keys = list(product((0, 1), (0, 1), ("a", "b"), ("understanding", "generation"), range(8)))
    seeds = [sample_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_parts_of_the_key_do_not_run_into_each_other():
    assert sample_seed(1, 12, "x", "generation", 0) != sample_seed(11, 2, "x", "generation", 0)
