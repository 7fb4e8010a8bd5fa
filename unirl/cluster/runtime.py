"""Joining or starting Ray, and the resources an actor plan finds there."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import ray
from ray.exceptions import RayActorError

from unirl.cluster.actor_log import LOG_DIR
from unirl.cluster.plan import PlannedActor, render_plan, total_resources
from unirl.config import ClusterConfig

log = logging.getLogger(__name__)

ACTOR_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore::FutureWarning,ignore::DeprecationWarning",
}


class PlacementError(RuntimeError):
    """The cluster cannot hold the actor plan."""


def start_ray(config: ClusterConfig, plan: list[PlannedActor], log_dir: Path | None = None) -> None:
    """Join the cluster at `config.address` or RAY_ADDRESS, else start one on this machine that ends with the run.

    Actors log into `log_dir`, a file each; what their engines print reaches the driver only when it logs at DEBUG (-v).

    Raises:
        PlacementError: the cluster has fewer CPUs or GPUs than the plan needs at once.
        ConnectionError: no cluster answers at the address.
    """
    address = config.address or os.environ.get("RAY_ADDRESS")
    environment = dict(ACTOR_ENVIRONMENT)
    if log_dir is not None:
        environment[LOG_DIR] = str(log_dir.resolve())
    if not any(actor.num_gpus for actor in plan):
        environment["TORCHDYNAMO_DISABLE"] = "1"
    needed = total_resources(plan)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address:
        ray.init(address=address, runtime_env={"env_vars": environment}, log_to_driver=log.isEnabledFor(logging.DEBUG))
    else:
        _start_local(config, needed, environment)
    check_resources(needed, ray.cluster_resources(), plan)


def _start_local(config: ClusterConfig, needed: dict[str, float], environment: dict[str, str]) -> None:
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # keeps a one-node Ray on loopback
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # nothing of it is reachable from outside
    num_cpus = config.num_cpus if config.num_cpus is not None else max(os.cpu_count() or 1, int(-(-needed["CPU"] // 1)))
    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        object_store_memory=int(config.object_store_gib * (1 << 30)),
        logging_level=logging.ERROR,
        log_to_driver=log.isEnabledFor(logging.DEBUG),
        runtime_env={"env_vars": environment},
    )


def check_resources(needed: Mapping[str, float], present: Mapping[str, float], plan: list[PlannedActor]) -> None:
    """Refuse a plan that the cluster cannot hold, instead of waiting for ever.

    Raises:
        PlacementError: names what was asked for and what is there.
    """
    short = [f"{name} {need:g} needed, {present.get(name, 0.0):g} present" for name, need in needed.items()
             if need > present.get(name, 0.0) + 1e-6]  # fmt: skip
    if short:
        raise PlacementError(
            f"cluster: expected room for every actor; got {'; '.join(short)}. Lower num_workers, num_ranks, num_cpus "
            f"or num_gpus, or join a larger cluster (cluster.address). The plan:\n{render_plan(plan)}"
        )


def wait_until_up(starting: Mapping[str, "ray.ObjectRef"], timeout_s: float) -> None:
    """Wait until every actor has answered for the first time.

    Args:
        starting: the pending answer of each actor, by its name.
        timeout_s: patience for all of them together.

    Raises:
        PlacementError: some are not up in time; says what the cluster has left.
        RuntimeError: an actor failed while it started; says why.
    """
    answers = {reference: name for name, reference in starting.items()}
    done, pending = ray.wait(list(answers), num_returns=len(answers), timeout=timeout_s)
    for reference in done:
        try:
            ray.get(reference)
        except RayActorError as error:
            raise RuntimeError(f"cluster: expected {answers[reference]} to start; got {error}") from None
    if pending:
        names = ", ".join(sorted(answers[reference] for reference in pending))
        raise PlacementError(
            f"cluster: expected every actor up within {timeout_s:g} s (cluster.start_timeout_s); got no answer from "
            f"{names}, with {ray.available_resources()} free; free resources, lower num_workers, or allow more time"
        )
