"""Asks every sentinel after each step, and remembers what was told. The table of sentinels is `sentinel_table.py`."""

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from unirl.config import RlConfig, SftConfig
from unirl.monitoring.detectors import Line, Look, Rules
from unirl.monitoring.durable_files import read_lines
from unirl.monitoring.sentinel_table import SENTINELS, Sentinel, sentinel_of
from unirl.monitoring.step_data import StepData
from unirl.types import TASKS, GenerationSample, UnderstandingSample

log = logging.getLogger(__name__)

REMIND_EVERY = 100
"""Steps after which a condition that lasts is told again."""
QUIET_STEPS = 3
"""Steps without it after which a condition is over."""
KEPT_LINES, FIRST_LINES = 50, 5
TOPICS = (*TASKS, "text", "image")
"""Words by which a message says what it is about: a condition that comes to another one is told of it at once."""


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
    failed: bool = False
    """Whether it could not look: then this is about the sentinel, and no verdict on the run."""


@dataclass(slots=True)
class _Condition:
    since: int
    seen: int
    told: int | None
    """Step at which it was told last; None when another process told it."""
    failed: bool = False
    topics: set[str] = field(default_factory=set)
    """Tasks and modalities that it was told of."""


class Sentinels:
    """Asks every sentinel after each step. A condition that lasts is told when it begins, then rarely."""

    def __init__(self, rules: Rules | None, run_dir: Path | None = None) -> None:
        """Watch a run.

        Args:
            rules: what the settings of PairGRPO say should hold; None watches fine-tuning.
            run_dir: of the run: what was seen and told before is read from its files.
        """
        finders = {s.name: s.find if rules else s.find_sft for s in SENTINELS}
        self._finders = {name: find for name, find in finders.items() if find is not None}
        # Sentinels of fine-tuning read none.
        self._rules = rules or Rules.of(RlConfig())
        self._run_dir = run_dir
        self._lines: dict[int, Line] = {}
        self._uses: Counter[str] = Counter()
        self._newest_use = 0
        """Step whose pairs were counted last."""
        self._conditions: dict[str, _Condition] = {}
        self._checksum = ""
        self._heldout: dict[str, str] = {}
        if run_dir is not None:
            self._lines = {line["step"]: line for line in read_lines(run_dir / "metrics.jsonl")}
            self._newest_use = max(self._lines, default=0)
            self._read_conditions(read_lines(run_dir / "events.jsonl"))

    def _read_conditions(self, events: Iterable[Mapping[str, object]]) -> None:
        for event in events:
            name, step = event.get("sentinel"), event.get("step")
            if name not in self._finders or not isinstance(name, str) or not isinstance(step, int):
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
        used = self._use(data)
        steps = sorted(self._lines)
        look = Look(
            rules=self._rules,
            data=data,
            now=metrics,
            past=[self._lines[step] for step in steps[-KEPT_LINES:]],
            first=[self._lines[step] for step in steps[:FIRST_LINES]],
            checksum_before=self._checksum,
            repeated=lambda: self._repeated(data, used),
            leaked=lambda: self._leaked(data),
        )
        found = {name: _ask(name, find, look) for name, find in self._finders.items()}
        begun = [a for s in SENTINELS if s.name in found and (a := self._tell(s, data.step, *found[s.name]))]
        over = [self._end(name, data.step) for name in self._over(data.step)]
        self._lines[data.step] = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._checksum = data.weights_checksum
        for step in sorted(self._lines)[FIRST_LINES:-KEPT_LINES]:
            del self._lines[step]
        return begun, over

    @property
    def ruined_since(self) -> int | None:
        """First step of what lasts and says that learning has gone wrong; None while nothing does."""
        lasting = (c.since for name, c in self._conditions.items() if sentinel_of(name).stops and not c.failed)
        return min(lasting, default=None)

    def _forget_from(self, step: int) -> None:
        """A run that was resumed may make steps again: what their first making left does not count."""
        if any(known >= step for known in self._lines):
            self._checksum = ""
        self._lines = {known: line for known, line in self._lines.items() if known < step}
        self._conditions = {n: c for n, c in self._conditions.items() if c.since < step}

    def _tell(self, sentinel: Sentinel, step: int, message: str, failed: bool) -> Alert | None:
        if not message:
            return None
        condition = self._conditions.get(sentinel.name)
        if condition is None or condition.failed != failed:
            condition = self._conditions[sentinel.name] = _Condition(step, step, None, failed)
        condition.seen = step
        topics = {word for word in TOPICS if word in message}
        if condition.told is not None and step - condition.told < REMIND_EVERY and topics <= condition.topics:
            return None
        condition.told = step
        condition.topics |= topics
        return Alert(step, sentinel, message, condition.since, failed)

    def _over(self, step: int) -> list[str]:
        return [n for n, c in self._conditions.items() if step - c.seen >= QUIET_STEPS]

    def _end(self, name: str, step: int) -> Alert:
        condition = self._conditions.pop(name)
        message = f"{name} is over; it began at step {condition.since}"
        return Alert(step, sentinel_of(name), message, condition.since)

    def _use(self, data: StepData) -> list[str]:
        """Count the step's pairs, and return them. Where steps are made again, all before them are counted anew."""
        own = sorted({group.pair.pair_id for group in data.groups})
        if data.step <= self._newest_use or (self._newest_use and not self._uses):
            self._uses = _uses_before(data.step, self._run_dir)
        self._uses.update(own)
        self._newest_use = data.step
        return own

    def _repeated(self, data: StepData, own: Sequence[str]) -> list[str]:
        """Pairs used more often than the epochs begun so far allow; a pair comes once an epoch."""
        if not data.num_pairs:
            return []
        epochs = math.ceil(data.step * self._rules.pairs_per_step / data.num_pairs)
        return [name for name in own if self._uses[name] > epochs]

    def _leaked(self, data: StepData) -> list[str]:
        if not self._heldout:
            return []
        samples = [group.scored.group.request.sample for group in data.groups]
        return [sample.id for sample in samples if content_key(sample) in self._heldout]


def _ask(name: str, find: Callable[[Look], Iterator[str]], look: Look) -> tuple[str, bool]:
    """What a sentinel says, "" where all is well, and whether it failed: then the run goes on without its opinion."""
    try:
        return "; ".join(find(look)), False
    except Exception as error:
        log.exception("step %d: sentinel %s failed", look.data.step, name)
        return f"sentinel {name} failed: {type(error).__name__}: {error}", True


def _uses_before(step: int, run_dir: Path | None) -> Counter[str]:
    """How often each pair was used before a step; of a step that was made again, what it used last."""
    lines = read_lines(run_dir / "used_pairs.jsonl") if run_dir is not None else []
    used = {line["step"]: [pair["pair_id"] for pair in line["pairs"]] for line in lines if line["step"] < step}
    return Counter(name for names in used.values() for name in names)


def content_key(sample: UnderstandingSample | GenerationSample) -> str:
    """What makes two samples the same to a model, whatever their names."""
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(sample, UnderstandingSample):
        digest.update(repr((sample.question, sample.choices, sample.image.shape)).encode())
        digest.update(sample.image.tobytes())
    else:
        digest.update(repr(sample.prompt.split()).encode())
    return digest.hexdigest()


def watch(config: RlConfig | SftConfig, run_dir: Path) -> Sentinels:
    """The sentinels of a run, new or under way."""
    return Sentinels(Rules.of(config) if isinstance(config, RlConfig) else None, run_dir)
