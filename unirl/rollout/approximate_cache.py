"""Lumina-DiMOO's approximate cache (ML-Cache): most steps compute only the positions that the model is least sure of.

Every position keeps the keys, values and logits of its last computation, so a cell revealed since then is still seen as
a mask until it is computed again. The log-probabilities are those of the law that was drawn from, which is not the one
that a learner computes: for inference only. Shapes: B rows, T positions, n of them computed, V ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unirl.models.canvases import CellLaw, padded, picked
from unirl.models.llada import KeysAndValues, LladaForDiffusion


@dataclass(frozen=True, slots=True, kw_only=True)
class ApproximateCache:
    """How much is reused, and when everything is computed again; the defaults are those of the official code.

    Raises:
        ValueError: a field is out of its range.
    """

    keep: float = 0.9
    """Share of the positions, in [0, 1), whose keys, values and logits are reused; 0 reuses nothing."""
    warmup: float = 0.3
    """Share of the steps, in [0, 1), after which reuse begins; the step at this mark still computes everything."""
    refresh_every: int = 5
    """Steps from one full computation to the next after the warm-up, at least 1; 1 reuses nothing."""

    def __post_init__(self) -> None:
        for name, share in (("keep", self.keep), ("warmup", self.warmup)):
            if not 0 <= share < 1:
                raise ValueError(f"cache: expected {name} in [0, 1); got {share}; 0.9 means nine tenths")
        if self.refresh_every < 1:
            raise ValueError(
                f"cache: expected refresh_every of 1 or more steps; got {self.refresh_every}; "
                f"for no refresh after the warm-up take the number of steps"
            )

    def computes_all(self, step: int, num_steps: int) -> bool:
        """Whether a step computes every position."""
        reusing = step - int(num_steps * self.warmup)
        return reusing <= 0 or reusing % self.refresh_every == 0


class CachedLogits:
    """Logits of one stream's cells step after step: the canvases of one batch, conditional or null."""

    def __init__(self, model: LladaForDiffusion, law: CellLaw, cache: ApproximateCache, num_steps: int) -> None:
        self._model, self._law, self._cache, self._num_steps = model, law, cache, num_steps
        self._kept = KeysAndValues()
        self._logits = torch.empty(0)

    def __call__(self, step: int, canvases: Sequence[NDArray[np.int32]], places: Sequence[NDArray[np.int64]]) -> Tensor:
        """Logits float32 [sum of n, V] of chosen places of each canvas, as last computed; steps in order from 0."""
        model, law = self._model, self._law
        ids, exists = padded(canvases, law.mask_id, model.device)
        if self._cache.computes_all(step, self._num_steps):
            self._logits = model.logits(model.hidden_states(ids, exists, self._kept), law.start, law.stop)
        else:
            where = least_certain(self._logits.amax(2), [len(canvas) for canvas in canvases], 1 - self._cache.keep)
            logits = model.logits(model.hidden_states(ids, exists, self._kept, where), law.start, law.stop)
            self._logits.scatter_(1, where[:, :, None].expand_as(logits), logits)
        return picked(self._logits, places)


def least_certain(certainty: Tensor, lengths: Sequence[int], share: float) -> Tensor:
    """Positions int64 [B, n] of each row up to its quantile `share` of certainty, equals included.

    A row with fewer than n of them repeats its first, so that what it computes does not depend on its company.

    Args:
        certainty: float32 [B, T]; officially the highest logit among the image codes, in prompt and marks as well.
        lengths: of each row without its padding.
        share: in (0, 1].
    """
    rows: list[Tensor] = []
    for row, length in zip(certainty, lengths, strict=True):
        own = row[:length]
        rows.append((own <= own.quantile(share)).nonzero()[:, 0])
    longest = max(map(len, rows))
    return torch.stack([torch.cat([row, row[:1].expand(longest - len(row))]) for row in rows])
