"""95 % intervals of means: Wilson in [0, 1], Student t without bounds, a cluster bootstrap for repeated prompts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
_RESAMPLES = 2000

Interval = tuple[float, float]


def wilson_interval(successes: int, num: int) -> Interval:
    """Interval of a share of independent trials (Wilson 1927); inside [0, 1] and never empty at 0 or `num` successes.

    Raises:
        ValueError: not 0 <= successes <= num with num >= 1.
    """
    if not 0 <= successes <= num or num < 1:
        raise ValueError(f"interval: expected 0 <= successes <= num, num >= 1; got {successes} of {num}; count again")
    return _wilson(successes / num, _Z**2 / num)


def bounded_interval(values: NDArray[np.float64], low: float = 0.0, high: float = 1.0) -> Interval:
    """Interval of the mean of independent values [N] in [low, high]; never leaves these bounds.

    Wilson's interval with the spread of the values in place of that of right and wrong, and Student's t in place of the
    normal quantile: it covers better than the symmetric t interval near a bound and equals it far from both.

    Raises:
        ValueError: fewer than two values, or one outside the bounds.
    """
    if len(values) < 2 or values.min() < low or values.max() > high:
        raise ValueError(
            f"interval: expected two or more values in [{low:g}, {high:g}]; got {len(values)}: {values[:5]}; use "
            "t_interval for values without bounds"
        )
    square = t_quantile(len(values) - 1) ** 2 * float(values.var(ddof=1)) / len(values)
    return _inside(float(values.mean()), square, len(values), low, high)


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedNoise:
    """How far runs differ that differ by their seed alone."""

    dispersion: float
    """Variance of a run's mean, over that of one right-or-wrong draw of the same mean where values have bounds."""
    degrees: int
    """Degrees of freedom of the estimate; 0 when no arm has two seeds, and nothing is known."""

    def square(self, values: NDArray[np.float64], bounds: Interval | None) -> float:
        """Variance that seeds give the mean of values [S, N]; 0 when nothing is known."""
        return self.dispersion * _draw_variance(values, bounds) / len(values)


def seed_noise(arms: Sequence[NDArray[np.float64]], bounds: Interval | None = (0.0, 1.0)) -> SeedNoise:
    """The noise of seeds from all arms [S, N] of a grid together, since two or three seeds of one say little.

    As the dispersion of a quasi-binomial model where values have bounds; arms whose values are all alike say nothing.
    """
    told = [(values, _draw_variance(values, bounds)) for values in arms if len(values) > 1]
    told = [(values, variance) for values, variance in told if variance > 0]
    degrees = sum(len(values) - 1 for values, _ in told)
    total = sum((len(v) - 1) * float(v.mean(axis=1).var(ddof=1)) / variance for v, variance in told)
    return SeedNoise(dispersion=total / degrees if degrees else 0.0, degrees=degrees)


def crossed_interval(
    values: NDArray[np.float64], bounds: Interval | None = (0.0, 1.0), noise: SeedNoise | None = None
) -> Interval:
    """Interval of the mean of values [S, N]: S runs with seeds of their own, judged on the same N items.

    What the seeds and what the items make uncertain are added as squares, each with its own Student's t. Both hold a
    share of the noise of single values, so that the sum is a little too wide rather than too narrow. One item says
    nothing of other items; that part is then left out.

    Args:
        values: finite.
        bounds: of the values, which the interval never leaves; None for values without bounds.
        noise: of the seeds, from all arms; None takes it from these values.

    Raises:
        ValueError: a value outside the bounds.
    """
    noise = noise or seed_noise([values], bounds)
    return _around(values.mean(axis=0), noise.square(values, bounds), noise.degrees, bounds)


def crossed_gain(
    values: NDArray[np.float64],
    reference: NDArray[np.float64],
    bounds: Interval | None = (0.0, 1.0),
    noise: SeedNoise | None = None,
) -> Interval:
    """Interval of what values [S, N] gain over those of a reference [R, N] of the same items, as `crossed_interval`.

    Items are paired, seeds are not. Where no item's mean differs there is no spread of items to measure, and the
    interval is at least that of `gain_interval`.

    Raises:
        ValueError: a value outside the bounds.
    """
    noise = noise or seed_noise([values, reference], bounds)
    gains = values.mean(axis=0) - reference.mean(axis=0)
    square = noise.square(values, bounds) + noise.square(reference, bounds)
    width = None if bounds is None else bounds[1] - bounds[0]
    low, high = _around(gains, square, noise.degrees, None if width is None else (-width, width))
    if width and len(gains) > 1 and not gains.any():
        least = gain_interval(gains)[1] * width
        return min(low, -least), max(high, least)
    return low, high


def gain_interval(gains: NDArray[np.float64]) -> Interval:
    """Interval of the mean of gains [N] in [-1, 1], as `bounded_interval`.

    Where no item changed there is no spread to measure, and the interval would be empty. It then holds the gains of a
    share of items that could have changed unseen, by 1 each way: at most Wilson's bound of 0 in N.

    Raises:
        ValueError: fewer than two values, or one outside [-1, 1].
    """
    if gains.any():
        return bounded_interval(gains, -1.0, 1.0)
    most = bounded_interval(gains)[1]
    return -most, most


def t_interval(values: NDArray[np.float64]) -> Interval:
    """Student t interval of the mean of independent values [N].

    Raises:
        ValueError: fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"interval: expected two or more values; got {len(values)}; evaluate more samples")
    half = t_quantile(len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return float(values.mean()) - half, float(values.mean()) + half


def cluster_interval(values: NDArray[np.float64], clusters: Sequence[str]) -> Interval:
    """Percentile bootstrap interval of the mean of values [N], drawing whole clusters with replacement.

    For prompts that occur several times: their results vary together, so that intervals over single results are too
    narrow. Equal arguments give equal intervals.

    Raises:
        ValueError: fewer than two clusters, or not one cluster per value.
    """
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    if len(clusters) != len(values) or len(names) < 2:
        raise ValueError(
            f"interval: expected a cluster per value and two or more clusters; got {len(clusters)} for {len(values)} "
            f"values, {len(names)} distinct; use t_interval instead"
        )
    sums, counts = np.bincount(index, weights=values), np.bincount(index)
    drawn = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), size=_RESAMPLES)
    low, high = np.quantile(drawn @ sums / (drawn @ counts), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def t_quantile(degrees: int) -> float:
    """The two-sided 95 % point of Student's t, from its closed distribution for whole degrees of freedom."""
    low, high = _Z, 13.0
    while high - low > 1e-10:
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, degrees) < CONFIDENCE else (low, middle)
    return (low + high) / 2


def _draw_variance(values: NDArray[np.float64], bounds: Interval | None) -> float:
    """Variance of one draw that is only ever at the bounds and has the mean of the values; 1 without bounds."""
    if bounds is None:
        return 1.0
    low, high = bounds
    mean = float(values.mean())
    return (mean - low) * (high - mean)


def _around(items: NDArray[np.float64], seed_square: float, degrees: int, bounds: Interval | None) -> Interval:
    """Interval of the mean of items' means [N], to whose own noise that of seeds is added."""
    mean, num = float(items.mean()), len(items)
    square = t_quantile(degrees) ** 2 * seed_square if degrees else 0.0
    if num > 1:
        square += t_quantile(num - 1) ** 2 * float(items.var(ddof=1)) / num
    if bounds is None:
        return mean - square**0.5, mean + square**0.5
    if items.min() < bounds[0] or items.max() > bounds[1]:
        raise ValueError(
            f"interval: expected values in [{bounds[0]:g}, {bounds[1]:g}]; got {items.min():g} to {items.max():g}; "
            "give wider bounds"
        )
    return _inside(mean, square, num, *bounds)


def _inside(mean: float, square: float, num: int, low: float, high: float) -> Interval:
    """Wilson's interval in [low, high] for a mean of `num` values with this squared half-width in the middle."""
    width = high - low
    share = (mean - low) / width
    most = share * (1 - share)
    edges = _wilson(share, square / width**2 / most if most > 0 else t_quantile(max(num - 1, 1)) ** 2 / num)
    return low + width * edges[0], low + width * edges[1]


def _wilson(share: float, square: float) -> Interval:
    """The shares p with (p - share)^2 <= square p (1 - p)."""
    centre = (share + square / 2) / (1 + square)
    half = math.sqrt(square * share * (1 - share) + square**2 / 4) / (1 + square)
    return max(0.0, centre - half), min(1.0, centre + half)


def _t_within(t: float, degrees: int) -> float:
    """P(|T| <= t) (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
