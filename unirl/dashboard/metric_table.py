"""The metrics of a run as columns of numbers: 8 bytes a value, whatever the number of steps."""

import hashlib
import math
import secrets
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unirl.run_files import Record, Tail

MAX_COLUMNS = 2000
MAX_NAME = 200
MAX_ASKED = 64
"""Lists of metrics that polls may mean without naming them."""
_FACTS = frozenset(("v", "step", "time", "attempt", "nonfinite"))
_NAN = math.nan
_JUMP_S = 60.0
MOST = 1e30
"""Sizes from here on are taken for damage: their sums and products would be infinite."""

Floats = NDArray[np.float64]


@dataclass(slots=True)
class Attempt:
    """When one start of the run wrote metrics."""

    first: float
    """Unix time of its first line."""
    last: float
    shown: float
    """Time of the first one as the curves have it."""
    seconds: float = 0.0
    """Between them, jumps of the clock left out."""


@dataclass(slots=True)
class _Columns:
    """Rows in the order of the file."""

    steps: array = field(default_factory=lambda: array("q"))
    times: array = field(default_factory=lambda: array("d"))
    values: dict[str, array] = field(default_factory=dict)
    attempts: dict[int, Attempt] = field(default_factory=dict)
    ordered: bool = True
    """No step came twice, nor after a later one."""
    clock_jumps: int = 0
    left_out: int = 0
    """Values of metrics beyond the limits."""
    shift: float = 0.0
    """Added to the clock, so that it never goes back."""


class MetricTable:
    """metrics.jsonl of one run, kept up to date. Not for several threads at once."""

    def __init__(self, folder: Path) -> None:
        """Remember the run directory; `refresh` reads."""
        self.tail = Tail(folder, "metrics.jsonl")
        self._rows = _Columns()
        self._label = secrets.token_hex(4)
        self._asked: dict[str, tuple[str, ...]] = {}  # by the word that stands for them, the latest last

    def refresh(self) -> None:
        """Take in what was added since; start again when the file is another one."""
        if self.tail.restarted():
            self._rows = _Columns()
            self._label = secrets.token_hex(4)
        for _, _, record in self.tail.records():
            if not self._add(record):
                self.tail.bad_lines += 1

    @property
    def num_rows(self) -> int:
        """Lines taken, repeated steps included."""
        return len(self._rows.steps)

    @property
    def step(self) -> int:
        """Step of the last line; 0 before the first."""
        return self._rows.steps[-1] if self._rows.steps else 0

    @property
    def names(self) -> list[str]:
        """Metrics of the run, in the order in which they came up."""
        return list(self._rows.values)

    @property
    def attempts(self) -> dict[int, Attempt]:
        """By number of the start."""
        return self._rows.attempts

    @property
    def skipped(self) -> dict[str, int]:
        """What the curves do not show, by reason."""
        rows = self._rows
        return {
            "repeated_steps": self.num_rows - len(self._last_of_each_step()),
            "clock_jumps": rows.clock_jumps,
            "values_beyond_limit": rows.left_out,
        }

    def last_value(self, name: str, step: int | None = None) -> float | None:
        """Value in the last line of a step, or of the run; None where there is none."""
        rows = self._rows
        column = rows.values.get(name, array("d"))
        for row in range(len(column) - 1, -1, -1):
            if step is None or rows.steps[row] == step:
                return None if math.isnan(column[row]) else column[row]
        return None

    def recent(self, name: str, count: int) -> list[float]:
        """Numbers of a metric in the last `count` lines."""
        return [value for value in self._rows.values.get(name, array("d"))[-count:] if not math.isnan(value)]

    def query(
        self, names: Sequence[str], *, since: str | None, window: tuple[int | None, int | None], points: int
    ) -> dict[str, Any]:
        """Columns for the page, and a cursor for the next question.

        Args:
            names: metrics; those that the run lacks are left out. None asked for, those of the cursor.
            since: a cursor of before: only lines after it, none thinned. None, or one of another file: all.
            window: first and last step that are asked for; None leaves that side open.
            points: most points of a metric.

        Returns:
            cursor, reset (the cursor was of no use), thinned, and arrays steps, times and values by name.
        """
        start, known = self._place_of(since)
        names = tuple(names) or known
        kept = self._last_of_each_step() if start is None else np.arange(start, self.num_rows)
        steps = np.array(self._rows.steps, np.int64)[kept]
        for bound, outside in zip(window, (np.less, np.greater), strict=True):
            if bound is not None:
                inside = ~outside(steps, bound)
                kept, steps = kept[inside], steps[inside]
        times = np.array(self._rows.times, np.float64)[kept]
        times = np.maximum.accumulate(times) if start is None else times
        # Most polls find nothing new: they need no names.
        values = {name: self._column(name)[kept] for name in names if name in self._rows.values and len(kept)}
        thinned = start is None and len(kept) > points
        if thinned:
            picked, values = thin(list(values.items()), len(kept), points)
            steps, times = steps[picked], times[picked]
        return {
            "cursor": f"{self._label}.{self.num_rows}.{self._remember(names)}",
            "reset": start is None and since is not None,
            "thinned": thinned,
            "steps": steps,
            "times": times,
            "values": values,
        }

    def _place_of(self, cursor: str | None) -> tuple[int | None, tuple[str, ...]]:
        """Row and metrics of a cursor; (None, ()) of one that is not this table's."""
        label, row, key = [*(cursor or "").split("."), "", ""][:3]
        known = label == self._label and row.isascii() and row.isdigit() and len(row) < 12 and key in self._asked
        return (int(row), self._asked[key]) if known and int(row) <= self.num_rows else (None, ())

    def _remember(self, names: tuple[str, ...]) -> str:
        """A short word for these metrics, so that polls need not name them."""
        key = hashlib.sha256(",".join(names).encode()).hexdigest()[:8]
        self._asked.pop(key, None)
        self._asked[key] = names
        if len(self._asked) > MAX_ASKED:
            del self._asked[next(iter(self._asked))]
        return key

    def _column(self, name: str) -> Floats:
        column = np.array(self._rows.values[name], np.float64)
        return np.pad(column, (0, self.num_rows - len(column)), constant_values=_NAN)

    def _last_of_each_step(self) -> NDArray[np.int64]:
        if self._rows.ordered:
            return np.arange(self.num_rows)
        steps = np.array(self._rows.steps, np.int64)
        return self.num_rows - 1 - np.unique(steps[::-1], return_index=True)[1]

    def _add(self, record: Record) -> bool:
        step, rows = record.get("step"), self._rows
        if type(step) is not int or not 0 <= step < 1 << 53:
            return False
        self._add_time(record)
        rows.ordered = rows.ordered and (not rows.steps or step > rows.steps[-1])
        rows.steps.append(step)
        row, columns = len(rows.steps) - 1, rows.values
        for name, value in record.items():
            if type(value) is not float:
                if name in _FACTS or not (value is None or type(value) is int):
                    continue
                number = as_number(value)
                value = _NAN if number is None else number
            elif name == "time":
                continue
            column = columns.get(name)
            if column is None:
                if len(columns) >= MAX_COLUMNS or len(name) > MAX_NAME:
                    rows.left_out += 1
                    continue
                column = columns[name] = array("d")
            if len(column) < row:
                column.extend([_NAN] * (row - len(column)))
            column.append(value if value - value == 0 else _NAN)  # infinities are no numbers either
        return True

    def _add_time(self, record: Record) -> None:
        """Set the clock right: it never goes back, and lines of one start lie `time/step_s` apart, more or less."""
        rows = self._rows
        before = rows.times[-1] if rows.times else None
        time, took = as_number(record.get("time")), as_number(record.get("time/step_s"))
        if time is None or not 0 <= time < 1e11:
            rows.times.append(before or 0.0)
            return
        number = record["attempt"] if type(record.get("attempt")) is int else 0
        attempt = rows.attempts.get(number)
        shown = time + rows.shift
        if before is not None:
            expected = before + max(0.0, took or 0.0)
            far = attempt is not None and took is not None and abs(shown - expected) > max(_JUMP_S, 10 * took)
            if far or shown < before:
                rows.clock_jumps += 1
                rows.shift += expected - shown
                shown = expected
        rows.times.append(shown)
        if attempt is None:
            rows.attempts[number] = Attempt(time, time, shown)
        else:
            attempt.seconds += shown - (before or shown)
            attempt.last = time


def as_number(value: object) -> float | None:
    """A JSON number as a float, if its size is below `MOST`; None for anything else, truth values and NaN too."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < MOST else None


def thin(columns: Sequence[tuple[str, Floats]], num: int, points: int) -> tuple[NDArray[np.int64], dict[str, Floats]]:
    """At most `points` rows in place of `num`, in which every metric keeps its least and its greatest values.

    The first and the last row stay as they are. Those between fall into buckets; of each bucket two rows stay, which
    all metrics share, and hold the least and the greatest value of the metric in the order in which these came.

    Args:
        columns: name and values [num], NaN where there is none.
        num: rows.
        points: at least 4, and fewer than `num`.

    Returns:
        Indices of the rows that stay, and the values by name.
    """
    buckets = max(1, points // 2 - 1)
    edges = np.linspace(1, num - 1, buckets + 1).astype(np.int64)
    width = int(np.diff(edges).max())
    rows = np.minimum(edges[:-1, None] + np.arange(width), edges[1:, None] - 1)  # [buckets, width], the last repeated
    inner = np.stack([edges[:-1], edges[1:] - 1], 1).reshape(-1)
    thinned = {}
    for name, values in columns:
        inside = values[rows]
        low, high = (np.where(np.isnan(inside), fill, inside) for fill in (np.inf, -np.inf))
        places = np.sort(np.stack([low.argmin(1), high.argmax(1)], 1), 1)
        ends = np.take_along_axis(inside, places, 1).reshape(-1)
        thinned[name] = np.concatenate([values[:1], ends, values[-1:]])
    return np.concatenate([[0], inner, [num - 1]]), thinned


def plain(values: Floats, digits: int = 7) -> list[float | None]:
    """Numbers for JSON with so many digits that count; None for NaN and infinity."""
    with np.errstate(all="ignore"):
        scale = 10.0 ** (digits - 1 - np.floor(np.log10(np.abs(values))))
        usable = np.isfinite(scale) & (scale > 0)
        rounded = np.where(usable, np.round(values * np.where(usable, scale, 1)) / np.where(usable, scale, 1), values)
    return [value if math.isfinite(value) else None for value in rounded.tolist()]


def mean_of(values: Iterable[float]) -> float:
    """Mean; NaN of nothing."""
    numbers = list(values)
    return math.fsum(numbers) / len(numbers) if numbers else _NAN
