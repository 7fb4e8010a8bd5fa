"""What the gates of `unirl verify` measure with: a sampler, a policy that scores, and the form of a finding."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from unirl.config import RlConfig, SamplingConfig
from unirl.jobs.step import make_requests
from unirl.learner.batching import build_batch, plan_micro_batches
from unirl.learner.engine import ComputingModule
from unirl.learner.passes import micro_tensors, scored_passes
from unirl.models.policy import Policy, Scoring
from unirl.rollout.sampler import Sampler
from unirl.rollout.units import units_of_work
from unirl.types import (
    LearnerBatch,
    LearnerRow,
    PairRecord,
    RolloutGroup,
    RolloutRequest,
    ScoredGroup,
    UnderstandingSample,
    WeightedGroup,
)

Dtype = Literal["float32", "bfloat16"]
Verdict = Literal["pass", "fail", "not applicable", "information"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one gate says."""

    gate: str
    dtype: Dtype
    measured: str
    figure: float | None = None
    limit: float | None = None
    """Most that the figure may be, or what it must be above; None where there is no limit."""
    bound: Literal["at most", "above"] = "at most"
    verdict: Verdict
    reason: str = ""
    """Why it failed or does not apply."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What the gates measure on, all of one precision."""

    config: RlConfig
    policy: Policy
    """Scores as the learner does."""
    sampler: Sampler
    pairs: tuple[PairRecord, ...]

    @property
    def dtype(self) -> Dtype:
        """Precision of the weights."""
        return self.config.model.dtype

    @property
    def sampling(self) -> SamplingConfig:
        """How training samples."""
        return self.config.rollout.sampling

    @property
    def requests(self) -> list[RolloutRequest]:
        """Both prompts of every pair."""
        return make_requests(self.pairs, 0, self.config)

    @property
    def uneven_requests(self) -> list[RolloutRequest]:
        """The same, each followed by one with the first half of its words, so that prompts differ in length."""
        return [each for request in self.requests for each in (request, _halved(request))]

    def sample(self, requests: Sequence[RolloutRequest], sampling: SamplingConfig) -> list[RolloutGroup]:
        """One group per request in their order, through the units of work in which workers get them."""
        units = units_of_work(requests, self.config.rollout.sequences_per_unit)
        groups = {g.request.request_id: g for unit in units for g in self.sampler.sample(unit, sampling)}
        return [groups[request.request_id] for request in requests]

    def batch(self, groups: Sequence[RolloutGroup]) -> LearnerBatch:
        """What the learner gets for these groups, every completion with advantage 1."""
        pairs = {pair.pair_id: pair for pair in self.pairs}
        weighted = []
        for group in groups:
            ones = np.ones(len(group.trajectories))
            rewards, judged = ones.astype(np.float32), ones.astype(bool)
            scored = ScoredGroup(group=group, rewards=rewards, judged=judged, components={})
            pair = pairs[group.request.pair_id]
            weighted.append(WeightedGroup(scored=scored, pair=pair, pair_weight=1.0, advantages=ones))
        return build_batch(weighted, self.config.algorithm)

    def score(self, rows: Sequence[LearnerRow], scoring: Scoring) -> list[NDArray[np.float32]]:
        """Log-probability [T] of each row's tokens in the learner's micro-batches; 0 where the loss does not count."""
        room = max(self.config.learner.max_tokens_per_micro_batch, 2 * self.config.rollout.max_model_len)
        (plan,) = plan_micro_batches(rows, policy=self.policy, scoring=scoring, max_tokens=room, num_ranks=1)
        device = next(self.policy.module.parameters()).device
        runner, unused = ComputingModule(self.policy.module), torch.zeros(len(rows), dtype=torch.float64)
        scores: dict[int, NDArray[np.float32]] = {}
        with torch.no_grad():
            for micro in plan:
                data = micro_tensors(micro, rows, unused, device)
                values = torch.zeros_like(data.old_logprobs)
                for part, mask in scored_passes(self.policy, runner, data, scoring):
                    values = torch.where(mask, part.logprobs.float(), values)
                scores |= zip(micro.indices, values.cpu().numpy(), strict=True)
        return [scores[index][: len(row.completion_ids)] for index, row in enumerate(rows)]

    def gap(self, rows: Sequence[LearnerRow], scoring: Scoring) -> NDArray[np.float32]:
        """|sampler - learner| log-probability of every token of the loss, in nats."""
        scores = self.score(rows, scoring)
        gaps = [np.abs(mine - row.old_logprobs)[row.loss_mask] for mine, row in zip(scores, rows, strict=True)]
        return np.concatenate(gaps) if gaps else np.zeros(0, np.float32)

    def finding(self, gate: str, measured: str, figure: float, limit: float, reason: str) -> Finding:
        """A figure against the most that it may be; `reason` is shown where it is more."""
        good = figure <= limit
        return Finding(
            gate=gate,
            dtype=self.dtype,
            measured=measured,
            figure=figure,
            limit=limit,
            verdict="pass" if good else "fail",
            reason="" if good else reason,
        )

    def information(self, gate: str, measured: str, figure: float, reason: str) -> Finding:
        """A figure to know, without a limit."""
        return Finding(
            gate=gate, dtype=self.dtype, measured=measured, figure=figure, verdict="information", reason=reason
        )

    def above_0(self, gate: str, measured: str, figure: float, reason: str) -> Finding:
        """A figure that must not be 0; `reason` is shown where it is."""
        good = figure > 0
        return Finding(
            gate=gate,
            dtype=self.dtype,
            measured=measured,
            figure=figure,
            limit=0,
            bound="above",
            verdict="pass" if good else "fail",
            reason="" if good else reason,
        )


def _halved(request: RolloutRequest) -> RolloutRequest:
    """The request with the first half of its question or prompt; of a single word, the first half of the word."""
    sample = request.sample
    if isinstance(sample, UnderstandingSample):
        shorter = replace(sample, question=_first_half(sample.question))
    else:
        shorter = replace(sample, prompt=_first_half(sample.prompt))
    return replace(request, request_id=f"{request.request_id}/half", sample=shorter)


def _first_half(text: str) -> str:
    words = text.split(" ")
    return " ".join(words[: len(words) // 2]) if len(words) > 1 else text[: max(1, len(text) // 2)]
