"""Asks every sentinel after each step, and remembers what was told. The table of sentinels is `sentinel_table.py`."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from unirl.config import RlConfig
from unirl.monitoring.detectors import Line, Look, Rules
from unirl.monitoring.durable_files import read_lines
from unirl.monitoring.sentinel_table import SENTINELS, Sentinel, sentinel_of
from unirl.monitoring.step_data import StepData
from unirl.types import GenerationSample, UnderstandingSample

REMIND_EVERY = 100
"""Steps after which a condition that lasts is told again."""
QUIET_STEPS = 3
"""Steps without it after which a condition is over."""
KEPT_LINES, FIRST_LINES = 50, 5


class StoppedByAlertError(ValueError):
    """A run that `monitoring.on_alert=stop` ended, after a checkpoint."""


@dataclass(frozen=True, slots=True)
class Alert:
    """What a sentinel says of a step."""

    step: int
    sentinel: Sentinel
    message: str
    since: int
    """First step of the condition."""


@dataclass(slots=True)
class _Condition:
    since: int
    seen: int
    told: int | None
    """Step at which it was told last; None when another process told it."""


class Sentinels:
    """Asks every sentinel after each step. A condition that lasts is told when it begins, then rarely."""

    def __init__(self, rules: Rules, run_dir: Path | None = None) -> None:
        """Watch a run.

        Args:
            rules: what its settings say should hold.
            run_dir: of a run that goes on: what was seen and told before is read from its files.
        """
        self._rules = rules
        self._lines: dict[int, Line] = {}
        self._used: dict[int, list[str]] = {}
        self._uses: Counter[str] = Counter()
        self._conditions: dict[str, _Condition] = {}
        self._checksum = ""
        self._heldout: dict[str, str] = {}
        if run_dir is not None:
            self._lines = {line["step"]: line for line in read_lines(run_dir / "metrics.jsonl")}
            for line in read_lines(run_dir / "used_pairs.jsonl"):
                self._use(line["step"], [pair["pair_id"] for pair in line["pairs"]])
            self._read_conditions(read_lines(run_dir / "events.jsonl"))

    def _read_conditions(self, events: Iterable[Mapping[str, object]]) -> None:
        asked = {sentinel.name for sentinel in SENTINELS if sentinel.find is not None}
        for event in events:
            name, step = event.get("sentinel"), event.get("step")
            if name not in asked or not isinstance(name, str) or not isinstance(step, int):
                continue
            if event.get("kind") == "alert over":
                self._conditions.pop(name, None)
            else:
                since = event.get("since", step)
                self._conditions[name] = _Condition(since if isinstance(since, int) else step, step, None)

    def hold_out(self, samples: Iterable[UnderstandingSample | GenerationSample]) -> None:
        """Name the samples that evaluations use, so that training on them is seen."""
        self._heldout = {content_key(sample): sample.id for sample in samples}

    def look(self, data: StepData, metrics: Mapping[str, float]) -> tuple[list[Alert], list[Alert]]:
        """Ask all about a finished step: what is to be told, and which conditions are over."""
        self._forget_from(data.step)
        steps = sorted(self._lines)
        look = Look(
            rules=self._rules,
            data=data,
            now=metrics,
            past=[self._lines[step] for step in steps[-KEPT_LINES:]],
            first=[self._lines[step] for step in steps[:FIRST_LINES]],
            checksum_before=self._checksum,
            repeated=self._repeated(data),
            leaked=self._leaked(data),
        )
        found = {s.name: "; ".join(s.find(look)) for s in SENTINELS if s.find is not None}
        begun = [alert for s in SENTINELS if (alert := self._tell(s, data.step, found.get(s.name, "")))]
        over = [self._end(name, data.step) for name in self._over(data.step)]
        self._lines[data.step] = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._checksum = data.weights_checksum
        for step in sorted(self._lines)[FIRST_LINES:-KEPT_LINES]:
            del self._lines[step]
        return begun, over

    @property
    def ruined_since(self) -> int | None:
        """First step of what lasts and says that learning has gone wrong; None while nothing does."""
        return min((c.since for name, c in self._conditions.items() if sentinel_of(name).stops), default=None)

    def _forget_from(self, step: int) -> None:
        """A run that was resumed may make steps again: what their first making left does not count."""
        if any(known >= step for known in self._lines):
            self._checksum = ""
        self._lines = {known: line for known, line in self._lines.items() if known < step}
        for known in [known for known in self._used if known >= step]:
            self._use(known, [])
        self._conditions = {n: c for n, c in self._conditions.items() if c.since < step}

    def _tell(self, sentinel: Sentinel, step: int, message: str) -> Alert | None:
        if not message:
            return None
        condition = self._conditions.setdefault(sentinel.name, _Condition(step, step, None))
        condition.seen = step
        if condition.told is not None and step - condition.told < REMIND_EVERY:
            return None
        condition.told = step
        return Alert(step, sentinel, message, condition.since)

    def _over(self, step: int) -> list[str]:
        return [n for n, c in self._conditions.items() if step - c.seen >= QUIET_STEPS]

    def _end(self, name: str, step: int) -> Alert:
        condition = self._conditions.pop(name)
        message = f"{name} is over; it began at step {condition.since}"
        return Alert(step, sentinel_of(name), message, condition.since)

    def _repeated(self, data: StepData) -> list[str]:
        """Pairs used more often than the epochs begun so far allow; a pair comes once an epoch."""
        own = sorted({group.pair.pair_id for group in data.groups})
        self._use(data.step, own)
        if not data.num_pairs:
            return []
        epochs = math.ceil(data.step * self._rules.pairs_per_step / data.num_pairs)
        return [name for name in own if self._uses[name] > epochs]

    def _use(self, step: int, names: list[str]) -> None:
        """Note the pairs of a step, in place of those noted of it before."""
        self._uses.subtract(self._used.pop(step, []))
        self._uses.update(names)
        if names:
            self._used[step] = names

    def _leaked(self, data: StepData) -> list[str]:
        if not self._heldout:
            return []
        samples = [group.scored.group.request.sample for group in data.groups]
        return [sample.id for sample in samples if content_key(sample) in self._heldout]


def content_key(sample: UnderstandingSample | GenerationSample) -> str:
    """What makes two samples the same to a model, whatever their names."""
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(sample, UnderstandingSample):
        digest.update(repr((sample.question, sample.choices, sample.image.shape)).encode())
        digest.update(sample.image.tobytes())
    else:
        digest.update(repr(sample.prompt.split()).encode())
    return digest.hexdigest()


def watch(config: RlConfig, run_dir: Path, *, resumed: bool) -> Sentinels:
    """The sentinels of a run."""
    return Sentinels(Rules.of(config), run_dir if resumed else None)
