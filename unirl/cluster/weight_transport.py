"""Weights from learner rank 0 to the samplers without the object store: by one broadcast, or in shared memory.

Either way rank 0 keeps a copy of the published weights in its own memory, and whoever is not reached by its transport
(a worker that joins late, one on another machine, all of them when a broadcast breaks) is served through the object
store from that copy. What arrives is checked against the manifest by name, shape and checksum as always.
"""

import mmap
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from unirl.types import TensorSpec, WeightsManifest

NamedArray = tuple[str, NDArray[np.generic]]
PART_BYTES = 64 * 2**20
"""Broadcast at a time; one tensor may be larger."""
ALIGNMENT = 16
"""Each tensor begins at a multiple of so many bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """One member's place in a group that broadcasts."""

    key: str
    """Tells this group from all others."""
    host: str
    port: int
    """Where rank 0 keeps the group's store."""
    rank: int
    """0 sends."""
    size: int
    backend: str
    """gloo, or nccl where every member has a GPU of its own."""
    timeout_s: float
    """Patience with the others, for joining and for each part."""


def open_store(host: str, port: int) -> TCPStore:
    """Where the members of a group find each other, kept by rank 0."""
    return TCPStore(host, port, is_master=True, wait_for_workers=False)


class BroadcastGroup:
    """A process group beside all others of this process: neither the learner's nor an engine's is touched."""

    def __init__(self, membership: Membership, store: Store | None = None) -> None:
        """Join; blocks until all members are there.

        Args:
            membership: this member's place.
            store: rank 0's own store; the others connect to it.

        Raises:
            RuntimeError: somebody did not come in time.
        """
        self.membership = membership
        timeout = timedelta(seconds=membership.timeout_s)
        if store is None:
            store = TCPStore(membership.host, membership.port, is_master=False, timeout=timeout)
        store = PrefixStore(membership.key, store)
        rank, size = membership.rank, membership.size
        if membership.backend == "nccl":
            # Else a wait returns at once, and a lost member ends this process.
            os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
            options = torch.distributed.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._group: Any = torch.distributed.ProcessGroupNCCL(store, rank, size, options)
            self._device = "cuda"
        else:
            self._group = torch.distributed.ProcessGroupGloo(store, rank, size, timeout)
            self._device = "cpu"

    def send(self, manifest: WeightsManifest, named: Sequence[NamedArray]) -> None:
        """Broadcast the manifest's arrays, part by part.

        Raises:
            RuntimeError: a member is lost.
        """
        arrays = dict(named)
        for part in parts_of(manifest):
            buffer = np.zeros(size_of(part), np.uint8)
            fill(buffer, part, arrays)
            self._broadcast(torch.from_numpy(buffer).to(self._device))

    def receive(self, manifest: WeightsManifest) -> list[NamedArray]:
        """The manifest's arrays as rank 0 sends them.

        Raises:
            RuntimeError: a member is lost.
        """
        named: list[NamedArray] = []
        for part in parts_of(manifest):
            buffer = torch.zeros(size_of(part), dtype=torch.uint8, device=self._device)
            self._broadcast(buffer)
            named += views(buffer.cpu().numpy(), part)
        return named

    def _broadcast(self, buffer: Tensor) -> None:
        options = torch.distributed.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self._group.broadcast([buffer], options).wait()


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedWeights:
    """Where one machine's processes find published weights: memory without a name, gone when nobody holds it."""

    node_id: str
    process: int
    descriptor: int
    name: str
    """Tells it from what the descriptor may stand for later."""
    num_bytes: int

    def named(self, manifest: WeightsManifest) -> list[NamedArray] | None:
        """The manifest's arrays, read-only, without a copy; None on another machine, and when the owner let it go."""
        if ray.get_runtime_context().get_node_id() != self.node_id:
            return None
        try:
            with Path(f"/proc/{self.process}/fd/{self.descriptor}").open("rb") as file:
                if self.name not in str(Path(f"/proc/self/fd/{file.fileno()}").readlink()):
                    return None
                memory = mmap.mmap(file.fileno(), self.num_bytes, prot=mmap.PROT_READ)
        except OSError:
            return None
        return list(views(np.frombuffer(memory, np.uint8), manifest.tensors))


class SharedMemory:
    """The owner's side of `SharedWeights`."""

    def __init__(self, manifest: WeightsManifest, named: Sequence[NamedArray]) -> None:
        """Copy the arrays into new memory."""
        size, name = size_of(manifest.tensors), f"unirl-weights-{uuid.uuid4().hex}"
        self._descriptor = os.memfd_create(name)
        os.ftruncate(self._descriptor, size)
        with mmap.mmap(self._descriptor, size) as memory:
            buffer = np.frombuffer(memory, np.uint8)
            fill(buffer, manifest.tensors, dict(named))
            del buffer
        self.handle = SharedWeights(
            node_id=ray.get_runtime_context().get_node_id(),
            process=os.getpid(),
            descriptor=self._descriptor,
            name=name,
            num_bytes=size,
        )

    def close(self) -> None:
        """Let it go; whoever has mapped it keeps it."""
        os.close(self._descriptor)


def parts_of(manifest: WeightsManifest, part_bytes: int = PART_BYTES) -> Iterator[list[TensorSpec]]:
    """Consecutive tensors, at most so many bytes to a part; the same wherever it is asked."""
    part: list[TensorSpec] = []
    for spec in manifest.tensors:
        if part and size_of([*part, spec]) > part_bytes:
            yield part
            part = []
        part.append(spec)
    if part:
        yield part


def size_of(specs: Sequence[TensorSpec]) -> int:
    """Bytes of the tensors one after the other, each aligned."""
    return sum(_room(spec) for spec in specs)


def fill(buffer: NDArray[np.uint8], specs: Sequence[TensorSpec], arrays: dict[str, NDArray[np.generic]]) -> None:
    """Write the arrays into the buffer where `views` will find them."""
    for (_, target), spec in zip(views(buffer, specs), specs, strict=True):
        np.copyto(target, arrays[spec.name])


def views(buffer: NDArray[np.uint8], specs: Sequence[TensorSpec]) -> Iterator[NamedArray]:
    """Each tensor's place in the buffer, as an array."""
    start = 0
    for spec in specs:
        own = buffer[start : start + _num_bytes(spec)]
        yield spec.name, own.view(_numpy_type(spec)).reshape(spec.shape)
        start += _room(spec)


def _numpy_type(spec: TensorSpec) -> np.dtype[Any]:
    return np.dtype("uint16" if spec.dtype == "bfloat16" else spec.dtype)


def _num_bytes(spec: TensorSpec) -> int:
    return int(np.prod(spec.shape, dtype=np.int64)) * _numpy_type(spec).itemsize


def _room(spec: TensorSpec) -> int:
    return -(-_num_bytes(spec) // ALIGNMENT) * ALIGNMENT
