"""Can this machine run unirl? Looks, changes nothing; every finding that stops a run comes with its fix."""

import json
import os
import platform
import re
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from unirl.config import RlConfig

PACKAGES = ("torch", "vllm", "ray", "deepspeed", "transformers", "open_clip_torch", "omegaconf", "typer", "math-verify")
LAB_CHECKPOINT = Path(__file__).parents[1] / "lab" / "checkpoints" / "janus"
RAY_PORT = 6379
HEAD_DIMS_ON_CPU = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Attention head sizes for which vLLM has a CPU kernel; others fail at the first step."""
MIN_DISK_GIB = 2.0
MIN_MEMORY_GIB = 4.0
GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing looked at."""

    name: str
    state: Literal["ok", "warning", "problem"] = "ok"
    value: str
    fix: str = ""


def main(*, as_json: bool) -> int:
    """Print what was found.

    Returns:
        0, or 3 when something would stop a run.
    """
    findings = examine()
    text = (
        json.dumps([asdict(finding) for finding in findings], indent=2) if as_json else "\n".join(map(render, findings))
    )
    sys.stdout.write(f"{text}\n")
    return 3 if any(finding.state == "problem" for finding in findings) else 0


def render(finding: Finding) -> str:
    """One finding as a line, its fix below it."""
    mark = {"ok": "ok     ", "warning": "warning", "problem": "PROBLEM"}[finding.state]
    return f"{mark} {finding.name}: {finding.value}" + (f"\n        fix: {finding.fix}" if finding.fix else "")


def examine() -> list[Finding]:
    """All findings, in the order of a set-up: interpreter, packages, hardware, Ray, room."""
    checks: tuple[Callable[[], list[Finding]], ...] = (
        check_python, check_owner, check_versions, check_torch, check_torchvision, check_lab, check_ray, check_room,
    )  # fmt: skip
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += check()
        except Exception as error:  # noqa: BLE001 - a broken package must not hide the other findings
            name, value = check.__name__.removeprefix("check_"), f"{type(error).__name__}: {error}"
            findings.append(Finding(name=name, state="problem", value=value, fix="run launch/setup.sh again"))
    return findings


def check_python() -> list[Finding]:
    """The interpreter is one that the locks are made for."""
    good = (3, 11) <= sys.version_info < (3, 14)
    value = f"{platform.python_version()} at {sys.executable}"
    fix = "" if good else "install Python 3.11 to 3.13 and run launch/setup.sh"
    return [Finding(name="python", state="ok" if good else "problem", value=value, fix=fix)]


def check_owner() -> list[Finding]:
    """Only one installed distribution provides the package `unirl`; others of that name exist."""
    owners = sorted(set(packages_distributions().get("unirl", [])))
    if owners == ["unirl-posttrain"]:
        return [Finding(name="owner of unirl", value=f"unirl-posttrain {version('unirl-posttrain')}")]
    value = ", ".join(owners) or "no distribution"
    others = " ".join(owner for owner in owners if owner != "unirl-posttrain")
    fix = f"pip uninstall {others}; then launch/setup.sh" if others else "run launch/setup.sh"
    return [Finding(name="owner of unirl", state="problem", value=value, fix=fix)]


def check_versions(packages: tuple[str, ...] = PACKAGES) -> list[Finding]:
    """Every package that a run imports is installed."""
    findings: list[Finding] = []
    for name in packages:
        try:
            findings.append(Finding(name=name, value=version(vllm_distribution() if name == "vllm" else name)))
        except PackageNotFoundError:
            findings.append(Finding(name=name, state="problem", value="not installed", fix="run launch/setup.sh"))
    return findings


def vllm_distribution() -> str:
    """The CPU build of vLLM is a distribution of another name."""
    return next(iter(packages_distributions().get("vllm", [])), "vllm")


def check_torch() -> list[Finding]:
    """The build of torch and what it can see."""
    import torch

    count = torch.cuda.device_count()
    build = (
        f"{torch.__version__}, CUDA {torch.version.cuda}" if torch.version.cuda else f"{torch.__version__}, CPU only"
    )
    devices = [f"{torch.cuda.get_device_name(i)}, {torch.cuda.mem_get_info(i)[1] / GIB:.0f} GiB" for i in range(count)]
    findings = [
        Finding(name="torch build", value=build),
        Finding(name="GPUs", value="; ".join(devices) or "none; the embedded lab needs none"),
    ]
    if shutil.which("nvidia-smi") and not count:
        fix = "run launch/setup.sh --gpu" if not torch.version.cuda else "check the driver with nvidia-smi"
        findings[1] = Finding(name="GPUs", state="warning", value="present, but torch sees none", fix=fix)
    return findings


def check_torchvision() -> list[Finding]:
    """Operators of torchvision: "native" from its own library, "declared" by our hook, or "absent"."""
    try:
        import torch
        import torchvision
    except (ImportError, RuntimeError) as error:
        fix = "run launch/setup.sh, which installs the start-up hook"
        return [Finding(name="torchvision", state="problem", value=f"absent: {error}", fix=fix)]
    state = "native" if hasattr(torch.ops.torchvision, "roi_align") else "declared"  # the hook declares only nms, qnms
    detail = f"{torchvision.__version__}, operators {state}"
    if state == "declared" and torch.version.cuda:
        fix = "reinstall torch and torchvision together: launch/setup.sh --gpu"
        return [Finding(name="torchvision", state="warning", value=detail, fix=fix)]
    return [Finding(name="torchvision", value=detail)]


def check_lab(checkpoint: Path = LAB_CHECKPOINT) -> list[Finding]:
    """The tiny checkpoint is there, and vLLM has a CPU kernel for its attention heads."""
    file = checkpoint / "config.json"
    if not file.is_file():
        fix = "reinstall unirl from a complete checkout, or make it with `unirl lab pretrain`"
        return [Finding(name="lab checkpoint", state="problem", value=f"no {file}", fix=fix)]
    text = json.loads(file.read_text())["text_config"]
    head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    good = head_dim in HEAD_DIMS_ON_CPU
    fix = "" if good else f"use one of {', '.join(map(str, HEAD_DIMS_ON_CPU))}"
    return [Finding(name="lab checkpoint", state="ok" if good else "problem", value=f"head_dim {head_dim}", fix=fix)]


def check_ray() -> list[Finding]:
    """Where Ray would run, whether a token is at hand, whether its port is free."""
    address = os.environ.get("RAY_ADDRESS")
    token = os.environ.get("RAY_AUTH_TOKEN") or (Path.home() / ".ray" / "auth_token").is_file()
    findings = [Finding(name="Ray cluster", value=address or "none given; a run starts its own on this machine")]
    if address and not token and os.environ.get("RAY_AUTH_MODE") != "disabled":
        fix = "set RAY_AUTH_TOKEN, or put the cluster's token into ~/.ray/auth_token"
        findings.append(Finding(name="Ray token", state="warning", value="none", fix=fix))
    elif address:
        findings.append(Finding(name="Ray token", value="present" if token else "not needed, RAY_AUTH_MODE=disabled"))
    with socket.socket() as probe:
        in_use = probe.connect_ex(("127.0.0.1", RAY_PORT)) == 0
    state = f"port {RAY_PORT} in use: a Ray cluster may already run here" if in_use else f"port {RAY_PORT} free"
    return [*findings, Finding(name="ports", value=state)]


def check_room(folder: Path | None = None) -> list[Finding]:
    """Disk, memory and shared memory are enough for a lab run."""
    folder = folder or Path.cwd()
    disk = shutil.disk_usage(folder).free / GIB
    findings = [_enough("disk", disk, MIN_DISK_GIB, f"free space under {folder}, or choose another --run-dir")]
    memory = available_memory_gib()
    if memory is not None:
        findings.append(_enough("memory", memory, MIN_MEMORY_GIB, "close programs, or use a larger machine"))
    shared = Path("/dev/shm")
    if shared.is_dir():
        needed = RlConfig().cluster.object_store_gib
        fix = "start the container with a larger --shm-size, or lower cluster.object_store_gib"
        findings.append(_enough("shared memory", shutil.disk_usage(shared).free / GIB, needed, fix))
    return findings


def available_memory_gib() -> float | None:
    """Memory that can be had without swapping, in GiB; None where the system does not say."""
    if find_spec("psutil") is None:
        return None
    import psutil

    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    caps = [psutil.virtual_memory().available] + ([int(text)] if re.fullmatch(r"\d+", text) else [])
    return min(caps) / GIB


def _enough(name: str, have: float, need: float, fix: str) -> Finding:
    good = have >= need
    value = f"{have:.1f} GiB free" + ("" if good else f", {need:g} GiB needed")
    return Finding(name=name, state="ok" if good else "problem", value=value, fix="" if good else fix)
