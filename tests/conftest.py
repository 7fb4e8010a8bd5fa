import gc
import os
import subprocess
import sys

import pytest

# Before anything imports torch, transformers or Ray.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
# The optimizer check of DeepSpeed imports a compiled function; without the compiler that takes seconds less.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


@pytest.fixture(scope="module", autouse=True)
def no_process_group_stays():
    """A module leaves this process in no process group, since vLLM and DeepSpeed end each other's groups."""
    yield
    if "vllm.v1.engine.core_client" in sys.modules:
        from vllm.distributed import cleanup_dist_env_and_memory
        from vllm.v1.engine.core_client import InprocClient

        # An engine ends every group when it is collected, which would be amid a later module. It hides from that.
        gc.unfreeze()
        for engine in [found for found in gc.get_objects() if type(found) is InprocClient]:
            engine._finalizer()
        cleanup_dist_env_and_memory()
    elif "torch.distributed" in sys.modules:
        from torch import distributed

        if distributed.is_initialized():
            distributed.destroy_process_group()


@pytest.fixture(scope="session")
def ray_session():
    """One local Ray for the whole session, since starting it takes seconds; a test ends the actors it made."""
    import ray

    from unirl.cluster.runtime import ACTOR_ENVIRONMENT

    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        object_store_memory=200_000_000,
        log_to_driver=False,
        runtime_env={"env_vars": {**ACTOR_ENVIRONMENT, "TORCHDYNAMO_DISABLE": "1"}},
    )
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def ten_steps(tmp_path_factory):
    """A folder for each family of conversations, as `tests.ten_steps` leaves it."""
    out = tmp_path_factory.mktemp("ten_steps")
    subprocess.run([sys.executable, "-W", "ignore", "-m", "tests.ten_steps", str(out)], check=True, timeout=240)
    return out


def pytest_terminal_summary(terminalreporter):
    """Say in red what was not tested for want of a browser."""
    skipped = (str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", ()))
    for reason in {reason for reason in skipped if "BROWSER TESTS" in reason}:
        terminalreporter.write_line(reason, red=True, bold=True)
