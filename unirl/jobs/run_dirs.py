"""Which run directory a job writes to, which one it resumes, and how far that came."""

import json
import re
import time
from pathlib import Path

from unirl.config import RlConfig
from unirl.config_rules import ConfigError, Problem

RUNS = Path("runs")


def choose_run_dir(config: RlConfig, resume: str | None) -> tuple[Path, bool]:
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
    for record in sorted(RUNS.glob(f"*-{name}/run.json"), reverse=True):
        ours = re.fullmatch(rf"\d{{8}}-\d{{6}}-{re.escape(name)}", record.parent.name)
        if ours and _status(record.parent) != "finished":
            return record.parent
    raise FileNotFoundError(f"--resume auto: expected an unfinished run named {name} in {RUNS}/; got none; start one")


def last_step(run_dir: Path) -> int | None:
    """Step of the newest committed checkpoint; None before the first."""
    return max((int(file.parent.name[5:]) for file in run_dir.glob("checkpoints/step_*/COMMIT.json")), default=None)


def is_complete(run_dir: Path, num_steps: int) -> bool:
    """Whether a run is finished and `num_steps` asks for no more.

    Raises:
        ConfigError: more steps were made already.
    """
    made = last_step(run_dir) or 0
    if num_steps < made:
        rule = f"must be at least {made}, the steps that {run_dir} has made"
        raise ConfigError([Problem("train.num_steps", num_steps, rule, "leave it out, or start a new run")])
    return num_steps == made and _status(run_dir) == "finished"


def _status(run_dir: Path) -> str:
    return json.loads((run_dir / "run.json").read_text())["status"]
