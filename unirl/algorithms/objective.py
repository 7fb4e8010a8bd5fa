"""What sets one objective apart from another. Each is a file of this folder with a constant `OBJECTIVE`."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from torch import Tensor

from unirl.algorithms.policy_loss import policy_loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """The choices in which eq. 1, 2 and 4 of PairUni differ; advantages, clip and KL are common to them."""

    weighs_pairs: bool
    """Advantages of a pair are multiplied by its weight (`pair_weight.weigh_pairs`)."""
    pools_tasks: bool
    """Trajectories of both tasks share one mean (`losses.token_scales`), and batches hold samples without their
    partners."""
    policy_loss: Callable[..., tuple[Tensor, dict[str, Tensor]]] = policy_loss
    """Loss of a micro-batch, of the signature of `policy_loss.policy_loss`."""


def find_objective(name: str) -> Objective:
    """The objective of `unirl/algorithms/<name>.py`; `unirl.config.ObjectiveName` lists the names."""
    return import_module(f"unirl.algorithms.{name}").OBJECTIVE
