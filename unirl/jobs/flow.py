"""Which part of which step runs when: one after the other, or sampling beside learning.

All flows run the same two parts of a step. Synchronous and one step off are the same run every time; a bounded
staleness depends on timing, and its tokens say which weights drew them.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

from unirl.config import RlConfig
from unirl.jobs.parts import Parts, Published
from unirl.jobs.step import SampledStep, learn_step, rl_step, sample_step
from unirl.monitoring.step_clock import StepClock
from unirl.monitoring.step_data import StepData

END_S = 10.0
"""Patience with a thread whose workers are gone."""


class Flow(Protocol):
    """Runs steps in their order."""

    def run_step(self, step: int) -> StepData:
        """Learn this step; what is needed for later ones may go on meanwhile."""
        ...

    def settle(self) -> None:
        """Return when nothing is being sampled and the samplers have the newest weights: to evaluate, save, or end."""
        ...


@contextmanager
def open_flow(parts: Parts, config: RlConfig, clock: StepClock, first_step: int) -> Iterator[Flow]:
    """The flow of `overlap.mode`, from `first_step` on.

    Args:
        parts: what steps are made of. For a first step above 1 the samplers of an overlapped flow hold the weights with
            which that step was being sampled.
        config: the run's.
        clock: times the learner's side.
        first_step: the step to go on with.
    """
    if config.overlap.mode == "synchronous":
        yield Synchronous(parts, config, clock)
        return
    kind = OneStepOff if config.overlap.mode == "one_step_off" else BoundedStaleness
    flow = kind(parts, config, clock, first_step)
    try:
        yield flow
    finally:
        flow.close()


class Synchronous:
    """Sample, learn, repeat."""

    def __init__(self, parts: Parts, config: RlConfig, clock: StepClock) -> None:
        self._parts, self._config, self._clock = parts, config, clock
        parts.rollouts.load_weights(parts.learner.publish_weights())

    def run_step(self, step: int) -> StepData:
        """The whole step."""
        return rl_step(step, self._parts, self._config, self._clock)

    def settle(self) -> None:
        """Nothing is ever under way between steps."""


class OneStepOff:
    """Step n + 1 is sampled while step n is learned, with the weights that step n - 1 left."""

    def __init__(self, parts: Parts, config: RlConfig, clock: StepClock, first_step: int) -> None:
        self._parts, self._config, self._clock = parts, config, clock
        self._newest = parts.learner.publish_weights()
        self._loaded: Published | None = None
        if first_step == 1:
            parts.rollouts.load_weights(self._newest)
            self._loaded = self._newest
        self._thread: threading.Thread | None = None
        # At once: whoever settles first waits for it, so that it is drawn by the weights that are there now.
        self._next = self._begin(first_step)

    def run_step(self, step: int) -> StepData:
        """Wait for the step's rollouts, let those of the next begin, and learn."""
        assert self._next is not None, f"step {step} comes after the last one"
        with self._clock.phase("wait"):
            sampled, seconds = self._next.result()
        self.settle()
        self._next = self._begin(step + 1)
        data, self._newest = learn_step(sampled, self._parts, self._config, self._clock)
        return replace(data, seconds=self._clock.take_seconds(), blocks=self._clock.taken, overlapped=seconds)

    def settle(self) -> None:
        """Wait for the rollouts under way, then load the newest weights."""
        if self._next is not None:
            with self._clock.phase("wait"):
                self._next.result()
        if self._loaded is not self._newest:
            with self._clock.phase("publish"):
                self._parts.rollouts.load_weights(self._newest)
            self._loaded = self._newest

    def _begin(self, step: int) -> Future[tuple[SampledStep, dict[str, float]]] | None:
        if step > self._config.train.num_steps:
            return None
        future: Future[tuple[SampledStep, dict[str, float]]] = Future()

        def sample() -> None:
            clock = StepClock()
            try:
                sampled = sample_step(step, self._parts, self._config, clock)
            except BaseException as error:  # noqa: BLE001 - raised where the step is waited for
                future.set_exception(error)
            else:
                future.set_result((sampled, clock.take_seconds()))

        self._thread = threading.Thread(target=sample, daemon=True, name=f"sample-{step}")
        self._thread.start()
        return future

    def close(self) -> None:
        """Let nothing be sampled any more."""
        _end(self._thread, self._parts)


class BoundedStaleness:
    """A thread samples step after step, at most `max_staleness` steps ahead of on-policy, with the newest weights."""

    def __init__(self, parts: Parts, config: RlConfig, clock: StepClock, first_step: int) -> None:
        self._parts, self._config, self._clock = parts, config, clock
        self._newest = parts.learner.publish_weights()
        parts.rollouts.load_weights(self._newest)
        self._changed = threading.Condition()
        self._sampled: dict[int, tuple[SampledStep, dict[str, float]]] = {}
        self._learned, self._busy, self._paused, self._closed = first_step - 1, False, False, False
        self._error: BaseException | None = None
        steps = range(first_step, config.train.num_steps + 1)
        self._thread = threading.Thread(target=self._sample, args=(steps,), daemon=True, name="sample")
        self._thread.start()

    def run_step(self, step: int) -> StepData:
        """Learn the step's rollouts, and offer the new weights to whoever samples."""
        with self._clock.phase("wait"), self._changed:
            self._paused = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: step in self._sampled or self._error is not None)
            if step not in self._sampled and self._error is not None:
                raise self._error
            sampled, seconds = self._sampled.pop(step)
        data, self._newest = learn_step(sampled, self._parts, self._config, self._clock)
        self._parts.rollouts.load_weights(self._newest, wait=False)
        with self._changed:
            self._learned = step
            self._changed.notify_all()
        return replace(data, seconds=self._clock.take_seconds(), blocks=self._clock.taken, overlapped=seconds)

    def settle(self) -> None:
        """Let the step under way be sampled to its end and none begin; then load the newest weights."""
        with self._clock.phase("wait"), self._changed:
            self._paused = True
            self._changed.wait_for(lambda: not self._busy)
            if self._error is not None:
                raise self._error
        with self._clock.phase("publish"):
            self._parts.rollouts.load_weights(self._newest)

    def _sample(self, steps: range) -> None:
        clock, overlap = StepClock(), self._config.overlap
        try:
            for step in steps:
                with self._changed:
                    self._changed.wait_for(
                        lambda step=step: (
                            self._closed or (not self._paused and step <= self._learned + 1 + overlap.max_staleness)
                        )
                    )
                    if self._closed:
                        return
                    self._busy = True
                oldest = (step - 1 - overlap.max_staleness) * self._config.algorithm.updates_per_step
                self._parts.rollouts.oldest_version = oldest
                sampled = sample_step(step, self._parts, self._config, clock)
                with self._changed:
                    self._sampled[step] = sampled, clock.take_seconds()
                    self._busy = False
                    self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001 - raised where the step is waited for
            with self._changed:
                self._error, self._busy = error, False
                self._changed.notify_all()

    def close(self) -> None:
        """Begin no further step."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        _end(self._thread, self._parts)


def _end(thread: threading.Thread | None, parts: Parts) -> None:
    """A run that ends amid sampling takes the workers from the thread that samples, and waits until it has noticed."""
    if thread is not None and thread.is_alive():
        thread.join(0.5)
        if thread.is_alive():
            parts.rollouts.close()
            thread.join(END_S)
