import dataclasses

import numpy as np
import pytest

from tests.monitoring.made_run import make_step


@pytest.fixture(scope="module")
def groups():
    return make_step(1).groups


def test_a_group_refuses_the_pair_of_another(groups):
    with pytest.raises(ValueError, match="expected its own pair pair-1-0; got pair-1-1"):
        dataclasses.replace(groups[0], pair=groups[2].pair)


@pytest.mark.parametrize("advantages", [np.zeros(3), np.full(8, np.nan)])
def test_a_group_refuses_advantages_that_do_not_fit(groups, advantages):
    with pytest.raises(ValueError, match="finite advantages"):
        dataclasses.replace(groups[0], advantages=advantages)
