from typing import get_args

import pytest

from unirl.algorithms.objective import find_objective
from unirl.algorithms.policy_loss import policy_loss
from unirl.config import ObjectiveName


def test_every_objective_that_may_be_named_is_a_file_of_its_own():
    assert {
        name: (o.weighs_pairs, o.pools_tasks) for name in get_args(ObjectiveName) for o in [find_objective(name)]
    } == {
        "pair_grpo": (True, False),
        "pairwise": (False, False),
        "vanilla_mixed": (False, True),
    }


@pytest.mark.parametrize("name", get_args(ObjectiveName))
def test_the_papers_objectives_share_one_loss(name):
    assert find_objective(name).policy_loss is policy_loss
