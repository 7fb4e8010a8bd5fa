"""Faults of the batch, the loss and the optimizer."""

import math
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch

from unirl.algorithms import policy_loss
from unirl.jobs import local, step
from unirl.jobs.faults.planting import replaced
from unirl.learner import learner as learner_file
from unirl.learner.learner import Learner
from unirl.learner.rank_engine import RankEngine
from unirl.models.janus_pro import JanusPro
from unirl.types import LearnerBatch, LearnerRow, Task


@contextmanager
def scaled_loss(task: Task | None, factor: float) -> Any:
    """The loss of one task, or of both, is multiplied."""
    current: list[str] = [""]

    def watching(original: Any) -> Any:
        def backward(self: Learner, data: Any, *arguments: Any, **settings: Any) -> Any:
            current[0] = data.task
            return original(self, data, *arguments, **settings)

        return backward

    def scaling(original: Any) -> Any:
        return lambda self, loss: original(self, loss * factor if task in (None, current[0]) else loss)

    with ExitStack() as stack:
        stack.enter_context(replaced(Learner, "_backward", watching))
        stack.enter_context(replaced(RankEngine, "backward", scaling))
        yield


def loss_explodes() -> AbstractContextManager[None]:
    """A loss that is a sum where it should be a mean."""
    return scaled_loss(None, 1000.0)


def pictures_dominate() -> AbstractContextManager[None]:
    """The same for pictures alone."""
    return scaled_loss("generation", 1000.0)


def answers_weigh_nothing() -> AbstractContextManager[None]:
    """A loss weight of 0 for answers."""
    return scaled_loss("understanding", 0.0)


def nan_loss() -> AbstractContextManager[None]:
    """A loss that is not a number."""
    return scaled_loss("understanding", math.nan)


def pictures_detached() -> AbstractContextManager[None]:
    """Log-probabilities of pictures without their gradient."""

    def make(original: Any) -> Any:
        def score(self: Any, rows: Any, scoring: Any) -> Any:
            for scores in original(self, rows, scoring):
                drawn = rows[0].task == "generation"
                yield replace(scores, logprobs=scores.logprobs.detach()) if drawn else scores

        return score

    return replaced(JanusPro, "score", make)


def dropout_left_on() -> AbstractContextManager[None]:
    """The learner scores with noise in its log-probabilities."""

    def make(original: Any) -> Any:
        def score(self: Any, rows: Any, scoring: Any) -> Any:
            for scores in original(self, rows, scoring):
                yield replace(scores, logprobs=scores.logprobs + 0.05 * torch.randn_like(scores.logprobs))

        return score

    return replaced(JanusPro, "score", make)


def dropout_in_bfloat16() -> AbstractContextManager[None]:
    """The same in bfloat16."""
    return dropout_left_on()


@contextmanager
def ratio_to_something_else() -> Any:
    """The loss takes ratios to log-probabilities that are a third too low."""

    def make(original: Any) -> Any:
        return lambda ratio, *arguments: original(ratio * 1.4, *arguments)

    def sums(original: Any) -> Any:
        return lambda log_ratio, *arguments: original(log_ratio + math.log(1.4), *arguments)

    with replaced(policy_loss, "clipped_surrogate", make), replaced(policy_loss, "surrogate_sums", sums):
        yield


def other_ratio_in_bfloat16() -> AbstractContextManager[None]:
    """The same in bfloat16."""
    return ratio_to_something_else()


def batched(change: Any) -> AbstractContextManager[None]:
    """Rows of the batch become `change(rows)`."""

    def make(original: Any) -> Any:
        def build(*arguments: Any) -> LearnerBatch:
            batch = original(*arguments)
            return replace(batch, rows=tuple(change(batch.rows)))

        return build

    return replaced(step, "build_batch", make)


def rows_of(task: Task) -> Any:
    """Keeps the rows of one task."""

    def keep(rows: tuple[LearnerRow, ...]) -> list[LearnerRow]:
        return [row for row in rows if row.task == task]

    return keep


def pictures_never_learned() -> AbstractContextManager[None]:
    """The batch leaves pictures out."""
    return batched(rows_of("understanding"))


def every_other_row() -> AbstractContextManager[None]:
    """Half of the rows are lost, as on one of two ranks."""
    return batched(lambda rows: rows[::2])


def rows_twice() -> AbstractContextManager[None]:
    """Rows that are learned twice."""
    return batched(lambda rows: (*rows, *rows[:4]))


def micro_batch_skipped() -> AbstractContextManager[None]:
    """The learner leaves its first micro-batch out."""
    return replaced(learner_file, "plan_micro_batches", lambda o: lambda *a, **k: [part[1:] for part in o(*a, **k)])


def micro_batch_masked() -> AbstractContextManager[None]:
    """The learner takes a micro-batch for padding: it goes through the model and counts for nothing."""

    def make(original: Any) -> Any:
        def plan(*arguments: Any, **settings: Any) -> Any:
            return [[replace(part[0], counted=False), *part[1:]] for part in original(*arguments, **settings)]

        return plan

    return replaced(learner_file, "plan_micro_batches", make)


def optimizer_asleep() -> AbstractContextManager[None]:
    """A step of the optimizer that moves nothing."""

    def make(_: Any) -> Any:
        return lambda self, number: 1.0

    return replaced(RankEngine, "step", make)


def old_weights_published() -> AbstractContextManager[None]:
    """The learner publishes a copy that it made once."""
    kept: list[Any] = []

    def make(original: Any) -> Any:
        def publish(self: local.LocalLearner) -> Any:
            kept[:] = kept or [original(self)]
            manifest = replace(kept[0].manifest, policy_version=self.policy_version)
            return local.LocalPublication(manifest, kept[0].tensors)

        return publish

    return replaced(local.LocalLearner, "publish_weights", make)


def no_rate() -> AbstractContextManager[None]:
    """A schedule that is over."""
    return replaced(learner_file, "learning_rate", lambda _: lambda *arguments: 0.0)


def huge_rate() -> AbstractContextManager[None]:
    """A rate with its exponent lost."""
    return replaced(learner_file, "learning_rate", lambda _: lambda *arguments: 0.3)


def huge_rate_once() -> AbstractContextManager[None]:
    """The same with one update a step, whose harm shows in later samples only."""
    return huge_rate()


def nan_metric() -> AbstractContextManager[None]:
    """The entropy of pictures is 0 times infinity."""

    def make(original: Any) -> Any:
        return lambda self, *arguments: original(self, *arguments) | {"policy/entropy/image": math.nan}

    return replaced(Learner, "update", make)


def nan_weights() -> AbstractContextManager[None]:
    """A weight that became NaN in the optimizer."""

    def make(original: Any) -> Any:
        def move(self: RankEngine, number: int) -> float:
            norm = original(self, number)
            with torch.no_grad():
                self._trainable[0].fill_(math.nan)
            return norm

        return move

    return replaced(RankEngine, "step", make)
