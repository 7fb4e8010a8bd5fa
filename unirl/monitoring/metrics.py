"""Every metric's name, unit, reduction and meaning in one table, and how a step's data become metrics.

Names are `room/name_unit`. A part in angle brackets stands for any word, such as the name of a reward.
"""

import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from unirl.monitoring.metric_advice import ADVICE, Advice
from unirl.monitoring.phases import fleet_metrics, partition
from unirl.monitoring.step_checks import check_metrics
from unirl.monitoring.step_data import StepData
from unirl.types import TASKS, Trajectory, WeightedGroup

Reduction = Literal["mean", "sum", "max", "min", "last"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table."""

    name: str
    unit: str
    """"1" for a pure number."""
    reduction: Reduction
    """How the values of several steps become one."""
    meaning: str

    @property
    def advice(self) -> Advice:
        """What is normal, and what to do when it is not."""
        return ADVICE.get(self.name, Advice("", ""))


METRICS: tuple[Metric, ...] = (
    Metric("reward/<task>", "1", "mean", "Mean reward of the judged completions; null when none could be judged."),
    Metric("reward/<task>/aligned", "1", "mean", "The same over aligned pairs; absent without any."),
    Metric("reward/<task>/retrieved", "1", "mean", "The same over retrieved pairs; absent without any."),
    Metric("reward/<task>/group_std", "1", "mean", "Standard deviation (ddof 1) inside a group, mean over groups."),
    Metric("reward/<task>/zero_variance_fraction", "1", "mean", "Share of groups whose rewards are all equal."),
    Metric("reward/<task>/unjudged_fraction", "1", "mean", "Share of completions not judged; they are masked."),
    Metric("reward/num_restarts", "workers", "sum", "Reward workers replaced since the last line: dead or hung."),
    Metric("score/<task>/<reward>", "1", "mean", "Mean of one reward over what it judged, before its weight."),
    Metric("score/<task>/<reward>/<detail>", "1", "mean", "Mean of a named part of it, such as correct or exact."),
    Metric("reward/<task>/spread", "1", "mean", "Standard deviation (ddof 1) of the groups' mean rewards."),
    Metric("reward/<task>/range", "1", "mean", "Greatest less least reward of the step's judged completions."),
    Metric(
        "reward/understanding/length_coupling",
        "1",
        "mean",
        "Rank correlation of reward and length inside groups of answers, mean over those in which both vary.",
    ),
    Metric("reward/understanding/length_coupling_freedom", "1", "sum", "Completions behind it, less one a group."),
    Metric(
        "reward/generation/brightness_coupling",
        "1",
        "mean",
        "Rank correlation of reward and mean pixel inside groups of images, mean over those in which both vary.",
    ),
    Metric("reward/generation/brightness_coupling_freedom", "1", "sum", "Completions behind it, less one a group."),
    Metric("reward/<task>/truncated", "1", "mean", "Mean reward of completions that were cut off; absent without any."),
    Metric(
        "advantage/disordered_fraction",
        "1",
        "mean",
        "Share of groups whose advantages do not rise with their rewards, or do not sum to 0.",
    ),
    Metric("pairs/num_blank_images", "pairs", "sum", "Pairs whose question is about a picture of one colour."),
    Metric("rollout/equal_images_fraction", "1", "mean", "Share of groups whose drawings are the same, code by code."),
    Metric(
        "rollout/surprisal/<modality>",
        "nats",
        "mean",
        "Mean -log p of the tokens drawn, an estimate of their entropy in all groups, with a signal or without.",
    ),
    Metric(
        "rollout/num_stale_samplers",
        "workers",
        "max",
        "Samplers whose own weights differ from the published ones, by a checksum of a fixed slice at each sync, or of "
        "which none could be compared.",
    ),
    Metric(
        "rollout/num_compared_weights",
        "weights",
        "min",
        "Weights so compared, of the sampler with fewest; absent where none was asked, or all rested.",
    ),
    Metric("advantage/abs_mean", "1", "mean", "Mean size of the advantages, pair weight applied; 0 teaches nothing."),
    Metric("pairs/similarity_mean", "1", "mean", "Mean cosine similarity s_p of the step's pairs."),
    Metric("pairs/similarity_mean/<kind>", "1", "mean", "The same over pairs of one kind; absent without any."),
    Metric("pairs/similarity_min", "1", "min", "Least cosine similarity of the step's pairs."),
    Metric("pairs/weight_mean", "1", "mean", "Mean pair weight w_p (PairUni, eq. 3)."),
    Metric("pairs/weight_mean/<kind>", "1", "mean", "The same over pairs of one kind; absent without any."),
    Metric("pairs/weight_min", "1", "min", "Least pair weight."),
    Metric("pairs/aligned_fraction", "1", "mean", "Share of the step's pairs that are aligned."),
    Metric("rollout/policy_version", "updates", "last", "Oldest weights that sampled any of the step's tokens."),
    Metric("rollout/staleness_mean", "updates", "mean", "Updates since the weights that drew a token."),
    Metric("rollout/staleness_max", "updates", "max", "Most such updates."),
    Metric("rollout/staleness_min", "updates", "min", "Fewest such updates."),
    Metric("rollout/staleness/<updates>", "1", "mean", "Share of the tokens drawn so many updates ago (a histogram)."),
    Metric("rollout/truncated_fraction", "1", "mean", "Share of answers cut off at the length limit."),
    Metric("rollout/answer_tokens_mean", "tokens", "mean", "Mean length of an answer."),
    Metric("rollout/num_tokens", "tokens", "sum", "Tokens sampled, text and image."),
    Metric("rollout/num_completions/<modality>", "1", "sum", "Completions sampled: answers (text), drawings (image)."),
    Metric("rollout/num_restarts", "workers", "sum", "Rollout workers replaced since the last line: dead or hung."),
    Metric("rollout/num_kept", "groups", "sum", "Groups taken from disk, where a crash had left them."),
    Metric("rollout/num_quarantined", "requests", "sum", "Requests left out as they failed; see quarantine.jsonl."),
    Metric("rollout/tokens_per_s", "tokens/s", "mean", "Tokens sampled per second of the rollout phase."),
    Metric("rollout/images_per_s", "images/s", "mean", "Images sampled per second of the rollout phase."),
    Metric("time/step_s", "s", "mean", "All phases since the last line, evaluation and checkpoint included."),
    Metric("time/<phase>_s", "s", "mean", "One phase, such as rollout (scoring overlaps it), update or publish."),
    Metric("learner/loss", "1", "mean", "Loss of the update; its size says little, since the ratio starts at 1."),
    Metric("learner/loss/<task>", "1", "mean", "Part of one task."),
    Metric("learner/grad_norm", "1", "mean", "Global norm of the gradient before clipping."),
    Metric("learner/lr", "1", "last", "Learning rate of the update."),
    Metric("learner/num_rows", "rows", "sum", "Trajectories whose tokens took part in a loss of the update."),
    Metric("learner/num_tokens", "tokens", "sum", "Tokens that took part in a loss of the update."),
    Metric("learner/num_micro_batches", "passes", "sum", "Forward and backward passes of one rank."),
    Metric("learner/skipped_updates", "updates", "sum", "Updates left out because no group carried a signal."),
    Metric("learner/num_restarts", "gangs", "sum", "Times that all ranks were started anew; absent without any."),
    Metric("learner/update_s", "s", "mean", "Seconds inside the learner."),
    Metric("learner/score_s", "s", "mean", "Seconds of them in forward passes and losses, on the first rank."),
    Metric("learner/backward_s", "s", "mean", "Seconds of them in backward passes and the optimizer, likewise."),
    Metric("sft/nats/<modality>", "nats", "mean", "Cross-entropy of a target among the ids of its own modality."),
    Metric("sft/accuracy/<modality>", "1", "mean", "Share of targets that were the likeliest of their modality."),
    Metric("sft/num_targets/<modality>", "tokens", "sum", "Targets of the step."),
    Metric("sft/num_learned/<modality>", "sequences", "sum", "Sequences of the step with a target of it."),
    Metric("sft/num_lost_targets", "tokens", "sum", "Targets of the step's sequences that did not reach the loss."),
    Metric(
        "sft/grad_norm/<modality>",
        "1",
        "mean",
        "Norm of the loss's gradient at the states that predict its targets, over all rows and ranks, before clipping; "
        "absent where its weight is 0 or nothing below the head is trained.",
    ),
    Metric(
        "sft/moved_fraction",
        "1",
        "mean",
        "Share of weights that the update changed, in their own precision: of 64 of each trained tensor of the first "
        "rank.",
    ),
    Metric("sft/repeated_fraction", "1", "mean", "Share of sequences that came oftener than an epoch is to have them."),
    Metric("sft/num_leaked", "sequences", "sum", "Sequences whose prompt, or all of which, is held out."),
    Metric(
        "sft/tokens_per_s", "tokens/s", "mean", "Tokens through the model, targets or not, per second of an update."
    ),
    Metric("sft/fill_fraction", "1", "mean", "Share of the rows' room that holds tokens."),
    Metric("sft/data_wait_s", "s", "mean", "Seconds that the slowest rank waited for its sequences."),
    Metric("policy/ratio_mean", "1", "mean", "New over old probability of a token; 1 on-policy."),
    Metric("policy/ratio_max", "1", "max", "Largest such ratio."),
    Metric("policy/ratio_min", "1", "min", "Least such ratio."),
    Metric("policy/clip_fraction", "1", "mean", "Share of tokens whose ratio was clipped."),
    Metric("policy/ratio_capped_fraction", "1", "mean", "Share of tokens whose log-ratio was held at 20 nats."),
    Metric("policy/kl", "nats", "mean", "KL per token from the policy that sampled, k3 estimate."),
    Metric(
        "policy/kl_update",
        "nats",
        "mean",
        "KL per token from the policy that sampled to the one after the step's updates, k3 estimate on a micro-batch "
        "of each task; in steps with a cosine.",
    ),
    Metric("policy/kl_reference", "nats", "mean", "KL per token from the reference policy; with a KL penalty only."),
    Metric("policy/entropy/text", "nats", "mean", "Entropy of the next-token distribution in answers."),
    Metric("policy/entropy/image", "nats", "mean", "Entropy of the next-token distribution in images."),
    Metric("policy/guidance_gap", "nats", "mean", "Mean |guided - conditional| log-probability of an image token."),
    Metric(
        "policy/rescoring_gap",
        "nats",
        "mean",
        "Mean |merged - sampled| log-probability of a token when `algorithm.diffusion_shrink` merges reveal steps.",
    ),
    Metric("policy/importance_mean", "1", "mean", "Mean weight of a token that older weights drew, capped."),
    Metric("policy/importance_capped_fraction", "1", "mean", "Share of such tokens whose weight is the cap."),
    Metric("policy/logprob_gap_max", "nats", "max", "Largest |learner - sampler| log-probability before the update."),
    Metric("policy/logprob_gap_max/<modality>", "nats", "max", "The same over answers or over images."),
    Metric("policy/logprob_gap/<modality>", "nats", "mean", "Mean |learner - sampler| over their tokens, likewise."),
    Metric(
        "learner/grad_norm/<task>",
        "1",
        "mean",
        "Global norm of one task's part of the gradient before clipping, exact over micro-batches and ranks, in the "
        "step's first update: every step with one rank and with ZeRO 2 and 3, else in measured steps.",
    ),
    Metric(
        "learner/grad_cosine",
        "1",
        "mean",
        "Cosine between the understanding and the generation part of the gradient, exact over micro-batches and ranks; "
        "in measured steps (`monitoring.grad_cosine_every`). Below 0 the tasks pull apart.",
    ),
    Metric("learner/grad_cosine/<kind>", "1", "mean", "The same between the two sides of aligned or retrieved pairs."),
    Metric("learner/grad_cosine_s", "s", "mean", "Seconds that measuring the gradients by task took in this step."),
    Metric(
        "phase/<phase>_s",
        "s",
        "mean",
        "Part of the driver's time line; all phases sum to `time/step_s`. text_rollout, image_rollout, decode (tokens "
        "into texts and pictures), reward: while a step is sampled, each moment goes in equal parts to the workers "
        "busy then, idle if none is. score, backward: the update's forward passes, and backward passes with the "
        "optimizer. sync: weights to the samplers. other: pairs, batch, evaluation, checkpoints, the rest. With "
        "overlap, idle is waiting for rollouts, and what is sampled behind learning is not counted.",
    ),
    Metric("fleet/<role>/tokens_per_s", "tokens/s", "mean", "Tokens that all workers of a role sampled per second."),
    Metric("fleet/<role>/images_per_s", "images/s", "mean", "Images that all workers of a role sampled per second."),
    Metric("fleet/<role>/queue_length", "requests", "mean", "Requests that waited for a worker of a role, on average."),
)


def lookup(name: str) -> Metric:
    """The row that declares a metric.

    Raises:
        ValueError: no row does.
    """
    found = _find(name)
    if found is None:
        raise ValueError(
            f"metrics: expected a name declared in unirl/monitoring/metrics.py; got {name!r}; correct it, or add a row "
            "with unit, reduction and meaning to METRICS"
        )
    return found


def reduce_values(name: str, values: Sequence[float]) -> float:
    """The values that a metric took in several steps as one, by its reduction.

    Raises:
        ValueError: unknown name, or no values.
    """
    if not values:
        raise ValueError(f"metrics: expected at least one value of {name}; got none; choose steps that were run")
    match lookup(name).reduction:
        case "mean":
            return math.fsum(values) / len(values)
        case "sum":
            return math.fsum(values)
        case "max":
            return max(values)
        case "min":
            return min(values)
        case "last":
            return values[-1]


def step_metrics(data: StepData) -> dict[str, float]:
    """The metrics line of one step.

    A mean over nothing that should exist (no completion judged) is NaN, which the run log writes as null and names;
    a mean over what may be absent (no retrieved pair) is left out.

    Raises:
        ValueError: the learner or a phase reports a name that the table lacks.
    """
    metrics: dict[str, float] = {}
    for task in TASKS:
        groups = [group for group in data.groups if group.scored.group.request.task == task]
        metrics.update(_reward_metrics(task, groups))
        metrics.update(_score_metrics(task, groups))
    metrics.update(_pair_metrics(data.groups))
    metrics.update(_rollout_metrics(data))
    metrics["time/step_s"] = math.fsum(data.seconds.values())
    metrics.update({f"time/{phase}_s": value for phase, value in ({**data.overlapped, **data.seconds}).items()})
    if data.blocks:
        phases = partition(data.blocks, data.activities, data.learner)
        metrics.update({f"phase/{phase}_s": value for phase, value in phases.items()})
    if seconds := data.seconds.get("rollout", data.overlapped.get("rollout")):
        metrics.update(fleet_metrics(data.activities, seconds))
    metrics.update({f"{pool}/num_restarts": num for pool, num in data.restarts.items()})
    metrics["rollout/num_quarantined"] = len(data.quarantined)
    metrics.update(check_metrics(data))
    metrics.update(data.learner)
    for name in metrics:
        lookup(name)
    return metrics


def _reward_metrics(task: str, groups: Sequence[WeightedGroup]) -> Iterator[tuple[str, float]]:
    if not groups:
        return
    name = f"reward/{task}"
    yield name, _mean(_judged_rewards(groups))
    for kind in ("aligned", "retrieved"):
        of_kind = [group for group in groups if group.pair.kind == kind]
        if of_kind:
            yield f"{name}/{kind}", _mean(_judged_rewards(of_kind))
    judged = [group.scored.rewards[group.scored.judged] for group in groups]
    yield f"{name}/group_std", _mean([float(np.std(rewards, ddof=1)) for rewards in judged if len(rewards) > 1])
    yield f"{name}/zero_variance_fraction", _mean([len(set(rewards.tolist())) < 2 for rewards in judged])
    yield f"{name}/unjudged_fraction", _mean([not ok for group in groups for ok in group.scored.judged])


def _score_metrics(task: str, groups: Sequence[WeightedGroup]) -> Iterator[tuple[str, float]]:
    parts: dict[str, list[float]] = {}
    for group in groups:
        for reward, scores in group.scored.components.items():
            parts.setdefault(f"score/{task}/{reward}", []).extend(scores.values[scores.judged].tolist())
            for detail, values in scores.details.items():
                parts.setdefault(f"score/{task}/{reward}/{detail}", []).extend(values[scores.judged].tolist())
    for name, values in parts.items():
        yield name, _mean(values)


def _pair_metrics(groups: Sequence[WeightedGroup]) -> Iterator[tuple[str, float]]:
    pairs = {group.pair.pair_id: group for group in groups}.values()
    similarities = [group.pair.similarity for group in pairs]
    weights = [group.pair_weight for group in pairs]
    yield "advantage/abs_mean", _mean([abs(a) for group in groups for a in group.advantages.tolist()])
    yield "pairs/similarity_mean", _mean(similarities)
    yield "pairs/similarity_min", min(similarities, default=math.nan)
    yield "pairs/weight_mean", _mean(weights)
    yield "pairs/weight_min", min(weights, default=math.nan)
    for kind in ("aligned", "retrieved"):
        of_kind = [group for group in pairs if group.pair.kind == kind]
        if of_kind:
            yield f"pairs/similarity_mean/{kind}", _mean([group.pair.similarity for group in of_kind])
            yield f"pairs/weight_mean/{kind}", _mean([group.pair_weight for group in of_kind])
    yield "pairs/aligned_fraction", _mean([group.pair.kind == "aligned" for group in pairs])


def _rollout_metrics(data: StepData) -> Iterator[tuple[str, float]]:
    trajectories: list[Trajectory] = [t for group in data.groups for t in group.scored.group.trajectories]
    answers = [t for t in trajectories if t.modality == "text"]
    num_tokens = sum(len(t.completion_ids) for t in trajectories)
    yield "rollout/policy_version", min((t.policy_version for t in trajectories), default=math.nan)
    yield "rollout/num_tokens", num_tokens
    yield "rollout/num_completions/text", len(answers)
    yield "rollout/num_completions/image", len(trajectories) - len(answers)
    if answers:
        yield "rollout/truncated_fraction", _mean([t.finish_reason == "length" for t in answers])
        yield "rollout/answer_tokens_mean", _mean([len(t.completion_ids) for t in answers])
    if seconds := data.seconds.get("rollout", data.overlapped.get("rollout")):
        yield "rollout/tokens_per_s", num_tokens / seconds
        yield "rollout/images_per_s", (len(trajectories) - len(answers)) / seconds
    if data.num_kept:
        yield "rollout/num_kept", data.num_kept
    yield from _staleness(trajectories, data.policy_version)


def _staleness(trajectories: Sequence[Trajectory], policy_version: int) -> Iterator[tuple[str, float]]:
    """How many updates lie between the weights that drew a token and those that learn from it, over all tokens."""
    tokens: Counter[int] = Counter()
    for trajectory in trajectories:
        spans = trajectory.version_spans or ((0, trajectory.policy_version),)
        ends = [*(start for start, _ in spans[1:]), len(trajectory.completion_ids)]
        for (start, version), end in zip(spans, ends, strict=True):
            # Weights that were never sent, version -1, are the checkpoint's, version 0.
            tokens[policy_version - max(version, 0)] += end - start
    total = tokens.total()
    if total:
        yield "rollout/staleness_mean", sum(updates * count for updates, count in tokens.items()) / total
        yield "rollout/staleness_max", max(tokens)
        yield "rollout/staleness_min", min(tokens)
        yield from ((f"rollout/staleness/{updates}", count / total) for updates, count in sorted(tokens.items()))


def _judged_rewards(groups: Iterable[WeightedGroup]) -> list[float]:
    return [reward for group in groups for reward in group.scored.rewards[group.scored.judged].tolist()]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


@lru_cache(maxsize=4096)
def _find(name: str) -> Metric | None:
    return next((metric for metric in METRICS if re.fullmatch(_pattern(metric.name), name)), None)


def _pattern(name: str) -> str:
    words = {"<task>": f"({'|'.join(TASKS)})"}
    parts = re.split(r"(<\w+>)", name)
    return "".join(words.get(part, r"[\w.-]+") if part.startswith("<") else re.escape(part) for part in parts)


def metrics_page() -> str:
    """docs/metrics.md, made from the table."""
    lines = [
        "# Metrics",
        "",
        "Made from the table in `unirl/monitoring/metrics.py` by",
        "`python -m unirl.monitoring.metrics > docs/metrics.md`. Each line of `metrics.jsonl` holds one step.",
        "A name in angle brackets stands for any word. A value that was NaN or infinite is `null`, and its name is",
        "listed under `nonfinite` in the same line. The reduction says how the values of several steps become one.",
        "",
        "What to do when a value is not normal stands last; [sentinels](sentinels.md) watch the worst of it.",
        "",
        "| name | unit | reduction | meaning | normal | else |",
        "|---|---|---|---|---|---|",
    ]
    for metric in METRICS:
        advice = metric.advice
        cells = (f"`{metric.name}`", metric.unit, metric.reduction, metric.meaning, advice.normal, advice.otherwise)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(metrics_page())
