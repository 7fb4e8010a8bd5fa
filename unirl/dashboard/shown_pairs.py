"""The shown pairs of a run: what they are searched by in memory, all else at its place in pairs.jsonl."""

import json
import re
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unirl.dashboard.metric_table import as_number, mean_of, plain
from unirl.run_files import Record, Tail, list_inside, parse
from unirl.types import TASKS

MAX_TEXT = 20_000
"""Characters; longer texts are cut."""
MAX_ID = 1000
MAX_DEPTH = 40
MAX_NUMBER = 1e300
PICTURE = re.compile(r"(?!\.)[\w.-]{1,200}\.(webp|png)", re.ASCII)
"""Names of pictures that are served."""
_LOOK_EVERY_S = 60.0
_TEXTS = ("question", "choices", "gold", "prompt")


@dataclass(frozen=True, slots=True, kw_only=True)
class PairFilter:
    """Which pairs are asked for; None leaves a side open."""

    kind: str | None = None
    zero_variance: bool | None = None
    """Whether all rewards of a group are equal, of `task`'s, or of either task's."""
    task: str | None = None
    """Whose rewards the bounds and `zero_variance` mean; None takes a pair when either task's fit."""
    min_reward: float | None = None
    max_reward: float | None = None
    text: str | None = None
    """Somewhere in id, question, options, gold, prompt or answers; case does not count."""
    step: int | None = None


@dataclass(slots=True)
class _Columns:
    """One entry a line, in the order of the file."""

    offsets: array = field(default_factory=lambda: array("q"))
    lengths: array = field(default_factory=lambda: array("q"))
    steps: array = field(default_factory=lambda: array("q"))
    similarities: array = field(default_factory=lambda: array("d"))
    weights: array = field(default_factory=lambda: array("d"))
    rewards: tuple[array, ...] = field(default_factory=lambda: tuple(array("d") for _ in TASKS))
    """Mean of each task."""
    flat: array = field(default_factory=lambda: array("B"))
    """Bit of each task whose rewards are all equal."""
    ids: list[str] = field(default_factory=list)
    kinds: array = field(default_factory=lambda: array("B"))
    kind_names: list[str] = field(default_factory=list)
    row_of: dict[tuple[int, str], int] = field(default_factory=dict)
    """Newest line of a step's pair."""
    pictures: array = field(default_factory=lambda: array("q"))
    """Hashes of the names of all pictures."""
    refused: int = 0


class ShownPairs:
    """pairs.jsonl of one run, kept up to date. Not for several threads at once."""

    def __init__(self, folder: Path) -> None:
        """Remember the run directory; `refresh` reads."""
        self.tail = Tail(folder, "pairs.jsonl")
        self._folder = folder
        self._rows = _Columns()
        self._missing, self._looked, self._seen = 0, 0.0, (0, 0)

    def refresh(self, most: int | None = None) -> None:
        """Take in what was added since, or about `most` bytes of it; start again when the file is another one."""
        if self.tail.restarted():
            self._rows, self._seen = _Columns(), (0, 0)
        for offset, length, record in self.tail.records(most=most):
            if not self._add(offset, length, record):
                self.tail.bad_lines += 1

    def find(self, asked: PairFilter, *, offset: int, limit: int) -> dict[str, Any]:
        """Number of pairs that fit, and some of them, newest step first.

        Args:
            asked: which.
            offset: leave out so many.
            limit: list no more.
        """
        rows = self._fitting(asked)
        if asked.text:
            rows = rows[self._holding(rows, asked.text)]
        return {"total": len(rows), "pairs": [self._fact(int(row)) for row in rows[offset : offset + limit]]}

    def line(self, step: int, pair_id: str) -> Record | None:
        """What the run says of a pair, texts cut and pictures looked for; None when it was not shown."""
        row = self._rows.row_of.get((step, pair_id))
        record = (
            parse(self.tail.bytes_at(self._rows.offsets[row], self._rows.lengths[row])) if row is not None else None
        )
        if record is None:
            return None
        shown = cut_texts(record)
        for side in (shown.get(task) for task in TASKS):
            if isinstance(side, dict):
                samples = side.get("samples")
                for holder in (side, *(samples if isinstance(samples, list) else [])):
                    if isinstance(holder, dict):
                        self._mark_picture(holder)
        return shown

    def is_shown(self, step: int, pair_id: str) -> bool:
        """Whether this step's use of a pair can be looked at."""
        return (step, pair_id) in self._rows.row_of

    @property
    def missing_images(self) -> int:
        """Pictures that lines name and the folder lacks; looked for every minute at most."""
        if not self._rows.pictures:
            return 0
        state = (len(self._rows.pictures), self._folder_time())
        if state != self._seen and (not self._seen[0] or time.monotonic() - self._looked > _LOOK_EVERY_S):
            self._seen, self._looked = state, time.monotonic()
            there = array("q", map(hash, list_inside(self._folder, "images")))
            self._missing = len(np.setdiff1d(np.array(self._rows.pictures), np.array(there)))
        return self._missing

    @property
    def refused_images(self) -> int:
        """Names of pictures that no run gives: paths, other kinds of file."""
        return self._rows.refused

    def _folder_time(self) -> int:
        try:
            return (self._folder / "images").stat().st_mtime_ns
        except OSError:
            return 0

    def _add(self, offset: int, length: int, record: Record) -> bool:
        step, pair_id, kind, rows = record.get("step"), record.get("pair_id"), record.get("kind"), self._rows
        if type(step) is not int or not 0 <= step < 1 << 53 or not isinstance(pair_id, str) or len(pair_id) > MAX_ID:
            return False
        kind = kind[:40] if isinstance(kind, str) else ""
        if kind not in rows.kind_names:
            if len(rows.kind_names) == 100:
                return False
            rows.kind_names.append(kind)
        rows.row_of[step, pair_id] = len(rows.ids)
        rows.ids.append(pair_id)
        rows.kinds.append(rows.kind_names.index(kind))
        for column, value in ((rows.offsets, offset), (rows.lengths, length), (rows.steps, step)):
            column.append(value)
        for column, name in ((rows.similarities, "similarity"), (rows.weights, "weight")):
            value = as_number(record.get(name))
            column.append(np.nan if value is None else value)
        self._add_sides(record)
        return True

    def _add_sides(self, record: Record) -> None:
        rows, flat = self._rows, 0
        for bit, task in enumerate(TASKS):
            side = record.get(task)
            side = side if isinstance(side, dict) else {}
            samples = [sample for sample in as_list(side.get("samples")) if isinstance(sample, dict)]
            rewards = [value for sample in samples if (value := as_number(sample.get("reward"))) is not None]
            rows.rewards[bit].append(mean_of(rewards))
            flat |= (len(rewards) > 0 and min(rewards) == max(rewards)) << bit
            for name in (holder.get("image") for holder in (side, *samples)):
                if isinstance(name, str) and PICTURE.fullmatch(name):
                    rows.pictures.append(hash(name))
                elif name is not None:
                    rows.refused += 1
        rows.flat.append(flat)

    def _fitting(self, asked: PairFilter) -> NDArray[np.int64]:
        """Rows that fit by all but the text, newest step first."""
        columns = self._rows
        rows = np.fromiter(columns.row_of.values(), np.int64, len(columns.row_of))
        steps = np.array(columns.steps, np.int64)[rows]
        rows = rows[np.lexsort((rows, -steps))]
        if asked.step is not None:
            rows = rows[np.array(columns.steps, np.int64)[rows] == asked.step]
        if asked.kind is not None:
            known = columns.kind_names.index(asked.kind) if asked.kind in columns.kind_names else -1
            rows = rows[np.array(columns.kinds)[rows] == known]
        sides = [bit for bit, task in enumerate(TASKS) if asked.task in (None, task)]
        if asked.zero_variance is not None:
            wanted = sum(1 << bit for bit in sides)
            rows = rows[((np.array(columns.flat)[rows] & wanted) > 0) == asked.zero_variance]
        if asked.min_reward is not None or asked.max_reward is not None:
            low = -np.inf if asked.min_reward is None else asked.min_reward
            high = np.inf if asked.max_reward is None else asked.max_reward
            means = [np.array(columns.rewards[bit])[rows] for bit in sides]
            rows = rows[np.any([(low <= mean) & (mean <= high) for mean in means], 0)] if means else rows[:0]
        return rows

    def _holding(self, rows: NDArray[np.int64], text: str) -> NDArray[np.bool_]:
        """Which of these lines hold a text: seldom parsed, since most can be told to lack it from their bytes."""
        wanted, columns = text.casefold(), self._rows
        written = json.dumps(text, ensure_ascii=False)[1:-1].casefold()
        places = ((columns.offsets[row], columns.lengths[row]) for row in rows)
        found = np.zeros(len(rows), bool)
        for number, line in enumerate(self.tail.lines_at(places)):
            shown = line.decode(errors="replace").casefold()
            if written in shown or "\\u" in shown:
                found[number] = any(wanted in part.casefold() for part in _searched(parse(line) or {}))
        return found

    def _fact(self, row: int) -> dict[str, Any]:
        rows = self._rows
        numbers = [rows.similarities[row], rows.weights[row], *(column[row] for column in rows.rewards)]
        similarity, weight, *rewards = plain(np.array(numbers))
        return {
            "step": rows.steps[row],
            "pair_id": rows.ids[row],
            "kind": rows.kind_names[rows.kinds[row]],
            "similarity": similarity,
            "weight": weight,
            **dict(zip(TASKS, rewards, strict=True)),
            "zero_variance": [task for bit, task in enumerate(TASKS) if rows.flat[row] >> bit & 1],
        }

    def _mark_picture(self, holder: Record) -> None:
        """Say where a picture is missing, and give no name that is not that of a picture."""
        name = holder.get("image")
        if name is None:
            return
        if not (isinstance(name, str) and PICTURE.fullmatch(name)):
            holder["image"], name = None, ""
        if not name or not (self._folder / "images" / name).is_file():
            holder["image_missing"] = True


def _searched(record: Record) -> Iterator[str]:
    yield str(record.get("pair_id", ""))
    for side in (record.get(task) for task in TASKS):
        if isinstance(side, dict):
            for value in (side.get(name) for name in _TEXTS):
                yield from (part for part in (value if isinstance(value, list) else [value]) if isinstance(part, str))
            for sample in as_list(side.get("samples")):
                if isinstance(sample, dict) and isinstance(sample.get("text"), str):
                    yield sample["text"]


def as_list(value: object) -> list[Any]:
    """A list, or none in place of anything else."""
    return value if isinstance(value, list) else []


def cut_texts(value: Any, most: int = MAX_TEXT, depth: int = MAX_DEPTH) -> Any:
    """The same JSON without what browsers cannot take: NaN, numbers and nesting beyond all use become None.

    Long texts are cut, and an object whose own text was cut says "cut": true.
    """
    if not depth:
        return None
    if isinstance(value, dict):
        whole = {str(key)[:MAX_ID]: cut_texts(item, most, depth - 1) for key, item in value.items()}
        return whole | {"cut": True} if any(_is_long(item, most) for item in value.values()) else whole
    if isinstance(value, list):
        return [cut_texts(item, most, depth - 1) for item in value]
    if isinstance(value, str):
        return value[:most]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return None if is_number and (as_number(value) is None or abs(value) > MAX_NUMBER) else value


def _is_long(value: object, most: int) -> bool:
    parts = value if isinstance(value, list) else [value]
    return any(isinstance(part, str) and len(part) > most for part in parts)
