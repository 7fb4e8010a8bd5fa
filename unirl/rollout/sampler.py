"""What a sampler must offer, whatever engine is behind it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from unirl.config import SamplingConfig
from unirl.types import RolloutGroup, RolloutRequest, WeightsManifest

NamedArrays = Iterable[tuple[str, NDArray[np.generic]]]
"""Weights in the manifest's order. bfloat16 travels as uint16 of the same shape."""


class Sampler(Protocol):
    """Samples completions in one process. Equal requests and weights give equal tokens in any company and order."""

    policy_version: int
    """Version of the weights in use; -1 for those of the checkpoint the sampler was built from until told otherwise."""

    between_tokens: Callable[[], None] | None
    """Called again and again while it samples, between tokens where a completion is drawn token after token; may load
    weights, under which completions then go on. Each token is drawn, and its log-probability taken, under one version
    with all tokens before it read by that version, and the versions are noted."""

    def sample(self, requests: Sequence[RolloutRequest], sampling: SamplingConfig) -> list[RolloutGroup]:
        """One group per request, in their order."""
        ...

    def rest(self) -> None:
        """Give back what memory it can until it is needed again; the next call wakes it by itself."""
        ...

    def weight_slices(self) -> dict[str, str] | None:
        """Checksums of a fixed slice of the weights that it samples with, by the manifest's names.

        What an engine keeps in another form than the checkpoint is left out. None while it rests and has put its
        weights away, so that there is nothing to look at.
        """
        ...

    def load_weights(self, manifest: WeightsManifest, tensors: NamedArrays) -> None:
        """Replace the weights in place and drop every cached prefix.

        Raises:
            ValueError: the manifest does not match this sampler's weights by name and shape; nothing is changed.
        """
        ...
