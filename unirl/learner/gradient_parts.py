"""Gradients by part of a batch: where DeepSpeed sums them up, and exact products of what each part added.

A sum is read between parts, so that nothing of how it is made changes. Under ZeRO-2 and 3 it is this rank's shard of
the mean over ranks; under ZeRO-0 and 1 each rank has a sum of its own, of all weights, and they meet here piece by
piece.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

PIECE_ELEMENTS, LARGE_ELEMENTS = 2**16, 2**22
"""Elements of a sum that are taken at a time: as many as a core's cache holds, or as make a transfer worth while."""

Products = list[list[float]]
"""Scalar product of every two parts, in the order in which they ended."""


def gradient_sums(engine: Any, trainable: Sequence[nn.Parameter]) -> list[Tensor]:
    """The gradient so far as DeepSpeed holds it in this process, between two backward passes: flat views, no copies.

    The same pieces in the same order every time; one that nothing was added to yet is zero.

    Args:
        engine: of `unirl.learner.engine.build_engine`.
        trainable: the parameters that it trains.
    """
    optimizer = engine.optimizer
    if (flat := getattr(optimizer, "grad_partitions_flat_buffer", None)) is not None:  # ZeRO-3
        return [flat]
    if (flats := getattr(optimizer, "fp32_groups_gradients_flat", None)) is not None:  # ZeRO-1 in bfloat16
        return list(flats)
    if getattr(optimizer, "partition_gradients", False):  # ZeRO-2
        return [piece for group in range(len(optimizer.bit16_groups)) for piece in _shard(optimizer, group)]
    return [_flat(parameter.grad, parameter.numel(), parameter.device) for parameter in trainable]


def _shard(optimizer: Any, group: int) -> list[Tensor]:
    """This rank's part of one group of parameters under ZeRO-2."""
    rank, size = dist.get_rank(group=optimizer.real_dp_process_group[group]), int(optimizer.partition_size[group])
    if optimizer._use_compact_grad_partition_buffer(group):
        buffers = optimizer.averaged_gradients.get(group)
        return [_flat(None if buffers is None else buffers.flat_partition, size, optimizer.device)]
    if optimizer.cpu_offload and torch.cuda.is_available():
        torch.cuda.synchronize()  # copies to main memory that are under way
    sums, pieces = optimizer.all_grad_tensors.get(group), []
    for index, parameter in enumerate(optimizer.params_in_partition[group]):
        key = optimizer.get_param_id(parameter)
        own = optimizer.accumulated_grads_in_cpu.get(key) if optimizer.cpu_offload else sums and sums[index]
        # A parameter may begin on the rank before, and end on the next one.
        start = int(optimizer.grad_start_offset[group][rank][key])
        room = size - int(optimizer.grad_partition_insertion_offset[group][rank][key])
        whole = _flat(own, parameter.numel(), optimizer.device)
        pieces.append(whole.narrow(0, start, min(parameter.numel() - start, room)))
    return pieces


def _flat(tensor: Tensor | None, size: int, device: torch.device | str) -> Tensor:
    """The tensor as a vector; without one, zeros that take no memory."""
    return torch.zeros((), device=device).expand(size) if tensor is None else tensor.detach().reshape(-1)


class GradientParts:
    """Keeps a copy of the sum at the end of each part but the last, in main memory; 4 bytes an element."""

    def __init__(self, read: Callable[[], list[Tensor]], num_ranks: int, *, summed_over_ranks: bool) -> None:
        """Begin with a gradient of zero.

        Args:
            read: the sum so far, as `gradient_sums` gives it.
            num_ranks: of the learner.
            summed_over_ranks: whether the sum is this rank's shard of all ranks' gradient, else its own addend of the
                whole one, `num_ranks` times too large.
        """
        self._read, self._num_ranks, self._summed = read, num_ranks, summed_over_ranks
        self._copies: list[Tensor] = []
        self.seconds = 0.0
        """Spent here so far."""

    def end_part(self) -> None:
        """What was added since the part before is a part of its own."""
        started = time.perf_counter()
        pieces = self._read()
        size, pinned = sum(piece.numel() for piece in pieces), any(piece.is_cuda for piece in pieces)
        copy = torch.empty(size, dtype=torch.float32, pin_memory=pinned)
        start = 0
        for piece in pieces:
            copy[start : start + piece.numel()].copy_(piece)
            start += piece.numel()
        self._copies.append(copy)
        self.seconds += time.perf_counter() - started

    def products(self) -> tuple[Products, float]:
        """Scalar products of the parts, of which the last ends now, over all ranks; and the ranks' mean seconds.

        Every rank must call it. Differences and products are taken in float64, sums over ranks of whole gradients in
        float32, as the optimizer's are.
        """
        started = time.perf_counter()
        num_parts = len(self._copies) + 1
        products = torch.zeros(num_parts, num_parts, dtype=torch.float64)
        for start, piece in self._pieces():
            sums = [copy[start : start + len(piece)].to(piece.device, torch.float64) for copy in self._copies]
            ends = torch.stack([*sums, piece.double()])
            ends[1:] -= ends[:-1].clone()
            if not self._summed:
                parts = ends.float()
                dist.all_reduce(parts)
                ends = parts.double() / self._num_ranks
            products += (ends @ ends.T).cpu()
        seconds = self.seconds + time.perf_counter() - started
        if self._num_ranks == 1:
            return products.tolist(), seconds
        device = "cuda" if torch.cuda.is_available() else "cpu"
        shared = torch.cat([products.flatten(), torch.tensor([seconds], dtype=torch.float64)]).to(device)
        dist.all_reduce(shared)
        shared[-1] /= self._num_ranks
        if not self._summed:
            shared[:-1] /= self._num_ranks
        return shared[:-1].view(num_parts, num_parts).tolist(), float(shared[-1])

    def _pieces(self) -> Iterator[tuple[int, Tensor]]:
        """The sum in order as vectors of some size, and where each begins."""
        begins, held, place = 0, list[Tensor](), 0
        wanted = PIECE_ELEMENTS if self._summed and not torch.cuda.is_available() else LARGE_ELEMENTS
        for whole in self._read():
            for piece in whole.split(wanted):
                held.append(piece)
                place += len(piece)
                if place - begins >= wanted:
                    yield begins, torch.cat(held)
                    begins, held = place, []
        if held:
            yield begins, torch.cat(held)


def norm(products: Products, parts: Sequence[int]) -> float:
    """Length of the sum of some parts."""
    return max(0.0, sum(products[i][j] for i in parts for j in parts)) ** 0.5


def cosine(products: Products, one: Sequence[int], other: Sequence[int]) -> float | None:
    """Cosine between the sum of some parts and that of others; None where one of them is zero."""
    lengths = norm(products, one) * norm(products, other)
    return sum(products[i][j] for i in one for j in other) / lengths if lengths else None
