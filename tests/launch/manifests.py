"""What the files of launch/ and docker/ must satisfy: each check takes a file's text and returns what is wrong."""

import copy
import re
import shlex
import subprocess
import warnings
from functools import cache
from pathlib import Path

import yaml
from jsonschema import Draft202012Validator
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

from unirl.cli import read_command
from unirl.cluster.placement import planned_bundles
from unirl.cluster.plan import actor_plan
from unirl.config_loading import load_config

ROOT = Path(__file__).parents[2]
JANUS = ROOT / "configs" / "rl" / "janus_pro_1b.yaml"

TEXT = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 0}
FLAG = {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
AMOUNT = {"anyOf": [COUNT, {"type": "string", "pattern": r"^\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"}]}


def table(required=(), **fields):
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def one_of(*words):
    return {"enum": list(words)}


def many(item):
    return {"type": "array", "items": item, "minItems": 1}


AMOUNTS = {"type": "object", "additionalProperties": AMOUNT}
RESOURCES = table(requests=AMOUNTS, limits=AMOUNTS)
POD_SECURITY = table(
    runAsNonRoot=FLAG, runAsUser=COUNT, runAsGroup=COUNT, fsGroup=COUNT,
    seccompProfile=table(["type"], type=one_of("RuntimeDefault", "Localhost", "Unconfined")),
)  # fmt: skip
CONTAINER_SECURITY = table(
    allowPrivilegeEscalation=FLAG,
    privileged=FLAG,
    readOnlyRootFilesystem=FLAG,
    capabilities=table(drop=many(TEXT), add=many(TEXT)),
)
CONTAINER = table(
    ["name", "image"], name=TEXT, image=TEXT, command=many(TEXT), args=many(TEXT), securityContext=CONTAINER_SECURITY,
    imagePullPolicy=one_of("Always", "IfNotPresent", "Never"), resources=RESOURCES,
    env=many(table(["name"], name=TEXT, value={"type": "string"}, valueFrom={"type": "object"})),
    ports=many(table(["containerPort"], name=TEXT, containerPort=COUNT, protocol=one_of("TCP", "UDP"))),
    volumeMounts=many(table(["name", "mountPath"], name=TEXT, mountPath=TEXT, readOnly=FLAG, subPath=TEXT)),
)  # fmt: skip
VOLUME = table(
    ["name"], name=TEXT, persistentVolumeClaim=table(["claimName"], claimName=TEXT, readOnly=FLAG),
    emptyDir=table(medium=one_of("", "Memory"), sizeLimit=AMOUNT), secret=table(["secretName"], secretName=TEXT),
)  # fmt: skip
POD = table(
    ["spec"],
    metadata=table(labels=TEXTS, annotations=TEXTS),
    spec=table(
        ["containers"], containers=many(CONTAINER), initContainers=many(CONTAINER), volumes=many(VOLUME),
        securityContext=POD_SECURITY, automountServiceAccountToken=FLAG, serviceAccountName=TEXT, nodeSelector=TEXTS,
        tolerations=many({"type": "object"}), terminationGracePeriodSeconds=COUNT, priorityClassName=TEXT,
    ),
)  # fmt: skip
CLUSTER = table(
    ["headGroupSpec"],
    rayVersion=TEXT,
    authOptions=table(["mode"], mode=one_of("disabled", "token")),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=table(
        upscalingMode=one_of("Default", "Aggressive", "Conservative"), version=one_of("v1", "v2"),
        idleTimeoutSeconds=COUNT, resources=RESOURCES, securityContext=CONTAINER_SECURITY, image=TEXT,
    ),
    headGroupSpec=table(
        ["template"], rayStartParams=TEXTS, template=POD, serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer")
    ),
    workerGroupSpecs=many(
        table(
            ["groupName", "minReplicas", "maxReplicas", "template"], groupName=TEXT, replicas=COUNT, minReplicas=COUNT,
            maxReplicas=COUNT, numOfHosts=COUNT, rayStartParams=TEXTS, template=POD, suspend=FLAG,
            idleTimeoutSeconds=COUNT,
        )
    ),
    suspend=FLAG,
)  # fmt: skip
JOB = table(
    ["entrypoint", "rayClusterSpec"], entrypoint=TEXT, rayClusterSpec=CLUSTER, runtimeEnvYAML=TEXT, metadata=TEXTS,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"), backoffLimit=COUNT,
    shutdownAfterJobFinishes=FLAG, ttlSecondsAfterFinished=COUNT, activeDeadlineSeconds=COUNT, suspend=FLAG, jobId=TEXT,
    entrypointNumCpus={"type": "number"}, entrypointNumGpus={"type": "number"}, submitterPodTemplate=POD,
)  # fmt: skip


def resource(kind, spec):
    return table(
        ["apiVersion", "kind", "metadata", "spec"], apiVersion=one_of("ray.io/v1"), kind=one_of(kind),
        metadata=table(["name"], name=TEXT, namespace=TEXT, labels=TEXTS, annotations=TEXTS), spec=spec,
    )  # fmt: skip


def check_raycluster(text):
    found = yaml.safe_load(text)
    return _against(resource("RayCluster", CLUSTER), found) or _check_cluster(found["spec"])


def check_rayjob(text):
    found = yaml.safe_load(text)
    problems = _against(resource("RayJob", JOB), found)
    if problems:
        return problems
    spec = found["spec"]
    problems += [f"runtimeEnvYAML: {key}" for key in yaml.safe_load(spec["runtimeEnvYAML"]).keys() - {"env_vars"}]
    _, *words = shlex.split(spec["entrypoint"].replace("/opt/unirl", str(ROOT)))
    command = read_command(words, [])
    if str(command.results) != spec["metadata"]["run_dir"]:
        problems.append("metadata.run_dir: not that of the entrypoint")
    return problems + _check_cluster(spec["rayClusterSpec"])


def _against(schema, found):
    return [
        f"{'.'.join(map(str, error.path))}: {error.message}"
        for error in Draft202012Validator(schema).iter_errors(found)
    ]


def _check_cluster(spec):
    problems = []
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        problems += _check_pod(group["template"]["spec"])
    cr = {"metadata": {"name": "unirl", "namespace": "default"}, "spec": spec}
    types = _derive_autoscaling_config_from_ray_cr(copy.deepcopy(cr))["available_node_types"]
    head = types.pop("headgroup")
    if head["resources"].get("CPU") != 0:
        problems.append("headGroupSpec: an actor could be placed beside the drivers")
    for name, bounds in {"learner": (1, 1), "rollout": (0, 8), "reward": (1, 2)}.items():
        group = types.get(name, {})
        if (group.get("min_workers"), group.get("max_workers")) != bounds:
            problems.append(f"{name}: expected {bounds} nodes")
    return problems + unplaced(types)


def _check_pod(pod):
    security, volumes = pod.get("securityContext", {}), {volume["name"] for volume in pod.get("volumes", ())}
    problems = [] if security.get("runAsNonRoot") and security.get("runAsUser") else ["a pod may run as root"]
    for container in pod["containers"]:
        security = container.get("securityContext", {})
        if security.get("allowPrivilegeEscalation") is not False or security.get("capabilities", {}).get("drop") != [
            "ALL"
        ]:
            problems.append(f"{container['name']}: has privileges")
        if container["image"].partition(":")[2] in ("", "latest"):
            problems.append(f"{container['name']}: the image has no version")
        problems += [f"no volume {m['name']}" for m in container["volumeMounts"] if m["name"] not in volumes]
        if container["resources"]["requests"] != container["resources"]["limits"]:
            problems.append(f"{container['name']}: requests and limits differ")
    return problems


def unplaced(types):
    """Actors of the Janus-Pro-1B run that find no room when every group has grown to its limit."""
    settings = ["model.path=m", "data.pairs=p", "rewards.generation.hpsv2.options.checkpoint=c"]
    config = load_config([JANUS], settings)
    bundles = [("learner", bundle) for bundle in planned_bundles(config)]
    for actor in actor_plan(config, 0, with_learner=False):
        bundles += [(actor.role, {"CPU": actor.num_cpus, "GPU": actor.num_gpus})] * actor.count
    free = [dict(group["resources"]) for group in types.values() for _ in range(group["max_workers"])]
    problems = []
    for role, bundle in bundles:
        node = next((node for node in free if all(node.get(name, 0) >= need for name, need in bundle.items())), None)
        if node is None:
            problems.append(f"{role}: no node has {bundle}")
        for name, need in bundle.items() if node is not None else ():
            node[name] = node.get(name, 0) - need
    return problems


def check_launcher(text):
    config = yaml.safe_load(text)
    try:
        validate_config(prepare_config(copy.deepcopy(config)))
    except Exception as error:  # noqa: BLE001 - whatever Ray says is the problem
        return [f"{type(error).__name__}: {error}"]
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    unsafe = [line for line in starts if "ray start" in line and "RAY_AUTH_MODE=token" not in line]
    unknown = [flag for line in starts for flag in re.findall(r"(--[\w-]+)", line) if flag not in ray_start_options()]
    return [f"without a token: {line}" for line in unsafe] + [f"no option of ray start: {flag}" for flag in unknown]


@cache
def ray_start_options():
    with warnings.catch_warnings(action="ignore"):  # of Ray Serve, which comes along
        from ray.scripts.scripts import start

    return {option for parameter in start.params for option in parameter.opts}


# Long options of sbatch that a script of ours may need, and what their values look like.
SBATCH = {
    "job-name": r"[\w.-]+",
    "nodes": r"\d+(-\d+)?",
    "ntasks-per-node": r"\d+",
    "cpus-per-task": r"\d+",
    "gpus-per-node": r"([\w.-]+:)?\d+",
    "mem": r"\d+[KMGT]?",
    "exclusive": None,
    "time": r"(\d+-)?\d{1,2}:\d{2}:\d{2}",
    "signal": r"(B:)?[A-Z0-9]+(@\d+)?",
    "requeue": None,
    "open-mode": r"append|truncate",
    "output": r"\S+",
    "partition": r"\S+",
    "account": r"\S+",
}


def check_sbatch(text):
    problems = []
    if not text.startswith("#!/"):
        problems.append("no interpreter in the first line")
    begun = False
    for line in text.splitlines():
        begun = begun or bool(line.strip() and not line.startswith("#"))
        if not line.startswith("#SBATCH"):
            continue
        name, equals, value = line.removeprefix("#SBATCH").strip().removeprefix("--").partition("=")
        if begun:
            problems.append(f"{name}: after the first command, where sbatch does not read it")
        elif name not in SBATCH:
            problems.append(f"{name}: no option of sbatch")
        elif (SBATCH[name] is None) != (not equals) or (equals and not re.fullmatch(SBATCH[name], value)):
            problems.append(f"{name}: expected {SBATCH[name] or 'no value'}; got {value!r}")
    parsed = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    joined = text.replace("\\\n", " ")
    flags = [f for line in re.findall(r"\bray start (.*)", joined) for f in re.findall(r"(--[\w-]+)", line)]
    problems += [f"no option of ray start: {flag}" for flag in flags if flag not in ray_start_options()]
    return problems + ([f"bash: {parsed.stderr.strip()}"] if parsed.returncode else [])


DOCKER = ("FROM", "RUN", "COPY", "ENV", "ARG", "USER", "WORKDIR", "CMD", "ENTRYPOINT", "EXPOSE", "LABEL", "SHELL")


def check_dockerfile(text):
    lines = re.sub(r"\\\n", " ", re.sub(r"(?m)^\s*#.*\n", "", text)).splitlines()
    instructions = [
        (word.upper(), rest.strip()) for word, _, rest in (line.strip().partition(" ") for line in lines) if word
    ]
    problems = [f"no instruction: {word}" for word, _ in instructions if word not in DOCKER]
    stages, users, last = {}, {}, ""
    for word, rest in instructions:
        if word == "FROM":
            base, _, last = rest.partition(" AS ")
            users[last] = users.get(base, "root")
            if base not in stages and (":" not in base or base.endswith(":latest")):
                problems.append(f"{base}: neither a stage nor an image with a version")
            stages[last] = base
        elif word == "USER":
            users[last] = rest
        elif word == "COPY":
            *sources, _ = [part for part in rest.split() if not part.startswith("--")]
            problems += [f"COPY: no {source}" for source in sources if not (ROOT / source).exists()]
        elif word == "RUN":
            checked = subprocess.run(["bash", "-n"], input=rest, capture_output=True, text=True, check=False)
            problems += [f"RUN: {checked.stderr.strip()}"] if checked.returncode else []
            problems += [f"RUN: no {name}" for name in re.findall(r"\blaunch/\S+", rest) if not (ROOT / name).exists()]
        elif word in ("CMD", "ENTRYPOINT") and not isinstance(yaml.safe_load(rest), list):
            problems.append(f"{word}: not a list")
    if list(stages) != ["base", "cpu", "gpu"]:
        problems.append(f"stages: {', '.join(stages)}")
    return problems + [f"{stage}: runs as root" for stage in ("cpu", "gpu") if users.get(stage, "root") == "root"]
