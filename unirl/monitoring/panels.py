"""The Grafana dashboard and the alert rules as two tables over the series of `series.py`; `grafana.py` writes files.

Ray adds labels of its own, such as a worker's id, to every series, so each expression aggregates: else a restart would
begin a new line.
"""

from dataclasses import dataclass
from typing import Literal

from unirl.monitoring.series import PREFIX

RUN = 'run=~"$run",SessionName=~"$SessionName"'
"""What the dashboard's variables choose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One figure of the dashboard."""

    title: str
    meaning: str
    queries: tuple[tuple[str, str], ...]
    """PromQL, and the legend with {{label}} for labels of its result."""
    unit: str = "none"
    """As Grafana names it."""
    kind: Literal["timeseries", "stat"] = "timeseries"
    stacked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One alert: it fires when a value stays beyond a bound."""

    name: str
    value: str
    """PromQL of what is watched, which has a result in a healthy run too."""
    bound: str
    """Comparison, such as "> 0.05"."""
    lasting: str
    """How long, as Prometheus writes it."""
    severity: Literal["warning", "critical"]
    summary: str
    """May name {{ $labels.x }} and {{ $value }}."""
    remedy: str


def _at(name: str, where: str = "") -> str:
    return f"{PREFIX}unirl_{name}{{{RUN}{where}}}"


def _by(labels: str, name: str, *, how: str = "max", where: str = "") -> str:
    return f"{how} by ({labels}) ({_at(name, where)})"


def _rate(labels: str, name: str, window: str = "$__rate_interval", where: str = "") -> str:
    return f"sum by ({labels}) (rate({_at(name, where)}[{window}]))"


def _grown(name: str, window: str, where: str = "") -> str:
    """Growth of a counter that does not exist before it first counts, so 0 of every run stands in."""
    return f"sum by (run) (increase({_at(name, where)}[{window}])) or 0 * {_by('run', 'step')}"


def _per_step(labels: str, name: str) -> str:
    """Growth of a counter in a step."""
    return f"{_rate(f'run, {labels}', name)} / on (run) group_left () {_rate('run', 'train_steps_total')}"


def _quantile(name: str, share: float) -> str:
    return f"histogram_quantile({share}, {_rate('run, le', f'{name}_bucket')})"


def _reward(task: str) -> Panel:
    kinds = _by("run, pair_kind", "reward_mean", where=f',task="{task}",pair_kind!="all"')
    return Panel(
        title=f"Reward, {task}",
        meaning="Mean over the judged completions of a step, by kind of pair.",
        queries=((kinds, "{{run}} {{pair_kind}}"),),
    )


DASHBOARD: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    ("Run", (
        Panel(title="Step", meaning="Last finished step.", queries=((_by("run", "step"), "{{run}}"),), kind="stat"),
        Panel(title="Age of the last step", meaning="Beyond a few steps' time the run hangs or is over.", unit="s",
              queries=((f"time() - {_by('run', 'step_time_seconds')}", "{{run}}"),), kind="stat"),
        Panel(title="Steps per minute", meaning="How fast it goes.",
              queries=((f"60 * {_rate('run', 'train_steps_total')}", "{{run}}"),)),
        Panel(title="Actors up", meaning="Workers whose heartbeat is fresh, by role.", kind="stat",
              queries=((f"count by (run, role) ({_by('run, actor, role', 'actor_state')} == 1)", "{{run}} {{role}}"),)),
        Panel(title="Weight version lag", meaning="Versions that the worst worker is behind the learner.", kind="stat",
              queries=((_by("run", "weight_version_lag"), "{{run}}"),)),
        Panel(title="Alerts in the last hour", meaning="Raised by the run itself; its events name them.", kind="stat",
              queries=((_grown("alerts_total", "1h"), "{{run}}"),)),
    )),
    ("Rewards", (
        _reward("understanding"),
        _reward("generation"),
        Panel(title="Groups without signal", meaning="Share of groups whose rewards are all equal.", unit="percentunit",
              queries=((_by("run, task", "reward_zero_variance_fraction"), "{{run}} {{task}}"),)),
        Panel(title="Spread inside a group", meaning="Standard deviation; 0 teaches nothing.",
              queries=((_by("run, task", "reward_group_std"), "{{run}} {{task}}"),)),
        Panel(title="Parts of the rewards", meaning="Mean of every reward and of its parts, before weights.",
              queries=((_by("run, task, reward, part", "score_mean"), "{{run}} {{task}} {{reward}} {{part}}"),)),
        Panel(title="Completions without a reward", meaning="Share that no judge could judge; masked.",
              unit="percentunit",
              queries=((_by("run, task", "reward_unjudged_fraction"), "{{run}} {{task}}"),)),
    )),
    ("Policy", (
        Panel(title="KL", meaning="Per token, from the policy that sampled, in nats.",
              queries=((_by("run", "policy_kl"), "{{run}}"),)),
        Panel(title="Clipped tokens", meaning="Share whose ratio was clipped.", unit="percentunit",
              queries=((_by("run", "policy_clip_fraction"), "{{run}}"),)),
        Panel(title="Entropy", meaning="Of the next token, in nats.",
              queries=((_by("run, modality", "policy_entropy"), "{{run}} {{modality}}"),)),
        Panel(title="Ratio", meaning="New over old probability of a token; 1 on-policy.",
              queries=((_by("run, of", "policy_ratio"), "{{run}} {{of}}"),)),
        Panel(title="Gradient norm", meaning="Before clipping; all, and each task's part.",
              queries=((_by("run, task", "learner_grad_norm"), "{{run}} {{task}}"),)),
        Panel(title="Gradient cosine", meaning="Understanding against generation; below 0 they pull apart.",
              queries=((_by("run, pair_kind", "policy_grad_cosine"), "{{run}} {{pair_kind}}"),)),
        Panel(title="Log-probability gap", meaning="Difference of learner and sampler, in nats: largest, and mean.",
              queries=((_by("run", "policy_logprob_gap_max"), "{{run}} largest"),
                       (_by("run, modality", "policy_logprob_gap"), "{{run}} {{modality}} mean"))),
        Panel(title="Guidance gap", meaning="Guided against conditional log-probability of an image token, in nats.",
              queries=((_by("run", "policy_guidance_gap"), "{{run}}"),)),
        Panel(title="Advantage", meaning="Mean size; 0 teaches nothing.",
              queries=((_by("run", "advantage_abs_mean"), "{{run}}"),)),
    )),
    ("Pairs", (
        Panel(title="Similarity", meaning="Mean cosine of the step's pairs.",
              queries=((_by("run, pair_kind", "pair_similarity"), "{{run}} {{pair_kind}}"),)),
        Panel(title="Weight", meaning="Mean pair weight.",
              queries=((_by("run, pair_kind", "pair_weight"), "{{run}} {{pair_kind}}"),)),
        Panel(title="Truncated answers", meaning="Share cut off at the length limit.", unit="percentunit",
              queries=((_by("run", "rollout_truncated_fraction"), "{{run}}"),)),
    )),
    ("Time", (
        Panel(title="A step by phase", meaning="Mean seconds of each phase; together a step.", unit="s", stacked=True,
              queries=((_per_step("phase", "step_phase_seconds_total"), "{{run}} {{phase}}"),)),
        Panel(title="Rollout, 95 % of steps", meaning="Seconds of the rollout that 95 % of the steps stay below.",
              unit="s", queries=((_quantile("rollout_seconds", 0.95), "{{run}}"),)),
        Panel(title="Completions per second", meaning="Answers and drawings.",
              queries=((_rate("run, modality", "rollout_samples_total"), "{{run}} {{modality}}"),)),
        Panel(title="Tokens per second", meaning="Sampled, by actor.",
              queries=((_rate("run, actor", "actor_tokens_total"), "{{run}} {{actor}}"),)),
        Panel(title="Images per second", meaning="Sampled, by actor.",
              queries=((_rate("run, actor", "actor_images_total"), "{{run}} {{actor}}"),)),
        Panel(title="Staleness", meaning="Most updates between sampling and learning.",
              queries=((_by("run", "rollout_staleness_max"), "{{run}}"),)),
    )),
    ("Fleet", (
        Panel(title="State of actors", meaning="1 up, 0 silent; who has been silent for ten minutes is left out.",
              queries=((_by("run, actor, role", "actor_state"), "{{run}} {{role}} {{actor}}"),)),
        Panel(title="Queue", meaning="What waits for an actor.",
              queries=((_by("run, actor, role", "actor_queue_length"), "{{run}} {{role}} {{actor}}"),)),
        Panel(title="Work done per second", meaning="Groups, completions or updates.",
              queries=((_rate("run, actor", "actor_done_total"), "{{run}} {{actor}}"),)),
        Panel(title="Memory of actors", meaning="Main memory.", unit="bytes",
              queries=((_by("run, actor, role", "actor_memory_bytes"), "{{run}} {{role}} {{actor}}"),)),
        Panel(title="Workers replaced in the last hour", meaning="Dead or hung.",
              queries=((_grown("actor_restarts_total", "1h"), "{{run}}"),)),
        Panel(title="Object store", meaning="In use on each node; beyond its size Ray spills to disk.", unit="bytes",
              queries=(('max by (instance) (ray_object_store_used_memory{SessionName=~"$SessionName"})',
                        "{{instance}}"),)),
    )),
)  # fmt: skip

RULES: tuple[Rule, ...] = (
    Rule(name="UnirlNoStep", value="time() - max by (run) (ray_unirl_step_time_seconds)", bound="> 1800", lasting="1m",
         severity="critical", summary="{{ $labels.run }} has made no step for half an hour",
         remedy="logs/driver.log of the run says what it waits for; for runs with longer steps raise the bound"),
    Rule(name="UnirlStopAlert", bound="> 0", lasting="0m", severity="critical",
         value='sum by (run) (increase(ray_unirl_alerts_total{severity="stop"}[15m])) or 0 * max by (run) '
         "(ray_unirl_step)",
         summary="{{ $labels.run }} raised an alert that stops runs", remedy="events.jsonl of the run names it"),
    Rule(name="UnirlNonFinite", value="max by (run) (ray_unirl_nonfinite_metrics)", bound="> 0", lasting="0m",
         severity="critical", summary="{{ $labels.run }}: {{ $value }} metrics are NaN or infinite",
         remedy="the step's line in metrics.jsonl lists them under nonfinite"),
    Rule(name="UnirlNoSignal", value="min by (run, task) (ray_unirl_reward_zero_variance_fraction)", bound="> 0.99",
         lasting="15m", severity="warning", summary="{{ $labels.run }}: no {{ $labels.task }} group carries a signal",
         remedy="the tasks are too easy or too hard, or the reward is constant: look at pairs.jsonl"),
    Rule(name="UnirlNoGradient", value="min by (run, task) (ray_unirl_learner_grad_norm)", bound="< 1e-12",
         lasting="15m", severity="warning", summary="{{ $labels.run }}: the gradient of {{ $labels.task }} is 0",
         remedy="no advantage reaches the loss: see the rewards and learner/skipped_updates"),
    Rule(name="UnirlUnjudged", value="max by (run, task) (ray_unirl_reward_unjudged_fraction)", bound="> 0.05",
         lasting="5m", severity="warning",
         summary="{{ $labels.run }}: {{ $value | humanizePercentage }} of {{ $labels.task }} are not judged",
         remedy="the journal says why for each (problem)"),
    Rule(name="UnirlSamplerDisagrees", bound="> 0.02", lasting="5m", severity="warning",
         value='max by (run, modality) (ray_unirl_policy_logprob_gap{modality="text"} or '
         'ray_unirl_policy_logprob_gap{modality="image"} / 9)',
         summary="{{ $labels.run }}: learner and sampler differ by {{ $value }} nats on an average token of "
         "{{ $labels.modality }} (of images a ninth is shown, since guidance 5 spreads them ninefold)",
         remedy="weights, temperature or guidance differ between them: unirl verify --checkpoint RUN"),
    Rule(name="UnirlKl", value="max by (run) (ray_unirl_policy_kl)", bound="> 0.2", lasting="5m", severity="warning",
         summary="{{ $labels.run }}: KL of {{ $value }} nats a token", remedy="lower learner.lr or updates_per_step"),
    Rule(name="UnirlEntropy", value="min by (run, modality) (ray_unirl_policy_entropy)", bound="< 0.005", lasting="15m",
         severity="warning", summary="{{ $labels.run }}: {{ $labels.modality }} has no entropy left",
         remedy="answers are all alike: raise the temperature, or stop here"),
    Rule(name="UnirlTruncated", value="max by (run) (ray_unirl_rollout_truncated_fraction)", bound="> 0.5",
         lasting="15m", severity="warning",
         summary="{{ $labels.run }}: {{ $value | humanizePercentage }} of the answers are cut off",
         remedy="raise rollout.sampling.text.max_tokens"),
    Rule(name="UnirlActorSilent", value="min by (run, actor, role) (ray_unirl_actor_state)", bound="== 0", lasting="2m",
         severity="warning", summary="{{ $labels.run }}: no sign of {{ $labels.role }} {{ $labels.actor }}",
         remedy="its log in logs/; one that left on purpose is shown as silent for ten minutes too"),
    Rule(name="UnirlRestarts", bound="> 3", lasting="0m", severity="warning",
         value="sum by (run) (increase(ray_unirl_actor_restarts_total[30m])) or 0 * max by (run) (ray_unirl_step)",
         summary="{{ $labels.run }}: {{ $value }} workers were replaced in half an hour",
         remedy="logs/driver.log says why: memory, time limits, or the node"),
    Rule(name="UnirlStaleWeights", value="max by (run, actor) (ray_unirl_weight_version_lag)", bound="> 8",
         lasting="10m", severity="warning",
         summary="{{ $labels.run }}: {{ $labels.actor }} is {{ $value }} versions behind",
         remedy="its log says what it does instead of loading weights"),
    Rule(name="UnirlExporterDown", value='min by (instance) (up{job="unirl"})', bound="< 1", lasting="2m",
         severity="warning", summary="{{ $labels.instance }} serves no metrics",
         remedy="the run is over, or the port is another: targets/ and cluster.metrics_port"),
    Rule(name="UnirlObjectStoreFull", bound="> 0.95", lasting="5m", severity="warning",
         value="max by (instance) (ray_object_store_used_memory / (ray_object_store_used_memory + "
         "ray_object_store_available_memory))",
         summary="{{ $labels.instance }}: the object store is {{ $value | humanizePercentage }} full",
         remedy="raise cluster.object_store_gib, or rollout workers outrun the rewards"),
)  # fmt: skip
