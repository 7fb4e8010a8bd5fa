"""A run's metrics in Prometheus, through the exporter that every Ray node has (`ray.util.metrics`)."""

import logging
import threading
import time
from collections.abc import Iterable, Mapping
from functools import cache

import ray
from ray.util.metrics import Counter, Gauge, Histogram

from unirl.monitoring.mirrors import MirroredRun
from unirl.monitoring.series import BY_NAME, FleetSamples, Sample, alert_sample, read_heartbeats, step_samples

log = logging.getLogger(__name__)

LOOK_EVERY_S = 5.0
"""Between looks at the heartbeats."""
_SECONDS = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000]


class Prometheus:
    """Hands samples to Ray while Ray is up; the driver's process alone writes, and every series has the run's name."""

    name = "Prometheus"

    def open(self, run: MirroredRun) -> None:
        """Take the run's name, and begin to look at heartbeats."""
        self._run = run
        self._fleet = FleetSamples()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch_fleet, daemon=True, name="prometheus")
        self._thread.start()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Set what the step measured."""
        self._record(step_samples(step, values, time.time()))

    def event(self, kind: str, fields: Mapping[str, object]) -> None:
        """Count alerts."""
        if kind == "alert":
            self._record([alert_sample(fields)])

    def close(self) -> None:
        """Look no more."""
        self._ended.set()
        self._thread.join(LOOK_EVERY_S)

    def _watch_fleet(self) -> None:
        while not self._ended.wait(LOOK_EVERY_S):
            try:
                self._record(self._fleet.samples(read_heartbeats(self._run.run_dir), time.time()))
            except Exception:
                log.warning("Prometheus: heartbeats could not be read; the fleet is no longer shown", exc_info=True)
                return

    def _record(self, samples: Iterable[Sample]) -> None:
        if not ray.is_initialized():  # before its start and after its end nobody could ask
            return
        for sample in samples:
            metric, tags = _metric(sample.name), {"run": self._run.id, **sample.labels}
            if isinstance(metric, Gauge):
                metric.set(float(sample.value), tags)
            elif isinstance(metric, Histogram):
                metric.observe(float(sample.value), tags)
            elif sample.value > 0:
                metric.inc(float(sample.value), tags)


@cache
def _metric(name: str) -> Counter | Gauge | Histogram:
    """The one object of a series: a second one of the same name would not be exported."""
    series = BY_NAME[name]
    labels = ("run", *series.labels)
    if series.kind == "histogram":
        return Histogram(name, series.meaning, boundaries=_SECONDS, tag_keys=labels)
    return (Gauge if series.kind == "gauge" else Counter)(name, series.meaning, tag_keys=labels)
