"""What Prometheus sees of a run: the series, their labels, and how a line of metrics or a heartbeat becomes samples.

Labels have few values: run, task, kind of pair, modality, phase, role, actor; never a pair, a step or a prompt.
No Ray here; `cluster/prometheus.py` writes the samples.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from unirl.run_files import silent_after_s
from unirl.types import TASKS

PREFIX = "ray_"
"""What Ray puts before the name of every metric that it exports."""
GONE_AFTER_S = 600.0
"""Seconds without a heartbeat after which an actor's gauges end."""

_TASK = f"(?P<task>{'|'.join(TASKS)})"
_KIND = "(?P<pair_kind>aligned|retrieved)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One name in Prometheus."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    meaning: str
    source: str = ""
    """Pattern of the metrics that feed it, whose named groups are its labels; empty when it is fed by hand."""
    labels: tuple[str, ...] = ()
    """Besides `run`."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One value of one series."""

    name: str
    value: float
    """What the gauge is, what the counter grew by, or what the histogram takes in."""
    labels: Mapping[str, str]
    """Besides `run`."""


def _gauge(name: str, source: str, meaning: str, *labels: str) -> Series:
    return Series(name=f"unirl_{name}", kind="gauge", meaning=meaning, source=source, labels=labels)


def _counter(name: str, source: str, meaning: str, *labels: str) -> Series:
    return Series(name=f"unirl_{name}_total", kind="counter", meaning=meaning, source=source, labels=labels)


def _histogram(name: str, source: str, meaning: str, *labels: str) -> Series:
    return Series(name=f"unirl_{name}", kind="histogram", meaning=meaning, source=source, labels=labels)


SERIES: tuple[Series, ...] = (
    _gauge("reward_mean", f"reward/{_TASK}(/{_KIND})?", "Mean reward of a step.", "task", "pair_kind"),
    _gauge("reward_group_std", f"reward/{_TASK}/group_std", "Spread of rewards inside a group.", "task"),
    _gauge("reward_zero_variance_fraction", f"reward/{_TASK}/zero_variance_fraction", "Groups without signal.", "task"),
    _gauge("reward_unjudged_fraction", f"reward/{_TASK}/unjudged_fraction", "Completions without a reward.", "task"),
    _gauge("score_mean", f"score/{_TASK}/(?P<reward>[^/]+)(/(?P<part>[^/]+))?", "Mean of a reward or part of one.",
           "task", "reward", "part"),
    _gauge("advantage_abs_mean", "advantage/abs_mean", "Mean size of the advantages."),
    _gauge("pair_similarity", f"pairs/similarity_mean(/{_KIND})?", "Mean cosine similarity of pairs.", "pair_kind"),
    _gauge("pair_weight", f"pairs/weight_mean(/{_KIND})?", "Mean pair weight.", "pair_kind"),
    _gauge("policy_kl", "policy/kl", "KL per token from the policy that sampled, in nats."),
    _gauge("policy_clip_fraction", "policy/clip_fraction", "Share of tokens whose ratio was clipped."),
    _gauge("policy_ratio", "policy/ratio_(?P<of>min|mean|max)", "New over old probability of a token.", "of"),
    _gauge("policy_entropy", "policy/entropy/(?P<modality>text|image)", "Entropy in nats.", "modality"),
    _gauge("policy_guidance_gap", "policy/guidance_gap", "Guided against conditional log-probability, in nats."),
    _gauge("policy_logprob_gap_max", "policy/logprob_gap_max", "Learner against sampler log-probability, in nats."),
    _gauge("policy_logprob_gap", "policy/logprob_gap/(?P<modality>text|image)", "Mean such difference of a modality.",
           "modality"),
    _gauge("policy_grad_cosine", f"learner/grad_cosine(/{_KIND})?", "Cosine of the tasks' gradients.", "pair_kind"),
    _gauge("learner_grad_norm", f"learner/grad_norm(/{_TASK})?", "Gradient norm before clipping.", "task"),
    _gauge("learner_loss", f"learner/loss(/{_TASK})?", "Loss of the update.", "task"),
    _gauge("learner_lr", "learner/lr", "Learning rate."),
    _gauge("rollout_truncated_fraction", "rollout/truncated_fraction", "Share of answers cut off."),
    _gauge("rollout_staleness_max", "rollout/staleness_max", "Most updates between sampling and learning."),
    _gauge("sft_nats", "sft/nats/(?P<modality>text|image)", "Cross-entropy of a target.", "modality"),
    _gauge("sft_accuracy", "sft/accuracy/(?P<modality>text|image)", "Targets that were the likeliest.", "modality"),
    _counter("rollout_samples", "rollout/num_completions/(?P<modality>text|image)", "Completions sampled.", "modality"),
    _counter("rollout_quarantined", "rollout/num_quarantined", "Requests that were given up."),
    _counter("actor_restarts", "(?P<role>rollout|reward|learner)/num_restarts", "Workers that were replaced.", "role"),
    _counter("skipped_updates", "learner/skipped_updates", "Updates left out for want of a signal."),
    _histogram("step_seconds", "time/step_s", "Seconds of a step."),
    _histogram("rollout_seconds", "time/rollout_s", "Seconds of a step's rollout."),
    _counter("step_phase_seconds", "phase/(?P<phase>\\w+)_s", "Seconds of all steps by phase.", "phase"),
    _gauge("step", "", "Number of the last finished step."),
    _gauge("step_time_seconds", "", "When it finished, in Unix seconds."),
    _gauge("nonfinite_metrics", "", "Metrics of the step that are NaN or infinite."),
    _counter("train_steps", "", "Steps finished by this process."),
    _counter("alerts", "", "Alerts of the run.", "sentinel", "severity"),
    _gauge("actor_state", "", "1 while its heartbeat is fresh, 0 when it is silent.", "actor", "role"),
    _gauge("actor_queue_length", "", "What waits for the actor.", "actor", "role"),
    _gauge("actor_memory_bytes", "", "Main memory of the actor.", "actor", "role"),
    _gauge("weight_version_lag", "", "Versions behind the newest weights.", "actor"),
    _counter("actor_done", "", "Groups, completions or updates.", "actor", "role"),
    _counter("actor_tokens", "", "Tokens sampled.", "actor", "role"),
    _counter("actor_images", "", "Images sampled.", "actor", "role"),
)  # fmt: skip
BY_NAME = {series.name: series for series in SERIES}
_FED = [(re.compile(series.source), series) for series in SERIES if series.source]


def step_samples(step: int, values: Mapping[str, float], now: float) -> Iterator[Sample]:
    """One step's metrics as samples. What is not finite is NaN, which ends a gauge's series, and counted.

    Args:
        step: the step.
        values: as in metrics.jsonl.
        now: Unix seconds.
    """
    yield Sample("unirl_step", step, {})
    yield Sample("unirl_step_time_seconds", now, {})
    yield Sample("unirl_train_steps_total", 1.0, {})
    yield Sample("unirl_nonfinite_metrics", sum(not math.isfinite(value) for value in values.values()), {})
    for name, value in values.items():
        for pattern, series in _FED:
            if (found := pattern.fullmatch(name)) and (math.isfinite(value) or series.kind == "gauge"):
                labels = {label: found[label] or "all" for label in series.labels}
                yield Sample(series.name, value if math.isfinite(value) else math.nan, labels)


def alert_sample(fields: Mapping[str, object]) -> Sample:
    """An alert of the run as a sample, by its fields."""
    labels = {"sentinel": str(fields.get("sentinel", "other")), "severity": str(fields.get("severity", "warn"))}
    return Sample("unirl_alerts_total", 1.0, labels)


class FleetSamples:
    """Heartbeats as samples; counts grow by what an actor did since the last look, also over its restarts."""

    _COUNTS = {"num_done": "actor_done", "num_tokens": "actor_tokens", "num_images": "actor_images"}  # noqa: RUF012

    def __init__(self, heartbeat_s: float) -> None:
        """Begin to count.

        Args:
            heartbeat_s: seconds between heartbeats, as the run is set.
        """
        self._silent_after, self._gone_after = silent_after_s(heartbeat_s), max(GONE_AFTER_S, 20 * heartbeat_s)
        self._seen: dict[tuple[str, str], float] = {}

    def samples(self, beats: list[dict[str, Any]], now: float) -> Iterator[Sample]:
        """What the actors said last; NaN for who is gone.

        Args:
            beats: as `run_files.last_beats` gives them.
            now: Unix seconds.
        """
        newest = max((beat["policy_version"] for beat in beats if beat.get("policy_version") is not None), default=0)
        for beat in beats:
            actor, age = str(beat["actor"]), now - beat["time"]
            labels = {"actor": actor, "role": str(beat["role"])}
            here = 1.0 if age < self._gone_after else math.nan
            yield Sample("unirl_actor_state", here * (age < self._silent_after), labels)
            yield Sample("unirl_actor_queue_length", here * (beat.get("queue") or 0), labels)
            yield Sample("unirl_actor_memory_bytes", here * (beat.get("memory_mb") or 0) * 1e6, labels)
            if beat.get("policy_version") is not None:
                yield Sample("unirl_weight_version_lag", here * (newest - beat["policy_version"]), {"actor": actor})
            for field, name in self._COUNTS.items():
                count, before = beat.get(field) or 0, self._seen.get((actor, field), 0)
                self._seen[actor, field] = count
                if grown := count - before if count >= before else count:
                    yield Sample(f"unirl_{name}_total", grown, labels)
