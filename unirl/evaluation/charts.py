"""Inline SVG figures: lines with bands, histograms, one stacked bar. Colours come from the page's style sheet."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

WIDTH, HEIGHT = 440, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 18, 10, 30
MAX_POINTS = 240
_HOVER_POINTS = 90


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One curve."""

    label: str
    points: Sequence[Point]
    color: str
    """Class of the style sheet: "und", "gen", "a", "b" or "c"."""
    dashed: bool = False
    band: Sequence[tuple[float, float, float]] = ()
    """(x, low, high) shaded behind the curve."""


def line_chart(
    title: str, lines: Sequence[Line], *, note: str = "", y_range: Point | None = None, x_label: str = "step"
) -> str:
    """A figure with one y axis; "" when no curve has a point.

    Args:
        title: above the figure.
        lines: curves over the same x.
        note: small print below the title.
        y_range: least range of the y axis; it grows to hold the data.
        x_label: what x is, one word.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points] + [y for line in lines for row in line.band for y in row[1:]]
    low, high = _range([*ys, *(y_range or ())])
    left, right = min(xs), max(max(xs), min(xs) + 1)

    def place(x: float, y: float) -> str:
        return f"{_across(x, left, right):.1f},{_down(y, low, high):.1f}"

    parts = [_grid(low, high), _x_axis(left, right, x_label, least_gap=1)]
    for line in lines:
        if line.band:
            band = _thin_band(line.band)
            edge = [place(x, y) for x, y, _ in band] + [place(x, y) for x, _, y in reversed(band)]
            parts.append(f'<polygon class="band {line.color}" points="{" ".join(edge)}"/>')
    for line in lines:
        points = thin(line.points)
        dash = " dashed" if line.dashed else ""
        path = " ".join(place(x, y) for x, y in points)
        parts.append(f'<polyline class="line {line.color}{dash}" points="{path}"/>')
        if len(points) <= _HOVER_POINTS:
            parts += [_hover(place(x, y), f"{line.label}, {x_label} {x:g}: {y:.4g}", line.color) for x, y in points]
    return _figure(title, "".join(parts), note, [(line.label, line.color, line.dashed) for line in lines])


def histogram(
    title: str, groups: Mapping[str, tuple[str, Sequence[float]]], x_label: str, *, note: str = "", bins: int = 20
) -> str:
    """Counts of values in [0, 1], groups stacked; "" without values.

    Args:
        title: above the figure.
        groups: label -> (colour class, values).
        x_label: what the values are.
        note: small print.
        bins: bars.
    """
    values = [value for _, group in groups.values() for value in group]
    if not values:
        return ""
    counts = {label: _count(group, bins) for label, (_, group) in groups.items()}
    high = max(map(sum, zip(*counts.values(), strict=True)))
    parts = [_grid(0, high, least_gap=1), _x_axis(0, 1, x_label)]
    floor = [0] * bins
    for label, (color, _) in groups.items():
        for index, count in enumerate(counts[label]):
            if count:
                x, width = _across(index / bins, 0, 1), _across(1 / bins, 0, 1) - LEFT
                y, base = _down(floor[index] + count, 0, high), _down(floor[index], 0, high)
                parts.append(
                    f'<rect class="bar {color}" x="{x + 0.5:.1f}" y="{y:.1f}" width="{width - 1:.1f}" '
                    f'height="{base - y:.1f}"><title>{escape(label)}, {index / bins:.2f} to {(index + 1) / bins:.2f}: '
                    f"{count}</title></rect>"
                )
                floor[index] += count
    return _figure(title, "".join(parts), note, [(label, color, False) for label, (color, _) in groups.items()])


def stacked_bar(parts: Mapping[str, float], unit: str) -> str:
    """Shares of a whole as one bar with a legend in HTML; "" when there is nothing."""
    total = math.fsum(parts.values())
    if total <= 0:
        return ""
    bars, legend = [], []
    for number, (label, value) in enumerate(sorted(parts.items(), key=lambda item: -item[1])):
        color = f"p{number % 8}"
        words = f"{label} {value:.2f} {unit} ({value / total:.0%})"
        bars.append(f'<span class="{color}" style="width:{100 * value / total:.2f}%" title="{escape(words)}"></span>')
        legend.append(f'<li><i class="{color}"></i>{escape(words)}</li>')
    return f'<div class="stack">{"".join(bars)}</div><ul class="legend">{"".join(legend)}</ul>'


def thin(points: Sequence[Point]) -> list[Point]:
    """At most MAX_POINTS points: means of neighbours."""
    size = math.ceil(len(points) / MAX_POINTS)
    buckets = [points[i : i + size] for i in range(0, len(points), size)] if size > 1 else [[p] for p in points]
    return [(bucket[-1][0], math.fsum(y for _, y in bucket) / len(bucket)) for bucket in buckets]


def smooth(points: Sequence[Point], window: int) -> list[Point]:
    """Means over the last `window` points."""
    ys = [y for _, y in points]
    return [
        (x, math.fsum(part) / len(part))
        for i, (x, _) in enumerate(points)
        if (part := ys[max(0, i + 1 - window) : i + 1])
    ]


def _thin_band(band: Sequence[tuple[float, float, float]]) -> list[tuple[float, float, float]]:
    lows, highs = thin([(x, low) for x, low, _ in band]), thin([(x, high) for x, _, high in band])
    return [(x, low, high) for (x, low), (_, high) in zip(lows, highs, strict=True)]


def _figure(title: str, body: str, note: str, legend: Sequence[tuple[str, str, bool]]) -> str:
    keys = "".join(
        f'<li><i class="{color}{" dashed" if dashed else ""}"></i>{escape(label)}</li>'
        for label, color, dashed in legend
    )
    small = f"<p class=note>{escape(note)}</p>" if note else ""
    keys = f'<ul class="legend">{keys}</ul>' if len(legend) > 1 else ""
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>{small}"
        f'{keys}<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{body}</svg></figure>"
    )


def _grid(low: float, high: float, least_gap: float = 0.0) -> str:
    ticks = _ticks(low, high, 4, least_gap)
    tiny = max(map(abs, ticks)) < 1e-3
    decimals = max((len(f"{tick:.5f}".rstrip("0").split(".")[1]) for tick in ticks), default=0)
    rows = []
    for tick in ticks:
        y, number = _down(tick, low, high), f"{tick:.1e}" if tiny and tick else f"{tick:.{0 if tiny else decimals}f}"
        rows.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number}</text>'
        )
    return "".join(rows)


def _x_axis(left: float, right: float, label: str, least_gap: float = 0.0) -> str:
    return f'<text x="{LEFT - 14}" y="{HEIGHT - 10}" text-anchor="end">{label}</text>' + "".join(
        f'<text x="{_across(tick, left, right):.1f}" y="{HEIGHT - 10}" text-anchor="middle">{tick:g}</text>'
        for tick in _ticks(left, right, 6, least_gap)
    )


def _hover(place: str, words: str, color: str) -> str:
    x, y = place.split(",")
    return f'<circle class="dot {color}" cx="{x}" cy="{y}" r="5"><title>{escape(words)}</title></circle>'


def _ticks(low: float, high: float, wanted: int, least_gap: float) -> list[float]:
    """Round numbers inside [low, high], about `wanted` of them, `least_gap` or more apart: 1 gives whole numbers."""
    rough = max((high - low) / wanted, least_gap)
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda size: abs(size - rough))
    return [float(f"{k * step:.12g}") for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _range(values: Sequence[float]) -> Point:
    """Ends of an axis with some room, at least 1 % of the values long: rounding errors draw a flat line."""
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    if low == high:
        return (low - 0.1 * size, high + 0.1 * size) if size else (0.0, 1.0)
    room = max((high - low) * 0.05, size * 0.005)
    return (low if low == 0 else low - room), high + room


def _across(x: float, left: float, right: float) -> float:
    return LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT)


def _down(y: float, low: float, high: float) -> float:
    return HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def _count(values: Sequence[float], bins: int) -> list[int]:
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, max(0, int(value * bins)))] += 1
    return counts
