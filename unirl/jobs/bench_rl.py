"""The benchmarks of reinforcement learning from the command line: what each measures, printed, and saved if asked."""

import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from unirl.benchmarks.janus_folder import JANUS_1B, JANUS_7B, JanusSize
from unirl.benchmarks.learner import LearnerBench, LearnerCase, measure_learner
from unirl.benchmarks.report import Report
from unirl.benchmarks.reward import RewardBench, measure_reward
from unirl.benchmarks.rollout import AT, RolloutBench, RolloutCase, measure_rollout
from unirl.benchmarks.sync import SyncBench, measure_sync
from unirl.config import ClusterConfig, RlConfig
from unirl.config_rules import OptionError
from unirl.jobs.assets import CHECKPOINTS
from unirl.jobs.bench_rl_shape import RlShape, measure_rl_shape
from unirl.jobs.bench_step import measure_step

LAB = CHECKPOINTS / "janus"
LAB_PROMPT = "a photo of a red circle and a blue square"
MIDDLE = JanusSize(codes_per_side=12)
NARROW = JanusSize(hidden=256, layers=4, inner=704, vision_hidden=64)
ROLLOUT_CASES: dict[str, RolloutCase] = {
    "lab": RolloutCase(name="lab's Janus", model=LAB, prompt=LAB_PROMPT),
    "middle": RolloutCase(name="8 layers of 512, 144 codes", model=MIDDLE, rounds=1),
    "narrow": RolloutCase(name="4 layers of 256, 576 codes", model=NARROW, rounds=1, concurrency=(1, AT)),
    "1b": RolloutCase(name="Janus-Pro-1B's shape", model=JANUS_1B, rounds=1, dtype="bfloat16"),
    "7b": RolloutCase(name="Janus-Pro-7B's shape", model=JANUS_7B, rounds=1, dtype="bfloat16"),
}
LEARNER_CASES: dict[str, LearnerCase] = {
    "lab": LearnerCase(name="lab's Janus", model=LAB, num_rows=32, rounds=20),
    "middle": LearnerCase(name="8 layers of 512, 144 codes", model=MIDDLE, num_rows=4, rounds=2),
}
EVERYTHING = ("rollout", "reward", "learner", "sync", "step")
STORE_GIB_PER_MB = 3e-3
"""Two publications and room."""


def show(report: Report, *, as_json: bool, save: bool) -> int:
    """Print a report, and keep it for the docs if asked."""
    if save:
        report.save()
    sys.stdout.write(report.as_json() if as_json else report.as_text())
    return 0


def rollout(names: Sequence[str], *, in_flight: Sequence[int], dtype: str | None, eager: bool) -> Report:
    """Pictures per second against the common Hugging Face loop.

    Args:
        names: of `ROLLOUT_CASES`, or Janus checkpoint folders.
        in_flight: pictures at once; none takes each case's own.
        dtype: None takes each case's own.
        eager: without torch.compile and CUDA graphs.
    """
    cases = [
        ROLLOUT_CASES.get(name) or RolloutCase(name=Path(name).name, model=_folder(name, ROLLOUT_CASES))
        for name in names
    ]
    changed = {"concurrency": tuple(in_flight)} if in_flight else {}
    changed |= {"dtype": dtype} if dtype else {}
    return measure_rollout(
        RolloutBench(cases=tuple(replace(case, **changed) for case in cases), enforce_eager=eager)  # pyright: ignore[reportArgumentType]
    )


def reward(bench: RewardBench) -> Report:
    """HPSv2 in groups against one picture at a time."""
    return measure_reward(bench)


def learner(names: Sequence[str], *, rounds: int | None) -> Report:
    """An update against a bare PyTorch loop.

    Args:
        names: of `LEARNER_CASES`, or Janus checkpoint folders.
        rounds: None takes each case's own.
    """
    cases = [
        LEARNER_CASES.get(name) or LearnerCase(name=Path(name).name, model=_folder(name, LEARNER_CASES))
        for name in names
    ]
    return measure_learner(LearnerBench(cases=tuple(replace(c, rounds=rounds or c.rounds) for c in cases)))


def sync(bench: SyncBench) -> Report:
    """Weights through Ray's object store against a memory copy."""
    import ray

    from unirl.cluster.runtime import start_ray

    with ExitStack() as stack:
        stack.callback(ray.shutdown)
        start_ray(ClusterConfig(object_store_gib=max(0.5, bench.megabytes * STORE_GIB_PER_MB)), [])
        return measure_sync(bench)


def step(config: RlConfig, *, steps: int, local: bool) -> Report:
    """Seconds of a step by phase in every mode of overlap."""
    return measure_step(config, steps=steps, local=local)


def rl_shape(shape: RlShape) -> Report:
    """One step of a Janus-Pro of a published size with random weights."""
    return measure_rl_shape(shape)


def everything() -> int:
    """Run each benchmark in a process of its own and save it; returns the first exit code that is not 0."""
    program = "from unirl.cli import main; main()"
    codes = [
        subprocess.run([sys.executable, "-c", program, "bench", name, "--save"], check=False).returncode
        for name in EVERYTHING
    ]
    return next((code for code in codes if code), 0)


def _folder(name: str, known: Iterable[str]) -> Path:
    folder = Path(name)
    if not (folder / "config.json").is_file():
        raise OptionError(
            f"--model: expected one of {', '.join(known)} or a Janus checkpoint folder; got {name}; correct it"
        )
    return folder
