"""Which run directory a job writes to, which one it resumes, and how far that came."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unirl.config import RlConfig, SftConfig, default_text
from unirl.config_loading import run_name
from unirl.config_rules import ConfigError, Problem

RUNS = Path("runs")
FIXED = (
    "model.",
    "data.pairs",
    "data.max_pairs",
    "data.take",
    "data.partners",
    "data.shuffle",
    "data.sources",
    "data.max_length",
    "data.too_long",
    "loss.",
    "train.samples_per_step",
    "rollout.pairs_per_step",
    "algorithm.objective",
    "train.seed",
    "learner.num_ranks",
    "learner.zero_stage",
)
"""Settings, or groups of them, that stay as they are from the first step to the last."""


def choose_run_dir(config: RlConfig | SftConfig, resume: str | None) -> tuple[Path, bool]:
    """The run directory, and whether it holds a run to go on with.

    Args:
        config: names the run, and the directory if it is set there.
        resume: a run directory, or None for a new run.

    Raises:
        FileNotFoundError: there is no such run to resume.
    """
    if resume is None:
        chosen = config.train.run_dir or RUNS / f"{time.strftime('%Y%m%d-%H%M%S')}-{config.train.name}"
        return Path(chosen), False
    if not is_run(Path(resume)):
        raise FileNotFoundError(
            f"--resume: expected a run directory with a run.json; got {resume}; see the folder runs/"
        )
    return Path(resume), True


def is_run(folder: Path) -> bool:
    """Whether the folder holds a run."""
    return (folder / "run.json").is_file()


def newest_unfinished(name: str) -> Path:
    """The newest run of this name in runs/ that has not finished.

    Raises:
        FileNotFoundError: there is none.
    """
    runs = [folder.parent for folder in RUNS.glob("*/run.json") if (folder.parent / "config.yaml").is_file()]
    for run_dir in sorted(runs, key=lambda folder: _facts(folder)["created"], reverse=True):
        if _facts(run_dir)["status"] != "finished" and run_name(run_dir / "config.yaml") == name:
            return run_dir
    raise FileNotFoundError(
        f"--resume auto: expected an unfinished run with train.name={name} in {RUNS}/; got none; name its folder with "
        "--resume RUN, or start one"
    )


def last_step(run_dir: Path) -> int | None:
    """Step of the newest committed checkpoint; None before the first."""
    return max((int(file.parent.name[5:]) for file in run_dir.glob("checkpoints/step_*/COMMIT.json")), default=None)


def newest_commit(run_dir: Path) -> dict[str, Any] | None:
    """What the newest committed checkpoint says of itself; None before the first."""
    step = last_step(run_dir)
    return None if step is None else json.loads((run_dir / f"checkpoints/step_{step:08d}/COMMIT.json").read_text())


def is_complete(run_dir: Path, num_steps: int, setting: tuple[str, object]) -> bool:
    """Whether a run is finished and `num_steps` asks for no more.

    Args:
        run_dir: the run.
        num_steps: steps of the whole run.
        setting: key and value that say so.

    Raises:
        ConfigError: more steps were made already.
    """
    made = last_step(run_dir) or 0
    if num_steps < made:
        rule = f"must give at least the {made} steps that {run_dir} has made, not {num_steps}"
        raise ConfigError([Problem(*setting, rule, "leave it out, or start a new run")])
    return num_steps == made and _facts(run_dir)["status"] == "finished"


def is_finished(run_dir: Path) -> bool:
    """Whether the folder holds a run that came to its end."""
    return is_run(run_dir) and _facts(run_dir)["status"] == "finished"


def check_changes(changed: Mapping[str, Sequence[object]], run_dir: Path) -> None:
    """Refuse settings that a run cannot change on its way.

    Args:
        changed: value before and now, by key.
        run_dir: the run.

    Raises:
        ConfigError: names them.
    """
    rule = f"cannot change while {run_dir} goes on: its data order and its optimizer depend on it"
    wrong = {key: " -> ".join(map(default_text, values)) for key, values in changed.items() if key.startswith(FIXED)}
    if wrong:
        raise ConfigError([Problem(k, change, rule, "leave it out, or start a new run") for k, change in wrong.items()])


def _facts(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "run.json").read_text())
