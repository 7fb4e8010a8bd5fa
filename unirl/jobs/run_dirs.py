"""Which run directory a job writes to, and which one it resumes."""

import json
import time
from pathlib import Path

from unirl.config import RlConfig

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
    if not (Path(resume) / "run.json").is_file():
        raise FileNotFoundError(
            f"--resume: expected a run directory with a run.json; got {resume}; see the folder runs/"
        )
    return Path(resume), True


def newest_unfinished(name: str) -> Path:
    """The newest run of this name in runs/ that has not finished.

    Raises:
        FileNotFoundError: there is none.
    """
    for record in sorted(RUNS.glob(f"*-{name}/run.json"), reverse=True):
        if json.loads(record.read_text())["status"] != "finished":
            return record.parent
    raise FileNotFoundError(f"--resume auto: expected an unfinished run named {name} in {RUNS}/; got none; start one")


def has_checkpoint(run_dir: Path) -> bool:
    """Whether the run got as far as its first committed checkpoint."""
    return any((run_dir / "checkpoints").glob("step_*/COMMIT.json"))
