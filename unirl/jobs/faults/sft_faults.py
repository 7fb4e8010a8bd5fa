"""Faults of fine-tuning: of its data, its loss and its optimizer."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch

from unirl.cluster.sft_worker import SftWorker
from unirl.data.mixture import Mixture
from unirl.jobs.faults.planting import replaced
from unirl.learner import sft_learner
from unirl.learner.rank_engine import RankEngine
from unirl.learner.sft_learner import SftLearner, StepWork
from unirl.learner.sft_targets import MODALITIES, Modality, ModalityLoss, RestrictedLoss
from unirl.models.joint_policy import JointPolicy
from unirl.types import TokenKind, TokenSequence


def sequences(change: Callable[[list[TokenSequence]], list[TokenSequence]]) -> AbstractContextManager[None]:
    """The sequences of a step become `change(sequences)`."""

    def make(original: Any) -> Any:
        return lambda self, step: change(original(self, step))

    return replaced(Mixture, "step", make)


def each(change: Callable[[TokenSequence], TokenSequence]) -> AbstractContextManager[None]:
    """Every sequence becomes `change(sequence)`."""
    return sequences(lambda own: list(map(change, own)))


def only_marked(is_kept: Callable[[TokenSequence], Any]) -> AbstractContextManager[None]:
    """Tokens outside a mask [L] lose the mark of what is to be learned."""
    return each(lambda sequence: replace(sequence, in_loss=sequence.in_loss & is_kept(sequence)))


def image_marks_lost() -> AbstractContextManager[None]:
    """No picture is marked as something to be learned any more."""
    return only_marked(lambda sequence: sequence.kinds != TokenKind.CODE)


def text_marks_lost() -> AbstractContextManager[None]:
    """No word is marked as something to be learned any more, nor the end of a picture."""
    return only_marked(lambda sequence: sequence.kinds == TokenKind.CODE)


def heldout_learned() -> AbstractContextManager[None]:
    """Held-out conversations are among the training data."""

    def make(original: Any) -> Any:
        def prepare(self: SftWorker, step: int) -> Any:
            held = self._heldout.all()[:2] if self._heldout else []
            with sequences(lambda own: [*own[len(held) :], *held]):
                return original(self, step)

        return prepare

    return replaced(SftWorker, "_prepare", make)


def same_sequences_again() -> AbstractContextManager[None]:
    """The order is lost: every step has the first step's sequences."""

    def make(original: Any) -> Any:
        return lambda self, step: original(self, 0)

    return replaced(Mixture, "step", make)


def slow_disk() -> AbstractContextManager[None]:
    """Sequences that take two seconds to read."""

    def make(original: Any) -> Any:
        def step(self: Mixture, number: int) -> list[TokenSequence]:
            time.sleep(2.0)
            return original(self, number)

        return step

    return replaced(Mixture, "step", make)


def rows(change: Callable[[StepWork], StepWork]) -> AbstractContextManager[None]:
    """A step's work becomes `change(work)` once it is planned."""

    def make(original: Any) -> Any:
        return lambda self, sequences: change(original(self, sequences))

    return replaced(SftLearner, "prepare", make)


def row_lost() -> AbstractContextManager[None]:
    """The last row of a step is planned and never run."""
    return rows(lambda work: replace(work, rows=work.rows[:-1]))


def row_twice() -> AbstractContextManager[None]:
    """The first row of a step is run twice."""
    return rows(lambda work: replace(work, rows=(*work.rows, work.rows[0])))


def losses(change: Callable[[Modality, torch.Tensor], torch.Tensor]) -> AbstractContextManager[None]:
    """Nats of the targets of each modality become `change(modality, nats)`."""

    def make(original: Any) -> Any:
        def compute(self: RestrictedLoss, *arguments: Any) -> dict[Modality, ModalityLoss]:
            found = original(self, *arguments)
            return {name: replace(found[name], nats=change(name, found[name].nats)) for name in MODALITIES}

        return compute

    return replaced(RestrictedLoss, "__call__", make)


def codes_detached() -> AbstractContextManager[None]:
    """The loss of pictures without its gradient."""
    return losses(lambda name, nats: nats.detach() if name == "image" else nats)


def words_weigh_nothing() -> AbstractContextManager[None]:
    """A gradient of words that is 0, though their loss is there."""
    return losses(lambda name, nats: nats.detach() + 0.0 * nats if name == "text" else nats)


def codes_dominate() -> AbstractContextManager[None]:
    """A gradient of pictures that is a sum where it should be a mean."""
    return losses(lambda name, nats: nats.detach() + 1000.0 * (nats - nats.detach()) if name == "image" else nats)


def gradient_explodes() -> AbstractContextManager[None]:
    """The same of both modalities."""
    return losses(lambda _, nats: nats.detach() + 1000.0 * (nats - nats.detach()))


def nan_nats() -> AbstractContextManager[None]:
    """A target of probability 0 in half precision."""
    return losses(lambda name, nats: nats * math.nan if name == "image" else nats)


def trunk_detached() -> AbstractContextManager[None]:
    """Hidden states without their gradient: only the head learns."""

    def make(original: Any) -> Any:
        return lambda self, row: original(self, row).detach()

    return replaced(JointPolicy, "hidden_states_of", make)


def one_place_off() -> AbstractContextManager[None]:
    """Each target is predicted from the place after the one before it."""

    def make(original: Any) -> Any:
        def batch(*arguments: Any) -> Any:
            made = original(*arguments)
            return replace(made, predictors=made.predictors + 1)

        return batch

    return replaced(sft_learner, "make_batch", make)


def curve_of_one_step() -> AbstractContextManager[None]:
    """The loss that is shown is of a step long past."""
    kept: dict[str, float] = {}

    def make(original: Any) -> Any:
        def metrics(self: SftLearner, sums: Any) -> dict[str, float]:
            kept.update({} if kept else original(self, sums))
            return dict(kept)

        return metrics

    return replaced(SftLearner, "_metrics", make)


def optimizer_stopped() -> AbstractContextManager[None]:
    """A step of the optimizer that moves nothing."""
    return replaced(RankEngine, "step", lambda _: lambda self, number: 1.0)


def rate_is_over() -> AbstractContextManager[None]:
    """A schedule that has come to its end."""
    return replaced(sft_learner, "learning_rate", lambda _: lambda *arguments: 0.0)


def rate_too_high() -> AbstractContextManager[None]:
    """A rate with its exponent lost."""
    return replaced(sft_learner, "learning_rate", lambda _: lambda *arguments: 2.0)


FAULTS: Sequence[tuple[Callable[[], AbstractContextManager[None]], str]] = (
    (image_marks_lost, "no_gradient"),
    (text_marks_lost, "no_gradient"),
    (codes_detached, "no_gradient"),
    (words_weigh_nothing, "no_gradient"),
    (trunk_detached, "no_gradient"),
    (codes_dominate, "dominating_modality"),
    (gradient_explodes, "gradient_spike"),
    (nan_nats, "nonfinite"),
    (row_lost, "lost_rows"),
    (row_twice, "lost_rows"),
    (optimizer_stopped, "frozen_weights"),
    (rate_is_over, "learning_rate_zero"),
    (rate_too_high, "loss_spike"),
    (one_place_off, "loss_spike"),
    (curve_of_one_step, "flat_loss"),
    (same_sequences_again, "repeated_conversations"),
    (heldout_learned, "evaluation_leak"),
    (slow_disk, "data_wait"),
)
CLEAN: Sequence[tuple[str, tuple[str, ...]]] = (
    ("as it is", ()),
    ("4 sequences a step", ("train.samples_per_step=4",)),
    ("epochs of 3 steps", ("train.samples_per_step=300",)),
    ("bfloat16 at a low rate", ("model.dtype=bfloat16", "learner.zero_stage=1", "learner.lr=2e-5")),
    ("a mean of each modality", ("loss.reduction=modalities", "loss.form=masked")),
)
"""Names and settings of runs without a fault."""
