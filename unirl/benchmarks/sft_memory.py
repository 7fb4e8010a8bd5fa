"""Peak memory of the restricted loss against full logits, each form in a process of its own.

`python -m unirl.benchmarks.sft_memory FORM JSON` prints bytes: what one forward and backward of the loss added to the
process (to the GPU where there is one), the weights, the states and their gradients aside. Without a GPU it reads
/proc, and so runs on Linux.
"""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from unirl.algorithms.cross_entropy import masked_cross_entropy, sliced_cross_entropy
from unirl.models.joint_policy import JointHead

Form = Literal["full", "masked", "sliced", "sliced, few at once"]
FEW = 64
"""In the last form, positions to a part; each modality is taken in as many parts. The others take all at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadShape:
    """A head and how much goes through it; the default vocabulary is Emu3's."""

    positions: int = 512
    """Targets; half of them are image codes."""
    hidden: int = 64
    vocabulary: int = 184622
    num_codes: int = 32768
    """The last ids of the vocabulary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossMemory:
    """What one form of the loss takes at its peak."""

    form: str
    peak_mib: float
    bytes_per_position: float
    ratio: float
    """Of the peak of full logits to this one."""
    nats: float
    """Of a target in the mean: equal for all restricted forms."""


def measure_memory(shape: HeadShape) -> list[LossMemory]:
    """Every form on the same values; the first, plain cross-entropy over the joint vocabulary, is the baseline."""
    found = {form: _in_its_own_process(form, shape) for form in get_args(Form)}
    return [
        LossMemory(
            form=form,
            peak_mib=own["bytes"] / 2**20,
            bytes_per_position=own["bytes"] / shape.positions,
            ratio=found["full"]["bytes"] / own["bytes"],
            nats=own["nats"],
        )
        for form, own in found.items()
    ]


def _in_its_own_process(form: Form, shape: HeadShape) -> dict[str, float]:
    # Large tensors go back to the system at once, so that holes in the heap do not count.
    command = ["env", "MALLOC_MMAP_THRESHOLD_=1048576"]
    command += [sys.executable, "-m", "unirl.benchmarks.sft_memory", form, json.dumps(asdict(shape))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["killed"])[-1]
        raise RuntimeError(
            f"bench sft: expected the loss {form!r} to run at {shape.positions} positions; its process ended with "
            f"{done.returncode}: {reason}; lower --positions"
        )
    return json.loads(done.stdout)


def spend(form: Form, shape: HeadShape) -> dict[str, float]:
    """Run one form in this process; returns the bytes that it added at the peak, and the mean of its nats."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    head = JointHead(shape.hidden, shape.vocabulary, bias=False)
    head.codes = slice(shape.vocabulary - shape.num_codes, shape.vocabulary)
    with torch.no_grad():
        head.weight.normal_(std=0.02, generator=generator)
    head.to(device)
    hidden = torch.randn(shape.positions, shape.hidden, generator=generator).to(device).requires_grad_()
    half = shape.positions // 2
    targets = torch.cat([torch.randint(0, head.codes.start, (half,), generator=generator),
                         torch.randint(head.codes.start, head.codes.stop, (shape.positions - half,),
                                       generator=generator)]).to(device)  # fmt: skip
    # The first pass, on the two targets in the middle, leaves the gradients where they stay, and the threads.
    _loss(form, head, hidden[half - 1 : half + 1], targets[half - 1 : half + 1]).sum().backward()
    before = _bytes(device)
    nats = _loss(form, head, hidden, targets)
    nats.sum().backward()
    return {"bytes": max(1, _peak(device) - before), "nats": nats.mean().item()}


def _loss(form: Form, head: JointHead, hidden: Tensor, targets: Tensor) -> Tensor:
    """Nats of each target."""
    if form == "full":
        return functional.cross_entropy(head(hidden).float(), targets, reduction="none")
    if form == "masked":
        is_code = torch.zeros(len(head.weight), dtype=torch.bool, device=targets.device)
        is_code[head.codes] = True
        return masked_cross_entropy(head(hidden), targets, is_code, torch.ones_like(is_code))[0]
    num_parts = -(-len(targets) // FEW) if form == "sliced, few at once" else 1
    codes = targets >= head.codes.start
    parts: tuple[tuple[Tensor, int, Any], ...] = ((~codes, 0, "text"), (codes, head.codes.start, "image"))
    return torch.cat(
        [
            sliced_cross_entropy(
                hidden[own], targets[own] - first, lambda rows, part=part: head(rows, part), num_parts=num_parts
            )[0]
            for own, first, part in parts
        ]
    )


def _bytes(device: torch.device) -> int:
    """What is held now, and the start of a new peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # Linux then takes what is resident now for the peak.
    Path("/proc/self/clear_refs").write_text("5")
    return _peak(device)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    asked: Any = sys.argv[1]
    sys.stdout.write(json.dumps(spend(asked, HeadShape(**json.loads(sys.argv[2])))))
