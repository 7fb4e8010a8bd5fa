"""Vanilla GRPO on mixed tasks (PairUni eq. 1): samples without their partners, one mean over both tasks."""

from unirl.algorithms.objective import Objective

OBJECTIVE = Objective(weighs_pairs=False, pools_tasks=True)
