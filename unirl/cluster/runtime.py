"""Joining or starting Ray, and the resources an actor plan finds there."""

import json
import logging
import math
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import ray
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray.exceptions import RayActorError
from ray.experimental.internal_kv import _internal_kv_get

from unirl.cluster.actor_log import HEARTBEAT_S, LOG_DIR
from unirl.cluster.plan import (
    PlacementError,
    PlannedActor,
    check_plan,
    cluster_address,
    machine_resources,
    may_grow,
    total_resources,
)
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


def start_ray(
    config: ClusterConfig, plan: list[PlannedActor], log_dir: Path | None = None, *, heartbeat_s: float = 0.0
) -> None:
    """Join the cluster at `config.address` or RAY_ADDRESS, else start one on this machine that ends with the run.

    Actors log into `log_dir`, a file each, and write a heartbeat each `heartbeat_s` (0: none) into actors/ beside it.
    What their engines print reaches the driver only when it logs at DEBUG (-v).

    Raises:
        PlacementError: the machine, or a cluster that cannot grow, has less than the plan needs at once, or Ray does
            not start.
        ConnectionError: no cluster answers at the address.
    """
    address = cluster_address(config)
    environment = dict(ACTOR_ENVIRONMENT)
    if log_dir is not None:
        environment |= {LOG_DIR: str(log_dir.resolve()), HEARTBEAT_S: str(heartbeat_s)}
    if not any(actor.num_gpus for actor in plan):
        environment["TORCHDYNAMO_DISABLE"] = "1"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address:
        with _own_signals():
            ray.init(
                address=address, runtime_env={"env_vars": environment}, log_to_driver=log.isEnabledFor(logging.DEBUG)
            )
        present = ray.cluster_resources()
        if not autoscaler_adds_nodes():
            check_plan(plan, {name: present.get(name, 0.0) for name in ("CPU", "GPU")})
    else:
        check_plan(plan, machine_resources(config))
        _start_local(config, total_resources(plan)["CPU"], environment)


def autoscaler_adds_nodes() -> bool:
    """Whether the cluster that was joined may get more nodes than it has."""
    status = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or "{}")
    return may_grow((status.get("autoscaler_report") or {}).get("node_type_mapping") or {})


def _start_local(config: ClusterConfig, needed_cpus: float, environment: dict[str, str]) -> None:
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # keeps a one-node Ray on loopback
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # nothing of it is reachable from outside
    num_cpus = config.num_cpus if config.num_cpus is not None else max(os.cpu_count() or 1, math.ceil(needed_cpus))
    try:
        with _own_signals():
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                object_store_memory=int(config.object_store_gib * (1 << 30)),
                logging_level=logging.ERROR,
                log_to_driver=log.isEnabledFor(logging.DEBUG),
                runtime_env={"env_vars": environment},
            )
    except Exception as error:
        raise PlacementError(
            f"cluster: expected a Ray of {num_cpus} CPUs and {config.object_store_gib:g} GiB of shared memory to start "
            f"on this machine; got {type(error).__name__}: {error}; look at `unirl doctor`, and at the newest folder "
            "under /tmp/ray"
        ) from error


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep the driver's answer to SIGTERM: `ray.init` puts its own there, which ends the process without saving."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


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
            # Ray's text is the traceback of the other process, which is in its log; the error is its last line.
            reason = str(error).strip().splitlines()[-1].strip()
            raise RuntimeError(
                f"cluster: expected {answers[reference]} to start; got {reason}; its log has the rest"
            ) from error
    if pending:
        names = ", ".join(sorted(answers[reference] for reference in pending))
        raise PlacementError(
            f"cluster: expected every actor up within {timeout_s:g} s (cluster.start_timeout_s); got no answer from "
            f"{names}, with {ray.available_resources()} free; free resources, lower num_workers, or allow more time"
        )
