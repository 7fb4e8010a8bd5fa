"""What an update measures: sums, counts and extremes that reduce exactly over passes, micro-batches and ranks."""

import math
import time
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from unirl.algorithms.losses import masked_sum, mean_metrics
from unirl.learner.passes import MicroTensors
from unirl.models.policy import TokenScores
from unirl.types import Task

MODALITIES: dict[Task, str] = {"understanding": "text", "generation": "image"}


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


class Laps:
    """Seconds by name; each lap begins where the one before ended."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._last = time.perf_counter()

    def end(self, name: str) -> None:
        """The time since the last call, or since the beginning, was this."""
        now = time.perf_counter()
        self.seconds[name] += now - self._last
        self._last = now


def measure(tally: Tally, data: MicroTensors, scores: TokenScores, mask: Tensor, difference: Tensor) -> None:
    """Tally what a scoring pass says beside its loss.

    Args:
        tally: where it goes.
        data: the micro-batch.
        scores: of the pass.
        mask: bool [B, T], tokens whose loss the pass carries.
        difference: float32 [B, T] nats, new minus old log-probability.
    """
    modality = MODALITIES[data.task]
    tally.add(
        {
            f"entropy/{modality}": masked_sum(scores.entropy, mask),
            f"tokens/{modality}": mask.sum(),
        }
    )
    if data.micro.counted and bool(mask.any()):
        scored = scores.scored.sum()
        for name, value in scores.metrics.items():
            tally.add({name: value, f"{name}_tokens": scored})
    tally.maximum("log_ratio", torch.where(mask, difference, -math.inf))
    tally.maximum("negative_log_ratio", torch.where(mask, -difference, -math.inf))


def metrics_of(sums: dict[str, float], maxima: dict[str, float], *, num_updates: int) -> dict[str, float]:
    """Full metric names from reduced sums and maxima; a metric without tokens behind it is left out."""
    means = mean_metrics({"tokens": 0.0} | sums)
    named = {
        "policy/ratio_mean": "ratio_mean",
        "policy/ratio_capped_fraction": "ratio_capped_fraction",
        "policy/kl": "kl_old_mean",
        "policy/kl_reference": "kl_ref_mean",
    }
    metrics = {name: means[key] for name, key in named.items() if key in means}
    if "clip_low_fraction" in means:
        metrics["policy/clip_fraction"] = means["clip_low_fraction"] + means["clip_high_fraction"]
    # What took part in a loss, not what arrived: a pass that was left out is missed here.
    metrics |= {f"learner/num_{name}": sums[name] / num_updates for name in ("rows", "tokens") if name in sums}
    for name, value in sums.items():
        if name == "loss" or name.startswith("loss/"):
            metrics[f"learner/{name}"] = value / num_updates
        elif sums.get(f"{name}_tokens"):
            metrics[f"policy/{name}"] = value / sums[f"{name}_tokens"]
    for modality in MODALITIES.values():
        if sums.get(f"tokens/{modality}"):
            metrics[f"policy/entropy/{modality}"] = sums[f"entropy/{modality}"] / sums[f"tokens/{modality}"]
    if means:
        # Beyond e^700 a float is infinite; the loss holds the ratio far below.
        metrics["policy/ratio_max"] = math.exp(min(maxima["log_ratio"], 700.0))
        metrics["policy/ratio_min"] = math.exp(min(-maxima["negative_log_ratio"], 700.0))
    gaps = {m: gap for m in MODALITIES.values() if (gap := maxima.get(f"logprob_gap/{m}", -math.inf)) >= 0}
    metrics.update({f"policy/logprob_gap_max/{modality}": gap for modality, gap in gaps.items()})
    if gaps:
        metrics["policy/logprob_gap_max"] = max(gaps.values())
    return metrics
