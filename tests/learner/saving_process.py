"""Trains and saves without end into the folder that is given; a test kills it in the middle of a save."""

import sys
from pathlib import Path

from tests.fakes import TinyPolicy, tiny_batch
from tests.learner.conftest import SETTINGS
from unirl.learner.engine import RankPlace
from unirl.learner.learner import Learner, scoring_of


def main(root: Path) -> None:
    learner = Learner(TinyPolicy(), SETTINGS, RankPlace())
    scoring = scoring_of(SETTINGS.sampling, SETTINGS.algorithm)
    step = 0
    while True:
        learner.update(tiny_batch(TinyPolicy(), scoring, seed=step), step)
        step += 1
        learner.save(root, step, {"saved": step})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
