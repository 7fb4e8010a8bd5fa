"""`unirl replay`: the update of a recorded step once more, from the journal alone, and what it would have been else."""

import hashlib
import json
import logging
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from unirl.config import RlConfig
from unirl.config_loading import load_config
from unirl.config_rules import ConfigError, Problem
from unirl.data.atomic import DataError
from unirl.data.pair_source import PairSource
from unirl.jobs.assets import resolve_checkpoint, resolve_pairs
from unirl.jobs.parts import Learners, open_learner, pair_settings
from unirl.jobs.rebuild import rebuild_step, redo_step
from unirl.jobs.run_dirs import is_run
from unirl.models.named_arrays import checksum, to_tensor
from unirl.monitoring.journal import read_step, step_file, weights_after
from unirl.run_files import read_lines

log = logging.getLogger(__name__)

CHANGEABLE = ("algorithm.", "learner.lr", "learner.betas", "learner.weight_decay", "learner.max_grad_norm")
"""Settings, or groups of them, that an update can be asked about: what was sampled and earned is in the journal."""
SHOWN = ("learner/loss", "learner/grad_norm", "learner/lr", "policy/clip_fraction", "policy/kl", "policy/ratio_max")
Weights = dict[str, NDArray[np.generic]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """How another update differs from the run's."""

    settings: list[str]
    num_other_advantages: int
    """Trajectories whose advantage is another one."""
    length_ratio: float
    """Length of the change of all weights, over that of the run's update."""
    cosine: float
    """Between both changes."""
    max_difference: float
    """Largest difference of one weight."""
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What `replay` found."""

    step: int
    from_step: int
    """Step of the checkpoint that it began with; 0 for the initial weights."""
    recorded: str
    """The run's checksum of the weights after the step (BLAKE3 over names and bytes)."""
    replayed: str
    sha256: str
    """The same of the replayed weights, by SHA-256."""
    equal: bool
    metrics: dict[str, tuple[float | None, float]]
    """The run's value and the replayed one, by metric."""
    change: Change | None = None


def main(run_dir: Path, step: int, perturb: Sequence[str], *, as_json: bool = False) -> int:
    """Make the update of a step once more; returns 0 when its weights equal the run's to the bit, else 1.

    Args:
        run_dir: a run, finished or not; nothing in it is changed.
        step: counted from 1.
        perturb: key=value settings to ask about, for this step alone.
        as_json: print one JSON object.

    Raises:
        DataError: no such run or step, steps without a journal before it, or a step that gives other weights.
        ConfigError: a setting that an update does not depend on.
    """
    if not is_run(run_dir):
        raise DataError(f"{run_dir}: expected a run directory with a run.json; got none; see `unirl runs` or runs/")
    config = load_config([run_dir / "config.yaml"], [])
    other = load_config([run_dir / "config.yaml"], check_changeable(perturb)) if perturb else None
    start = start_of(run_dir, step)
    facts = json.loads((run_dir / "run.json").read_text())
    replay = Replayer(run_dir, config, threads=facts.get("learner_threads", 1))
    found = replay.run(start, step, other, perturb)
    sys.stdout.write((json.dumps(asdict(found), indent=2) if as_json else shown(found)) + "\n")
    return 0 if found.equal else 1


def check_changeable(perturb: Sequence[str]) -> list[str]:
    """The settings, if each is one that the update alone depends on.

    Raises:
        ConfigError: names the others.
    """
    rule = "is not a setting of the update: what was sampled and earned stays as the journal has it"
    fix = f"choose from {', '.join(name.rstrip('.') for name in CHANGEABLE)}"
    wrong = [setting for setting in perturb if not setting.startswith(CHANGEABLE)]
    if wrong:
        pairs = [setting.partition("=") for setting in wrong]
        raise ConfigError([Problem(key, value, rule, fix) for key, _, value in pairs])
    return list(perturb)


def start_of(run_dir: Path, step: int) -> int:
    """Step of the newest checkpoint before this one from which the journal leads to it without a gap.

    Raises:
        DataError: the step, or one on the way to it, has no journal.
    """
    saved = sorted(int(file.parent.name[5:]) for file in run_dir.glob("checkpoints/step_*/COMMIT.json"))
    start = max((one for one in saved if one < step), default=0)
    if missing := [one for one in range(start + 1, step + 1) if not step_file(run_dir, one).is_file()]:
        raise DataError(
            f"{run_dir}: expected the journal of every step from {start + 1} to {step}; got none of {missing[:5]}; "
            "choose a step that was run, with monitoring.journal=true"
        )
    return start


class Replayer:
    """A learner of a run's settings without samplers and rewards."""

    def __init__(self, run_dir: Path, config: RlConfig, *, threads: int) -> None:
        """Prepare.

        Args:
            run_dir: the run.
            config: its settings.
            threads: of its learner, since sums depend on how they are divided.
        """
        self._run_dir, self._config, self._threads = run_dir, config, threads
        self._checkpoint = resolve_checkpoint(config.model.path)
        pairs = resolve_pairs(config.data.pairs, config.data.cache_dir)
        self._pairs = PairSource.open(pairs, **pair_settings(config))

    def run(self, start: int, step: int, other: RlConfig | None, perturb: Sequence[str]) -> Replay:
        """From the checkpoint after `start` to the weights after `step`; `other` settings for that step alone."""
        with ExitStack() as stack:
            before_step = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="unirl-replay-")))
            with self._learner(self._config) as learner:
                if start:
                    learner.restore(self._run_dir / "checkpoints" / f"step_{start:08d}")
                for early in range(start + 1, step):
                    log.info("step %d", early)
                    self._redo(learner, early, self._config)
                    self._check(learner, early)
                before = weights_of(learner)[1] if other else {}
                if other:
                    learner.save(before_step, step - 1, {"step": step - 1})
                metrics = self._redo(learner, step, self._config)
                digest, after = weights_of(learner)
            change = None
            if other is not None:
                with self._learner(other) as learner:
                    learner.restore(before_step)
                    measured = self._redo(learner, step, other)
                    length, cosine, largest = compare(before, after, weights_of(learner)[1])
                change = Change(
                    settings=list(perturb),
                    num_other_advantages=self._other_advantages(step, other),
                    length_ratio=length,
                    cosine=cosine,
                    max_difference=largest,
                    metrics={name: measured[name] for name in SHOWN if name in measured},
                )
        recorded, told = weights_after(self._run_dir, step), self._recorded_metrics(step)
        return Replay(
            step=step,
            from_step=start,
            recorded=recorded,
            replayed=digest,
            sha256=sha256_of(after),
            equal=digest == recorded,
            metrics={name: (told.get(name), metrics[name]) for name in SHOWN if name in metrics},
            change=change,
        )

    @contextmanager
    def _learner(self, config: RlConfig) -> Iterator[Learners]:
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            with open_learner(config, self._checkpoint) as learner:
                yield learner
        finally:
            torch.set_num_threads(before)

    def _redo(self, learner: Learners, step: int, config: RlConfig) -> dict[str, float]:
        pairs = self._pairs.batch(step - 1)
        _, metrics = redo_step(learner, self._run_dir, step, pairs, config.algorithm)
        return metrics

    def _check(self, learner: Learners, step: int) -> None:
        """Stop at the first step that does not repeat: what follows would be another run."""
        found, recorded = learner.publish_weights().manifest.checksum, weights_after(self._run_dir, step)
        if found != recorded:
            raise DataError(
                f"{self._run_dir}: expected the weights after step {step} again, checksum {recorded or 'none'}; got "
                f"{found}; the run went on with other settings since, or this machine or torch computes otherwise"
            )

    def _recorded_metrics(self, step: int) -> dict[str, float]:
        lines, _ = read_lines(self._run_dir / "metrics.jsonl")
        return next((line for line in reversed(lines) if line.get("step") == step), {})

    def _other_advantages(self, step: int, other: RlConfig) -> int:
        """Trajectories whose advantage would have been another one."""
        groups = rebuild_step(self._run_dir, step, self._pairs.batch(step - 1), other.algorithm)
        ours = np.concatenate([group.advantages for group in groups])
        theirs = np.array([row.advantage for row in read_step(self._run_dir, step)])
        return int((ours != theirs).sum())


def weights_of(learner: Learners) -> tuple[str, Weights]:
    """Checksum and arrays of the current weights."""
    published: Any = learner.publish_weights()
    named = published.tensors if isinstance(published.tensors, list) else published.tensors()
    return published.manifest.checksum, dict(named)


def sha256_of(weights: Weights) -> str:
    """SHA-256 over names and bytes, in order."""
    return checksum(weights.items(), hashlib.sha256())


def compare(before: Weights, after: Weights, other: Weights) -> tuple[float, float, float]:
    """Length of the other change over that of the run's, cosine between both, largest difference of one weight."""
    dot = ours = theirs = largest = 0.0
    for name, start in before.items():
        origin = to_tensor(start).double()
        mine, yours = to_tensor(after[name]).double() - origin, to_tensor(other[name]).double() - origin
        dot, ours, theirs = dot + (mine * yours).sum(), ours + mine.square().sum(), theirs + yours.square().sum()
        largest = max(largest, float((mine - yours).abs().max())) if mine.numel() else largest
    lengths = math.sqrt(ours), math.sqrt(theirs)
    cosine = float(dot) / (lengths[0] * lengths[1]) if all(lengths) else math.nan
    return lengths[1] / lengths[0] if lengths[0] else math.inf, cosine, largest


def shown(found: Replay) -> str:
    """The findings as a table for people."""
    begun = f"the checkpoint after step {found.from_step}" if found.from_step else "the initial weights"
    verdict = "equal to the bit" if found.equal else "DIFFERENT"
    lines = [
        f"step {found.step}, from {begun}: {verdict}",
        f"  run       {found.recorded or 'not recorded'}",
        f"  replayed  {found.replayed}",
        f"  sha256    {found.sha256}",
        "",
    ]
    change = found.change
    lines.append(f"{'':<24}{'run':>14}{'replayed':>14}" + (f"{'perturbed':>14}" if change else ""))
    for name, (run, replayed) in found.metrics.items():
        told = "" if run is None else f"{run:.6g}"
        line = f"{name:<24}{told:>14}{replayed:>14.6g}"
        lines.append(line + (f"{change.metrics[name]:>14.6g}" if change and name in change.metrics else ""))
    if change:
        lines += [
            "",
            f"with {' '.join(change.settings)}",
            f"  advantages that differ    {change.num_other_advantages}",
            f"  length of the change      {change.length_ratio:.4g} of the run's",
            f"  cosine to the run's       {change.cosine:.6f}",
            f"  largest difference        {change.max_difference:.3g} in one weight",
        ]
    return "\n".join(lines)
