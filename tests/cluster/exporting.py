"""A process of its own that makes a Ray and writes made steps through the Prometheus mirror, twice a second.

python -m tests.cluster.exporting RUN_DIR PORT; ends by itself, with no step after the last.
"""

import sys
import time
from pathlib import Path

import ray

from tests.monitoring.made_run import make_config, make_learner, make_step
from unirl.cluster.prometheus import Prometheus
from unirl.cluster.runtime import start_ray
from unirl.config import ClusterConfig
from unirl.monitoring.durable_files import JsonLines
from unirl.monitoring.metrics import step_metrics
from unirl.monitoring.run_log import RunLog

LAST_STEP = 240
PHASES = {"text_rollout": 0.3, "image_rollout": 0.7, "backward": 0.4, "idle": 0.1}


def learner_metrics(step):
    return make_learner(step) | {
        "policy/guidance_gap": 0.2,
        "learner/grad_norm/understanding": 0.5,
        "learner/grad_norm/generation": 0.25,
        "learner/grad_cosine": -0.1,
        "learner/grad_cosine/aligned": -0.2,
    }


def beat(file, actor, role, version, done):
    file.append(
        {"v": 1, "time": time.time(), "actor": actor, "role": role, "state": "sampling", "queue": 3,
         "policy_version": version, "num_done": done, "num_tokens": 100 * done, "num_images": 8 * done,
         "memory_mb": 250.0, "pid": 1, "node": "made"}
    )  # fmt: skip


def main(run_dir, port):
    start_ray(ClusterConfig(num_cpus=1, object_store_gib=0.08, metrics_port=port), [])
    config = make_config(num_steps=LAST_STEP, journal=False, pairs_every=0)
    made = [step_metrics(make_step(step, learner=learner_metrics(step), num_pairs=3)) for step in range(1, 4)]
    with RunLog(run_dir, config, config.monitoring, mirrors=[Prometheus()]) as log:
        (run_dir / "actors").mkdir()
        files = {name: JsonLines(run_dir / "actors" / f"{name}.jsonl") for name in ("rollout-image-0", "learner-0")}
        for step in range(1, LAST_STEP + 1):
            values = made[step % 3] | {f"phase/{phase}_s": seconds for phase, seconds in PHASES.items()}
            if step >= 4:
                log.write_metrics(step, values)
            beat(files["rollout-image-0"], "rollout-image-0", "rollout.image", step - 1, step)
            beat(files["learner-0"], "learner-0", "learner", step, step)
            time.sleep(0.5)
    ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
