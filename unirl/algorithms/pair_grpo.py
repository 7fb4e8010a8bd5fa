"""PairGRPO (PairUni eq. 4): the mean of each task, advantages times the weight of the pair (eq. 3)."""

from unirl.algorithms.objective import Objective

OBJECTIVE = Objective(weighs_pairs=True, pools_tasks=False)
