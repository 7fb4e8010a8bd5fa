"""Fine-tuning on conversations, one rank: sequences through the policy, the restricted loss, the optimizer step."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unirl.config import LearnerConfig, SftConfig, SftLossConfig
from unirl.learner.engine import RankPlace, learning_rate
from unirl.learner.packing import Batching, plan_rows
from unirl.learner.rank_engine import RankEngine
from unirl.learner.sft_targets import (
    MODALITIES,
    Batch,
    Modality,
    ModalityLoss,
    RestrictedLoss,
    count_targets,
    make_batch,
)
from unirl.models.interleaved import InterleavedPolicy
from unirl.models.named_arrays import to_tensor
from unirl.types import TokenSequence


@dataclass(frozen=True, slots=True, kw_only=True)
class SftSettings:
    """The settings of a run that the learner reads."""

    learner: LearnerConfig
    loss: SftLossConfig
    batching: Batching
    num_steps: int
    """Steps of the run; the schedule ends there."""

    @classmethod
    def of(cls, config: SftConfig, num_steps: int) -> "SftSettings":
        """The settings of a run of so many steps."""
        return cls(
            learner=config.learner,
            loss=config.loss,
            batching=config.train.batching,
            num_steps=num_steps,
        )


@dataclass(frozen=True, slots=True)
class _Row:
    """Sequences that go through the policy together."""

    sequences: tuple[TokenSequence, ...]
    counted: bool
    """False for a filler, whose loss is multiplied by zero: it only keeps this rank in step with the others."""
    num_parts: dict[Modality, int]
    """In how many parts every rank takes the targets here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """What one rank does in a step; needs no device, so that it can be made ahead."""

    rows: tuple[_Row, ...]
    num_targets: dict[Modality, int]
    """Of each modality, over all ranks."""
    num_sequences: int
    """Over all ranks."""
    num_tokens: int
    """Over all ranks."""
    num_learned: dict[Modality, int]
    """Sequences with a target of each modality, over all ranks."""


@dataclass(slots=True)
class _Sums:
    """What the targets of one modality came to, over rows and ranks."""

    nats: float = 0.0
    hits: int = 0
    count: int = 0
    square: float = 0.0
    """Of the gradient at the states that predict them."""

    def add(self, loss: ModalityLoss) -> None:
        self.nats += float(loss.nats.detach().double().sum())
        self.hits += int(loss.hits.sum())
        self.count += len(loss.hits)

    def __add__(self, other: "_Sums") -> "_Sums":
        return _Sums(
            self.nats + other.nats, self.hits + other.hits, self.count + other.count, self.square + other.square
        )


class SftLearner:
    """One rank. All ranks call the same methods in the same order with the same arguments."""

    def __init__(self, policy: InterleavedPolicy, settings: SftSettings, place: RankPlace) -> None:
        """Join the process group and put the policy under DeepSpeed.

        Raises:
            ValueError: nothing is trainable, or settings that cannot run here.
        """
        self.policy, self.num_updates = policy, 0
        self._settings = settings
        self._engine = RankEngine(policy.module, settings.learner, place)
        # Of one row on every rank.
        self._row_tokens = settings.learner.max_tokens_per_micro_batch * place.world_size
        loss = settings.loss
        self._weights: dict[Modality, float] = {"text": loss.text_weight, "image": loss.image_weight}
        self._loss = RestrictedLoss(policy.layout, loss, self._engine.device)
        self._squares = torch.zeros(len(MODALITIES), device=self._engine.device)
        self._reached = False

    def prepare(self, sequences: Sequence[TokenSequence]) -> StepWork:
        """This rank's share of a step on these sequences, which all ranks are given.

        Raises:
            ValueError: a sequence above the token budget, or nothing to learn in all of them.
        """
        counts = [count_targets(sequence, self._settings.loss) for sequence in sequences]
        totals: dict[Modality, int] = {name: sum(count[name] for count in counts) for name in MODALITIES}
        if not sum(totals.values()):
            raise ValueError(
                f"learner: expected targets in the {len(sequences)} sequences of a step; got none; mark what is to be "
                "learned in the data, or set loss.targets=all"
            )
        return StepWork(
            rows=tuple(map(_decoded, self._rows(sequences, counts))),
            num_targets=totals,
            num_sequences=len(sequences),
            num_tokens=sum(len(sequence.ids) for sequence in sequences),
            num_learned={name: sum(count[name] > 0 for count in counts) for name in MODALITIES},
        )

    def update(self, work: StepWork, step: int) -> dict[str, float]:
        """One optimizer step on the mean loss of all targets of a step; returns metrics of all ranks.

        The loss is normalised by the targets of all sequences, so that rows, their order and the number of ranks
        change it by float rounding only.

        Raises:
            RuntimeError: a loss or gradient that is not finite, or a modality with targets that gets no gradient;
                raised on all ranks before the optimizer moves, and the learner must then be thrown away.
        """
        started = time.perf_counter()
        scales = self._scales(work.num_targets)
        lr = learning_rate(self._settings.learner, self.num_updates, self._settings.num_steps)
        self._engine.set_rate(lr)
        self._engine.clear_gradients()
        sums = _no_sums()
        problems: list[str] = []
        square = 0.0
        self._squares.zero_()
        self._reached = False
        for row in work.rows:
            losses = self._run(row, sums)
            square += self._engine.backward(self._total(losses, scales if row.counted else _NOTHING))
            problems += _problems(row, losses)
        for name, own in zip(MODALITIES, self._squares.tolist(), strict=True):
            sums[name].square = own
        everyone = self._engine.gather((problems, square, sums))
        self._refuse([p for found, _, _ in everyone for p in found], sum(s for _, s, _ in everyone), step)
        before = self._engine.sampled_weights()
        norm = self._engine.step(step)
        moved = (self._engine.sampled_weights() != before).float()
        self.num_updates += 1
        seconds = time.perf_counter() - started
        total = _added([own for _, _, own in everyone])
        return (
            self._metrics(total)
            | self._checks(work, total, moved)
            | {
                "learner/grad_norm": norm,
                "learner/lr": lr,
                "learner/num_rows": float(work.num_sequences),
                "learner/num_tokens": float(work.num_tokens),
                "learner/num_micro_batches": float(len(work.rows)),
                "learner/update_s": seconds,
                "sft/fill_fraction": work.num_tokens / (len(work.rows) * self._row_tokens),
                "sft/tokens_per_s": work.num_tokens / seconds,
            }
        )

    @property
    def num_passes(self) -> int:
        """Backward passes since the start."""
        return self._engine.num_backwards

    @torch.no_grad()
    def evaluate(self, sequences: Sequence[TokenSequence]) -> dict[str, float]:
        """Loss and accuracy of each modality over these sequences; the same on all ranks."""
        sums = _no_sums()
        for row in self._rows(sequences, [count_targets(sequence, self._settings.loss) for sequence in sequences]):
            self._run(row, sums)
        return self._metrics(_added(self._engine.gather(sums)))

    def _rows(self, sequences: Sequence[TokenSequence], counts: Sequence[dict[Modality, int]]) -> list[_Row]:
        """What this rank runs, given the targets of each sequence."""
        plan = plan_rows(
            [len(sequence.ids) for sequence in sequences],
            max_tokens=self._settings.learner.max_tokens_per_micro_batch,
            num_ranks=self._engine.place.world_size,
            batching=self._settings.batching,
        )
        shortest = min(range(len(sequences)), key=lambda index: len(sequences[index].ids))
        rows: list[_Row] = []
        for everyone in zip(*plan, strict=True):
            most = {name: max(sum(counts[index][name] for index in row) for row in everyone) for name in MODALITIES}
            own = everyone[self._engine.place.rank]
            rows.append(
                _Row(
                    tuple(sequences[index] for index in own or (shortest,)),
                    counted=bool(own),
                    num_parts={name: max(1, -(-most[name] // self._settings.loss.rows_at_once)) for name in MODALITIES},
                )
            )
        return rows

    def _run(self, row: _Row, sums: dict[Modality, _Sums]) -> dict[Modality, ModalityLoss]:
        batch = make_batch(row.sequences, self._settings.loss, self._engine.device)
        nats = self._engine(partial(self._compute, batch, row.num_parts))
        losses: dict[Modality, ModalityLoss] = {
            "text": ModalityLoss(nats=nats[0], hits=nats[1]),
            "image": ModalityLoss(nats=nats[2], hits=nats[3]),
        }
        for name in MODALITIES if row.counted else ():
            sums[name].add(losses[name])
        return losses

    def _compute(self, batch: Batch, num_parts: dict[Modality, int]) -> tuple[Tensor, ...]:
        losses = self._loss(self.policy, batch, num_parts, partial(self._measure_gradient, batch.is_code))
        return losses["text"].nats, losses["text"].hits, losses["image"].nats, losses["image"].hits

    def _measure_gradient(self, is_code: Tensor, gradient: Tensor) -> None:
        """Add the squares of a row's gradient, told apart by what the states predict."""
        self._reached = True
        squares = torch.linalg.vector_norm(gradient.detach(), dim=-1, dtype=torch.float32).square()
        self._squares += torch.stack([(squares * ~is_code).sum(), (squares * is_code).sum()])

    def _scales(self, counts: dict[Modality, int]) -> dict[Modality, float]:
        """Factor of a target's nats in the loss of the step."""
        if self._settings.loss.reduction == "tokens":
            total = sum(counts.values())
            return {name: self._weights[name] / total for name in MODALITIES}
        return {name: self._weights[name] / max(1, counts[name]) for name in MODALITIES}

    def _total(self, losses: dict[Modality, ModalityLoss], scales: dict[Modality, float]) -> Tensor:
        return losses["text"].nats.sum() * scales["text"] + losses["image"].nats.sum() * scales["image"]

    def _refuse(self, problems: list[str], square: float, step: int) -> None:
        if detached := [problem for problem in problems if problem.startswith(_DETACHED)]:
            raise RuntimeError(
                f"learner, step {step}: expected a gradient from each modality; got {'; '.join(detached)}; check that "
                "model.frozen leaves weights of both modalities, and resume from the last checkpoint"
            )
        if problems or not math.isfinite(square):
            raise RuntimeError(
                f"learner, step {step}: expected a finite loss and gradient; got "
                f"{'; '.join(problems) or 'NaN or infinity in the gradient'}; look at these samples, lower learner.lr, "
                "and resume from the last checkpoint"
            )
        if square == 0.0:
            raise RuntimeError(
                f"learner, step {step}: expected a gradient; got none at all; check that model.frozen leaves weights "
                "to train and that loss.text_weight and loss.image_weight are not both 0"
            )

    def _metrics(self, sums: dict[Modality, _Sums]) -> dict[str, float]:
        """Loss under the settings' reduction and weights, and nats and accuracy of each modality that was there."""
        scales = self._scales({name: sums[name].count for name in MODALITIES})
        metrics = {"learner/loss": sum(sums[name].nats * scales[name] for name in MODALITIES)}
        for name in MODALITIES:
            if sums[name].count:
                metrics[f"sft/nats/{name}"] = sums[name].nats / sums[name].count
                metrics[f"sft/accuracy/{name}"] = sums[name].hits / sums[name].count
            metrics[f"sft/num_targets/{name}"] = float(sums[name].count)
        return metrics

    def _checks(self, work: StepWork, total: dict[Modality, _Sums], moved: Tensor) -> dict[str, float]:
        """What tells whether a step was learned from."""
        checks = {"sft/num_lost_targets": float(sum(work.num_targets[name] - total[name].count for name in MODALITIES))}
        for name in MODALITIES:
            checks[f"sft/num_learned/{name}"] = float(work.num_learned[name])
            if total[name].count and self._weights[name] and self._reached:
                # The loss was multiplied by the number of ranks.
                checks[f"sft/grad_norm/{name}"] = math.sqrt(total[name].square) / self._engine.place.world_size
        return checks | ({"sft/moved_fraction": float(moved.mean())} if len(moved) else {})

    def export(self, folder: Path) -> None:
        """Write the policy as a checkpoint folder in its family's public layout. Rank 0 holds all weights meanwhile."""
        arrays = [named for bucket in self._engine.weight_buckets(self.num_updates) for named in bucket]
        if self._engine.place.rank == 0:
            self.policy.save(folder, {name: to_tensor(array) for name, array in arrays})
        self._engine.gather(None)

    def save(self, folder: Path, step: int, state: dict[str, Any]) -> None:
        """Commit a checkpoint of weights, optimizer, random-number states and `state` (JSON values) into `folder`.

        Raises:
            OSError: it could not be written; earlier checkpoints are whole.
        """
        self._engine.save(folder, step, {"num_updates": self.num_updates, "run": state})

    def restore(self, folder: Path) -> dict[str, Any]:
        """Load the newest committed checkpoint in `folder` into this fresh learner; returns the `state` saved with it.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it was written by another number of ranks, ZeRO stage or precision.
        """
        state = self._engine.restore(folder)
        self.num_updates = state["num_updates"]
        return state["run"]

    def close(self) -> None:
        """Free the engine and leave the process group."""
        self._engine.close()


_DETACHED = "no gradient of"
_NOTHING: dict[Modality, float] = {"text": 0.0, "image": 0.0}


def _decoded(row: _Row) -> _Row:
    """The row with its images in memory."""
    return replace(row, sequences=tuple(replace(own, pixels=tuple(own.pixels)) for own in row.sequences))


def _no_sums() -> dict[Modality, _Sums]:
    return {"text": _Sums(), "image": _Sums()}


def _problems(row: _Row, losses: dict[Modality, ModalityLoss]) -> list[str]:
    """What is wrong with the loss of a row; reported rather than raised, since the other ranks would wait."""
    names = ", ".join(sequence.id for sequence in row.sequences)
    found = [f"{_DETACHED} {m} in {names}" for m in MODALITIES if not losses[m].nats.requires_grad]
    return found + [f"NaN or infinity in {m} of {names}" for m in MODALITIES if not losses[m].nats.isfinite().all()]


def _added(everyone: Sequence[dict[Modality, _Sums]]) -> dict[Modality, _Sums]:
    return {name: sum((own[name] for own in everyone), _Sums()) for name in MODALITIES}
