import pytest
import yaml

from tests.launch import manifests
from tests.launch.manifests import ROOT

FILES = {
    "launch/kubernetes/raycluster.yaml": manifests.check_raycluster,
    "launch/kubernetes/rayjob.yaml": manifests.check_rayjob,
    "launch/cluster.yaml": manifests.check_launcher,
    "launch/slurm.sbatch": manifests.check_sbatch,
    "docker/train.Dockerfile": manifests.check_dockerfile,
}
CLUSTER, JOB, LAUNCHER, SBATCH, DOCKER = FILES

# File, what stands there, what is written by mistake, what the check says.
TYPOS = [
    *((file, *typo) for file in (CLUSTER, JOB) for typo in (
        ("workerGroupSpecs:", "workerGroupSpec:", "'workerGroupSpec' was unexpected"),
        ("groupName: reward", "name: reward", "'groupName' is a required property"),
        ('num-cpus: "0"', "num-cpus: 0", "0 is not of type 'string'"),
        ('num-cpus: "0"', 'num-cpu: "0"', "an actor could be placed beside the drivers"),
        ("mode: token", "mode: tokens", "'tokens' is not one of"),
        ("runAsNonRoot: true", "runAsNonRoot: false", "may run as root"),
        ("drop: [ALL]", "drop: [NET_RAW]", "has privileges"),
        ("unirl:0.1.0-gpu", "unirl:latest", "the image has no version"),
        ("name: shared, mountPath", "name: share, mountPath", "no volume share"),
        ("maxReplicas: 8", "maxReplicas: 1", "rollout: expected"),
        ('cpu: "6", memory: 64Gi, nvidia.com/gpu: "1"', 'cpu: "3", memory: 64Gi, nvidia.com/gpu: "1"',
         "rollout.image: no node has"),
        ("memory: 128Gi", "memory: 128GiB", "128GiB"),
    )),
    (CLUSTER, "kind: RayCluster", "kind: Raycluster", "'Raycluster' is not one of"),
    (JOB, "entrypoint:", "entryPoint:", "'entrypoint' is a required property"),
    (JOB, "env_vars:", "env_var:", "runtimeEnvYAML"),
    (JOB, "--run-dir /shared/runs/janus-pro-1b --resume", "--run-dir /shared/runs/other --resume", "metadata.run_dir"),
    (LAUNCHER, "max_workers: 2", "max_worker: 2", "max_worker"),
    (LAUNCHER, "provider:", "providers:", "provider"),
    (LAUNCHER, "run_options:", "run_option:", "run_option"),
    (LAUNCHER, "--dashboard-host", "--dashbord-host", "no option of ray start: --dashbord-host"),
    (LAUNCHER, "RAY_AUTH_MODE=token ray start --head", "ray start --head", "without a token"),
    (SBATCH, "--ntasks-per-node", "--ntask-per-node", "ntask-per-node: no option of sbatch"),
    (SBATCH, "--time=24:00:00", "--time=24h", "time: expected"),
    (SBATCH, "#SBATCH --requeue", "#SBATCH --requeue=yes", "requeue: expected no value"),
    (SBATCH, "#SBATCH --exclusive", "exclusive=1", "after the first command"),
    (SBATCH, "code=$?; done", "code=$?; don", "bash: "),
    (SBATCH, "--dashboard-host", "--dashbord-host", "no option of ray start: --dashbord-host"),
    (DOCKER, "COPY --chown=ray:ray unirl unirl", "COPPY --chown=ray:ray unirl unirl", "no instruction: COPPY"),
    (DOCKER, "ray:ray configs configs", "ray:ray config configs", "COPY: no config"),
    (DOCKER, "python:3.11.14-slim-bookworm", "python:latest", "an image with a version"),
    (DOCKER, "FROM base AS gpu", "FROM bass AS gpu", "bass: neither a stage"),
    (DOCKER, "USER 1000\n", "", "gpu: runs as root"),
    (DOCKER, "launch/setup.sh --gpu", "launch/set-up.sh --gpu", "RUN: no launch/set-up.sh"),
    (DOCKER, "useradd --uid 1000", "useradd (--uid 1000", "RUN: "),
]  # fmt: skip


@pytest.mark.parametrize("file", FILES)
def test_a_shipped_file_passes_its_check(file):
    assert FILES[file]((ROOT / file).read_text()) == []


@pytest.mark.parametrize(("file", "right", "wrong", "said"), TYPOS)
def test_a_planted_typo_is_found(file, right, wrong, said):
    text = (ROOT / file).read_text()
    assert right in text
    problems = FILES[file](text.replace(right, wrong))
    assert said in "; ".join(problems)


def test_the_job_s_cluster_is_the_cluster():
    cluster, job = (yaml.safe_load((ROOT / file).read_text())["spec"] for file in (CLUSTER, JOB))
    assert job["rayClusterSpec"] == cluster
