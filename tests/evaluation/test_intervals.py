import numpy as np
import pytest

from unirl.evaluation.intervals import (
    bounded_interval,
    cluster_interval,
    crossed_gain,
    crossed_interval,
    seed_noise,
    t_interval,
    t_quantile,
    wilson_interval,
)


def test_wilson_equals_a_worked_example():
    # 8 of 10, z = 1.95996, z^2 = 3.84146: centre (0.8 + 0.192073) / 1.384146 = 0.716740,
    # half 1.95996 / 1.384146 * sqrt(0.8 * 0.2 / 10 + 3.84146 / 400) = 1.416005 * sqrt(0.02560365) = 0.226577.
    assert wilson_interval(8, 10) == pytest.approx((0.490163, 0.943317), abs=2e-6)


def test_wilson_is_never_empty_and_mirrors():
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.277533), abs=1e-6)
    low, high = wilson_interval(10, 10)
    assert (1 - high, 1 - low) == pytest.approx(wilson_interval(0, 10))
    assert wilson_interval(279, 480) == pytest.approx((0.536640, 0.624569), abs=1e-6)


@pytest.mark.parametrize(("successes", "num"), [(3, 2), (-1, 5), (0, 0)])
def test_impossible_counts_are_refused(successes, num):
    with pytest.raises(ValueError, match="expected 0 <= successes <= num"):
        wilson_interval(successes, num)


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423), (479, 1.9649)],
)
def test_t_quantiles_equal_printed_tables(degrees, quantile):
    assert t_quantile(degrees) == pytest.approx(quantile, abs=5e-5)


def test_t_interval_equals_a_worked_example():
    # Mean 3, standard deviation sqrt(2.5), n = 5: half 2.7764 * 1.581139 / 2.236068 = 1.963243.
    assert t_interval(np.arange(1.0, 6.0)) == pytest.approx((1.036757, 4.963243), abs=1e-4)
    with pytest.raises(ValueError, match="two or more values"):
        t_interval(np.ones(1))


def test_a_bounded_interval_solves_its_equation():
    # The ends p are where |mean - p| is t standard errors, the variance scaled from mean (1 - mean) to p (1 - p).
    values = np.array([1.0] * 17 + [0.75, 0.5, 0.25])
    mean, error = values.mean(), values.std(ddof=1) / np.sqrt(20)
    for end in bounded_interval(values):
        scaled = error * np.sqrt(end * (1 - end) / (mean * (1 - mean)))
        assert abs(mean - end) == pytest.approx(2.0930 * scaled, abs=1e-4)


def test_a_bounded_interval_stays_inside_where_the_symmetric_one_does_not():
    values = np.array([1.0] * 19 + [0.4])
    assert t_interval(values)[1] > 1
    low, high = bounded_interval(values)
    assert 0 < low < values.mean() < high < 1
    assert bounded_interval(1 - values) == pytest.approx((1 - high, 1 - low))
    assert bounded_interval(2 * values - 1, -1.0, 1.0) == pytest.approx((2 * low - 1, 2 * high - 1))


def test_far_from_the_bounds_a_bounded_interval_is_that_of_student():
    values = np.random.default_rng(3).normal(0.5, 0.02, size=50)
    assert bounded_interval(values) == pytest.approx(t_interval(values), abs=1e-4)


def test_a_bounded_interval_of_right_and_wrong_is_nearly_that_of_wilson():
    assert bounded_interval(np.repeat([0.0, 1.0], [40, 440])) == pytest.approx(wilson_interval(440, 480), abs=3e-4)


def test_a_bounded_interval_of_a_mean_at_the_bound_is_not_empty():
    low, high = bounded_interval(np.ones(10))
    assert low < high == 1


@pytest.mark.parametrize("values", [[0.5], [0.5, 1.5], [-0.1, 0.5]])
def test_values_outside_the_bounds_are_refused(values):
    with pytest.raises(ValueError, match=r"two or more values in \[0, 1\]"):
        bounded_interval(np.array(values))


def test_near_a_bound_the_bounded_interval_covers_and_the_symmetric_one_does_not():
    rng = np.random.default_rng(0)
    outcomes = np.repeat([1.0, 0.75, 0.5, 0.25], [90, 4, 3, 3])
    draws = [draw for draw in rng.choice(outcomes, size=(1000, 20)) if np.ptp(draw)]
    covered = [
        np.mean([low <= outcomes.mean() <= high for low, high in map(interval, draws)])
        for interval in (bounded_interval, t_interval)
    ]
    assert covered[0] > 0.94 > 0.91 > covered[1]


def test_a_crossed_interval_equals_a_worked_example():
    # Means of items 0.5, 0, 1, 1: variance 0.229167, / 4 = 0.0572917, * 3.1824^2 = 0.58023.
    # Means of seeds 0.75, 0.5: variance 0.03125, / 2 = 0.015625, * 12.7062^2 = 2.52262. Half sqrt(3.10285) = 1.76149.
    values = np.array([[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
    assert crossed_interval(values, None) == pytest.approx((0.625 - 1.76149, 0.625 + 1.76149), abs=1e-4)
    low, high = crossed_interval(values)
    assert 0 < low < 0.625 < high < 1
    for end in (low, high):
        assert abs(end - 0.625) == pytest.approx(1.76149 * np.sqrt(end * (1 - end) / (0.625 * 0.375)), abs=1e-4)


def test_one_seed_leaves_the_noise_of_items_and_one_item_that_of_seeds():
    values = np.random.default_rng(4).uniform(size=20)
    assert crossed_interval(values[None]) == pytest.approx(bounded_interval(values))
    assert crossed_interval(values[:, None], None) == pytest.approx(t_interval(values))
    with pytest.raises(ValueError, match="give wider bounds"):
        crossed_interval(np.full((2, 2), 1.5))


def test_a_crossed_interval_covers_when_seeds_and_items_both_vary():
    rng, covered = np.random.default_rng(5), 0
    for _ in range(600):
        seeds, items = rng.normal(0, 0.3, (3, 1)), rng.normal(0, 1, (1, 30))
        low, high = crossed_interval(seeds + items + rng.normal(0, 1, (3, 30)), None)
        covered += low <= 0 <= high
    assert covered / 600 > 0.94


def test_seeds_noise_is_that_of_all_arms():
    # Right in 3 and 1 of 4: means 0.75 and 0.25, variance 0.125, over 0.5 * 0.5. In 4 and 2: 0.125 over 0.75 * 0.25.
    half = np.array([[1.0, 1, 1, 0], [0, 0, 1, 0]])
    more = np.array([[1.0, 1, 1, 1], [0, 1, 1, 0]])
    noise = seed_noise([half, more, np.ones((2, 4)), half[:1]])
    assert noise.degrees == 2
    assert noise.dispersion == pytest.approx((0.125 / 0.25 + 0.125 / 0.1875) / 2)
    # Of `half`: 4.3027^2 * 0.58333 * 0.25 / 2 for the seeds, items 0.5, 0.5, 1, 0: 3.1824^2 * (0.5 / 3) / 4.
    square = 4.3027**2 * 0.583333 * 0.125 + 3.1824**2 * 0.166667 / 4
    for end in crossed_interval(half, noise=noise):
        assert abs(end - 0.5) == pytest.approx(np.sqrt(square * end * (1 - end) / 0.25), abs=1e-4)
    alone = crossed_interval(half[:1])
    assert alone == pytest.approx(bounded_interval(half[0])), "one seed alone says nothing of seeds"


def test_gains_cover_with_two_seeds_when_their_noise_is_shared():
    rng, covered, widths = np.random.default_rng(6), 0, []
    for _ in range(400):
        items = rng.normal(0, 1, 30)
        arms = [items + rng.normal(0, 0.3, (2, 1)) + rng.normal(0, 1, (2, 30)) for _ in range(6)]
        low, high = crossed_gain(arms[1], arms[0], None, seed_noise(arms, None))
        widths.append(high - low)
        covered += low <= 0 <= high
    assert covered / 400 > 0.94
    alone = crossed_gain(arms[1], arms[0], None)
    assert np.mean(widths) < 2
    assert alone[1] - alone[0] > 2.5, "twelve runs know the noise better than four"


def test_the_noise_of_seeds_counts_where_no_item_differs():
    arm = np.repeat([[1.0], [0.0]], 40, axis=1)
    low, high = crossed_gain(arm, arm)
    assert (low, high) == pytest.approx((-high, high))
    assert high > 0.9, "runs that are all right or all wrong say nothing"


def test_clusters_of_one_give_about_the_t_interval():
    values = np.random.default_rng(1).normal(size=200)
    assert cluster_interval(values, list(map(str, range(200)))) == pytest.approx(t_interval(values), abs=0.02)


def test_repeated_prompts_widen_the_interval_as_if_each_counted_once():
    once = np.random.default_rng(2).normal(size=50)
    names = [str(index) for index in range(50)]
    low, high = cluster_interval(np.repeat(once, 9), np.repeat(names, 9).tolist())
    assert (low, high) == pytest.approx(t_interval(once), abs=0.05)
    narrow = t_interval(np.repeat(once, 9))
    assert high - low > 2 * (narrow[1] - narrow[0])


def test_a_bootstrap_is_the_same_every_time():
    values, names = np.arange(12.0), list("aabbccddeeff")
    assert cluster_interval(values, names) == cluster_interval(values, names)


@pytest.mark.parametrize("clusters", [["a"] * 3, ["a", "b"]])
def test_clusters_must_fit_the_values(clusters):
    with pytest.raises(ValueError, match="cluster per value"):
        cluster_interval(np.ones(3), clusters)
