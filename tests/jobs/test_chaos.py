"""Ten SIGKILLs over every part of a run; `python -m tests.chaos --kills 50` for more."""

from collections import Counter

import pytest

from tests import chaos


@pytest.mark.timeout(900)
def test_ten_kills_change_nothing(tmp_path):
    kills = chaos.main(tmp_path, num_kills=10, num_steps=14, seed=5)
    assert set(Counter(kill.role for kill in kills)) == set(chaos.ROLES)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_kills_change_nothing_while_sampling_overlaps_learning(tmp_path):
    chaos.main(tmp_path, num_kills=10, num_steps=14, seed=6, mode="one_step_off")
