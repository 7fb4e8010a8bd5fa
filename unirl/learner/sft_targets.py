"""Which tokens of a conversation are learned, and the restricted loss over them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unirl.algorithms.cross_entropy import masked_cross_entropy, sliced_cross_entropy
from unirl.config import SftLossConfig
from unirl.models.interleaved import ChatLayout, InterleavedPolicy, PackedRow
from unirl.types import TokenKind, TokenSequence

Modality = Literal["text", "image"]
MODALITIES: tuple[Modality, ...] = ("text", "image")


def target_mask(sequence: TokenSequence, config: SftLossConfig) -> NDArray[np.bool_]:
    """[L] true for the tokens whose prediction counts; the first token has nothing before it."""
    ignored = [TokenKind.PLACEHOLDER]
    ignored += [TokenKind.END] if config.end_of_image == "ignored" else []
    ignored += [TokenKind.ROW_END] if config.row_ends == "ignored" else []
    mask = ~np.isin(sequence.kinds, ignored)
    if config.targets == "response":
        mask &= sequence.in_loss
    mask[0] = False
    return mask


def count_targets(sequence: TokenSequence, config: SftLossConfig) -> dict[Modality, int]:
    """Targets of each modality."""
    mask = target_mask(sequence, config)
    images = int((mask & (sequence.kinds == TokenKind.CODE)).sum())
    return {"text": int(mask.sum()) - images, "image": images}


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Some sequences as one row on a device, with their targets."""

    row: PackedRow
    predictors: Tensor
    """int64 [N] places whose hidden states predict."""
    targets: Tensor
    """int64 [N] ids that they predict."""
    is_code: Tensor
    """bool [N] true where the target is an image code."""


def make_batch(sequences: Sequence[TokenSequence], config: SftLossConfig, device: torch.device | str) -> Batch:
    """The sequences one behind the other."""
    ids = np.concatenate([sequence.ids for sequence in sequences]).astype(np.int64)
    kinds = np.concatenate([sequence.kinds for sequence in sequences])
    places = np.flatnonzero(np.concatenate([target_mask(sequence, config) for sequence in sequences]))
    arrays = (ids, places - 1, ids[places], kinds[places] == TokenKind.CODE)
    on_device = [torch.from_numpy(array).to(device, non_blocking=True) for array in arrays]
    row = PackedRow(
        ids=on_device[0],
        lengths=tuple(len(sequence.ids) for sequence in sequences),
        pixels=tuple(image for sequence in sequences for image in sequence.pixels),
    )
    return Batch(row=row, predictors=on_device[1], targets=on_device[2], is_code=on_device[3])


@dataclass(frozen=True, slots=True, kw_only=True)
class ModalityLoss:
    """The targets of one modality in a batch."""

    nats: Tensor
    """float32 [n] of each target, with gradient."""
    hits: Tensor
    """bool [n] whether the target was the likeliest."""


class RestrictedLoss:
    """UnifiedVisual appendix A: each target competes with the ids of its own modality only."""

    def __init__(self, layout: ChatLayout, config: SftLossConfig, device: torch.device | str) -> None:
        vocabulary = layout.vocabulary
        self._vocabulary, self._config = vocabulary, config
        is_code = torch.from_numpy(vocabulary.is_code)
        self._is_code = is_code if config.restrict else torch.zeros_like(is_code)
        drawable = torch.from_numpy(vocabulary.drawable_text.copy())
        # What the layout writes may be a target, though nobody draws it.
        drawable[sorted(layout.written)] = True
        self._allowed = (is_code | drawable if config.text_ids == "drawable" else torch.ones_like(is_code)).to(device)
        # Place of each text id among the text ids.
        self._rank = (torch.cumsum(~is_code, 0) - 1).to(device)
        # None spares a copy of the logits.
        text_ids = torch.from_numpy(vocabulary.text_ids).to(device)
        self._allowed_text = self._allowed[text_ids] if config.text_ids == "drawable" else None
        self._is_code = self._is_code.to(device)

    def __call__(
        self,
        policy: InterleavedPolicy,
        batch: Batch,
        num_parts: dict[Modality, int],
        on_gradient: Callable[[Tensor], None],
    ) -> dict[Modality, ModalityLoss]:
        """Nats of every target of the batch, in as many parts of each modality as every rank makes here.

        Args:
            policy: the model.
            batch: what goes through it.
            num_parts: of each modality.
            on_gradient: is given the gradient [N, H] at the states that predict; not called without one.
        """
        hidden = policy.hidden_states_of(batch.row)[batch.predictors]
        if hidden.requires_grad:
            hidden.register_hook(on_gradient)
        if self._config.form == "masked":
            logits = policy.logits(hidden, "both")
            nats, hits = masked_cross_entropy(logits, batch.targets, self._is_code, self._allowed)
            return {
                "text": ModalityLoss(nats=nats[~batch.is_code], hits=hits[~batch.is_code]),
                "image": ModalityLoss(nats=nats[batch.is_code], hits=hits[batch.is_code]),
            }
        text, codes = batch.targets[~batch.is_code], batch.targets[batch.is_code]
        text_nats, text_hits = sliced_cross_entropy(
            hidden[~batch.is_code],
            self._rank[text],
            lambda rows: policy.logits(rows, "text"),
            self._allowed_text,
            num_parts=num_parts["text"],
        )
        code_nats, code_hits = sliced_cross_entropy(
            hidden[batch.is_code],
            codes - self._vocabulary.first_code,
            lambda rows: policy.logits(rows, "image"),
            num_parts=num_parts["image"],
        )
        return {
            "text": ModalityLoss(nats=text_nats, hits=text_hits),
            "image": ModalityLoss(nats=code_nats, hits=code_hits),
        }
