"""One rank's training: micro-batches through the policy, the loss, the optimizer step, weights and checkpoints."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from unirl.algorithms.importance import truncated_importance
from unirl.algorithms.losses import BatchTotals, masked_sum, token_scales
from unirl.algorithms.objective import find_objective
from unirl.algorithms.policy_loss import LOG_RATIO_CAP, LossRule
from unirl.config import AlgorithmConfig, LearnerConfig, RlConfig, SamplingConfig
from unirl.learner.batching import plan_micro_batches
from unirl.learner.diffusion_steps import draw_steps, merge_steps
from unirl.learner.engine import RankPlace, build_frozen_engine, learning_rate
from unirl.learner.passes import MicroTensors, Runner, micro_tensors, scored_passes
from unirl.learner.rank_engine import RankEngine
from unirl.learner.tally import MODALITIES, Laps, Tally, measure, metrics_of
from unirl.learner.task_gradients import TaskGradients
from unirl.learner.weights import Bucket
from unirl.models.named_arrays import to_tensor
from unirl.models.policy import Policy, Scoring, load_policy
from unirl.types import LearnerBatch, LearnerRow, Task, WeightsManifest


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSettings:
    """The sections of a run's config that the learner reads."""

    learner: LearnerConfig
    algorithm: AlgorithmConfig
    sampling: SamplingConfig
    num_steps: int
    """Steps of the run; the schedule ends there."""
    seed: int = 0
    """Of the run; decides which reveal steps an update learns from."""
    grad_cosine_every: int = 0
    """Steps between measurements of the cosine between the tasks' gradients; 0 measures no gradient by task."""


class Learner:
    """One rank. All ranks call the same methods in the same order with the same arguments."""

    def __init__(
        self, policy: Policy, settings: LearnerSettings, place: RankPlace, *, reference: Policy | None = None
    ) -> None:
        """Join the process group and put the policy under DeepSpeed.

        Args:
            policy: the weights to train.
            settings: how to train.
            place: this rank.
            reference: the initial policy, loaded anew, for a KL penalty to it.

        Raises:
            ValueError: a KL penalty to the initial policy without `reference`, or settings that cannot run here.
        """
        algorithm = settings.algorithm
        if wants_reference(algorithm) and reference is None:
            raise ValueError(
                "learner: expected a reference policy for algorithm.kl_reference=initial; got none; load the initial "
                "checkpoint a second time, or set algorithm.kl_beta=0"
            )
        self._engine = RankEngine(policy.module, settings.learner, place)
        self.policy, self.policy_version = policy, 0
        self._settings = settings
        self._scoring = scoring_of(settings.sampling, algorithm)
        self._objective = find_objective(algorithm.objective)
        self._rule = LossRule(
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
            kl_beta=algorithm.kl_beta,
            kl_estimator=algorithm.kl_estimator,
        )
        self._reference: tuple[Policy, Runner] | None = None
        if reference is not None:
            runner = build_frozen_engine(reference.module, settings.learner, self._engine.device)
            self._reference = reference, runner

    @classmethod
    def from_config(cls, config: RlConfig, checkpoint: Path, *, rank: int, address: tuple[str, int]) -> "Learner":
        """The learner of a run, with the weights of a checkpoint folder.

        Args:
            config: the run's.
            checkpoint: folder of the initial policy.
            rank: this one, from 0.
            address: host and port of rank 0; a single rank needs no port.
        """
        settings = LearnerSettings(
            learner=config.learner,
            algorithm=config.algorithm,
            sampling=config.rollout.sampling,
            num_steps=config.train.num_steps,
            seed=config.train.seed,
            grad_cosine_every=config.monitoring.grad_cosine_every,
        )
        place = RankPlace(rank=rank, world_size=config.learner.num_ranks, address=address[0], port=address[1])
        reference = load_policy(config.model, checkpoint) if wants_reference(config.algorithm) else None
        return cls(load_policy(config.model, checkpoint), settings, place, reference=reference)

    def update(self, batch: LearnerBatch, step: int) -> dict[str, float]:
        """Make the step's optimizer updates on the whole batch; returns metrics of all ranks under their full names.

        The loss is normalised by the counts of the batch, so the division into micro-batches and ranks changes it by
        float rounding only. A batch without rows states no preference: nothing is learned,
        `learner/skipped_updates` says so, and the schedule goes on. `policy_version` counts the updates of the
        schedule, skipped ones included.

        Raises:
            ValueError: a row above the token budget, or a batch of older weights where old log-probabilities must be
                rescored with the current ones.
            RuntimeError: a log-probability or gradient that is not finite, or a task that should learn and gets no
                gradient; raised on all ranks before the optimizer moves, and the learner must then be thrown away.
        """
        laps, tally, measured = Laps(), Tally(), dict[str, float]()
        num_updates = self._settings.algorithm.updates_per_step
        work = self._prepare(batch)
        # A sampler that was never sent weights says version -1: it holds the checkpoint, like the learner at version 0.
        on_policy = max(batch.policy_version, 0) == self.policy_version
        lr, norm = 0.0, 0.0
        laps.end("other")
        for index in range(num_updates):
            lr = self._next_rate()
            if work:
                parts = self._parts_of(work, step) if index == 0 else None
                problems = self._accumulate(work, tally, laps, parts, first=index == 0, on_policy=on_policy)
                # Later updates, and batches of older weights, may rightly find every token clipped.
                strict = index == 0 and (on_policy or self._settings.algorithm.importance_cap is not None)
                self._refuse(problems, {row.task for row in batch.rows if strict and row.advantage != 0.0}, step)
                if parts is not None:
                    measured = parts.metrics(with_cosine=self._is_measured(step))
                laps.end("other")
                norm = max(norm, self._engine.step(step))
                laps.end("backward")
            self.policy_version += 1
        metrics = {"learner/num_rows": 0.0, "learner/num_tokens": 0.0}
        metrics |= metrics_of(*tally.reduce(), num_updates=num_updates)
        if work:
            metrics["learner/grad_norm"] = norm
        laps.end("other")
        if work and self._is_measured(step) and (moved := self._kl_of_update(work)) is not None:
            metrics["policy/kl_update"] = moved
        laps.end("score")
        return (
            metrics
            | measured
            | {
                "learner/lr": lr,
                "learner/skipped_updates": 0.0 if work else float(num_updates),
                "learner/num_micro_batches": float(len(work)),
                "learner/update_s": sum(laps.seconds.values()),
                "learner/score_s": laps.seconds["score"],
                "learner/backward_s": laps.seconds["backward"],
            }
        )

    @property
    def num_passes(self) -> int:
        """Backward passes since the start."""
        return self._engine.num_backwards

    def _prepare(self, batch: LearnerBatch) -> list[MicroTensors]:
        """This rank's micro-batches as tensors; none on every rank when the batch has no rows."""
        algorithm, sampling = self._settings.algorithm, self._settings.sampling
        if max(batch.policy_version, 0) != self.policy_version and any(map(self._rescores, batch.rows)):
            raise ValueError(
                f"learner: expected a batch sampled with the current weights, version {self.policy_version}, since "
                "conditional log-probabilities of guided images and those of merged steps are rescored with them; got "
                f"version {batch.policy_version}; sample after each update, or set algorithm.image_logprob=guided and "
                "algorithm.diffusion_shrink=1"
            )
        whole = [merge_steps(row, algorithm.diffusion_shrink) for row in batch.rows]
        key = self._settings.seed, self.policy_version
        rows, factors = draw_steps(whole, algorithm.diffusion_steps_per_update, key)
        plan = plan_micro_batches(
            rows,
            policy=self.policy,
            scoring=self._scoring,
            max_tokens=self._settings.learner.max_tokens_per_micro_batch,
            num_ranks=self._engine.place.world_size,
            exchanges=self._engine.exchanges,
        )
        longest_image = max((len(row.completion_ids) for row in rows if row.task == "generation"), default=0)
        totals = BatchTotals(
            num_trajectories=batch.num_trajectories, num_tokens=batch.num_loss_tokens, num_pairs=batch.num_pairs
        )
        scales = token_scales(
            [int(row.loss_mask.sum()) for row in whole],
            [row.task for row in whole],
            totals,
            aggregation=algorithm.token_aggregation,
            pooled=self._objective.pools_tasks,
            max_lengths={"understanding": sampling.text.max_tokens, "generation": longest_image},
        ) * torch.tensor(factors, dtype=torch.float64)
        return [micro_tensors(micro, rows, scales, self._engine.device) for micro in plan[self._engine.place.rank]]

    def _rescores(self, row: LearnerRow) -> bool:
        """Whether the sampler's log-probabilities are of another mode than the loss's, so that they cannot be old."""
        if row.unmask_step is not None and self._settings.algorithm.diffusion_shrink > 1:
            return True
        scoring = self._scoring
        return row.task == "generation" and scoring.image_logprob == "conditional" and scoring.guidance_scale != 1.0

    def _next_rate(self) -> float:
        settings = self._settings
        num_updates = settings.num_steps * settings.algorithm.updates_per_step
        lr = learning_rate(settings.learner, self.policy_version, num_updates)
        self._engine.set_rate(lr)
        return lr

    def _is_measured(self, step: int) -> bool:
        every = self._settings.grad_cosine_every
        return bool(every and step) and (step == 1 or step % every == 0)

    def _parts_of(self, work: list[MicroTensors], step: int) -> TaskGradients | None:
        """What tells the gradients of the tasks apart: when measured, and for their norms where that is nearly free."""
        measured = self._is_measured(step)
        wanted = measured or (self._settings.grad_cosine_every and not self._engine.parts_need_traffic)
        return TaskGradients(self._engine, work, by_kind=measured) if wanted else None

    def _accumulate(
        self,
        work: list[MicroTensors],
        tally: Tally,
        laps: Laps,
        parts: TaskGradients | None,
        *,
        first: bool,
        on_policy: bool,
    ) -> tuple[list[str], dict[str, float]]:
        """Add up this rank's gradient; returns its problems and the sum of squared gradients of each task.

        A problem is reported rather than raised here: the other ranks would wait for this one for ever.
        """
        problems: list[str] = []
        squares: dict[str, float] = {}
        self._engine.clear_gradients()
        for data in work:
            if parts is not None:
                parts.before_micro_batch()
                laps.end("other")
            if first and self._reference is not None:
                data.ref_logprobs = self._reference_logprobs(data, *self._reference)
            bad, square = self._backward(data, tally, laps, first=first, on_policy=on_policy)
            squares[data.task] = squares.get(data.task, 0.0) + square
            if bad or not math.isfinite(square):
                rows = sorted([data.micro.indices[row] for row in bad] or data.micro.indices)
                problems.append(f"a {'log-probability' if bad else 'gradient'} of {data.task} rows {rows}")
        return problems, squares

    def _backward(
        self, data: MicroTensors, tally: Tally, laps: Laps, *, first: bool, on_policy: bool
    ) -> tuple[set[int], float]:
        """One backward per scoring pass; returns the rows with a broken log-probability, and the squared gradients."""
        bad: set[int] = set()
        square, taken = 0.0, torch.zeros(len(data.rows), dtype=torch.bool, device=data.loss_mask.device)
        for scores, mask in scored_passes(self.policy, self._engine, data, self._scoring):
            broken = mask & ~scores.logprobs.isfinite()
            if bool(broken.any()):
                bad.update(broken.any(dim=1).nonzero().flatten().tolist())
                mask = mask & ~broken
            if first:
                self._take_old(data, scores.logprobs.detach(), mask, tally, on_policy=on_policy)
            difference = scores.logprobs.detach() - data.old_logprobs
            reference = data.old_logprobs if self._rule.kl_beta > 0 else None
            loss, sums = self._objective.policy_loss(
                scores.logprobs,
                data.old_logprobs,
                data.advantages,
                mask,
                data.scale if data.importance is None else data.scale[:, None] * data.importance,
                self._rule,
                data.ref_logprobs if data.ref_logprobs is not None else reference,
            )
            if not loss.requires_grad:
                raise RuntimeError(_no_gradient(data.task))
            laps.end("score")
            square += self._engine.backward(loss)
            laps.end("backward")
            tally.add(sums | {f"loss/{data.task}": sums["loss"]})
            measure(tally, data, scores, mask, difference)
            taken |= mask.any(dim=1)
        tally.add({"rows": taken.sum()})
        return bad, square

    def _take_old(self, data: MicroTensors, logprobs: Tensor, mask: Tensor, tally: Tally, *, on_policy: bool) -> None:
        """Before the optimizer moves: compare with what the sampler reported, and set what ratios are taken to."""
        difference = (logprobs - data.old_logprobs).abs()
        if self._rescores(data.rows[0]):
            # These are the log-probabilities of the policy that sampled.
            name = "guidance_gap" if self._settings.algorithm.diffusion_shrink == 1 else "rescoring_gap"
            tally.add({name: masked_sum(difference, mask), f"{name}_tokens": mask.sum()})
        elif on_policy:
            name = f"logprob_gap/{MODALITIES[data.task]}"
            tally.add({name: masked_sum(difference, mask), f"{name}_tokens": mask.sum()})
            tally.maximum(name, torch.where(mask, difference, -math.inf))
            return
        elif (cap := self._settings.algorithm.importance_cap) is not None:
            weights = truncated_importance(logprobs, data.old_logprobs, mask, cap)
            capped = (weights >= cap) & mask
            for name, values in (("importance_mean", weights), ("importance_capped_fraction", capped.float())):
                tally.add({name: masked_sum(values, mask), f"{name}_tokens": mask.sum()})
            data.importance = weights if data.importance is None else torch.where(mask, weights, data.importance)
        else:
            return
        data.old_logprobs = torch.where(mask, logprobs, data.old_logprobs)

    @torch.no_grad()
    def _kl_of_update(self, work: list[MicroTensors]) -> float | None:
        """KL per token that the updates just made took the policy from the one that sampled; None without a token.

        Of the last micro-batch of each task, the same ones on every rank; the k3 estimate that `policy/kl` is.
        """
        tally = Tally()
        for data in {data.task: data for data in work}.values():
            for scores, mask in scored_passes(self.policy, self._engine, data, self._scoring):
                log_ratio = torch.where(mask, scores.logprobs - data.old_logprobs, 0.0).clamp(
                    -LOG_RATIO_CAP, LOG_RATIO_CAP
                )
                tally.add({"kl": masked_sum(torch.expm1(log_ratio) - log_ratio, mask), "tokens": mask.sum()})
        sums, _ = tally.reduce()
        return sums["kl"] / sums["tokens"] if sums["tokens"] else None

    @torch.no_grad()
    def _reference_logprobs(self, data: MicroTensors, policy: Policy, runner: Runner) -> Tensor:
        logprobs = torch.zeros_like(data.old_logprobs)
        for scores, mask in scored_passes(policy, runner, data, self._scoring):
            logprobs = torch.where(mask, scores.logprobs, logprobs)
        return logprobs

    def _refuse(self, own: tuple[list[str], dict[str, float]], learners: set[Task], step: int) -> None:
        """Raise on every rank when any has a problem, or when a task that should learn has no gradient at all."""
        everyone: list[tuple[list[str], dict[str, float]]] = self._engine.gather(own)
        problems = [f"{problem} (rank {rank})" for rank, (found, _) in enumerate(everyone) for problem in found]
        if problems:
            raise RuntimeError(
                f"learner, step {step}: expected finite numbers; got NaN or infinity in {'; '.join(problems)}; look at "
                "these rows in the journal, lower learner.lr, and resume from the last checkpoint"
            )
        silent = [task for task in sorted(learners) if not sum(squares.get(task, 0.0) for _, squares in everyone)]
        if silent:
            raise RuntimeError(_no_gradient(", ".join(silent)))

    def weight_buckets(self, *, copy: bool = True) -> Iterator[Bucket]:
        """All weights bucket by bucket, on rank 0; the other ranks go through the same buckets, which are empty.

        With `copy` False a bucket may be the weights themselves, to be read before the next one is taken.
        """
        return self._engine.weight_buckets(self.policy_version, copy=copy)

    def manifest(self) -> WeightsManifest:
        """Manifest of the last `weight_buckets`, once all were taken; meant for rank 0."""
        return self._engine.manifest()

    def export(self, folder: Path) -> None:
        """Write the policy as a checkpoint folder in its family's public layout. Rank 0 holds all weights meanwhile."""
        arrays = [named for bucket in self.weight_buckets() for named in bucket]
        if self._engine.place.rank == 0:
            self.policy.save(folder, {name: to_tensor(array) for name, array in arrays})
        dist.barrier()

    def save(self, folder: Path, step: int, state: dict[str, Any]) -> None:
        """Commit a checkpoint of weights, optimizer, random-number states and `state` (JSON values) into `folder`.

        Raises:
            OSError: it could not be written; earlier checkpoints are whole.
        """
        self._engine.save(folder, step, {"policy_version": self.policy_version, "run": state})

    def restore(self, folder: Path) -> dict[str, Any]:
        """Load the newest committed checkpoint in `folder` into this fresh learner; returns the `state` saved with it.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it was written by another number of ranks, ZeRO stage or precision.
        """
        state = self._engine.restore(folder)
        self.policy_version = state["policy_version"]
        return state["run"]

    def close(self) -> None:
        """Free the engine and leave the process group."""
        self._engine.close()


def wants_reference(config: AlgorithmConfig) -> bool:
    """Whether the loss needs the initial policy beside the trained one."""
    return config.kl_beta != 0 and config.kl_reference == "initial"


def scoring_of(sampling: SamplingConfig, algorithm: AlgorithmConfig) -> Scoring:
    """The distribution under which the learner scores: the sampler's, at temperature 1 where that one was greedy."""
    return Scoring(
        text_temperature=sampling.text.temperature or 1.0,
        image_temperature=sampling.image.temperature or 1.0,
        guidance_scale=sampling.image.guidance_scale,
        image_logprob=algorithm.image_logprob,
    )


def _no_gradient(tasks: str) -> str:
    return (
        f"learner: expected a gradient from every task whose rows have advantages; got none at all from {tasks}; check "
        "that model.frozen leaves weights that this task passes through"
    )
