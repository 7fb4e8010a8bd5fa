"""Asks every sentinel after each step, and remembers what was told. The table of sentinels is `sentinel_table.py`."""

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from unirl.config import RlConfig, SftConfig
from unirl.monitoring.detectors import Line, Look, Rules
from unirl.monitoring.durable_files import read_lines
from unirl.monitoring.sentinel_table import SENTINELS, Sentinel, failure_of, sentinel_of
from unirl.monitoring.step_data import StepData
from unirl.types import TASKS, GenerationSample, UnderstandingSample

log = logging.getLogger(__name__)

REMIND_EVERY = 100
"""Steps after which a condition that lasts is told again."""
QUIET_STEPS = 3
"""Steps without it after which a condition is over; a step that lacks the metrics that told it does not count."""
SAME_ONSET = 100
"""Steps after which a condition that comes again is another one, for which another checkpoint is kept."""
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
    told: int | None = None
    """Step at which it was told last; None when another process told it."""
    quiet: int = 0
    """Steps since it was there."""
    columns: tuple[str, ...] = ()
    """Metrics without which a step says nothing of it."""
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
        self._failures: dict[str, _Condition] = {}
        self._onsets: dict[str, tuple[int, int]] = {}
        """First and last step at which a sentinel spoke that says that learning has gone wrong."""
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
            failed = str(event.get("message")).startswith(failure_of(name))
            known = self._failures if failed else self._conditions
            since = event.get("since", step)
            if event.get("kind") == "alert over":
                known.pop(name, None)
            else:
                known[name] = _Condition(since if isinstance(since, int) else step)
            if not failed:
                self._note_onset(name, step)

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
        begun: list[Alert] = []
        over: list[Alert] = []
        for name, find in self._finders.items():
            message, failed = _ask(name, find, look)
            begun += self._tell(name, data.step, message, metrics, failed=failed)
            over += self._quieten(name, data.step, message, metrics, failed=failed)
        self._lines[data.step] = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._checksum = data.weights_checksum
        for step in sorted(self._lines)[FIRST_LINES:-KEPT_LINES]:
            del self._lines[step]
        return begun, over

    @property
    def onsets(self) -> list[int]:
        """Steps at which what says that learning has gone wrong began, the last time of each sentinel, in order.

        Also of conditions that are over: a reward that fell, and stays down, soon is what is usual.
        """
        return sorted({first for first, _ in self._onsets.values()})

    def _note_onset(self, name: str, step: int) -> None:
        if sentinel_of(name).stops:
            first, last = self._onsets.get(name, (step, step))
            self._onsets[name] = (first if step - last <= SAME_ONSET else step), step

    def _forget_from(self, step: int) -> None:
        """A run that was resumed may make steps again: what their first making left does not count."""
        if any(known >= step for known in self._lines):
            self._checksum = ""
        self._lines = {known: line for known, line in self._lines.items() if known < step}
        self._conditions = {n: c for n, c in self._conditions.items() if c.since < step}
        self._failures = {n: c for n, c in self._failures.items() if c.since < step}
        self._onsets = {n: (first, min(last, step)) for n, (first, last) in self._onsets.items() if first < step}

    def _tell(self, name: str, step: int, message: str, metrics: Collection[str], *, failed: bool) -> list[Alert]:
        """The alert, if there is something new to say."""
        if not message:
            return []
        sentinel, known = sentinel_of(name), self._failures if failed else self._conditions
        condition = known.setdefault(name, _Condition(step))
        condition.quiet, condition.columns = 0, tuple(column for column in sentinel.looks_at if column in metrics)
        if not failed:
            self._note_onset(name, step)
        topics = {word for word in TOPICS if word in message}
        if condition.told is not None and step - condition.told < REMIND_EVERY and topics <= condition.topics:
            return []
        condition.told = step
        condition.topics |= topics
        return [Alert(step, sentinel, message, condition.since, failed)]

    def _quieten(self, name: str, step: int, message: str, metrics: Collection[str], *, failed: bool) -> list[Alert]:
        """What is over; a sentinel that could not look says nothing of what it watches."""
        ended = []
        for known, words in ((self._failures, f"{failure_of(name)} no more"), (self._conditions, f"{name} is over")):
            condition = known.get(name)
            if condition is None or failed or (message and known is self._conditions):
                continue
            condition.quiet += all(column in metrics for column in condition.columns)
            if condition.quiet >= QUIET_STEPS:
                del known[name]
                said = f"{words}; it began at step {condition.since}"
                ended.append(Alert(step, sentinel_of(name), said, condition.since))
        return ended

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
        return f"{failure_of(name)}: {type(error).__name__}: {error}", True


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
