"""Which pairs a step trains on, and what each pair has earned so far. The order is a pure function of seed and step."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from unirl.config import PairPartners, PairsTaken
from unirl.data.atomic import DataError
from unirl.data.pair_choice import choose_pairs
from unirl.data.pair_store import read_pair_set
from unirl.types import TASKS, PairRecord, Task

STATE_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one side of a pair earned in one step."""

    pair_id: str
    task: Task
    mean_reward: float | None
    """Mean over the judged completions; None when none could be judged."""
    zero_variance: bool
    """All judged rewards were equal: the group carried no signal."""


@dataclass(slots=True, kw_only=True)
class PairEarnings:
    """What one side of a pair earned in all recorded steps."""

    num_steps: int = 0
    """Steps in which at least one completion was judged."""
    sum_mean_rewards: float = 0.0
    last_mean_reward: float | None = None
    num_zero_variance: int = 0
    num_unjudged: int = 0
    """Steps in which no completion could be judged."""


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


class PairSource:
    """Hands each step its batch of pairs once, and keeps the ledger of what the pairs earned.

    `batch` computes a step's pairs without handing them out. `lease` hands them out, `record` closes the step and
    `release` takes an unfinished step back, so that it can be leased again.
    """

    def __init__(self, pairs: Sequence[PairRecord], *, pairs_per_step: int, seed: int, shuffle: bool = True) -> None:
        """Serve `pairs`.

        Raises:
            DataError: a pair id occurs twice, or there are fewer pairs than a step needs.
        """
        self._pairs = tuple(pairs)
        self._size, self._seed, self._shuffle = pairs_per_step, seed, shuffle
        ids = [pair.pair_id for pair in self._pairs]
        if len(set(ids)) != len(ids):
            raise DataError("expected pairs with unique ids; got an id twice; make the pair set again")
        if not 1 <= pairs_per_step <= len(ids):
            raise DataError(
                f"expected at least rollout.pairs_per_step = {pairs_per_step} pairs, and that at least 1; got "
                f"{len(ids)} pairs; lower rollout.pairs_per_step or make a larger pair set"
            )
        self._fingerprint = hashlib.sha256("\n".join(map(_text, self._pairs)).encode()).hexdigest()
        self._order: tuple[int, list[int]] = (0, self._permutation(0))
        self._leased: dict[int, tuple[PairRecord, ...]] = {}
        self._done: set[int] = set()
        self._ledger: dict[str, dict[str, PairEarnings]] = {}

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        pairs_per_step: int,
        seed: int,
        shuffle: bool = True,
        max_pairs: int | None = None,
        take: PairsTaken = "all",
        partners: PairPartners = "own",
    ) -> Self:
        """Serve the pairs of a pair set's folder that `choose_pairs` takes.

        Raises:
            DataError: the pair set cannot be read, or has fewer pairs than a step needs.
        """
        pair_set = read_pair_set(folder)
        pairs = choose_pairs(pair_set, take=take, partners=partners, max_pairs=max_pairs, seed=seed)
        return cls(pairs, pairs_per_step=pairs_per_step, seed=seed, shuffle=shuffle)

    def num_pairs(self) -> int:
        """Pairs of an epoch."""
        return len(self._pairs)

    def batch(self, step: int) -> tuple[PairRecord, ...]:
        """The pairs of a step, counted from 0: a pure function of seed and step.

        Epochs follow each other without a gap, each a permutation of all pairs. A step that spans two epochs still
        holds each pair once.
        """
        if step < 0:
            raise ValueError(f"expected a step of at least 0; got {step}; count steps from 0")
        epoch, start = divmod(step * self._size, len(self._pairs))
        places = self._epoch(epoch)[start : start + self._size]
        if len(places) < self._size:
            places = places + self._epoch(epoch + 1)[: self._size - len(places)]
        return tuple(self._pairs[place] for place in places)

    def lease(self, step: int) -> tuple[PairRecord, ...]:
        """The pairs of a step, handed out once.

        Raises:
            RuntimeError: the step is out already, or finished.
        """
        if step in self._leased or step in self._done:
            state = "finished" if step in self._done else "handed out and not released"
            raise RuntimeError(
                f"step {step}: expected a step that nobody works on; it is {state}; release it after a crash, or go on "
                "with the next step"
            )
        self._leased[step] = self.batch(step)
        return self._leased[step]

    def is_finished(self, step: int) -> bool:
        """Whether the step was recorded."""
        return step in self._done

    def is_leased(self, step: int) -> bool:
        """Whether the step is out."""
        return step in self._leased

    def release(self, step: int) -> None:
        """Take an unfinished step back, so that it can be leased again.

        Raises:
            RuntimeError: the step is not out.
        """
        self._require_lease(step)
        del self._leased[step]

    def record(self, step: int, results: Iterable[StepResult]) -> None:
        """Close a leased step with what each of its pairs earned on each task.

        Raises:
            RuntimeError: the step is not out.
            ValueError: the results are not exactly one per pair and task of the step.
        """
        self._require_lease(step)
        results = list(results)
        expected = sorted((pair.pair_id, task) for pair in self._leased[step] for task in TASKS)
        found = sorted((result.pair_id, result.task) for result in results)
        if found != expected:
            odd = sorted(set(found) ^ set(expected)) or "one twice"
            raise ValueError(
                f"step {step}: expected one result for each pair and task of the step, {len(expected)} in all; got "
                f"{len(found)}, differing in {odd}; record exactly what was leased"
            )
        for result in results:
            _add(self._ledger.setdefault(result.pair_id, {}).setdefault(result.task, PairEarnings()), result)
        del self._leased[step]
        self._done.add(step)

    def earnings(self, pair_id: str, task: Task) -> PairEarnings:
        """What a pair has earned on a task so far."""
        return self._ledger.get(pair_id, {}).get(task, PairEarnings())

    def state(self) -> dict[str, Any]:
        """Finished steps and ledger as JSON values. Open leases are left out: whoever held them is gone at a resume."""
        return {
            "version": STATE_VERSION,
            "pairs": self._fingerprint,
            "pairs_per_step": self._size,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "done": sorted(self._done),
            "ledger": {
                pair: {task: asdict(earned) for task, earned in tasks.items()} for pair, tasks in self._ledger.items()
            },
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved state; steps that were out are free again.

        Raises:
            DataError: the state belongs to other pairs, another seed or another batch size.
        """
        mine = self.state()
        keys = ("version", "pairs", "pairs_per_step", "seed", "shuffle")
        if differing := [key for key in keys if state.get(key) != mine[key]]:
            raise DataError(
                "expected the state of the same pairs, seed and pairs_per_step; got another "
                + ", ".join(f"{key} ({state.get(key)!r}, now {mine[key]!r})" for key in differing)
                + "; resume with the settings that the run began with"
            )
        self._done, self._leased = set(state["done"]), {}
        self._ledger = {
            pair: {task: PairEarnings(**earned) for task, earned in tasks.items()}
            for pair, tasks in state["ledger"].items()
        }

    def _require_lease(self, step: int) -> None:
        if step not in self._leased:
            raise RuntimeError(f"step {step}: expected a leased step; it is not out; call lease({step}) first")

    def _permutation(self, epoch: int) -> list[int]:
        places = list(range(len(self._pairs)))
        if not self._shuffle:
            return places
        # A hash instead of a random generator: the order depends on no library's version.
        keys = [_hash(f"{self._seed}/{epoch}/{pair.pair_id}") for pair in self._pairs]
        return sorted(places, key=lambda place: (keys[place], place))

    def _epoch(self, epoch: int) -> list[int]:
        """Order of an epoch. What shares a step with the end of the epoch before must not occur there again."""
        known, order = self._order if self._order[0] <= epoch else (0, self._permutation(0))
        while known < epoch:
            known += 1
            num_before = known * len(order) % self._size
            shared = set(order[len(order) - num_before :])
            fresh = self._permutation(known)
            head = [place for place in fresh if place not in shared][: (self._size - num_before) % self._size]
            taken = set(head)
            order = head + [place for place in fresh if place not in taken]
        self._order = (known, order)
        return order


def _text(pair: PairRecord) -> str:
    asked, drawn = pair.understanding, pair.generation
    return repr(
        (pair.pair_id, pair.kind, pair.similarity, asked.id, asked.question, asked.answer, drawn.id, drawn.prompt)
    )


def _add(earned: PairEarnings, result: StepResult) -> None:
    if result.mean_reward is None:
        earned.num_unjudged += 1
        return
    earned.num_steps += 1
    earned.sum_mean_rewards += result.mean_reward
    earned.last_mean_reward = result.mean_reward
    earned.num_zero_variance += result.zero_variance
