"""Where an actor's log goes: a file of its own in the run directory."""

import logging
import os
from pathlib import Path

LOG_DIR = "UNIRL_LOG_DIR"
"""Environment variable of the actors with the run's logs folder; unset where there is no run directory."""


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
