"""Pairwise GRPO (PairUni eq. 2): the mean of each task over pairs, every pair alike."""

from unirl.algorithms.objective import Objective

OBJECTIVE = Objective(weighs_pairs=False, pools_tasks=False)
