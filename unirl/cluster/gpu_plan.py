"""What lies on each GPU of a run, and whether a card holds it. Arithmetic on the actor plan; starts nothing."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unirl.cluster.plan import GIB, PlannedActor
from unirl.config import RlConfig
from unirl.models.checkpoint import read_json

CARD_GIB = 80e9 / GIB
"""Room on a card of 80 GB. Such cards show 4 to 5 GiB more, which is left to CUDA graphs, buffers and fragments."""
LIVE_WEIGHTS = 10**9
"""DeepSpeed's default: ZeRO-3 keeps at most so many gathered weights at once."""
WIDTH_COPIES, MLP_COPIES = 20, 5
"""Values of a token that one decoder layer keeps for its backward pass, in widths of the trunk and of its MLP."""

Parts = tuple[tuple[str, float], ...]
"""Actors on one GPU with their GiB."""


@dataclass(frozen=True, slots=True)
class GpuLoad:
    """GPUs that hold the same."""

    count: int
    parts: Parts

    @property
    def gib(self) -> float:
        """Memory of all parts together."""
        return sum(gib for _, gib in self.parts)

    @property
    def fits(self) -> bool:
        """Whether one card of 80 GB holds it."""
        return self.gib <= CARD_GIB


def activations_gib(config: RlConfig, checkpoint: Path, num_parameters: int) -> float | None:
    """Most that one micro-batch takes on a rank's GPU beside weights, gradients and optimizer; None if unknown.

    Each of `learner.max_tokens_per_micro_batch` tokens leaves the input of every layer (or, without activation
    checkpointing, all that a layer keeps), one layer is recomputed at a time, and every token is taken for scored:
    logits over the vocabulary and their gradient, with a copy of the head and its gradient, in float32. ZeRO-3 adds
    what it has gathered. Attention is taken to build no scores, as its kernels on GPUs do.

    Args:
        config: the run's.
        checkpoint: folder whose config.json states the sizes of the trunk.
        num_parameters: weights of the checkpoint.
    """
    raw = read_json(checkpoint / "config.json")
    raw = raw.get("text_config") or raw
    names = (
        ("hidden_size", "d_model"),
        ("intermediate_size", "mlp_hidden_size"),
        ("num_hidden_layers", "n_layers"),
        ("vocab_size",),
    )
    stated = [next((raw[key] for key in keys if key in raw), None) for keys in names]
    sizes = [size for size in stated if isinstance(size, int)]
    if len(sizes) < len(names):
        return None
    width, mlp, layers, vocabulary = sizes
    tokens, value = config.learner.max_tokens_per_micro_batch, 2 if config.model.dtype == "bfloat16" else 4
    layer = tokens * (WIDTH_COPIES * width + MLP_COPIES * mlp) * value
    kept = layers * tokens * width * value + layer if config.learner.activation_checkpointing else layers * layer
    head = 2 * 4 * vocabulary * (tokens + width)
    gathered = min(num_parameters, LIVE_WEIGHTS) * value if config.learner.zero_stage == 3 else 0
    return (kept + head + gathered) / GIB


def gpu_loads(plan: Sequence[PlannedActor], config: RlConfig, activations: float | None) -> list[GpuLoad]:
    """What lies on each GPU: a whole card for who asks for one, shared ones filled in the order of the plan.

    Args:
        plan: every actor of the run, as `actor_plan` orders them.
        config: says whether rollout workers share the learner's cards, dealt out in turn.
        activations: GiB of a micro-batch on each of the learner's ranks.
    """
    num_ranks, colocated = config.learner.num_ranks, config.cluster.placement == "colocated"
    # The first cards are the ranks'.
    cards: list[tuple[float, Parts]] = [(0.0, ())] * (num_ranks if colocated or config.learner.num_gpus else 0)
    workers = 0
    for actor in plan:
        more = (activations or 0.0) if actor.role == "learner" else 0.0
        for number in range(actor.count):
            card = number if actor.role == "learner" else None
            if colocated and actor.role.startswith("rollout."):
                card, workers = workers % num_ranks, workers + 1
            if not actor.num_gpus:
                continue
            if card is None:
                room = (index for index, (taken, _) in enumerate(cards) if taken + actor.num_gpus <= 1 + 1e-6)
                card = next(room, len(cards))
            cards += [(0.0, ())] * (card == len(cards))
            taken, parts = cards[card]
            cards[card] = taken + actor.num_gpus, (*parts, (actor.role, actor.memory_gib + more))
    return [GpuLoad(count, parts) for parts, count in Counter(parts for _, parts in cards if parts).items()]


def render_loads(loads: Sequence[GpuLoad], activations: float | None) -> str:
    """The cards as a table for people."""
    lines = [f"on each GPU of 80 GB, {CARD_GIB:.1f} GiB:"]
    for load in loads:
        shown = " + ".join(f"{role} {gib:.1f}" for role, gib in load.parts)
        verdict = "fits" if load.fits else "DOES NOT FIT"
        lines.append(f"{load.count:>3} x {load.gib:>6.1f} GiB  {verdict:<12}  {shown}")
    known = activations is not None
    counted = f"at most {activations:.1f} GiB of the learner's" if known else "not counted, config.json states no sizes"
    return "\n".join([*lines, f"activations: {counted}"])
