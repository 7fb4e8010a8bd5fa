"""Where an actor's log and heartbeat go: a file of its own for each in the run directory."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from unirl.monitoring.heartbeat import Heartbeat
from unirl.monitoring.run_log import Report

ActorState = Literal["up", "down", "restart"]
"""What became of an actor: it works, is gone, or was lost and another is started in its place."""

LOG_DIR = "UNIRL_LOG_DIR"
"""Environment variable of the actors with the run's logs folder; unset where there is no run directory."""
HEARTBEAT_S = "UNIRL_HEARTBEAT_S"
"""Environment variable of the actors with `monitoring.heartbeat_s`; unset where there is no run directory."""


def open_actor_log(name: str) -> None:
    """Write this process's records from INFO on to <logs>/<name>.log; called once, first thing in an actor.

    On a node that does not see the run directory they go to the actor's stderr, which Ray keeps.
    """
    logging.getLogger("unirl").setLevel(logging.INFO)
    folder = Path(os.environ.get(LOG_DIR, ""))
    handler = (
        logging.FileHandler(folder / f"{name}.log") if folder.name and folder.is_dir() else logging.StreamHandler()
    )
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)


def open_heartbeat(actor: str, role: str, look: Callable[[], str | None] = lambda: None) -> Heartbeat:
    """The heartbeat of this process; it writes nothing where nobody sees the run directory, or none is wanted.

    Args:
        actor: the same for whoever takes this one's place.
        role: as in the actor plan.
        look: see `Heartbeat`.
    """
    logs = Path(os.environ.get(LOG_DIR, ""))
    folder = logs.parent / "actors" if logs.name and logs.is_dir() else None
    return Heartbeat(actor, role, folder=folder, every_s=float(os.environ.get(HEARTBEAT_S, "0")), look=look)


def report_actor(report: Report | None, actor: str, role: str, state: ActorState, why: str = "") -> None:
    """Note in the run's events what became of an actor, under the name of its heartbeat; nothing without a report."""
    if report is not None:
        says = {"up": "is up", "down": "is gone", "restart": "was started anew"}[state]
        report("actor", f"{actor} {says}{': ' if why else ''}{why}", {"actor": actor, "role": role, "state": state})
