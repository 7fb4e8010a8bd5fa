"""What an update measures: sums, counts and extremes that reduce exactly over passes, micro-batches and ranks."""

from collections.abc import Mapping

import torch
from torch import Tensor


class Tally:
    """Sums in float64 and maxima of one rank, kept on the device until `reduce`, so that no pass waits for them."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}

    def add(self, sums: Mapping[str, Tensor]) -> None:
        """Add detached scalars under their names."""
        for name, value in sums.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def maximum(self, name: str, values: Tensor) -> None:
        """Keep the largest of the values seen under this name; nothing happens without values."""
        if values.numel():
            value = values.detach().double().max()
            self._maxima[name] = torch.maximum(self._maxima[name], value) if name in self._maxima else value

    def reduce(self) -> tuple[dict[str, float], dict[str, float]]:
        """Sums and maxima over all ranks, equal on each; ranks may know different names. Every rank must call it."""
        own = ({k: v.item() for k, v in self._sums.items()}, {k: v.item() for k, v in self._maxima.items()})
        everyone: list[tuple[dict[str, float], dict[str, float]]] = [own] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, own)
        sums: dict[str, float] = {}
        maxima: dict[str, float] = {}
        for rank_sums, rank_maxima in everyone:
            for name, value in rank_sums.items():
                sums[name] = sums.get(name, 0.0) + value
            for name, value in rank_maxima.items():
                maxima[name] = max(maxima.get(name, value), value)
        return sums, maxima
