"""A run's metrics in Prometheus, through the exporter that every Ray node has (`ray.util.metrics`)."""

import logging
import math
import threading
import time
from collections.abc import Iterable, Mapping
from functools import cache

import ray
from ray.util.metrics import Counter, Gauge, Histogram

from unirl.config import MonitoringConfig
from unirl.monitoring.mirrors import MirroredRun
from unirl.monitoring.series import BY_NAME, FleetSamples, Sample, alert_sample, step_samples
from unirl.run_files import last_beats, parse_settings

log = logging.getLogger(__name__)

REFRESH_EVERY_S, LOOK_EVERY_S = 1.0, 5.0
"""Between repetitions of the gauges, which Ray forgets within two exports (of a second or more), and between looks at
the heartbeats."""
_BUCKETS_S = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000]


class Prometheus:
    """Hands samples to Ray while Ray is up. The driver's process alone writes, and every series has the run's name."""

    name = "Prometheus"

    def open(self, run: MirroredRun) -> None:
        """Take the run's name, and begin to look at heartbeats."""
        every_s = parse_settings(run.settings).get("monitoring.heartbeat_s", MonitoringConfig().heartbeat_s)
        self._run, self._fleet = run, FleetSamples(every_s)
        self.gauges: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        """Last value by name and labels."""
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_up, daemon=True, name="prometheus")
        self._thread.start()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take in what the step measured."""
        self._record(step_samples(step, values, time.time()))

    def event(self, kind: str, fields: Mapping[str, object]) -> None:
        """Count alerts."""
        if kind == "alert":
            self._record([alert_sample(fields)])

    def close(self) -> None:
        """Let the series end."""
        self._ended.set()
        self._thread.join(LOOK_EVERY_S)

    def _keep_up(self) -> None:
        """Repeat the gauges, and take in heartbeats, until the run ends."""
        looked, complained = 0.0, False
        while not self._ended.wait(REFRESH_EVERY_S):
            try:
                if time.monotonic() - looked >= LOOK_EVERY_S:
                    looked = time.monotonic()
                    self._record(self._fleet.samples(last_beats(self._run.run_dir), time.time()))
                self._set_gauges()
            except Exception:
                if not complained:
                    log.warning("Prometheus: gauges were not repeated; run and mirror go on", exc_info=True)
                complained = True

    def _record(self, samples: Iterable[Sample]) -> None:
        if not ray.is_initialized():  # before its start and after its end nobody could ask
            return
        for sample in samples:
            labels = {"run": self._run.id, **sample.labels}
            metric = _metric(sample.name)
            if isinstance(metric, Gauge):
                with self._lock:
                    self.gauges[sample.name, tuple(labels.items())] = float(sample.value)
            elif isinstance(metric, Histogram):
                metric.observe(float(sample.value), labels)
            elif sample.value > 0:
                metric.inc(float(sample.value), labels)
        self._set_gauges()

    def _set_gauges(self) -> None:
        """Set every gauge once more; one that became NaN is left out, and its series ends."""
        if not ray.is_initialized():
            return
        with self._lock:
            for (name, labels), value in self.gauges.items():
                metric = _metric(name)
                assert isinstance(metric, Gauge), name
                if not math.isnan(value):
                    metric.set(value, dict(labels))


@cache
def _metric(name: str) -> Counter | Gauge | Histogram:
    """The one object of a series."""
    series = BY_NAME[name]
    labels = ("run", *series.labels)
    if series.kind == "histogram":
        return Histogram(name, series.meaning, boundaries=_BUCKETS_S, tag_keys=labels)
    return (Gauge if series.kind == "gauge" else Counter)(name, series.meaning, tag_keys=labels)
