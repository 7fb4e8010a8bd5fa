"""Change the number of rollout workers of a run that is under way."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from unirl.config_rules import ConfigError, Problem
from unirl.data.atomic import DataError
from unirl.jobs.run_dirs import is_run
from unirl.monitoring.control import newest_order, order_scale, read_answer
from unirl.monitoring.folder_lock import is_locked

ROLES = ("text", "image", "both")
LOOK_EVERY_S = 0.2


def parse_counts(settings: list[str]) -> dict[str, int]:
    """Workers by role, from words such as rollout.image=4.

    Raises:
        ConfigError: another key, or no whole number from 0 on; names every such word.
    """
    counts, problems = {}, []
    known = {f"rollout.{role}": role for role in ROLES}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in known:
            problems.append(Problem(key, value, "must name workers to scale", f"try one of {', '.join(known)}"))
        elif not value.isdecimal():
            problems.append(Problem(key, value, "must be a whole number, 0 or more", f"try {key}=2"))
        else:
            counts[known[key]] = int(value)
    if problems:
        raise ConfigError(problems)
    return counts


def main(run_dir: Path, counts: Mapping[str, int], *, timeout_s: float, as_json: bool) -> int:
    """Order it, and wait until the workers are there; returns the exit code.

    Args:
        run_dir: the run.
        counts: workers wanted, by role.
        timeout_s: patience; the order stands when it is over.
        as_json: print the run's last answer as one JSON object.

    Raises:
        DataError: the folder holds no run, or its process is gone.
    """
    if not is_run(run_dir):
        raise DataError(f"scale: expected a run directory with a run.json; got {run_dir}; see the folder runs/")
    if not is_locked(run_dir):
        raise DataError(
            f"scale: expected a run that is under way; got {run_dir}, which no process holds; go on with it by `unirl "
            f"train --resume {run_dir}`, with other num_workers if wanted"
        )
    answer = _follow(run_dir, order_scale(run_dir, counts), timeout_s, quiet=as_json)
    sys.stdout.write(json.dumps(answer) + "\n" if as_json else f"{answer['state']}: {answer['message']}\n")
    return 0 if answer["state"] == "joined" else 1


def _follow(run_dir: Path, order_id: str, timeout_s: float, *, quiet: bool) -> dict[str, object]:
    """The last answer to the order, within the time."""
    start, shown = time.monotonic(), None
    while True:
        answer = read_answer(run_dir, order_id)
        if answer is not None and answer["state"] != "joining":
            return answer
        if answer is not None and not quiet and answer["message"] != shown:
            shown = answer["message"]
            sys.stderr.write(f"joining: {shown}\n")
        if newest_order(run_dir) != order_id:
            return {"state": "replaced", "message": "another order came before this one was carried out"}
        if not is_locked(run_dir):
            return {"state": "ended", "message": "the run ended before this was carried out"}
        if time.monotonic() - start > timeout_s:
            said = "workers are still starting" if answer else "the run has not looked yet; it does while it samples"
            return {"state": "pending", "message": f"{said}; given up waiting after {timeout_s:g} s, the order stands"}
        time.sleep(LOOK_EVERY_S)
