"""What an update reports of the gradient of each task: its norm, and how the tasks' directions agree."""

from collections.abc import Sequence
from itertools import groupby

from unirl.learner.gradient_parts import cosine, norm
from unirl.learner.passes import MicroTensors
from unirl.learner.rank_engine import RankEngine
from unirl.types import TASKS, PairKind, Task

Label = tuple[Task, PairKind | None]


class TaskGradients:
    """The gradient of one update by task and, if its micro-batches allow it, by the kind of the pairs."""

    def __init__(self, engine: RankEngine, work: Sequence[MicroTensors], *, by_kind: bool) -> None:
        """Begin; the engine's gradient has just been cleared.

        Args:
            engine: sums the gradient.
            work: this rank's micro-batches in their order; every rank's have the same tasks and kinds.
            by_kind: whether to tell kinds apart, which takes up to three copies of the gradient instead of one.
        """
        self._labels: list[Label] = [(data.task, data.micro.kind if by_kind else None) for data in work]
        # A micro-batch of several kinds, or a kind that comes back after another one, has no sum of its own.
        if len(list(groupby(self._labels))) > len(set(self._labels)):
            self._labels = [(data.task, None) for data in work]
        self._parts = engine.gradient_parts()
        self._next = 0

    def before_micro_batch(self) -> None:
        """Call it before each micro-batch."""
        if self._next and self._labels[self._next] != self._labels[self._next - 1]:
            self._parts.end_part()
        self._next += 1

    def metrics(self, *, with_cosine: bool) -> dict[str, float]:
        """Norms and cosines under their full names, equal on every rank; every rank must call it, before the step.

        A cosine is left out where a task has no micro-batch, or no gradient.
        """
        products, seconds = self._parts.products()
        labels = [label for label, _ in groupby(self._labels)]
        of_task = {task: [i for i, label in enumerate(labels) if label[0] == task] for task in TASKS}
        metrics = {f"learner/grad_norm/{task}": norm(products, parts) for task, parts in of_task.items() if parts}
        if with_cosine:
            found = {"learner/grad_cosine": cosine(products, *of_task.values())}
            for kind in sorted({kind for _, kind in labels if kind is not None}):
                sides = ([i for i in parts if labels[i][1] == kind] for parts in of_task.values())
                found[f"learner/grad_cosine/{kind}"] = cosine(products, *sides)
            metrics |= {name: value for name, value in found.items() if value is not None}
        return metrics | {"learner/grad_cosine_s": seconds}
