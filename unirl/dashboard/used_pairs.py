"""Every pair of every step, from used_pairs.jsonl: which lines name a pair, and where the line of a step lies."""

import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from unirl.dashboard.metric_table import as_number
from unirl.dashboard.shown_pairs import as_list, cut_texts
from unirl.run_files import Record, Tail, last_record, parse

BIN = 0.02
"""Width of a bar of the similarity histogram."""
_KIND = re.compile(r"[\w.-]{1,40}", re.ASCII)


class UsedPairs:
    """used_pairs.jsonl of one run, kept up to date. Not for several threads at once."""

    def __init__(self, folder: Path) -> None:
        """Remember the run directory; `refresh` reads."""
        self._folder, self._name = folder, "used_pairs.jsonl"
        self.tail = Tail(folder, self._name)
        self._start()

    def _start(self) -> None:
        self._line_of: dict[int, int] = {}  # newest line of a step
        self._places = (array("q"), array("q"))  # offset and length of each line
        self._uses = (array("q"), array("i"))  # hash of a pair's id, line that names it

    def refresh(self, most: int | None = None) -> None:
        """Take in what was added since, or about `most` bytes of it; start again when the file is another one."""
        if self.tail.restarted():
            self._start()
        for offset, length, record in self.tail.records(most=most):
            step = _step(record)
            if step is None:
                self.tail.bad_lines += 1
                continue
            number = len(self._places[0])
            self._line_of[step] = number
            self._places[0].append(offset)
            self._places[1].append(length)
            for pair in _pairs(record):
                self._uses[0].append(hash(pair["pair_id"]))
                self._uses[1].append(number)

    def history(self, pair_id: str) -> list[dict[str, Any]]:
        """Each use of a pair, oldest first: step, similarity, weight and mean reward of either task."""
        self.refresh()
        lines = np.array(self._uses[1], np.int32)[np.array(self._uses[0], np.int64) == hash(pair_id)]
        newest = set(self._line_of.values()) if len(lines) else set()
        uses = {}
        for record in self._records(line for line in np.unique(lines).tolist() if line in newest):
            for pair in _pairs(record):
                if pair["pair_id"] == pair_id:
                    uses[record["step"]] = {"step": record["step"], **_numbers(pair)}
        return [uses[step] for step in sorted(uses)]

    def similarities(self, step: int | None, window: int) -> dict[str, Any]:
        """Histogram of the pairs' similarity by kind; that of the newest step without reading the others.

        Args:
            step: the last one that counts; None takes the newest.
            window: steps that count.

        Returns:
            first and last step, edges [B + 1], and counts [B] by kind.
        """
        newest = last_record(self._folder, self._name)
        if window == 1 and step in (None, _step(newest)):
            last, records = _step(newest) or 0, iter([newest])
        else:
            self.refresh()
            last = max(self._line_of, default=0) if step is None else step
            wanted = [self._line_of[n] for n in range(max(0, last - window + 1), last + 1) if n in self._line_of]
            records = self._records(iter(wanted))
        by_kind: dict[str, list[float]] = {}
        for record in records:
            for pair in _pairs(record):
                kind, similarity = pair.get("kind"), as_number(pair.get("similarity"))
                if similarity is not None and isinstance(kind, str) and _KIND.fullmatch(kind):
                    by_kind.setdefault(kind, []).append(min(1.0, max(-1.0, similarity)))
        least = min((min(values) for values in by_kind.values()), default=1.0 - BIN)
        first = min(np.floor(round(least / BIN, 6)), round(1 / BIN) - 1)
        edges = np.round(np.arange(first, round(1 / BIN) + 1) * BIN, 6)
        counts = {kind: np.histogram(values, edges)[0].tolist() for kind, values in sorted(by_kind.items())}
        return {"first": max(0, last - window + 1), "step": last, "edges": edges.tolist(), "counts": counts}

    def _records(self, lines: Iterator[int]) -> Iterator[Record]:
        places = ((self._places[0][line], self._places[1][line]) for line in lines)
        yield from (record for data in self.tail.lines_at(places) if (record := parse(data)))


def _pairs(record: Record) -> Iterator[Record]:
    return (p for p in as_list(record.get("pairs")) if isinstance(p, dict) and isinstance(p.get("pair_id"), str))


def _step(record: Record) -> int | None:
    step = record.get("step")
    return step if type(step) is int and 0 <= step < 1 << 53 else None


def _numbers(pair: Record) -> dict[str, Any]:
    names = ("similarity", "weight", "understanding", "generation")
    return {"kind": cut_texts(pair.get("kind"), 40)} | {name: as_number(pair.get(name)) for name in names}
