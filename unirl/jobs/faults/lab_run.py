"""A short run of the lab as a user makes it, with a fault planted in it, and what its sentinels said."""

import io
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from time import perf_counter
from typing import Any

from unirl.cluster.sft_worker import SftWorker
from unirl.config import RlConfig, SftConfig
from unirl.config_loading import load_config
from unirl.data.interleaved import write_interleaved
from unirl.jobs import rl, sft
from unirl.jobs.faults.bank import Clean, Fault
from unirl.jobs.faults.planting import replaced
from unirl.jobs.flow import Synchronous
from unirl.lab.unified_visual import SUBSETS, heldout_samples, training_samples
from unirl.monitoring.durable_files import read_lines

PLANTED_AT = 3
"""Step from which on a fault is there: two are as they should be."""
MOST_STEPS = 3
"""Steps in which it must be caught, the first with it among them."""
CLEAN_STEPS = 8

SMALL = (
    "rollout.backend=torch",
    "rollout.pairs_per_step=6",
    "rollout.num_understanding=6",
    "rollout.num_generation=6",
    "train.save_every=0",
    "evaluation.enabled=false",
    "data.max_pairs=96",
    "monitoring.pairs_every=0",
)

SMALL_SFT = (
    "model.family=anole",
    "model.path=lab:anole",
    "data.max_length=192",
    "learner.zero_stage=0",
    "learner.lr=1e-3",
    "learner.betas=[0.9, 0.98]",
    "learner.max_tokens_per_micro_batch=1024",
    "train.samples_per_step=32",
    "train.save_every=0",
)


class _Caught(Exception):  # noqa: N818 - no error: the run has shown what it was made for
    """Ends a run early."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a run."""

    name: str
    what: str
    planted: int | None
    """Step; None in a clean run."""
    caught: int | None = None
    """Step of the sentinel that was to speak; None when it did not."""
    by: str = ""
    message: str = ""
    also: dict[str, int] = field(default_factory=dict)
    """Other sentinels that spoke, and at which step first."""
    early: dict[str, int] = field(default_factory=dict)
    """Sentinels that spoke before the fault was there."""
    steps: int = 0
    seconds: float = 0.0
    error: str = ""
    """By which the run ended, if it did not finish."""

    @property
    def passed(self) -> bool:
        """Whether the fault was caught in time and nothing was said before; in a clean run, nothing at all."""
        if self.early:
            return False
        if self.planted is None:
            return not self.error and not self.also
        return self.caught is not None and self.caught - self.planted < MOST_STEPS


def run_fault(fault: Fault, cache: str, seed: int = 0) -> Outcome:
    """Plant a fault in a run, and let it go on until it is caught or was there for long enough."""
    config = settings_of(fault, seed, PLANTED_AT + MOST_STEPS - 1, cache)
    owner, name = (Synchronous, "run_step") if fault.job == "train" else (SftWorker, "update")
    with _run_dir(config) as (run_dir, config), _silence():
        started = perf_counter()
        with ExitStack() as planted, replaced(owner, name, _planting(fault, planted, run_dir)):
            error = _run(config, local=fault.local)
        seconds = perf_counter() - started
        spoke = _spoke(run_dir)
        steps = len(read_lines(run_dir / "metrics.jsonl"))
    caught = next((event for event in spoke if event["sentinel"] == fault.sentinel), None)
    return Outcome(
        name=fault.name,
        what=fault.what,
        planted=PLANTED_AT,
        caught=caught["step"] if caught else None,
        by=fault.sentinel if caught else "",
        message=caught["message"] if caught else "",
        also=_first_steps(event for event in spoke if event["sentinel"] != fault.sentinel),
        early=_first_steps(event for event in spoke if event["step"] < PLANTED_AT),
        steps=steps,
        seconds=seconds,
        error=error,
    )


def run_clean(clean: Clean, cache: str) -> Outcome:
    """A run in which no sentinel may speak."""
    config = settings_of(clean, clean.seed, CLEAN_STEPS, cache)
    with _run_dir(config) as (run_dir, config), _silence():
        started = perf_counter()
        error = _run(config, local=clean.local)
        seconds = perf_counter() - started
        spoke = _spoke(run_dir)
        steps = len(read_lines(run_dir / "metrics.jsonl"))
    what = "; ".join(event["message"] for event in spoke)
    also = _first_steps(spoke)
    return Outcome(name=clean.name, what=what, planted=None, also=also, steps=steps, seconds=seconds, error=error)


def settings_of(run: Fault | Clean, seed: int, num_steps: int, cache: str) -> RlConfig | SftConfig:
    """The lab's, small."""
    own = (f"train.seed={seed}", f"data.cache_dir={cache}")
    if run.job == "sft":
        steps = f"train.max_steps={num_steps}"
        return load_config([], [*SMALL_SFT, *sft_sources(cache), *own, steps, *run.settings], SftConfig)
    if isinstance(run, Clean) and not run.local:
        own += ("rollout.text.num_workers=0", "rollout.image.num_workers=0", "rollout.both.num_workers=2")
    return load_config([], [*SMALL, *own, f"train.num_steps={num_steps}", *run.settings])


@lru_cache
def sft_sources(cache: str) -> tuple[str, str]:
    """Settings that name a few conversations of each subset to learn from, and a few that are held out; writes them."""
    files = {name: Path(cache) / f"faults-{name}.parquet" for name in ("talks", "heldout")}
    for file, make, count in zip(files.values(), (training_samples, heldout_samples), (80, 4), strict=True):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_interleaved(file, (sample for subset in SUBSETS for sample in make(subset, count, seed=0)))
    return (
        f"data.sources={{lab: {{path: {files['talks']}}}}}",
        f"evaluation.sources={{held: {{path: {files['heldout']}}}}}",
    )


@contextmanager
def _run_dir(config: RlConfig | SftConfig) -> Iterator[tuple[Path, RlConfig | SftConfig]]:
    from dataclasses import replace

    folder = Path(tempfile.mkdtemp(prefix="unirl-fault-"))
    try:
        run_dir = folder / "run"
        train: Any = replace(config.train, run_dir=str(run_dir))
        yield run_dir, replace(config, train=train)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _silence() -> Iterator[None]:
    """A run's own words go nowhere: there are dozens."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _planting(fault: Fault, planted: ExitStack, run_dir: Path) -> Any:
    def make(original: Any) -> Any:
        def run_step(self: Synchronous | SftWorker, step: int) -> Any:
            if any(event["sentinel"] == fault.sentinel for event in _spoke(run_dir)):
                raise _Caught
            if step == PLANTED_AT:
                planted.enter_context(fault.plant())
                if isinstance(self, SftWorker):
                    # What was made ahead has no fault yet.
                    self.close_ahead()
            return original(self, step)

        return run_step

    return make


def _run(config: RlConfig | SftConfig, *, local: bool) -> str:
    """Why it ended; empty when it finished, or was caught."""
    try:
        code = sft.main(config, local=local) if isinstance(config, SftConfig) else rl.main(config, local=local)
    except _Caught:
        return ""
    except Exception as error:  # noqa: BLE001 - a fault may end a run in any way
        return f"{type(error).__name__}: {error}"
    return f"exit code {code}" if code else ""


def _spoke(run_dir: Path) -> list[dict[str, Any]]:
    return [event for event in read_lines(run_dir / "events.jsonl") if event["kind"] == "alert"]


def _first_steps(events: Any) -> dict[str, int]:
    first: dict[str, int] = {}
    for event in events:
        first.setdefault(event["sentinel"], event["step"])
    return first
