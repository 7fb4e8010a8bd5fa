"""95 % intervals of means: Wilson in [0, 1], Student t without bounds, a cluster bootstrap for repeated prompts."""

import math
from collections.abc import Sequence
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


def crossed_interval(values: NDArray[np.float64], bounds: Interval | None = (0.0, 1.0)) -> Interval:
    """Interval of the mean of values [S, N]: S runs with seeds of their own, judged on the same N items.

    What the seeds and what the items make uncertain are added as squares, each with its own Student's t, from the means
    of rows and of columns. Each of these holds a share of the noise of single values, so that the sum is a little too
    wide rather than too narrow. One row, or one column, says nothing about its own part, which is then left out.

    Args:
        values: finite.
        bounds: of the values, which the interval never leaves; None for values without bounds.

    Raises:
        ValueError: fewer than two values, or one outside the bounds.
    """
    low, high = bounds or (-math.inf, math.inf)
    if values.size < 2 or values.min() < low or values.max() > high:
        raise ValueError(
            f"interval: expected two or more values in [{low:g}, {high:g}]; got shape {values.shape}, from "
            f"{values.min(initial=0):g} to {values.max(initial=0):g}; give wider bounds"
        )
    mean = float(values.mean())
    square = sum(
        t_quantile(len(means) - 1) ** 2 * float(means.var(ddof=1)) / len(means)
        for means in (values.mean(axis=0), values.mean(axis=1))
        if len(means) > 1
    )
    return _inside(mean, square, values.shape[1], low, high) if bounds else (mean - square**0.5, mean + square**0.5)


def gain_interval(gains: NDArray[np.float64]) -> Interval:
    """Interval of the mean of gains [S, N] in [-1, 1] of N items in S runs, as `crossed_interval`.

    Where no item changed in any run there is no spread to measure, and the interval would be empty. It then holds the
    gains of a share of items that could have changed unseen, by 1 each way: at most Wilson's bound of 0 in N.

    Raises:
        ValueError: fewer than two values, or one outside [-1, 1].
    """
    if gains.any():
        return crossed_interval(gains, (-1.0, 1.0))
    most = bounded_interval(gains.mean(axis=0))[1]
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
